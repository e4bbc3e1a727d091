"""What an app of the tests is made of.

A test describes its app once, builds it for itself (``spec.build()``), and hands the description to its workers through the
environment, where :mod:`tests.support.apps.worker` builds the same app again::

    app = open_app(replace(spec, settings={"task_acks_late": True}))
    worker = start_worker(spec, pool="threads")

Tasks are registered by modules that have a function ``register(app, *, base, ledger)``; :mod:`tests.support.apps.generic` is one.
With ``base="plain"`` the same tasks run on Celery's own ``Task``, to see side by side what the library makes of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, ClassVar, Literal

from celery import Celery, Task

from celery_idempotent import IdempotentTask
from tests.support import orm
from tests.support.apps.restoring import restore_every_second
from tests.support.ledger import Ledger

__all__ = ["AppSpec", "OpenApp", "close_app"]


@dataclass(frozen=True, slots=True)
class AppSpec:
    """A description of an app; everything in it is JSON.

    Attributes:
        broker: Broker URL.
        backend: Result backend URL.
        store: URL of the queue log's store.
        queue: Default queue.
        ledger: Path of the ledger that the tasks write.
        table: Name of the queue log's table; ``None`` for the default.
        base: ``idempotent`` for ``IdempotentTask``, ``plain`` for Celery's ``Task``.
        tasks: Modules whose tasks are registered.
        transport_options: For ``broker_transport_options``.
        settings: Any other Celery or ``idempotent_*`` settings; they win over what is set here.
        orm: The Django app whose models are the tables of the store's database, if the processes that are handed this are ones of a
            Django project: see :mod:`tests.support.orm`. Their queue log is at ``django://default`` then.
    """

    broker: str
    backend: str
    store: str
    queue: str
    ledger: str
    table: str | None = None
    base: Literal["idempotent", "plain"] = "idempotent"
    tasks: tuple[str, ...] = ("tests.support.apps.generic",)
    transport_options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    orm: str | None = None

    #: The environment variable in which a worker finds its app.
    VARIABLE: ClassVar[str] = "CELERY_IDEMPOTENT_TEST_APP"

    def environment(self) -> dict[str, str]:
        """Return what a worker process needs to find in its environment."""
        of_django = {} if self.orm is None else orm.environment(self.store, self.orm)
        return {AppSpec.VARIABLE: json.dumps(asdict(self)), **of_django}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> AppSpec:
        """Return the description that :meth:`environment` passed on."""
        values = json.loads(environ[AppSpec.VARIABLE])
        return cls(**{**values, "tasks": tuple(values["tasks"])})

    def build(self) -> Celery:
        """Build the app; nothing is connected or created."""
        app = _App("tests", broker=self.broker, backend=self.backend, set_as_current=False)
        app.conf.update(
            broker_connection_retry_on_startup=True,
            broker_transport_options=dict(self.transport_options),
            result_expires=3600,
            task_default_queue=self.queue,
            worker_send_task_events=False,
        )
        if self.base == "idempotent":
            app.conf.update(idempotent_store="django://default" if orm.is_used() else self.store)
            if self.table is not None:
                app.conf.update(idempotent_table=self.table)
        elif idempotent := [name for name in self.settings if name.startswith("idempotent_")]:
            raise ValueError(f"a plain app has no {idempotent}")
        app.conf.update(self.settings)
        if self.transport_options.get("unacked_restore_throttle") == 1:
            restore_every_second()
        base: type[Task] = Task if self.base == "plain" else IdempotentTask
        ledger = Ledger(self.ledger)
        for module in self.tasks:
            import_module(module).register(app, base=base, ledger=ledger)
        return app


#: What the fixture ``open_app`` gives: builds an app in this process, with its queue log's table made.
OpenApp = Callable[[AppSpec], Celery]


def close_app(app: Celery) -> None:
    """Close all connections of an app in this process: to the store, the result backend and the broker."""
    if "queue_log" in vars(app):
        app.queue_log.close()
    if app.conf.result_backend.startswith("redis"):
        # A result that is collected later would connect again to unsubscribe, and try for 20 seconds if the server is gone.
        consumer = app.backend.result_consumer
        consumer.stop()
        consumer.subscribed_to.clear()
        consumer._pubsub = None
        app.backend.client.close()
    elif app.conf.result_backend.startswith("rpc"):
        # It listens on a connection of its own as soon as a result was asked for.
        consumer = app.backend.result_consumer
        if consumer._connection is not None:
            consumer.stop()
    app.close()


class _App(Celery):  # type: ignore[misc] # Celery has no types
    """An app that keeps its tasks to itself: Celery registers them with every other app of the process too."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{"shared": False, **options})
