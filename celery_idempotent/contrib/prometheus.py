"""Count outcomes for Prometheus; needs the extra ``prometheus``.

``idempotent_hooks = ["celery_idempotent.contrib.prometheus.hook"]`` counts in the default registry of ``prometheus_client``.

A prefork worker counts in its children, but a scraper asks its main process. So set ``PROMETHEUS_MULTIPROC_DIR`` to a directory that is
empty when the worker starts, before anything imports ``prometheus_client``. Then all processes count there.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import TYPE_CHECKING

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.hooks import Outcome, OutcomeKind

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram, start_http_server
    from prometheus_client.multiprocess import MultiProcessCollector
except ImportError as error:
    raise ConfigurationError(
        "this hook needs prometheus_client: pip install 'celery-idempotent[prometheus]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PrometheusHook", "hook", "serve"]

logger = logging.getLogger("celery_idempotent")

_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

_MINUTE, _HOUR, _DAY = 60.0, 3600.0, 86400.0

#: Buckets in seconds: for a body, from a lookup to a report; for a statement; and for a copy's delay, from a double click to a week.
_RUN = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, _MINUTE, 5 * _MINUTE, 15 * _MINUTE, _HOUR)
_STORE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
_AGE = (0.1, 1.0, 10.0, _MINUTE, 5 * _MINUTE, _HOUR, 6 * _HOUR, _DAY, 2 * _DAY, 7 * _DAY)

_COPIES = frozenset(
    (OutcomeKind.DUPLICATE, OutcomeKind.HELD, OutcomeKind.MISMATCHED, OutcomeKind.REPLAYED, OutcomeKind.SKIPPED)
)


class PrometheusHook:
    """A hook that counts outcomes and measures durations.

    Its labels are the task's name and the outcome, never an id. To use another registry, make your own hook::

        app.conf.idempotent_hooks = [PrometheusHook(registry)]

    Args:
        registry: The registry of the series; by default ``prometheus_client``'s own.

    Raises:
        ValueError: The registry already has these series.
    """

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        by_task = ("task_name", "outcome")
        self._outcomes = Counter(
            "celery_idempotent_outcomes",
            "Outcomes of messages, calls and deliveries; for purged, the number of rows",
            by_task,
            registry=registry,
        )
        self._run = Histogram(
            "celery_idempotent_run_seconds",
            "How long bodies took, by outcome",
            by_task,
            buckets=_RUN,
            registry=registry,
        )
        self._store = Histogram(
            "celery_idempotent_store_seconds",
            "How long the store took to record, claim, complete or fail a message",
            ("outcome",),
            buckets=_STORE,
            registry=registry,
        )
        self._age = Histogram(
            "celery_idempotent_duplicate_age_seconds",
            "How long after a message was recorded a copy of it came",
            by_task,
            buckets=_AGE,
            registry=registry,
        )
        self._process: int | None = os.getpid()

    def __call__(self, outcome: Outcome, /) -> None:
        """Count an outcome."""
        if self._process is not None and self._process != os.getpid():
            self._note_fork()
        kind, task_name = outcome.kind.value, outcome.task_name or ""
        self._outcomes.labels(task_name, kind).inc(outcome.count)
        if outcome.ran is not None:
            self._run.labels(task_name, kind).observe(outcome.ran)
        if outcome.store is not None and outcome.kind is not OutcomeKind.DUPLICATE:
            self._store.labels(kind).observe(outcome.store)
        if outcome.age is not None and outcome.kind in _COPIES:
            self._age.labels(task_name, kind).observe(outcome.age)

    def _note_fork(self) -> None:
        self._process = None
        if _DIRECTORY not in os.environ:
            logger.warning(
                "metrics from this prefork child are not exported; set %s before starting the worker",
                _DIRECTORY,
            )


#: The hook on the default registry.
hook = PrometheusHook()


def serve(port: int, *, address: str = "0.0.0.0") -> Callable[[], None]:  # noqa: S104 - a scraper is elsewhere
    """Answer ``GET /metrics`` from a thread of this process. Call it in a worker's main process, on the signal ``worker_ready``.

    With ``PROMETHEUS_MULTIPROC_DIR`` it answers for all processes that count there, otherwise for this one alone.

    Args:
        port: The port; 0 for any free port.
        address: The address to listen on.

    Returns:
        A function that stops the server.

    Raises:
        OSError: The port is taken.
        ValueError: ``PROMETHEUS_MULTIPROC_DIR`` is not a directory.
    """
    registry = REGISTRY
    if _DIRECTORY in os.environ:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    server, thread = start_http_server(port, address, registry)
    # Children forked later must not keep the port open after this process has ended.
    os.register_at_fork(after_in_child=server.socket.close)
    logger.info("metrics are at http://%s:%d/metrics", *server.server_address[:2])

    def end() -> None:
        server.shutdown()
        server.server_close()
        if thread is not threading.current_thread():
            thread.join()

    return end
