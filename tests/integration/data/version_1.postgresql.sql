-- The tables as retrykit 0.1.0 made them.

CREATE TABLE rk_schema (
  name VARCHAR(50) NOT NULL,
  value BIGINT NOT NULL,
  PRIMARY KEY (name)
);

COMMENT ON COLUMN rk_schema.name IS 'version, or contexts: how many histories there are (SQLite)';

INSERT INTO rk_schema (name, value) VALUES ('version', 1);

INSERT INTO rk_schema (name, value) VALUES ('contexts', 0);

CREATE TABLE rk_context (
  id BIGSERIAL NOT NULL,
  context_key VARCHAR(600) COLLATE "C" NOT NULL,
  revision INTEGER NOT NULL,
  name VARCHAR(255),
  retry_count INTEGER,
  last_failed_at DOUBLE PRECISION,
  not_before DOUBLE PRECISION,
  veto TEXT,
  exhausted BOOLEAN,
  completed_at DOUBLE PRECISION,
  expires_at DOUBLE PRECISION,
  updated_at DOUBLE PRECISION NOT NULL,
  snapshot TEXT NOT NULL,
  PRIMARY KEY (id),
  UNIQUE (context_key)
);

CREATE INDEX ix_rk_context_expires_at ON rk_context (expires_at) WHERE expires_at IS NOT NULL;

CREATE INDEX ix_rk_context_updated_at ON rk_context (updated_at) WHERE completed_at IS NULL;

COMMENT ON COLUMN rk_context.id IS 'never given out twice';

COMMENT ON COLUMN rk_context.context_key IS 'canonical text of template name and key';

COMMENT ON COLUMN rk_context.revision IS 'grows with every save';

COMMENT ON COLUMN rk_context.name IS 'of the template';

COMMENT ON COLUMN rk_context.last_failed_at IS 'seconds since the epoch, as all times here';

COMMENT ON COLUMN rk_context.completed_at IS 'not null: a completion mark, no history';

COMMENT ON COLUMN rk_context.expires_at IS 'may be dropped from then on';

COMMENT ON COLUMN rk_context.snapshot IS 'JSON; the columns above repeat parts of it for people';

CREATE TABLE rk_parked (
  id BIGSERIAL NOT NULL,
  name VARCHAR(255) NOT NULL,
  context_key VARCHAR(600) COLLATE "C",
  message_id TEXT,
  destination TEXT,
  payload BYTEA NOT NULL,
  content_type TEXT,
  headers TEXT NOT NULL,
  reason TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  errors TEXT NOT NULL,
  first_failed_at DOUBLE PRECISION,
  last_failed_at DOUBLE PRECISION,
  parked_at DOUBLE PRECISION NOT NULL,
  PRIMARY KEY (id)
);

CREATE INDEX ix_rk_parked_name ON rk_parked (name, id);

COMMENT ON COLUMN rk_parked.name IS 'of the template';

COMMENT ON COLUMN rk_parked.context_key IS 'the history that it had';

COMMENT ON COLUMN rk_parked.destination IS 'where it came from, and goes back to';

COMMENT ON COLUMN rk_parked.payload IS 'as it was delivered, byte for byte';

COMMENT ON COLUMN rk_parked.headers IS 'JSON object';

COMMENT ON COLUMN rk_parked.errors IS 'JSON array, oldest first';
