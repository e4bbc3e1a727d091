"""The Redis store: the queue log in Redis, by one Lua script per verb."""

from __future__ import annotations

from celery_idempotent.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
