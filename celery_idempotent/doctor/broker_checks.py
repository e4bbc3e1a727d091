"""Check the broker: how long it waits for a worker, and whether its queues lose messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from celery_idempotent.core.decision import MAX_TAKEOVERS
from celery_idempotent.doctor.facts import Facts
from celery_idempotent.doctor.finding import Finding

__all__ = ["check_queues", "check_timeouts", "evicts"]

#: Seconds of the longest hold of a copy on RabbitMQ: half of its usual consumer_timeout.
_LONGEST_HOLD = 900.0


@dataclass(frozen=True, slots=True)
class _Setting:
    """A setting that is too low: its name and its value."""

    name: str
    now: str

    def above(self, seconds: float) -> str:
        return f"{self.name} of more than {seconds:g} s (now {self.now})"


def check_timeouts(facts: Facts) -> Iterator[Finding]:
    """Yield leases, bodies and waiting messages that last longer than the broker waits."""
    broker, app = facts.broker, facts.app
    if broker.away is not None:
        yield Finding("broker-unreachable", f"{broker.url}: {broker.away}", "start it, or correct broker_url")
    last_due = _last_due(facts)
    if (visible := broker.visibility_timeout) is not None:
        setting = _Setting('broker_transport_options = {"visibility_timeout": ...}', f"{visible:g} s")
        if leases := facts.names(lambda task: task.lease >= visible):
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
            if leases := facts.names(lambda task: min(task.lease, _LONGEST_HOLD) >= patience):
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
    if long := facts.names(lambda task: task.acks_late and (task.time_limit or 0.0) >= patience):
        longest = max(task.time_limit or 0.0 for task in facts.app.tasks if task.acks_late)
        yield Finding(
            code,
            f"acks_late with time limits of up to {longest:g} s, but {whose} of {patience:g} s",
            f"{setting.above(longest)}; or shorter time limits",
            long,
        )


def _late(code: str, facts: Facts, patience: float, last_due: float, setting: _Setting) -> Iterator[Finding]:
    """Yield messages that wait in a worker for longer than the broker waits."""
    delayed = facts.names(lambda task: task.longest_delay >= patience)
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
    if short := facts.names(lambda task: task.unique_for is not None and task.unique_for <= patience):
        shortest = min(task.unique_for for task in facts.app.tasks if task.unique_for is not None)
        yield Finding(
            "unique-for-short",
            f"ids are free again after {shortest:g} s, which is no longer than {name}",
            f"unique_for=..., of more than {patience:g} s; but of less than the interval for a task of beat: if that is shorter, ignore this finding",
            short,
        )


def check_queues(facts: Facts) -> Iterator[Finding]:
    """Yield queues and settings by which the broker loses messages."""
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
    if evicts(policy, broker.configuration.get("maxmemory")):
        yield Finding("broker-eviction", f"the broker's maxmemory-policy is {policy}", "maxmemory-policy noeviction")


def evicts(policy: str, maxmemory: str | None) -> bool:
    """Return whether a Redis deletes keys that have no time to live. It never does without a limit on its memory."""
    return policy.startswith("allkeys") and maxmemory != "0"


def _last_due(facts: Facts) -> float:
    """Return the seconds until the last of the waiting messages is due."""
    health = facts.store.health
    if health is None or health.last_due is None:
        return 0.0
    return round((health.last_due - health.read_at).total_seconds())
