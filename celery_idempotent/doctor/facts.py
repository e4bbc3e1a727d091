"""The facts that the checks use, about an app, its broker and its store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from celery_idempotent.core.records import LogHealth

__all__ = ["AppFacts", "BrokerFacts", "EntryFacts", "Facts", "QueueFacts", "StoreFacts", "TaskFacts"]


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """A guarded task. Durations are seconds.

    Attributes:
        name: The task's name.
        acks_late: Whether its messages are acknowledged after the body.
        reported_lost: Whether Celery reports a lost process to the caller as a failure, although the message runs again.
        awaited: Whether its results are stored.
        track_started: Whether Celery stores the state STARTED.
        time_limit: The time after which it is killed or interrupted; ``None`` for none.
        longest_delay: The longest pause between its retries, if it retries automatically or sets that pause; otherwise 0.
        failure_stays: Whether a message ends as a failure if its worker dies, so that later calls under its id get this failure, and no
            option says that this is intended.
        lease: The lease of its claims.
        unique_for: The time after its end for which its id stays taken; ``None`` until it is purged.
        atomic: Whether its body runs in a transaction.
        past_the_guard: Whether something has replaced both methods of its class that the guard wraps.
    """

    name: str
    acks_late: bool = False
    reported_lost: bool = False
    awaited: bool = True
    track_started: bool = False
    time_limit: float | None = None
    longest_delay: float = 0.0
    failure_stays: bool = False
    lease: float = 60.0
    unique_for: float | None = None
    atomic: bool = False
    past_the_guard: bool = False


@dataclass(frozen=True, slots=True)
class EntryFacts:
    """An entry of ``beat_schedule`` whose ticks all have one message id. Durations are seconds.

    Attributes:
        name: The entry's name.
        task: Its task's name.
        message_id: The id.
        interval: The time between its next two ticks; ``None`` if it is not known.
        unique_for: The time after its end for which its task's ids stay taken; ``None`` until they are purged.
    """

    name: str
    task: str
    message_id: str
    interval: float | None = None
    unique_for: float | None = None

    @property
    def stays_taken(self) -> bool:
        """Whether the id is still taken at the next tick."""
        return self.unique_for is None or (self.interval is not None and self.unique_for >= self.interval)


@dataclass(frozen=True, slots=True)
class AppFacts:
    """An app.

    Attributes:
        wrong: The library's errors about its settings or a task's options.
        enabled: The setting: whether the guard is on.
        tasks: Its guarded tasks.
        result_backend: Whether it has one.
        result_expires: Seconds for which the backend keeps results; ``None`` for ever, or if unknown.
        retention: The setting, in seconds.
        failure_retention: The setting, in seconds.
        recovery_interval: The setting, in seconds; 0 for none.
        unguarded: Its tasks that are not guarded, or are turned off.
        without_base: Its tasks that have options of the guard, and not its base class.
        atomic_refused: Why its store cannot run its atomic tasks, if it has some.
        isolation_level: The isolation level of atomic tasks, if the app names one.
        eager: Whether calls run in place, and are recorded in a store that outlives the process.
        fixed_entries: The entries of its beat schedule that have one message id for all ticks.
    """

    wrong: tuple[str, ...] = ()
    enabled: bool = True
    tasks: tuple[TaskFacts, ...] = ()
    result_backend: bool = True
    result_expires: float | None = None
    retention: float = 7 * 86400.0
    failure_retention: float = 30 * 86400.0
    recovery_interval: float = 30.0
    unguarded: tuple[str, ...] = ()
    without_base: tuple[str, ...] = ()
    atomic_refused: str | None = None
    isolation_level: str | None = None
    eager: bool = False
    fixed_entries: tuple[EntryFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """A queue that the app declares.

    Attributes:
        name: Its name.
        quorum: Whether it is a quorum queue of RabbitMQ.
        delivery_limit: How often RabbitMQ delivers a message of this queue before it drops the message; ``None`` for no limit.
    """

    name: str
    quorum: bool = False
    delivery_limit: int | None = None


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """A broker.

    Attributes:
        url: Its URL, without the password.
        away: Why it could not be reached.
        local: Whether only this host can reach it.
        visibility_timeout: Seconds after which an unacknowledged message is delivered again; ``None`` if the broker has no such timeout.
        consumer_timeout: Seconds after which RabbitMQ closes the channel of a worker that has not acknowledged a message.
        consumer_timeout_of: Where that value comes from.
        delays: Whether the broker keeps messages until they are due; otherwise a worker does.
        queues: The app's queues.
        configuration: The settings of a Redis, if the account may read them.
    """

    url: str = ""
    away: str | None = None
    local: bool = False
    visibility_timeout: float | None = None
    consumer_timeout: float | None = None
    consumer_timeout_of: str = ""
    delays: bool = False
    queues: tuple[QueueFacts, ...] = ()
    configuration: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """A store.

    Attributes:
        name: Its URL, or its class, without the password.
        relative_file: Its file as an absolute path, if the working directory decides which file that is.
        away: Why it could not be reached.
        refused: What it refused, and why.
        schema: What is wrong with its schema.
        outstanding: Changes that would bring its schema to this version; it can be used without them.
        there: Whether its schema exists, or is created on first use.
        configuration: The settings of its server, if the account may read them; ``None`` if it was not asked.
        health: The state of the log; ``None`` if it was not asked.
        waiting: The tasks of the messages that have waited longest.
        doubted: The tasks of those among them that may have run while the guard was off.
        local_clock: This host's clock at the moment of the store's clock.
        clock_error: Seconds by which that may be wrong.
    """

    name: str = ""
    relative_file: str | None = None
    away: str | None = None
    refused: str | None = None
    schema: str | None = None
    outstanding: tuple[str, ...] = ()
    there: bool = True
    configuration: Mapping[str, str] | None = None
    health: LogHealth | None = None
    waiting: tuple[str, ...] = ()
    doubted: tuple[str, ...] = ()
    local_clock: datetime | None = None
    clock_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Facts:
    """All facts."""

    app: AppFacts
    broker: BrokerFacts
    store: StoreFacts

    def names(self, concerned: Callable[[TaskFacts], bool]) -> tuple[str, ...]:
        """Return the names of the guarded tasks that a check concerns."""
        return tuple(task.name for task in self.app.tasks if concerned(task))
