"""Write a process's spans, Celery's and our hook's, to the file that an environment variable names."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from celery import Celery, Task
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from celery_idempotent.contrib.opentelemetry import OpenTelemetryHook
from tests.support.ledger import Ledger

__all__ = ["VARIABLE", "hook", "register"]

VARIABLE = "CELERY_IDEMPOTENT_TEST_SPANS"


class _File(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.writelines(json.dumps(json.loads(span.to_json())) + "\n" for span in spans)
        return SpanExportResult.SUCCESS


_provider = TracerProvider()
_provider.add_span_processor(SimpleSpanProcessor(_File()))
hook = OpenTelemetryHook(_provider)


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Register a task that keeps no result, and instrument Celery in this process if that writes spans."""
    if os.environ.get(VARIABLE):
        instrumentor: Any = CeleryInstrumentor()  # type: ignore[no-untyped-call]
        instrumentor.instrument(tracer_provider=_provider)

    @app.task(base=base, name="traced.unkept", keep_result=False)
    def unkept() -> str:
        return "not kept"
