"""Read the facts from the app's configuration, its broker and its store, without changing anything. A server that is down is a fact."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.backends.base import DisabledBackend
from celery.utils.quorum_queues import detect_quorum_queues

from celery_idempotent.core.records import RowFilter, Status
from celery_idempotent.core.transactions import transactional
from celery_idempotent.doctor.beat_entries import read_fixed_entries
from celery_idempotent.doctor.facts import AppFacts, BrokerFacts, Facts, QueueFacts, StoreFacts, TaskFacts
from celery_idempotent.errors import ConfigurationError, SchemaError, StoreError, StoreUnavailableError
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.producer.publisher import ANSWER
from celery_idempotent.settings import OPTION_NAMES, PREFIX
from celery_idempotent.worker.binding import passes_the_guard
from celery_idempotent.worker.celery_versions import retries_lost_workers

if TYPE_CHECKING:
    from celery import Celery
    from kombu import Connection

    from celery_idempotent.core.store import Store
    from celery_idempotent.queue_log import QueueLog
    from celery_idempotent.task import IdempotentTask

__all__ = ["read_facts"]

#: RabbitMQ's default consumer_timeout in seconds, and the version that introduced it.
_CONSUMER_TIMEOUT, _WITH_CONSUMER_TIMEOUT = 1800.0, (3, 8, 17)
#: RabbitMQ's default delivery limit of a quorum queue, and the version that introduced it.
_DELIVERY_LIMIT, _WITH_DELIVERY_LIMIT = 20, (4, 0)

_LOCAL_HOSTS = {None, "", "localhost", "127.0.0.1", "::1"}
_LOCAL_TRANSPORTS = {"memory", "filesystem"}

#: How many of the messages that have waited longest are read.
_OLDEST = 1000

#: Transport options that limit a driver's wait for a silent server.
_PATIENCE: Mapping[str, Mapping[str, float]] = {
    "redis": {"socket_timeout": ANSWER, "socket_connect_timeout": ANSWER},
    "amqp": {"read_timeout": ANSWER, "write_timeout": ANSWER},
}


def read_facts(
    queue_log: QueueLog,
    *,
    consumer_timeout: float | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Facts:
    """Read all facts.

    Args:
        queue_log: The queue log; the modules of its app's tasks have been imported.
        consumer_timeout: RabbitMQ's, in seconds, which clients cannot read; ``None`` for the app's queue arguments, or the default.
        clock: This host's clock.
    """
    app = _read_app(queue_log)
    broker = _read_broker(queue_log.app, consumer_timeout)
    try:
        store = queue_log.store
    except ConfigurationError as error:
        return Facts(replace(app, wrong=app.wrong or (str(error),)), broker, StoreFacts())
    if queue_log.app.conf.task_always_eager and getattr(store, "lasting", True):
        app = replace(app, eager=True)
    if any(task.atomic for task in app.tasks):
        try:
            transactional(store)
        except ConfigurationError as error:
            app = replace(app, atomic_refused=str(error))
    return Facts(app, broker, _read_store(store, clock))


# -- the app -----------------------------------------------------------------------------------------------------------


def _read_app(queue_log: QueueLog) -> AppFacts:
    app = queue_log.app
    try:
        settings = queue_log.settings
    except ConfigurationError as error:
        return AppFacts(wrong=(str(error),))
    wrong: list[str] = []
    tasks: list[TaskFacts] = []
    for name, task in sorted(app.tasks.items()):
        if is_guarded(task):
            try:
                tasks.append(_read_task(name, task))
            except ConfigurationError as error:
                wrong.append(str(error))
    return AppFacts(
        wrong=tuple(wrong),
        enabled=settings.enabled,
        tasks=tuple(tasks),
        result_backend=not isinstance(app.backend, DisabledBackend),
        result_expires=(app.backend.persistent and app.backend.expires) or None,
        retention=settings.retention,
        failure_retention=settings.failure_retention,
        recovery_interval=settings.recovery_interval,
        unguarded=tuple(name for name, task in sorted(app.tasks.items()) if not (is_guarded(task) and _is_on(task))),
        without_base=tuple(
            name for name, task in sorted(app.tasks.items()) if not is_guarded(task) and _has_options(task)
        ),
        isolation_level=queue_log.isolation_level,
        fixed_entries=tuple(read_fixed_entries(app)),
    )


def _has_options(task: Task) -> bool:
    return any(getattr(type(task), name, None) is not None for name in (*OPTION_NAMES, "idempotent"))


def _is_on(task: IdempotentTask) -> bool:
    try:
        return task.idempotency.idempotent
    except ConfigurationError:  # reported as a separate finding
        return True


def _read_task(name: str, task: IdempotentTask) -> TaskFacts:
    _ = task.Request  # raises if it cannot be imported or combined with ours
    options, conf = task.idempotency, task.app.conf
    reruns = options.delivery.on_abandoned != "fail"
    limits = [task.time_limit or conf.task_time_limit, task.soft_time_limit or conf.task_soft_time_limit]
    retries = bool(getattr(task, "autoretry_for", ())) or task.default_retry_delay != Task.default_retry_delay
    backs_off = bool(getattr(task, "retry_backoff", False))
    delay = getattr(task, "retry_backoff_max", 600) if backs_off else task.default_retry_delay
    return TaskFacts(
        name,
        acks_late=bool(task.acks_late),
        reported_lost=bool(
            task.acks_late and reruns and not task.reject_on_worker_lost and not retries_lost_workers(task)
        ),
        awaited=not task.ignore_result,
        track_started=bool(task.track_started),
        time_limit=next((float(limit) for limit in limits if limit), None),
        longest_delay=float(delay) if retries and task.max_retries != 0 else 0.0,
        failure_stays=options.message_id is not None
        and not (task.acks_late or options.call.resubmit_failed)
        and all(said is None for said in (type(task).on_abandoned, conf.get(f"{PREFIX}on_abandoned"))),
        lease=options.lease,
        unique_for=options.unique_for,
        past_the_guard=not any(passes_the_guard(type(task), hook) for hook in ("__call__", "before_start")),
        atomic=options.atomic,
    )


# -- the broker --------------------------------------------------------------------------------------------------------


def _read_broker(app: Celery, consumer_timeout: float | None) -> BrokerFacts:
    try:
        connection = app.connection_for_write()
        driver = connection.transport.driver_type
        options = {**_PATIENCE.get(driver, {}), **(app.conf.broker_transport_options or {})}
        connection = app.connection_for_write(transport_options=options)
        url, local = connection.as_uri(), _is_local(connection)
        visible = _visibility_timeout(connection)
    except Exception as error:  # noqa: BLE001 - for a bad URL, kombu or any transport may raise anything
        return BrokerFacts(url="broker_url", away=_text(error))
    answered: dict[str, Any] = {}
    away: str | None = None
    try:
        with connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=ANSWER)
            answered = _ask_broker(app, connection, driver, consumer_timeout)
    except Exception as error:  # noqa: BLE001 - as above
        away = _text(error)
    return BrokerFacts(url=url, away=away, local=local, visibility_timeout=visible, **answered)


def _ask_broker(app: Celery, connection: Connection, driver: str, consumer_timeout: float | None) -> dict[str, Any]:
    if driver == "redis":
        return {"configuration": _ask_redis(connection.default_channel.client)}
    if driver != "amqp":
        return {}
    version = _version(getattr(connection.connection, "server_properties", None) or {})
    queues = list(app.amqp.queues.values())
    timeout, of = _consumer_timeout([queue.queue_arguments or {} for queue in queues], version, consumer_timeout)
    return {
        "consumer_timeout": timeout,
        "consumer_timeout_of": of,
        # Celery's rule for each message: by its exchange, if there is a quorum queue.
        "delays": detect_quorum_queues(app, driver)[0] and all(queue.exchange.type != "direct" for queue in queues),
        "queues": tuple(_read_queue(queue.name, queue.queue_arguments or {}, version) for queue in queues),
    }


def _read_queue(name: str, arguments: Mapping[str, Any], version: tuple[int, ...]) -> QueueFacts:
    limit = arguments.get("x-delivery-limit", _DELIVERY_LIMIT if version >= _WITH_DELIVERY_LIMIT else None)
    return QueueFacts(name, quorum=arguments.get("x-queue-type") == "quorum", delivery_limit=limit)


def _consumer_timeout(
    queues: list[Mapping[str, Any]], version: tuple[int, ...], given: float | None
) -> tuple[float | None, str]:
    own = [arguments["x-consumer-timeout"] / 1000 for arguments in queues if "x-consumer-timeout" in arguments]
    if own:
        return min(own), "from x-consumer-timeout of a queue"
    if given is not None:
        return given, "as given"
    if version >= _WITH_CONSUMER_TIMEOUT:
        return _CONSUMER_TIMEOUT, "the default, since clients cannot read it; see --consumer-timeout"
    return None, ""


def _version(properties: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the version of a RabbitMQ; empty for any other AMQP server."""
    if properties.get("product") != "RabbitMQ":
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", str(properties.get("version", "")))[:3])


def _visibility_timeout(connection: Connection) -> float | None:
    """Return the visibility timeout that the app sets, or the transport's default; ``None`` for a transport without one."""
    channel = getattr(connection.transport, "Channel", None)  # where kombu's own transports have it
    known = [getattr(channel, name, None) for name in ("visibility_timeout", "default_visibility_timeout")]
    defaults = [value for value in known if isinstance(value, (int, float))]
    if not defaults:
        return None
    return float((connection.transport_options or {}).get("visibility_timeout") or defaults[0])


def _ask_redis(client: Any) -> dict[str, str]:
    """Return a Redis's settings, as far as the account may read them."""
    try:
        found = client.config_get("maxmemory*")
    except Exception:  # noqa: BLE001 - the account may lack the right, or the service the command
        return {}
    return {_str(name): _str(value) for name, value in found.items()}


def _is_local(connection: Connection) -> bool:
    if connection.transport.driver_type in _LOCAL_TRANSPORTS:
        return True
    return connection.hostname in _LOCAL_HOSTS and not connection.alt


# -- the store ---------------------------------------------------------------------------------------------------------


def _read_store(store: Store, clock: Callable[[], datetime]) -> StoreFacts:
    facts: dict[str, Any] = {"name": str(store), "relative_file": _relative_file(store)}
    try:
        facts["configuration"] = store.configuration()
        facts["there"] = store.inspect()
        if facts["there"]:
            facts["outstanding"] = tuple(change.what for change in store.outstanding())
            began, asked = clock(), time.monotonic()
            facts["health"] = store.health()
            took = time.monotonic() - asked
            # The statement ran at some time between the two readings.
            oldest = list(store.rows(RowFilter(status=Status.PENDING, limit=_OLDEST, oldest_first=True)))
            facts["waiting"] = tuple(sorted({row.key.task_name for row in oldest}))
            oldest += store.lapsed(again_after=0.0, limit=_OLDEST)
            facts["doubted"] = tuple(sorted({row.key.task_name for row in oldest if row.may_have_run}))
            facts["local_clock"], facts["clock_error"] = began + timedelta(seconds=took / 2), took / 2
    except StoreUnavailableError as error:
        facts["away"] = _text(error)
    except SchemaError as error:
        facts["schema"] = _text(error)
    except StoreError as error:
        facts["refused"] = _text(error)
    return StoreFacts(**facts)


def _relative_file(store: Store) -> str | None:
    """Return the absolute path of a SQLite file that the working directory chooses."""
    url = getattr(getattr(store, "engine", None), "url", None)
    if url is None or url.get_backend_name() != "sqlite" or url.database in {None, "", ":memory:"}:
        return None
    path = Path(url.database)
    return None if path.is_absolute() or url.database.startswith("file:") else str(path.absolute())


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _str(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
