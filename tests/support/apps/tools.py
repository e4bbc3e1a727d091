"""Tasks among what others put between Celery and a task: mixins of Celery's own, and tools that patch it or listen to its signals."""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from celery import Celery, Task
from celery.contrib.abortable import AbortableTask
from celery.contrib.django.task import DjangoTask

from tests.support.apps.outcomes import first
from tests.support.ledger import Ledger

__all__ = ["NAMES", "VARIABLE", "register"]

#: Names the file in which each tool of a worker notes what it saw. Without it no tool is installed.
VARIABLE = "CELERY_IDEMPOTENT_TEST_TOOLS"

#: The tasks: each mixin before and after the base, and the base alone.
NAMES = ("abortable.first", "abortable.last", "django.first", "django.last", "alone")


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register ``tools.<name>`` for each of ``NAMES``, and install the tools."""
    if os.environ.get(VARIABLE):
        _sentry()
        _opentelemetry()
        _structlog(app)
        import celery_progress.tasks  # noqa: F401 - listens to a signal

    bases = [(AbortableTask, base), (base, AbortableTask), (DjangoTask, base), (base, DjangoTask), (base,)]
    for name, given in zip(NAMES, bases, strict=True):
        own = tuple(dict.fromkeys(cls for cls in given if cls is not Task)) or (Task,)
        _register_body(app, type("Derived", own, {"abstract": True}), ledger, f"tools.{name}")


def _register_body(app: Celery, cls: type[Task], ledger: Ledger, name: str) -> None:
    @app.task(base=cls, bind=True, name=name, max_retries=5)
    def body(self: Any, flag: str = "") -> list[Any]:
        from celery_progress.backend import ProgressRecorder

        with ledger.run(self):
            if flag and first(flag):
                raise self.retry(countdown=0)
            ProgressRecorder(self).set_progress(1, 2)
            return [self.AsyncResult(self.request.id).state, getattr(self, "is_aborted", bool)()]


def _note(*words: object) -> None:
    with Path(os.environ[VARIABLE]).open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def _sentry() -> None:
    import sentry_sdk
    from sentry_sdk.envelope import Envelope
    from sentry_sdk.integrations.celery import CeleryIntegration
    from sentry_sdk.transport import Transport

    class Notes(Transport):
        def capture_envelope(self, envelope: Envelope) -> None:
            for item in envelope.items:
                event = item.payload.json or {}
                if item.type == "transaction":
                    _note("sentry", event["transaction"], event["tags"]["celery_task_id"])

    sentry_sdk.init(
        "http://key@127.0.0.1:1/1",
        integrations=[CeleryIntegration()],
        default_integrations=False,
        traces_sample_rate=1.0,
        transport=Notes,
    )


def _opentelemetry() -> None:
    from opentelemetry.instrumentation.celery import CeleryInstrumentor
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

    class Notes(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            for span in spans:
                _note("opentelemetry", span.name, (span.attributes or {}).get("messaging.message.id"))
            return SpanExportResult.SUCCESS

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(Notes()))
    instrumentor: Any = CeleryInstrumentor()  # type: ignore[no-untyped-call]
    instrumentor.instrument(tracer_provider=provider)


def _structlog(app: Celery) -> None:
    import structlog
    from django.conf import settings

    def note(_: Any, __: str, event: MutableMapping[str, Any]) -> str:
        _note("structlog", event["event"], event.get("task_id"))
        raise structlog.DropEvent

    settings.configure()
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, note])
    from django_structlog.celery.steps import DjangoStructLogInitStep

    app.steps["worker"].add(DjangoStructLogInitStep)
