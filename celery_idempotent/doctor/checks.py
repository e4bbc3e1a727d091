"""The checks: pure functions of facts, in groups for the app, its broker and its store. They know neither Celery nor a server."""

# Longer than most: one function for each group of findings, and nothing else.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

from celery_idempotent.core.decision import AVAILABLE_GRACE, MAX_TAKEOVERS
from celery_idempotent.doctor.facts import Facts, TaskFacts
from celery_idempotent.doctor.finding import Finding

__all__ = ["findings"]

#: Seconds by which synchronized clocks differ at most.
_IN_STEP = 2.0

#: Seconds of the longest hold of a copy on RabbitMQ: half of its usual consumer_timeout.
_LONGEST_HOLD = 900.0

#: Recovery passes that may be late or fail before recovery is presumed not to run; and the least number of seconds for that.
_STEPS_IN_VAIN = 5
_AT_LEAST = 120.0

#: Seconds past its retention after which a row counts as not purged, since a long log is purged bit by bit.
_PURGED_WITHIN = 86400.0


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting that is too low: its name and its value."""

    name: str
    now: str

    def above(self, seconds: float) -> str:
        return f"{self.name} of more than {seconds:g} s (now {self.now})"


def findings(facts: Facts) -> list[Finding]:
    """Return all findings for these facts, errors first."""
    found = [finding for check in (_app, _timeouts, _queues, _store, _servers, _condition) for finding in check(facts)]
    return sorted(found, key=lambda finding: finding.severity)


# -- the app -----------------------------------------------------------------------------------------------------------


def _app(facts: Facts) -> Iterator[Finding]:
    app = facts.app
    for wrong in app.wrong:
        yield Finding("settings", wrong, "correct it as the message says")
    if not app.enabled:
        yield Finding(
            "guard-off",
            "idempotent_enabled is False: the guard is off for all tasks",
            "idempotent_enabled = True, or remove the setting, as soon as the incident or the load test is over",
        )
    if not app.tasks and not app.wrong:
        yield Finding(
            "no-guarded-tasks",
            "the app has no task with base=IdempotentTask, or does not import their modules",
            "give the tasks base=IdempotentTask, and add their modules to `imports` or `include`",
        )
    if app.without_base:
        yield Finding(
            "base-missing",
            "these tasks have options of the guard, and not its base class",
            "give them base=IdempotentTask; or, if the attributes are your own, ignore this finding",
            app.without_base,
        )
    if replaced := _names(facts, lambda task: task.past_the_guard):
        yield Finding(
            "past-the-guard",
            "something replaced __call__ and before_start of these tasks' classes after they were bound to the app",
            "make it call the methods that it replaces; or override them in a class, and use that as the task's base",
            replaced,
        )
    if lost := _names(facts, lambda task: task.told_lost):
        yield Finding(
            "late-ack-worker-lost",
            "acks_late without reject_on_worker_lost",
            "task_reject_on_worker_lost = True, or reject_on_worker_lost=True on the task",
            lost,
        )
    if stays := _names(facts, lambda task: task.failure_stays):
        yield Finding(
            "early-ack-failure",
            "early acknowledgement, and an id that later calls have too",
            'acks_late=True and reject_on_worker_lost=True on the task, so that the message runs again; or on_abandoned="fail", if it must not',
            stays,
        )
    awaited = _names(facts, lambda task: task.awaited)
    if not app.result_backend and awaited:
        yield Finding(
            "no-result-backend",
            "there is no result backend, but these tasks do not ignore their results",
            "result_backend = ...; or task_ignore_result = True, or ignore_result=True on the task, if no caller waits",
            awaited,
        )
    if app.result_backend and (tracked := _names(facts, lambda task: task.track_started and task.awaited)):
        yield Finding("track-started", "track_started is on", "task_track_started = False", tracked)
    if app.result_backend and awaited and app.result_expires is not None and app.result_expires < app.retention:
        yield Finding(
            "result-expires",
            f"results are kept for {app.result_expires:g} s, and rows for {app.retention:g} s",
            f"result_expires = {app.retention:g}; or a shorter idempotent_retention; or ignore this finding, if no caller waits that long",
        )
    if app.recovery_interval == 0 and app.tasks:
        early = _names(facts, lambda task: not task.acks_late)
        yield Finding(
            "recovery-off",
            "idempotent_recovery_interval is 0, so workers do not recover"
            + ("; with early acknowledgement the broker has no copy of what runs" if early else ""),
            "idempotent_recovery_interval = 30; or run `celery -A proj idempotent recover --watch`, and ignore this finding",
            early,
        )


# -- the broker --------------------------------------------------------------------------------------------------------


def _timeouts(facts: Facts) -> Iterator[Finding]:
    broker, app = facts.broker, facts.app
    if broker.away is not None:
        yield Finding("broker-unreachable", f"{broker.url}: {broker.away}", "start it, or correct broker_url")
    last_due = _last_due(facts)
    if (visible := broker.visibility_timeout) is not None:
        setting = _Setting('broker_transport_options = {"visibility_timeout": ...}', f"{visible:g} s")
        if leases := _names(facts, lambda task: task.lease >= visible):
            longest = max(task.lease for task in app.tasks)
            yield Finding(
                "visibility-lease",
                f"leases of up to {longest:g} s, but a visibility timeout of {visible:g} s",
                f"{setting.above(longest)}; or a shorter idempotent_lease",
                leases,
            )
        yield from _long("visibility-time-limit", facts, visible, "a visibility timeout", setting)
        yield from _late("visibility-eta", facts, visible, last_due, setting)
        yield from _forgotten_early(facts, visible, f"the visibility timeout, {visible:g} s")
    if (patience := broker.consumer_timeout) is not None:
        setting = _Setting("consumer_timeout of RabbitMQ", f"{patience:g} s, {broker.consumer_timeout_of}")
        yield from _long("consumer-timeout-time-limit", facts, patience, "a consumer timeout", setting)
        if not broker.delays:
            if leases := _names(facts, lambda task: min(task.lease, _LONGEST_HOLD) >= patience):
                longest = max(min(task.lease, _LONGEST_HOLD) for task in app.tasks)
                yield Finding(
                    "consumer-timeout-lease",
                    f"copies are held for up to {longest:g} s, but the consumer timeout is {patience:g} s",
                    f"{setting.above(longest)}; or a shorter idempotent_lease",
                    leases,
                )
            yield from _late("consumer-timeout-eta", facts, patience, last_due, setting)
        yield from _forgotten_early(facts, patience, f"the consumer timeout, {patience:g} s")


def _long(code: str, facts: Facts, patience: float, whose: str, setting: _Setting) -> Iterator[Finding]:
    """Yield bodies that may run for longer than the broker waits."""
    if long := _names(facts, lambda task: task.acks_late and (task.time_limit or 0.0) >= patience):
        longest = max(task.time_limit or 0.0 for task in facts.app.tasks if task.acks_late)
        yield Finding(
            code,
            f"acks_late with time limits of up to {longest:g} s, but {whose} of {patience:g} s",
            f"{setting.above(longest)}; or shorter time limits",
            long,
        )


def _late(code: str, facts: Facts, patience: float, last_due: float, setting: _Setting) -> Iterator[Finding]:
    """Yield messages that wait in a worker for longer than the broker waits."""
    delayed = _names(facts, lambda task: task.longest_delay >= patience)
    longest = max([last_due, *(task.longest_delay for task in facts.app.tasks)])
    if longest >= patience:
        whose = "a message waits" if last_due >= patience else "retries are delayed by up to"
        yield Finding(
            code,
            f"{whose} {longest:g} s, but the broker waits {patience:g} s for the worker that keeps the message",
            f"{setting.above(longest)}; or shorter countdowns",
            delayed,
        )


def _forgotten_early(facts: Facts, patience: float, name: str) -> Iterator[Finding]:
    """Yield rows that are purged, or ids that are free again, while the broker may still deliver a copy."""
    if facts.app.retention <= patience:
        yield Finding(
            "retention-short",
            f"rows are kept for {facts.app.retention:g} s, which is no longer than {name}",
            f"idempotent_retention = ..., of more than {patience:g} s",
        )
    if short := _names(facts, lambda task: task.unique_for is not None and task.unique_for <= patience):
        shortest = min(task.unique_for for task in facts.app.tasks if task.unique_for is not None)
        yield Finding(
            "unique-for-short",
            f"ids are free again after {shortest:g} s, which is no longer than {name}",
            f"unique_for=..., of more than {patience:g} s; but of less than the interval for a task of beat: if that is shorter, ignore this finding",
            short,
        )


def _queues(facts: Facts) -> Iterator[Finding]:
    broker = facts.broker
    # The first delivery, and a takeover after each loss of a worker.
    wanted = MAX_TAKEOVERS + 1
    for queue in broker.queues:
        if queue.quorum and queue.delivery_limit is not None and 0 <= queue.delivery_limit < wanted:
            yield Finding(
                "delivery-limit",
                f"the quorum queue {queue.name} has a delivery limit of {queue.delivery_limit}, but the guard needs {wanted} deliveries",
                f'queue_arguments={{"x-delivery-limit": ...}} of the queue, {wanted} or more',
            )
    policy = broker.configuration.get("maxmemory-policy", "")
    if _evicts(policy, broker.configuration.get("maxmemory")):
        yield Finding("broker-eviction", f"the broker's maxmemory-policy is {policy}", "maxmemory-policy noeviction")


# -- the store ---------------------------------------------------------------------------------------------------------


def _store(facts: Facts) -> Iterator[Finding]:
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
            _names(facts, lambda task: task.atomic),
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


def _servers(facts: Facts) -> Iterator[Finding]:
    """Check the settings of the store's server. Each name belongs to only one kind of server."""
    told = facts.store.configuration
    if told is None:
        return
    if not told and facts.store.there:
        yield Finding(
            "store-configuration",
            f"this account may not read the settings of {facts.store.name}",
            "let the account read them: for Redis +config|get or +info",
        )
    if told.get("file") == "":
        yield Finding(
            "store-in-memory",
            f"{facts.store.name} is in the memory of one process",
            "idempotent_store = a file, or a server",
        )
    yield from _redis(facts, told)
    for name, bad, good in (
        ("fsync", {"off"}, "fsync = on"),
        ("synchronous_commit", {"off"}, "synchronous_commit = on"),
        ("innodb_flush_log_at_trx_commit", {"0", "2"}, "innodb_flush_log_at_trx_commit = 1"),
        ("synchronous", {"0", "1"}, "PRAGMA synchronous = FULL"),
        ("appendfsync", {"no"} if told.get("appendonly") == "yes" else set[str](), "appendfsync everysec, or always"),
    ):
        if told.get(name) in bad:
            yield Finding("store-durability", f"{name} is {told[name]} at {facts.store.name}", good)
    for name in ("default_transaction_read_only", "read_only"):
        if told.get(name, "").lower() in {"on", "1"}:
            yield Finding(
                "store-read-only", f"{name} is on at {facts.store.name}", "idempotent_store = the primary server"
            )
    if told.get("pooler") and told.get("prepare_threshold"):
        yield Finding(
            "pooler-prepares",
            f"the engine of {facts.store.name} prepares named statements after {told['prepare_threshold']} uses, but there is a pooler",
            'create_engine(url, connect_args={"prepare_threshold": None})',
        )
    yield from _isolation(facts, told)


def _redis(facts: Facts, told: Mapping[str, str]) -> Iterator[Finding]:
    for name, value in told.items():  # for a cluster there may be several, with the node after the name
        setting, _, node = name.partition(" ")
        if setting == "appendonly" and value != "yes":
            yield Finding(
                "redis-appendonly",
                f"appendonly is {value} at {facts.store.name}{node and f' {node}'}",
                "appendonly yes, by CONFIG SET and in redis.conf",
            )
        if setting == "maxmemory-policy" and _evicts(
            value, told.get(f"maxmemory {node}".strip(), told.get("maxmemory"))
        ):
            yield Finding(
                "redis-eviction",
                f"maxmemory-policy is {value} at {facts.store.name}{node and f' {node}'}",
                "maxmemory-policy noeviction, by CONFIG SET and in redis.conf",
            )


def _evicts(policy: str, maxmemory: str | None) -> bool:
    """Return whether a Redis deletes keys that have no time to live. It never does without a limit on its memory."""
    return policy.startswith("allkeys") and maxmemory != "0"


def _isolation(facts: Facts, told: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("transaction_isolation", "tx_isolation", "default_transaction_isolation"):
        if name not in told:
            continue
        level = told[name].upper().replace("-", " ")
        if level == "READ UNCOMMITTED" and name != "default_transaction_isolation":  # PostgreSQL has no dirty reads
            yield Finding(
                "isolation-dirty",
                f"{name} is {told[name]} at {facts.store.name}",
                f"{name} = READ-COMMITTED or REPEATABLE-READ",
            )
        own = (facts.app.isolation_level or level).upper().replace("_", " ")
        fixed = name == "default_transaction_isolation" or told.get("innodb_snapshot_isolation", "").upper() in {
            "ON",
            "1",
        }
        atomic = _names(facts, lambda task: task.atomic)
        if atomic and fixed and own in {"REPEATABLE READ", "SERIALIZABLE"}:
            yield Finding(
                "isolation-renewal",
                f"atomic tasks run at {own} at {facts.store.name}, where a transaction keeps its first snapshot",
                'QueueLog(app, isolation_level="READ COMMITTED"); or a lease of more than three times the body\'s duration',
                atomic,
            )


def _condition(facts: Facts) -> Iterator[Finding]:
    """Check the rows and the clock."""
    store, app = facts.store, facts.app
    condition = store.condition
    if condition is None:
        return
    now = condition.read_at
    if store.local_clock is not None:
        skew = (store.local_clock - now).total_seconds()
        if abs(skew) > _IN_STEP + store.clock_error:
            yield Finding(
                "clock-skew",
                f"this host's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} that of {store.name}"
                + (
                    f", more than the {AVAILABLE_GRACE:g} s of grace for a retry" if abs(skew) > AVAILABLE_GRACE else ""
                ),
                "synchronize the clocks of all hosts, by NTP",
            )
    yield from _left_waiting(facts)
    patience = timedelta(seconds=max(_AT_LEAST, _STEPS_IN_VAIN * app.recovery_interval))
    overdue = {
        "a message whose owner's lease ran out at {} was not published again": condition.lapsed_since,
        "a message recorded at {} was not published": condition.unsent_since,
    }
    for what, since in overdue.items():
        if since is not None and now - since > patience:
            yield Finding(
                "recovery-behind",
                what.format(since.isoformat(sep=" ", timespec="seconds")),
                "idempotent_recovery_interval = 30 in a running worker, or `celery -A proj idempotent recover`; its log says what goes wrong",
            )
    done = condition.done_since
    kept = max(app.retention, app.failure_retention)
    if done is not None and (now - done).total_seconds() > kept + _PURGED_WITHIN:
        yield Finding(
            "purge-behind",
            f"a row that was done at {done.isoformat(sep=' ', timespec='seconds')} is still there, but retention is {kept:g} s",
            "idempotent_recovery_interval = 30 in a running worker, or `celery -A proj idempotent purge`",
        )


def _left_waiting(facts: Facts) -> Iterator[Finding]:
    """Yield waiting messages whose tasks are not guarded in this app."""
    app, guarded = facts.app, {task.name for task in facts.app.tasks} - set(facts.app.unguarded)
    waiting = [name for name in facts.store.waiting if name not in guarded]
    if unguarded := tuple(name for name in waiting if name in app.unguarded):
        yield Finding(
            "waiting-unguarded",
            "recorded messages are waiting; their tasks have no base=IdempotentTask here, or their guard is off (idempotent=False, idempotent_enabled)",
            "let them end before; what has run meanwhile: `celery -A proj idempotent forget --task NAME --status pending --force`; "
            "what the broker has lost: `... recover --task NAME --lost-after 0`",
            unguarded,
        )
    if doubted := tuple(name for name in facts.store.doubted if name in guarded):
        yield Finding(
            "waiting-doubted",
            "messages that were recorded wait since the guard was off; those that the broker still has end as they run",
            "what has run: `celery -A proj idempotent forget --task NAME --error 'unguarded*' --force`; "
            "what the broker has lost: `... recover --task NAME --lost-after 0`",
            doubted,
        )
    if unknown := tuple(name for name in waiting if name not in app.unguarded):
        yield Finding(
            "waiting-unknown",
            "recorded messages are waiting for tasks that this app does not have",
            "import their modules; ignore this finding if another app with the same store has them; or `... forget --task NAME --force`",
            unknown,
        )


# -- in common ---------------------------------------------------------------------------------------------------------


def _names(facts: Facts, concerned: Callable[[TaskFacts], bool]) -> tuple[str, ...]:
    return tuple(task.name for task in facts.app.tasks if concerned(task))


def _last_due(facts: Facts) -> float:
    """Return the seconds until the last of the waiting messages is due."""
    condition = facts.store.condition
    if condition is None or condition.last_due is None:
        return 0.0
    return round((condition.last_due - condition.read_at).total_seconds())
