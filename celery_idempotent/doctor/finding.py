"""A finding: one way in which the set-up of the app, its broker and its store would break the promise."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["CODES", "Finding", "Severity"]

_PAGE = "the documentation, page doctor"


class Severity(StrEnum):
    """How severe a finding is."""

    #: Messages are lost, take effect twice or cannot run.
    ERROR = "error"
    #: The promise holds, but at an avoidable cost, or only while nothing else fails; or a caller gets a wrong answer.
    WARNING = "warning"


_E, _W = Severity.ERROR, Severity.WARNING

#: All codes, with their severity and what is at stake, in a sentence. Codes never change, since scripts ignore them by name.
CODES: dict[str, tuple[Severity, str]] = {
    # the app
    "settings": (_E, "A worker does not start, and a call raises ConfigurationError."),
    "guard-off": (
        _E,
        "Nothing is guarded: calls are not recorded, and each repeated call and each copy of a message runs.",
    ),
    "no-guarded-tasks": (_W, "Nothing is guarded, and the rest of this report says nothing about your tasks."),
    "always-eager": (
        _E,
        "What a test runs is recorded as done, and a real message with the same id then never runs.",
    ),
    "past-the-guard": (
        _E,
        "Messages of these tasks run unguarded: copies run again, rows stay pending, and recovery publishes them.",
    ),
    "base-missing": (
        _E,
        "Messages of these tasks run unguarded: their options have no effect, and each copy and each repeated call runs.",
    ),
    "early-ack-failure": (
        _W,
        (
            "A message whose worker is killed ends as a failure, and each later call under its id is answered with that failure until somebody "
            "requeues or forgets it."
        ),
    ),
    "late-ack-worker-lost": (
        _W,
        (
            "When a pool process dies, Celery reports a failure (WorkerLostError) to the caller and the errbacks, and acknowledges the broker's "
            "copy; the message still runs again, but only after recovery has found its row."
        ),
    ),
    "no-result-backend": (
        _W,
        "No caller gets an outcome: callers wait in vain, duplicates under another task id have no result, and chords do not work.",
    ),
    "track-started": (
        _W,
        (
            "A copy of a failed message overwrites the failure by STARTED before it is recognized as a copy; it then fails again, with "
            "AlreadyFailedError, and its errbacks are called again."
        ),
    ),
    "result-expires": (
        _W,
        "A first caller that asks after that waits for ever; a duplicate call stores the result again, from its row.",
    ),
    "recovery-off": (
        _W,
        (
            "Unless `recover --watch` runs somewhere, messages stay lost that a dead worker had acknowledged, that an outbox left behind or that "
            "the broker lost; and no row is purged."
        ),
    ),
    "retention-short": (
        _W,
        "A copy whose acknowledgement was lost may come after its row was purged, and then run again.",
    ),
    "beat-fixed-id": (
        _E,
        "Each later tick of the entry is a duplicate of the first, and is not sent until the id is free again.",
    ),
    "unique-for-short": (
        _W,
        "A copy whose acknowledgement was lost may come when its id is free again, and then run again.",
    ),
    "isolation-renewal": (
        _W,
        "An atomic body that takes longer than a third of its lease cannot complete its row, and is run a second time under a longer lease.",
    ),
    # the broker
    "broker-unreachable": (
        _E,
        "Nothing is sent and nothing runs; the broker's settings could not be checked.",
    ),
    "broker-eviction": (
        _W,
        "A full broker silently deletes queues with all their messages; recovery publishes these from their rows, minutes later.",
    ),
    "visibility-lease": (
        _W,
        "A dead worker's message is delivered again before its lease has run out, so it is held, and runs later than it could.",
    ),
    "visibility-time-limit": (
        _W,
        (
            "If a body takes longer, its message is delivered again while it runs: the guard holds each copy, again and again, which costs workers "
            "time."
        ),
    ),
    "visibility-eta": (
        _W,
        (
            "A message that is not due yet is delivered again each time that this timeout passes, to one worker after the other; its copies fill "
            "the workers until they are skipped."
        ),
    ),
    "consumer-timeout-time-limit": (
        _E,
        (
            "RabbitMQ closes the channel of a worker whose body takes longer, which ends that worker; all its messages are "
            "delivered again."
        ),
    ),
    "consumer-timeout-eta": (
        _E,
        "RabbitMQ closes the channel of a worker that keeps a message for longer until it is due, which ends one worker after the other.",
    ),
    "consumer-timeout-lease": (
        _E,
        "A held copy waits in a worker, at most for as long as the lease lasts; RabbitMQ closes that worker's channel before.",
    ),
    "delivery-limit": (
        _W,
        "RabbitMQ drops a message after this many deliveries, before the guard gives it up with an error; only recovery can bring it back.",
    ),
    # the store
    "store-unreachable": (
        _E,
        "Calls and workers wait for the store, as idempotent_on_store_error says, or do not start if it refused; nothing could be said of how it is set up.",
    ),
    "store-refused": (_E, "The store refuses this request; those of calls and workers will fail too."),
    "schema": (_E, "A worker does not start, and a call raises SchemaError."),
    "schema-behind": (_W, "Recovery and purging read more of the table than they need, and more as it grows."),
    "atomic-store": (_E, "A worker does not start: atomic tasks need a store in a SQL database."),
    "store-in-memory": (
        _E,
        "Each process has its own queue log, so a copy is new to all other processes, and a restart forgets everything.",
    ),
    "store-local-file": (
        _W,
        "Each host has its own queue log, so a copy that comes to another host runs again.",
    ),
    "store-relative-file": (
        _W,
        "Two processes with different working directories have two queue logs, so that what one of them has recorded is new to the other.",
    ),
    "store-durability": (
        _W,
        "Messages that were recorded, claimed or done just before a crash are forgotten; they run again, or are lost.",
    ),
    "store-read-only": (_E, "Nothing can be recorded or claimed: calls raise, and workers wait."),
    "pooler-prepares": (
        _E,
        "A statement named on one connection is executed on another, where the name is unknown or another statement's: bodies fail.",
    ),
    "store-configuration": (_W, "It is unknown whether the server keeps what the queue log writes."),
    "redis-appendonly": (
        _E,
        "After a restart, Redis has forgotten rows: done messages run again, and lost ones are not brought back.",
    ),
    "redis-eviction": (
        _E,
        "A full Redis silently deletes rows of messages that run or wait: they run again, or never.",
    ),
    "isolation-dirty": (
        _E,
        "The relay reads and publishes rows that a transaction has not committed and may still roll back.",
    ),
    "clock-skew": (
        _W,
        (
            "Workers use their own clocks for ETAs and expiries, and on a Redis broker also for when another worker's message is delivered again: "
            "too early or too late by the difference."
        ),
    ),
    "waiting-unguarded": (
        _W,
        (
            "Messages that the broker loses are not published again while their task is not guarded; if their rows "
            "stay until the task is guarded again, they may run a second time."
        ),
    ),
    "waiting-doubted": (
        _W,
        (
            "These messages waited while the guard was off and may have run, so neither recovery nor a repeated call publishes one that the "
            "broker has lost."
        ),
    ),
    "waiting-unknown": (_W, "Unless another app has these tasks, the messages neither run nor are published again."),
    "recovery-behind": (_E, "Recovery does not run: messages of dead workers, or of an outbox, wait for ever."),
    "purge-behind": (_W, "The queue log grows without end, since no worker purges it."),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding.

    Attributes:
        code: One of :data:`CODES`.
        what: The observation, with its figures.
        remedy: The setting to change, or the command to run.
        tasks: The tasks concerned; empty if all are.
    """

    code: str
    what: str
    remedy: str
    tasks: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity:
        """How severe it is."""
        return CODES[self.code][0]

    @property
    def stake(self) -> str:
        """What is at stake, in one sentence."""
        return CODES[self.code][1]

    @property
    def see(self) -> str:
        """Where there is more to read: neither a path nor a URL, since the package comes without its documentation."""
        return f"{_PAGE}, section {self.code}"
