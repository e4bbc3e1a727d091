"""The checks, each provoked by one fact that is changed in a set-up with which nothing is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from celery_idempotent.core.records import LogHealth
from celery_idempotent.doctor import CODES, Facts, Severity, findings
from celery_idempotent.doctor.facts import AppFacts, BrokerFacts, EntryFacts, QueueFacts, StoreFacts, TaskFacts

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "doctor.md"

TASKS = (
    TaskFacts("late", acks_late=True, time_limit=300.0, lease=60.0, longest_delay=180.0),
    TaskFacts("early", unique_for=86400.0),
)
HEALTHY = Facts(
    AppFacts(tasks=TASKS),
    BrokerFacts(
        url="redis://broker/0",
        visibility_timeout=3600.0,
        configuration={"maxmemory-policy": "noeviction", "maxmemory": "0"},
    ),
    StoreFacts(
        name="a store",
        configuration={"fsync": "on", "synchronous_commit": "on", "default_transaction_isolation": "read committed"},
        health=LogHealth(NOW, last_due=NOW + timedelta(minutes=5)),
        local_clock=NOW,
    ),
)
RABBITMQ = BrokerFacts(
    url="amqp://broker//",
    consumer_timeout=1800.0,
    consumer_timeout_of="its default",
    queues=(QueueFacts("celery", quorum=True, delivery_limit=20),),
)
REDIS = {"appendonly": "yes", "appendfsync": "everysec", "maxmemory": "100", "maxmemory-policy": "noeviction"}
MARIADB = {
    "tx_isolation": "REPEATABLE-READ",
    "innodb_snapshot_isolation": "OFF",
    "innodb_flush_log_at_trx_commit": "1",
    "read_only": "OFF",
}
SQLITE = {"journal_mode": "wal", "synchronous": "2", "file": "/var/log.db"}


def app(**changes: Any) -> Facts:
    return replace(HEALTHY, app=replace(HEALTHY.app, **changes))


def fixed(**changes: Any) -> Facts:
    return app(fixed_entries=(EntryFacts("nightly", "late", "m", **changes),))


def waiting(*names: str, unguarded: tuple[str, ...]) -> Facts:
    facts = app(unguarded=unguarded)
    return replace(facts, store=replace(facts.store, waiting=("early", *names)))


def task(**changes: Any) -> Facts:
    return app(tasks=(replace(TASKS[0], **changes), TASKS[1]))


def broker(**changes: Any) -> Facts:
    return replace(HEALTHY, broker=replace(HEALTHY.broker, **changes))


def rabbitmq(facts: Facts = HEALTHY, **changes: Any) -> Facts:
    return replace(facts, broker=replace(RABBITMQ, **changes))


def store(**changes: Any) -> Facts:
    return replace(HEALTHY, store=replace(HEALTHY.store, **changes))


def health(**changes: Any) -> Facts:
    return store(health=replace(HEALTHY.store.health, **changes))  # type: ignore[type-var]


def told(configuration: dict[str, str], facts: Facts = HEALTHY, /, **changes: str) -> Facts:
    return replace(facts, store=replace(facts.store, configuration={**configuration, **changes}))


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


ATOMIC = task(atomic=True)
LOCAL = replace(HEALTHY, broker=replace(HEALTHY.broker, local=True))


@pytest.mark.parametrize(
    "facts",
    [
        HEALTHY,
        rabbitmq(),
        rabbitmq(delays=True, queues=()),
        rabbitmq(
            queues=(QueueFacts("classic", delivery_limit=1), QueueFacts("unlimited", True, -1), QueueFacts("q", True))
        ),
        told(REDIS),
        told({**REDIS, "maxmemory-policy": "volatile-lru"}),
        told({**REDIS, "maxmemory-policy": "allkeys-lru", "maxmemory": "0"}),
        told(MARIADB),
        told(MARIADB, ATOMIC),
        told(MARIADB, tx_isolation="READ-COMMITTED", innodb_snapshot_isolation="ON"),
        told(SQLITE, LOCAL),
        # Of PostgreSQL, which has no dirty reads.
        store(configuration={"default_transaction_isolation": "read uncommitted"}),
        replace(ATOMIC, app=replace(ATOMIC.app, isolation_level="READ_COMMITTED")),
        # What was not asked, and what is made on first use.
        store(configuration=None, health=None),
        store(configuration={}, health=None, there=False),
        # A lost process that is not reported; results without a reader.
        app(result_backend=False, tasks=tuple(replace(each, awaited=False) for each in TASKS)),
        task(track_started=True, awaited=False),
        # Limits of bodies whose messages are acknowledged before.
        task(acks_late=False, time_limit=7200.0),
        rabbitmq(task(acks_late=False, time_limit=7200.0)),
        rabbitmq(health(last_due=NOW + timedelta(days=1)), delays=True),
        # Within what a recovery pass, and a purge, may take.
        health(lapsed_since=ago(100), unsent_since=ago(100), done_since=ago(7.5 * 86400)),
        store(local_clock=NOW + timedelta(seconds=1.5)),
        store(local_clock=NOW + timedelta(seconds=9), clock_error=8.0),
    ],
)
def test_with_a_good_set_up_nothing_is_found(facts: Facts) -> None:
    assert findings(facts) == []


@dataclass(frozen=True)
class Provoked:
    code: str
    facts: Facts
    says: str
    tasks: tuple[str, ...] = ()


SICK = [
    Provoked("guard-off", app(enabled=False), "idempotent_enabled is False"),
    Provoked("settings", app(wrong=("unknown setting 'idempotent_stor'",), tasks=()), "idempotent_stor"),
    Provoked("no-guarded-tasks", app(tasks=()), "base=IdempotentTask"),
    Provoked("always-eager", app(eager=True), "calls are recorded in a store"),
    Provoked("past-the-guard", task(past_the_guard=True), "__call__ and before_start", ("late",)),
    Provoked("base-missing", app(without_base=("mail",)), "options of the guard", ("mail",)),
    Provoked("base-missing", app(without_base=("mail",), tasks=TASKS), "not its base class", ("mail",)),
    Provoked("early-ack-failure", task(failure_stays=True), "early acknowledgement", ("late",)),
    Provoked("late-ack-worker-lost", task(reported_lost=True), "reject_on_worker_lost", ("late",)),
    Provoked("no-result-backend", app(result_backend=False), "no result backend", ("late", "early")),
    Provoked("track-started", task(track_started=True), "track_started", ("late",)),
    Provoked("result-expires", app(result_expires=86400.0), "86400 s"),
    Provoked("beat-fixed-id", fixed(interval=60.0), "'nightly' has the message id 'm' at each tick", ("late",)),
    Provoked("beat-fixed-id", fixed(interval=60.0, unique_for=60.0), "stays taken for 60 s", ("late",)),
    Provoked("beat-fixed-id", fixed(), "until it is purged", ("late",)),
    Provoked("recovery-off", app(recovery_interval=0.0), "early acknowledgement", ("early",)),
    Provoked("recovery-off", app(recovery_interval=0.0, tasks=TASKS[:1]), "is 0, so workers do not recover"),
    Provoked("retention-short", app(retention=3600.0), "3600 s"),
    Provoked("retention-short", rabbitmq(app(retention=1000.0)), "1800 s"),
    Provoked("unique-for-short", task(unique_for=3600.0), "3600 s", ("late",)),
    Provoked("unique-for-short", rabbitmq(task(unique_for=60.0)), "60 s", ("late",)),
    Provoked("broker-unreachable", broker(away="refused"), "redis://broker/0: refused"),
    Provoked(
        "broker-eviction", broker(configuration={"maxmemory-policy": "allkeys-lru", "maxmemory": "9"}), "allkeys-lru"
    ),
    Provoked("visibility-lease", task(lease=3600.0), "3600 s", ("late",)),
    Provoked("visibility-time-limit", task(time_limit=3600.0), "up to 3600 s", ("late",)),
    Provoked("visibility-eta", task(longest_delay=4000.0), "retries are delayed by up to 4000 s", ("late",)),
    Provoked("visibility-eta", health(last_due=NOW + timedelta(hours=2)), "a message waits 7200 s"),
    Provoked("consumer-timeout-time-limit", rabbitmq(task(time_limit=1800.0)), "1800 s", ("late",)),
    Provoked("consumer-timeout-lease", rabbitmq(task(lease=600.0), consumer_timeout=400.0), "600 s", ("late",)),
    Provoked("consumer-timeout-eta", rabbitmq(task(longest_delay=1800.0)), "1800 s", ("late",)),
    Provoked("consumer-timeout-eta", rabbitmq(health(last_due=NOW + timedelta(hours=1))), "a message waits 3600 s"),
    Provoked("delivery-limit", rabbitmq(queues=(QueueFacts("q", quorum=True, delivery_limit=5),)), "limit of 5"),
    Provoked("store-unreachable", store(away="gave no answer", health=None), "gave no answer"),
    Provoked("store-refused", store(refused="no rights", health=None), "no rights"),
    Provoked("schema", store(schema="the table is missing", health=None), "the table is missing"),
    Provoked(
        "schema-behind", store(outstanding=("create the index queue_log_open",)), "create the index queue_log_open"
    ),
    Provoked(
        "atomic-store", replace(ATOMIC, app=replace(ATOMIC.app, atomic_refused="needs SQL")), "needs SQL", ("late",)
    ),
    Provoked("store-in-memory", told(SQLITE, LOCAL, file=""), "in the memory of one process"),
    Provoked("store-local-file", told(SQLITE), "a file on this host"),
    Provoked("store-relative-file", store(relative_file="/srv/queue_log.db"), "/srv/queue_log.db here"),
    Provoked("store-durability", told({"fsync": "off"}), "fsync is off"),
    Provoked("store-durability", told({"synchronous_commit": "off"}), "synchronous_commit is off"),
    Provoked(
        "store-durability", told(MARIADB, innodb_flush_log_at_trx_commit="2"), "innodb_flush_log_at_trx_commit is 2"
    ),
    Provoked("store-durability", told(SQLITE, LOCAL, synchronous="1"), "synchronous is 1"),
    Provoked("store-durability", told(REDIS, appendfsync="no"), "appendfsync is no"),
    Provoked("store-read-only", told(MARIADB, read_only="ON"), "read_only is on"),
    Provoked("store-read-only", told({"default_transaction_read_only": "on"}), "default_transaction_read_only is on"),
    Provoked("pooler-prepares", told({"pooler": "on", "prepare_threshold": "5"}), "after 5 uses"),
    Provoked("store-configuration", told({}), "may not read the settings"),
    Provoked("redis-appendonly", told(REDIS, appendonly="no", appendfsync="no"), "appendonly is no at a store"),
    Provoked("redis-appendonly", told({**REDIS, "appendonly [node:1]": "no"}), "at a store [node:1]"),
    Provoked("redis-eviction", told({**REDIS, "maxmemory-policy": "allkeys-lfu"}), "allkeys-lfu"),
    Provoked(
        "redis-eviction",
        told({"appendonly": "yes", "maxmemory": "0", "maxmemory [n:1]": "9", "maxmemory-policy [n:1]": "allkeys-lru"}),
        "[n:1]",
    ),
    Provoked("isolation-dirty", told(MARIADB, tx_isolation="READ-UNCOMMITTED"), "READ-UNCOMMITTED"),
    Provoked("isolation-dirty", told({"transaction_isolation": "READ-UNCOMMITTED"}), "transaction_isolation"),
    Provoked("isolation-renewal", told(MARIADB, ATOMIC, innodb_snapshot_isolation="ON"), "REPEATABLE READ", ("late",)),
    Provoked(
        "isolation-renewal",
        told({"default_transaction_isolation": "serializable"}, ATOMIC),
        "SERIALIZABLE",
        ("late",),
    ),
    Provoked(
        "isolation-renewal",
        replace(ATOMIC, app=replace(ATOMIC.app, isolation_level="REPEATABLE_READ")),
        "REPEATABLE READ",
        ("late",),
    ),
    Provoked("clock-skew", store(local_clock=NOW + timedelta(seconds=5)), "5.0 s ahead of that of a store"),
    Provoked(
        "clock-skew",
        store(local_clock=NOW - timedelta(seconds=60)),
        "60.0 s behind that of a store, more than the 30 s",
    ),
    Provoked("recovery-behind", health(lapsed_since=ago(200)), "2026-01-02 03:00:45+00:00 was not published again"),
    Provoked("recovery-behind", health(unsent_since=ago(200)), "2026-01-02 03:00:45+00:00 was not published"),
    Provoked("purge-behind", health(done_since=ago(32 * 86400)), "2025-12-01 03:04:05+00:00"),
    Provoked("waiting-unguarded", waiting("mail", unguarded=("mail",)), "no base=IdempotentTask", ("mail",)),
    Provoked("waiting-unguarded", waiting("late", unguarded=("late",)), "idempotent=False", ("late",)),
    Provoked("waiting-doubted", store(waiting=("late",), doubted=("late",)), "since the guard was off", ("late",)),
    Provoked("waiting-unknown", waiting("gone", unguarded=("mail",)), "that this app does not have", ("gone",)),
]


@pytest.mark.parametrize("sick", SICK, ids=lambda sick: f"{sick.code}: {sick.says}")
def test_each_fault_gives_its_finding_alone(sick: Provoked) -> None:
    (found,) = findings(sick.facts)
    assert (found.code, found.tasks) == (sick.code, sick.tasks)
    assert sick.says in found.what
    assert found.remedy
    assert found.severity is CODES[sick.code][0]


def test_every_code_is_provoked() -> None:
    assert {sick.code for sick in SICK} == set(CODES)


def test_every_code_has_its_section_on_the_page_and_no_other_has() -> None:
    headings = [line.removeprefix("### ") for line in PAGE.read_text().splitlines() if line.startswith("### ")]
    assert sorted(headings) == sorted(CODES)
    assert all(
        sick_code.see == f"the documentation, page doctor, section {sick_code.code}"
        for sick_code in findings(SICK[0].facts)
    )


def test_a_longer_interval_gives_recovery_more_time() -> None:
    since = health(lapsed_since=ago(200))
    assert findings(replace(since, app=replace(since.app, recovery_interval=60.0))) == []


def test_errors_come_first() -> None:
    both: Callable[[Facts], Facts] = lambda facts: replace(facts, store=replace(facts.store, schema="missing"))  # noqa: E731
    severities = [finding.severity for finding in findings(both(task(reported_lost=True, track_started=True)))]
    assert severities == [Severity.ERROR, Severity.WARNING, Severity.WARNING]


def test_each_finding_says_its_stakes_in_one_sentence() -> None:
    assert [stake for _, stake in CODES.values() if stake.count(". ") or not stake.endswith(".")] == []
