"""A finding: one way in which the promise would not hold as the app, its broker and its store are set up."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["CODES", "Finding", "Severity"]

_PAGE = "the documentation, page doctor"


class Severity(StrEnum):
    """How much is wrong."""

    #: Messages are lost, take effect twice or cannot run.
    ERROR = "error"
    #: The promise holds, but at a cost that is not needed, or only while something goes well; or somebody is told what is not so.
    WARNING = "warning"


_E, _W = Severity.ERROR, Severity.WARNING

#: Every code there is, how severe it is, and what is at stake, in a sentence. Codes stay what they are: scripts ignore them by name.
CODES: dict[str, tuple[Severity, str]] = {
    # the app
    "settings": (_E, "A worker does not start, and a call raises ConfigurationError."),
    "no-guarded-tasks": (_W, "Nothing is guarded, and nothing of this report is about your tasks."),
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
            "When a pool process dies, the caller and the errbacks are told that the message failed (WorkerLostError), and the broker's copy is "
            "acknowledged; the message runs again all the same, but only once recovery has found its row."
        ),
    ),
    "no-result-backend": (
        _W,
        "Nobody can be told an outcome: callers wait in vain, duplicates under another task id have no result, and chords do not work.",
    ),
    "track-started": (
        _W,
        (
            "A copy of a message that failed overwrites its failure by STARTED before it is known for a copy; it then fails once more, as "
            "AlreadyFailedError, and its errbacks are called again."
        ),
    ),
    "result-expires": (
        _W,
        "A first caller who asks later than that waits for ever; a duplicate call stores the result once more, from its row.",
    ),
    "recovery-off": (
        _W,
        (
            "Unless `recover --watch` runs somewhere, what a dead worker had acknowledged, what an outbox left behind and what the broker lost stays "
            "lost, and no row is purged."
        ),
    ),
    "retention-short": (
        _W,
        "A copy whose acknowledgement was lost may come after its row was purged, and then runs again.",
    ),
    "unique-for-short": (
        _W,
        "A copy whose acknowledgement was lost may come when its id is free again, and then runs again.",
    ),
    "isolation-renewal": (
        _W,
        "An atomic body that takes longer than a third of its lease cannot complete its row, and is run a second time under a longer lease.",
    ),
    # the broker
    "broker-unreachable": (
        _E,
        "Nothing is sent and nothing runs; and nothing could be said of how the broker is set up.",
    ),
    "broker-eviction": (
        _W,
        "A broker that is full deletes queues, with all that waits in them and without a word; it comes back from the rows, minutes later.",
    ),
    "visibility-lease": (
        _W,
        "A dead worker's message is delivered again before its lease has run out, is held for that, and runs later than it could.",
    ),
    "visibility-time-limit": (
        _W,
        (
            "A body that takes longer has its message delivered again while it runs: the guard holds each copy, again and again, and that is work "
            "for workers."
        ),
    ),
    "visibility-eta": (
        _W,
        (
            "A message that waits for its time is delivered again each time that this long has passed, to one worker after the other: its copies are "
            "skipped in the end, and fill the workers until then."
        ),
    ),
    "consumer-timeout-time-limit": (
        _E,
        (
            "RabbitMQ closes the channel of a worker whose body takes longer, which ends that worker; its message, and all others that it had, are "
            "delivered again."
        ),
    ),
    "consumer-timeout-eta": (
        _E,
        "RabbitMQ closes the channel of a worker that keeps a message for longer until its time comes, which ends one worker after the other.",
    ),
    "consumer-timeout-lease": (
        _E,
        "A copy that is held waits in a worker, in the end for as long as the lease lasts; RabbitMQ closes the channel of that worker before.",
    ),
    "delivery-limit": (
        _W,
        "RabbitMQ drops a message that has been delivered so often, before the guard gives it up and says so; only recovery can bring it back.",
    ),
    # the store
    "store-unreachable": (
        _E,
        "Calls and workers wait for the store, as idempotent_on_store_error says, or do not start if it refused; nothing could be said of how it is set up.",
    ),
    "store-refused": (_E, "The store does not do what it is asked; calls and workers fail alike."),
    "schema": (_E, "A worker does not start, and a call raises SchemaError."),
    "schema-behind": (_W, "Recovery and purging read more of the table than they need, the more the longer it is."),
    "atomic-store": (_E, "A worker does not start: atomic tasks need a store in a SQL database."),
    "store-in-memory": (
        _E,
        "Each process has a queue log of its own, so that a copy is new to every other one, and a restart forgets all.",
    ),
    "store-local-file": (
        _W,
        "Each host has a queue log of its own, so that a copy that comes to another host runs again.",
    ),
    "store-relative-file": (
        _W,
        "Two processes with different working directories have two queue logs, so that what one of them has recorded is new to the other.",
    ),
    "store-durability": (
        _W,
        "What was recorded, claimed or done just before a crash is forgotten, and then runs again, or is never brought back.",
    ),
    "store-read-only": (_E, "Nothing can be recorded or claimed: calls raise, and workers wait."),
    "pooler-prepares": (
        _E,
        "What is named on one connection is executed on another one, where the name is not known or means another statement: bodies fail.",
    ),
    "store-configuration": (_W, "Whether the server keeps what the queue log writes is not known."),
    "redis-appendonly": (
        _E,
        "A Redis that is restarted has forgotten rows: what was done runs again, and what was lost is not brought back.",
    ),
    "redis-eviction": (
        _E,
        "A Redis that is full deletes rows of messages that run or wait, and tells nobody: they run again, or never.",
    ),
    "isolation-dirty": (
        _E,
        "The relay reads, and publishes, what a transaction has not committed and may still roll back.",
    ),
    "clock-skew": (
        _W,
        (
            "Workers judge ETAs and expiries by their own clocks, and on a Redis broker also when a message of another worker is delivered again: "
            "too early, or too late, by the difference."
        ),
    ),
    "waiting-unguarded": (
        _W,
        (
            "Messages that were recorded wait while their task is not guarded: what the broker loses of them is not published again; and if their rows "
            "stay when the task is guarded again, they may run a second time."
        ),
    ),
    "waiting-unknown": (_W, "If they are no other app's, nobody runs them, and nobody publishes them again."),
    "recovery-behind": (_E, "Nobody recovers: messages of dead workers, or of an outbox, wait for ever."),
    "purge-behind": (_W, "The queue log grows without end, since nobody purges it."),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found.

    Attributes:
        code: One of :data:`CODES`.
        what: What is so, with its figures.
        remedy: The setting to change, or the command to run.
        tasks: The tasks that it is about; none where it is about all.
    """

    code: str
    what: str
    remedy: str
    tasks: tuple[str, ...] = ()

    @property
    def severity(self) -> Severity:
        """How much is wrong."""
        return CODES[self.code][0]

    @property
    def stake(self) -> str:
        """What is at stake, in a sentence."""
        return CODES[self.code][1]

    @property
    def see(self) -> str:
        """Where there is more to read: neither a path nor a URL, since the package comes without its documentation."""
        return f"{_PAGE}, section {self.code}"
