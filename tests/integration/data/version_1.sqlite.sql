-- The tables as retrykit 0.1.0 made them.

CREATE TABLE rk_schema (
  name VARCHAR(50) NOT NULL,
  value BIGINT NOT NULL,
  PRIMARY KEY (name)
);

INSERT INTO rk_schema (name, value) VALUES ('version', 1);

INSERT INTO rk_schema (name, value) VALUES ('contexts', 0);

CREATE TABLE rk_context (
  id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  context_key VARCHAR(600) NOT NULL,
  revision INTEGER NOT NULL,
  name VARCHAR(255),
  retry_count INTEGER,
  last_failed_at DOUBLE,
  not_before DOUBLE,
  veto TEXT,
  exhausted BOOLEAN,
  completed_at DOUBLE,
  expires_at DOUBLE,
  updated_at DOUBLE NOT NULL,
  snapshot TEXT NOT NULL,
  UNIQUE (context_key)
);

CREATE INDEX ix_rk_context_expires_at ON rk_context (expires_at) WHERE expires_at IS NOT NULL;

CREATE INDEX ix_rk_context_updated_at ON rk_context (updated_at) WHERE completed_at IS NULL;

CREATE TRIGGER IF NOT EXISTS rk_context_inserted AFTER INSERT ON rk_context WHEN NEW.completed_at IS NULL
BEGIN UPDATE rk_schema SET value = value + 1 WHERE name = 'contexts'; END;

CREATE TRIGGER IF NOT EXISTS rk_context_deleted AFTER DELETE ON rk_context WHEN OLD.completed_at IS NULL
BEGIN UPDATE rk_schema SET value = value - 1 WHERE name = 'contexts'; END;

CREATE TRIGGER IF NOT EXISTS rk_context_reopened AFTER UPDATE OF completed_at ON rk_context WHEN OLD.completed_at IS NOT NULL AND NEW.completed_at IS NULL
BEGIN UPDATE rk_schema SET value = value + 1 WHERE name = 'contexts'; END;

CREATE TRIGGER IF NOT EXISTS rk_context_completed AFTER UPDATE OF completed_at ON rk_context WHEN OLD.completed_at IS NULL AND NEW.completed_at IS NOT NULL
BEGIN UPDATE rk_schema SET value = value - 1 WHERE name = 'contexts'; END;

CREATE TABLE rk_parked (
  id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
  name VARCHAR(255) NOT NULL,
  context_key VARCHAR(600),
  message_id TEXT,
  destination TEXT,
  payload BLOB NOT NULL,
  content_type TEXT,
  headers TEXT NOT NULL,
  reason TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  errors TEXT NOT NULL,
  first_failed_at DOUBLE,
  last_failed_at DOUBLE,
  parked_at DOUBLE NOT NULL
);

CREATE INDEX ix_rk_parked_name ON rk_parked (name, id);
