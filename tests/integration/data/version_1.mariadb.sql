-- The tables as retrykit 0.1.0 made them.

CREATE TABLE rk_schema (
  name VARCHAR(50) NOT NULL COMMENT 'version, or contexts: how many histories there are (SQLite)',
  value BIGINT NOT NULL,
  PRIMARY KEY (name)
)ENGINE=InnoDB;

INSERT INTO rk_schema (name, value) VALUES ('version', 1);

INSERT INTO rk_schema (name, value) VALUES ('contexts', 0);

CREATE TABLE rk_context (
  id BIGINT NOT NULL COMMENT 'never given out twice' AUTO_INCREMENT,
  context_key VARCHAR(600) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL COMMENT 'canonical text of template name and key',
  revision INTEGER NOT NULL COMMENT 'grows with every save',
  name VARCHAR(255) COMMENT 'of the template',
  retry_count INTEGER,
  last_failed_at DOUBLE COMMENT 'seconds since the epoch, as all times here',
  not_before DOUBLE,
  veto TEXT,
  exhausted BOOL,
  completed_at DOUBLE COMMENT 'not null: a completion mark, no history',
  expires_at DOUBLE COMMENT 'may be dropped from then on',
  updated_at DOUBLE NOT NULL,
  snapshot LONGTEXT CHARACTER SET utf8mb4 NOT NULL COMMENT 'JSON; the columns above repeat parts of it for people',
  PRIMARY KEY (id),
  UNIQUE (context_key)
)ENGINE=InnoDB;

CREATE INDEX ix_rk_context_expires_at ON rk_context (expires_at);

CREATE INDEX ix_rk_context_updated_at ON rk_context (updated_at);

CREATE TABLE rk_parked (
  id BIGINT NOT NULL AUTO_INCREMENT,
  name VARCHAR(255) NOT NULL COMMENT 'of the template',
  context_key VARCHAR(600) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin COMMENT 'the history that it had',
  message_id TEXT,
  destination TEXT COMMENT 'where it came from, and goes back to',
  payload LONGBLOB NOT NULL COMMENT 'as it was delivered, byte for byte',
  content_type TEXT,
  headers LONGTEXT CHARACTER SET utf8mb4 NOT NULL COMMENT 'JSON object',
  reason TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  errors LONGTEXT CHARACTER SET utf8mb4 NOT NULL COMMENT 'JSON array, oldest first',
  first_failed_at DOUBLE,
  last_failed_at DOUBLE,
  parked_at DOUBLE NOT NULL,
  PRIMARY KEY (id)
)ENGINE=InnoDB;

CREATE INDEX ix_rk_parked_name ON rk_parked (name, id);
