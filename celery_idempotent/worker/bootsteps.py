"""The worker's bootsteps: a check before it starts, and recovery while it runs."""

from __future__ import annotations

import logging
import random
import threading
from typing import Any

import click
from celery.bootsteps import StartStopStep, Step
from celery.exceptions import WorkerShutdown
from celery.platforms import EX_FAILURE

from celery_idempotent.core.transactions import transactional
from celery_idempotent.errors import AccessDeniedError, ConfigurationError, StoreError, StoreUnavailableError
from celery_idempotent.maintenance.recovery import Recovery
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.queue_log import QueueLog
from celery_idempotent.settings import Settings

__all__ = ["CheckStep", "RecoveryStep"]

logger = logging.getLogger("celery_idempotent")


class CheckStep(Step):  # type: ignore[misc]
    """Stop a worker from starting if it could not guard its tasks. Otherwise every message that it takes would be delayed or fail.

    Raises:
        ConfigurationError: A setting or a task's option is not valid, or the worker's pool is eventlet's.
        SchemaError: The table is missing or behind.
        StoreError: The store's server refused: there is no such database, or no such account, or it lacks a right.
    """

    name = "idempotent-check"

    def include_if(self, parent: Any) -> bool:
        """Check; a store that gives no answer now may do so later, and is waited for then.

        On Celery's command line the worker says in one line what is wrong, and ends with status 1.
        """
        try:
            self._check(parent)
        except (ConfigurationError, StoreError) as error:
            if click.get_current_context(silent=True) is None:  # a worker in somebody's program, who wants to know
                raise
            logger.critical("the worker does not start: %s", error)
            raise WorkerShutdown(EX_FAILURE) from error
        return False

    def _check(self, parent: Any) -> None:
        from celery_idempotent.worker import control  # noqa: F401 - makes its command known

        # Database drivers need `select.poll`, which eventlet removes.
        if parent.pool_cls.__module__ == "celery.concurrency.eventlet":
            raise ConfigurationError(
                "celery-idempotent does not run in the eventlet pool; start the worker with --pool=gevent or --pool=threads"
            )
        queue_log = QueueLog.of(parent.app)
        _ = queue_log.hooks  # raises for a hook that cannot be imported
        if not queue_log.settings.enabled:
            logger.warning(
                "the guard is off for all tasks, since idempotent_enabled is False: messages run as plain Celery's, and each copy runs too"
            )
            try:
                _ = queue_log.store  # imported here: a child must not be forked while a thread does that
            except ConfigurationError as error:
                logger.warning("the worker starts although it could not guard its tasks: %s", error)
            return
        for task in parent.app.tasks.values():
            if is_guarded(task) and task.idempotency.atomic:
                transactional(queue_log.store)
        if (check_worker := getattr(queue_log.store, "check_worker", None)) is not None:
            check_worker()
        try:
            queue_log.store.check()
        except AccessDeniedError:
            raise
        except StoreUnavailableError as error:
            logger.warning("the worker starts although the store gives no answer: %s", error)
        # The pool is about to fork, and no connection may be shared with its children.
        queue_log.close()


class RecoveryStep(StartStopStep):  # type: ignore[misc]
    """Run recovery about every ``idempotent_recovery_interval`` seconds while the worker runs.

    The step ends when the worker begins to stop. Leases of bodies that still run are kept by the lease renewal.
    """

    name = "idempotent-recovery"
    requires = (CheckStep,)

    def __init__(self, parent: Any, **kwargs: Any) -> None:
        super().__init__(parent, **kwargs)
        self._stopped = threading.Event()

    def include_if(self, parent: Any) -> bool:
        """Leave the step out if the interval is 0, unless the guard is off: what waits meanwhile has to be noted."""
        settings = QueueLog.of(parent.app).settings
        return settings.recovery_interval > 0 or not settings.enabled

    def start(self, parent: Any) -> None:
        """Start the thread."""
        self._stopped.clear()
        threading.Thread(target=self._run, args=(QueueLog.of(parent.app),), name=self.name, daemon=True).start()

    def stop(self, parent: Any) -> None:  # noqa: ARG002 - Celery's signature
        """Stop after the current pass, if one is running."""
        self._stopped.set()

    terminate = stop

    def _run(self, queue_log: QueueLog) -> None:
        settings = queue_log.settings
        interval = settings.recovery_interval or Settings.recovery_interval
        # A short guard-off must leave its note too.
        pause = 0.0 if not settings.enabled else interval * _around_one()
        # Random pauses keep workers apart that were started together.
        while not self._stopped.wait(pause):
            pause = interval * _around_one()
            try:
                if settings.recovery_interval > 0:
                    Recovery(queue_log).run_pass()
                else:
                    Rescue.of(queue_log).doubt_turned_off()
            except Exception as error:  # noqa: BLE001 - the next pass must come, whatever the error
                logger.warning("a recovery pass failed; the next one continues: %r", error)


def _around_one() -> float:
    return random.uniform(0.5, 1.5)  # noqa: S311 - keeps no secret
