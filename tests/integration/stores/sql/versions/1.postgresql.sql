CREATE TABLE queue_log (
    message_id VARCHAR(255) NOT NULL,
    task_name VARCHAR(255) NOT NULL,
    status VARCHAR(16) NOT NULL,
    processed_status VARCHAR(16),
    created_timestamp TIMESTAMP WITH TIME ZONE NOT NULL,
    processed_timestamp TIMESTAMP WITH TIME ZONE,
    task_id VARCHAR(255) NOT NULL,
    queue VARCHAR(255),
    fingerprint VARCHAR(64),
    attempt INTEGER NOT NULL,
    token BIGINT NOT NULL,
    worker VARCHAR(255),
    lease_expires_at TIMESTAMP WITH TIME ZONE,
    available_at TIMESTAMP WITH TIME ZONE,
    published_at TIMESTAMP WITH TIME ZONE,
    expires_at TIMESTAMP WITH TIME ZONE,
    duplicates INTEGER NOT NULL,
    takeovers INTEGER NOT NULL,
    ran_task_id VARCHAR(255),
    message BYTEA,
    result BYTEA,
    steps BYTEA,
    error VARCHAR,
    PRIMARY KEY (message_id, task_name)
);

CREATE INDEX queue_log_open ON queue_log (status, queue, published_at) WHERE processed_timestamp IS NULL;

CREATE INDEX queue_log_processed ON queue_log (processed_timestamp, published_at) WHERE processed_timestamp IS NOT NULL OR published_at IS NULL;
