CREATE TABLE queue_log (
    message_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
    task_name VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
    status VARCHAR(16) NOT NULL,
    processed_status VARCHAR(16),
    created_timestamp DATETIME(6) NOT NULL,
    processed_timestamp DATETIME(6),
    task_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin NOT NULL,
    queue VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin,
    fingerprint VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin,
    attempt INTEGER NOT NULL,
    token BIGINT NOT NULL,
    worker VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin,
    lease_expires_at DATETIME(6),
    available_at DATETIME(6),
    published_at DATETIME(6),
    expires_at DATETIME(6),
    duplicates INTEGER NOT NULL,
    takeovers INTEGER NOT NULL,
    ran_task_id VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_nopad_bin,
    message LONGBLOB,
    result LONGBLOB,
    steps LONGBLOB,
    error LONGTEXT CHARACTER SET utf8mb4,
    PRIMARY KEY (message_id, task_name)
)ENGINE=InnoDB CHARSET=utf8mb4 ROW_FORMAT=DYNAMIC;

CREATE INDEX queue_log_open ON queue_log (status, queue, published_at);

CREATE INDEX queue_log_processed ON queue_log (processed_timestamp, published_at);
