"""Check the store: whether it can be used, and the settings of its server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from celery_idempotent.doctor.broker_checks import evicts
from celery_idempotent.doctor.facts import Facts
from celery_idempotent.doctor.finding import Finding

__all__ = ["check_servers", "check_store"]


def check_store(facts: Facts) -> Iterator[Finding]:
    """Yield what keeps the store from being used as it is set up."""
    store, app = facts.store, facts.app
    if store.away is not None:
        yield Finding("store-unreachable", store.away, "start it, or correct idempotent_store")
    if store.refused is not None:
        yield Finding(
            "store-refused",
            store.refused,
            "correct what it names; the page of each store lists the rights that it needs",
        )
    if store.schema is not None:
        yield Finding("schema", store.schema, "run `celery -A proj idempotent init`, or your migration")
    if store.outstanding:
        yield Finding(
            "schema-behind",
            f"the table is of an older version, or lacks indexes; outstanding: {', '.join(store.outstanding)}",
            "run `celery -A proj idempotent init`, or your migration, at any time",
        )
    if app.atomic_refused is not None:
        yield Finding(
            "atomic-store",
            app.atomic_refused,
            "idempotent_store = a PostgreSQL, MySQL, MariaDB or SQLite; or atomic=False",
            facts.names(lambda task: task.atomic),
        )
    if store.relative_file is not None:
        yield Finding(
            "store-relative-file",
            f"idempotent_store names a file of the working directory, which is {store.relative_file} here",
            f"idempotent_store = {f'sqlite:///{store.relative_file}'!r}, or a database server",
        )
    if (store.configuration or {}).get("file") and not facts.broker.local:
        yield Finding(
            "store-local-file",
            f"{store.name} is a file on this host, but other hosts can reach the broker at {facts.broker.url}",
            "idempotent_store = a database server, unless all workers and callers are on this host",
        )


def check_servers(facts: Facts) -> Iterator[Finding]:
    """Yield settings of the store's server that endanger rows. Each name belongs to only one kind of server."""
    settings = facts.store.configuration
    if settings is None:
        return
    if not settings and facts.store.there:
        yield Finding(
            "store-configuration",
            f"this account may not read the settings of {facts.store.name}",
            "let the account read them: for Redis +config|get or +info",
        )
    if settings.get("file") == "":
        yield Finding(
            "store-in-memory",
            f"{facts.store.name} is in the memory of one process",
            "idempotent_store = a file, or a server",
        )
    yield from _redis(facts, settings)
    for name, bad, good in (
        ("fsync", {"off"}, "fsync = on"),
        ("synchronous_commit", {"off"}, "synchronous_commit = on"),
        ("innodb_flush_log_at_trx_commit", {"0", "2"}, "innodb_flush_log_at_trx_commit = 1"),
        ("synchronous", {"0", "1"}, "PRAGMA synchronous = FULL"),
        (
            "appendfsync",
            {"no"} if settings.get("appendonly") == "yes" else set[str](),
            "appendfsync everysec, or always",
        ),
    ):
        if settings.get(name) in bad:
            yield Finding("store-durability", f"{name} is {settings[name]} at {facts.store.name}", good)
    for name in ("default_transaction_read_only", "read_only"):
        if settings.get(name, "").lower() in {"on", "1"}:
            yield Finding(
                "store-read-only", f"{name} is on at {facts.store.name}", "idempotent_store = the primary server"
            )
    if settings.get("pooler") and settings.get("prepare_threshold"):
        yield Finding(
            "pooler-prepares",
            f"the engine of {facts.store.name} prepares named statements after {settings['prepare_threshold']} uses, but there is a pooler",
            'create_engine(url, connect_args={"prepare_threshold": None})',
        )
    yield from _isolation(facts, settings)


def _redis(facts: Facts, settings: Mapping[str, str]) -> Iterator[Finding]:
    for name, value in settings.items():  # for a cluster there may be several, with the node after the name
        setting, _, node = name.partition(" ")
        if setting == "appendonly" and value != "yes":
            yield Finding(
                "redis-appendonly",
                f"appendonly is {value} at {facts.store.name}{node and f' {node}'}",
                "appendonly yes, by CONFIG SET and in redis.conf",
            )
        if setting == "maxmemory-policy" and evicts(
            value, settings.get(f"maxmemory {node}".strip(), settings.get("maxmemory"))
        ):
            yield Finding(
                "redis-eviction",
                f"maxmemory-policy is {value} at {facts.store.name}{node and f' {node}'}",
                "maxmemory-policy noeviction, by CONFIG SET and in redis.conf",
            )


def _isolation(facts: Facts, settings: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("transaction_isolation", "tx_isolation", "default_transaction_isolation"):
        if name not in settings:
            continue
        level = settings[name].upper().replace("-", " ")
        if level == "READ UNCOMMITTED" and name != "default_transaction_isolation":  # PostgreSQL has no dirty reads
            yield Finding(
                "isolation-dirty",
                f"{name} is {settings[name]} at {facts.store.name}",
                f"{name} = READ-COMMITTED or REPEATABLE-READ",
            )
        own = (facts.app.isolation_level or level).upper().replace("_", " ")
        fixed = name == "default_transaction_isolation" or settings.get("innodb_snapshot_isolation", "").upper() in {
            "ON",
            "1",
        }
        atomic = facts.names(lambda task: task.atomic)
        if atomic and fixed and own in {"REPEATABLE READ", "SERIALIZABLE"}:
            yield Finding(
                "isolation-renewal",
                f"atomic tasks run at {own} at {facts.store.name}, where a transaction keeps its first snapshot",
                'QueueLog(app, isolation_level="READ COMMITTED"); or a lease of more than three times the body\'s duration',
                atomic,
            )
