"""Report outcomes as spans and events of OpenTelemetry; needs the extra ``opentelemetry``.

``idempotent_hooks = ["celery_idempotent.contrib.opentelemetry.hook"]`` adds to the traces that an app already has, for example from
``opentelemetry-instrumentation-celery``. A duplicate becomes a child of the current span, with a link to the span in which the original
was sent. All other outcomes become events of the current span.
"""

from __future__ import annotations

import time
from dataclasses import fields

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.hooks import Outcome, OutcomeKind

try:
    from opentelemetry.trace import Link, TracerProvider, get_current_span, get_tracer
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError as error:
    raise ConfigurationError(
        "this hook needs opentelemetry-api: pip install 'celery-idempotent[opentelemetry]'"
    ) from error

__all__ = ["OpenTelemetryHook", "hook"]

_NAMESPACE = "celery_idempotent"

#: The attributes for an outcome's fields; names of durations end in the unit.
_ATTRIBUTES = {
    field.name: f"{_NAMESPACE}.{field.name}{'_seconds' if field.name in {'store', 'ran', 'age', 'delay'} else ''}"
    for field in fields(Outcome)
    if field.name not in {"kind", "trace"}
}

#: Outcomes that concern another message or delivery, which may be in another trace.
_LINKED = frozenset(
    (
        OutcomeKind.DUPLICATE,
        OutcomeKind.HELD,
        OutcomeKind.MISMATCHED,
        OutcomeKind.RECOVERED,
        OutcomeKind.REPLAYED,
        OutcomeKind.SKIPPED,
        OutcomeKind.TAKEN_OVER,
    )
)

_TRACE_CONTEXT = TraceContextTextMapPropagator()


class OpenTelemetryHook:
    """A hook that traces.

    The span in which a message was sent is kept in its row and in its header: 55 bytes. After a success it is kept in the stored result.
    With ``keep_result=False`` there is no stored result, so later duplicates have no link.

    Args:
        tracer_provider: The provider of the tracer. By default the global one, even if that is set later.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = get_tracer(_NAMESPACE, tracer_provider=tracer_provider)

    def traceparent(self) -> str | None:
        """Return the current span, as W3C trace context."""
        carrier: dict[str, str] = {}
        _TRACE_CONTEXT.inject(carrier)
        return carrier.get("traceparent")

    def __call__(self, outcome: Outcome, /) -> None:
        """Record an outcome."""
        attributes = {
            "celery_idempotent.outcome": outcome.kind.value,
            **{key: value for name, key in _ATTRIBUTES.items() if (value := getattr(outcome, name)) is not None},
        }
        if outcome.kind in _LINKED:
            now = time.time_ns()
            span = self._tracer.start_span(
                f"{outcome.kind.value} {outcome.task_name}",
                links=_links(outcome.trace),
                attributes=attributes,
                start_time=now - int((outcome.store or 0.0) * 1e9),
            )
            span.end(now)
            return
        current = get_current_span()
        if current.is_recording():
            current.add_event(f"{_NAMESPACE}.{outcome.kind.value}", attributes)


def _links(traceparent: str | None) -> list[Link]:
    if traceparent is None:
        return []
    original = get_current_span(_TRACE_CONTEXT.extract({"traceparent": traceparent})).get_span_context()
    return [Link(original)] if original.is_valid else []


#: The hook on the global tracer provider.
hook = OpenTelemetryHook()
