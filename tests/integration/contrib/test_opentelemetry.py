"""Spans: a duplicate's span links to the span in which the original was sent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, format_span_id, format_trace_id

from celery_idempotent.contrib.opentelemetry import OpenTelemetryHook
from celery_idempotent.maintenance.rescue import Rescue
from tests.conftest import attach_log
from tests.support.apps import traced
from tests.support.deployment import unique
from tests.support.servers import skip_if_not_installed
from tests.support.shared_workers import SharedWorker, open_shared_worker
from tests.support.waiting import TIMEOUT, wait_until


@dataclass
class Traced:
    """A shared worker whose spans are kept: those of this process in memory, those of the worker in a file."""

    shared_worker: SharedWorker
    app: Celery
    provider: TracerProvider
    memory: InMemorySpanExporter
    path: Path

    @contextmanager
    def span(self, name: str) -> Iterator[SpanContext]:
        """Yield a span of the caller's, a request say."""
        with self.provider.get_tracer("a caller").start_as_current_span(name) as span:
            yield span.get_span_context()

    def here(self, name: str, message_id: str) -> ReadableSpan:
        """Return the only span of this process of that name about a message."""
        (found,) = (
            span
            for span in self.memory.get_finished_spans()
            if span.name == name and (span.attributes or {})["celery_idempotent.message_id"] == message_id
        )
        return found

    def in_worker(self, name: str, message_id: str) -> dict[str, Any]:
        """Return the first span of the worker of that name about a message, once it is there."""
        key = "celery_idempotent.message_id"
        return wait_until(
            lambda: next(
                (s for s in self.spans() if s["name"] == name and s["attributes"].get(key) == message_id), None
            ),
            describe=lambda: f"a span {name!r} of {message_id}: {[s['name'] for s in self.spans()]}",
        )

    def parent_of(self, span: dict[str, Any]) -> dict[str, Any]:
        """Return the span of the worker that a span is within, once that has ended."""
        return wait_until(
            lambda: next((s for s in self.spans() if s["context"]["span_id"] == span["parent_id"]), None),
            describe=lambda: f"the parent of {span}",
        )

    def spans(self) -> list[dict[str, Any]]:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def _traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    directory = Path(tmp_path_factory.mktemp("traced"))
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    settings = {
        "idempotent_hooks": ["tests.support.apps.traced.hook"],
        "idempotent_recovery_interval": 0,
        "idempotent_lease": 5.0,
    }
    tasks = ("tests.support.apps.generic", "tests.support.apps.traced")
    path = directory / "spans.jsonl"
    environment = {traced.VARIABLE: str(path)}
    with (
        skip_if_not_installed(),
        open_shared_worker(directory, tasks, settings=settings, environment=environment) as shared_worker,
    ):
        app = shared_worker.producer(idempotent_hooks=[OpenTelemetryHook(provider)])
        yield Traced(shared_worker, app, provider, memory, path)


@pytest.fixture
def site(request: pytest.FixtureRequest, _traced: Traced) -> Traced:
    attach_log(request, "the worker", _traced.shared_worker.worker.log_tail)
    return _traced


@pytest.fixture
def instrumented(site: Traced) -> Iterator[None]:
    """Give this process Celery's own spans too, as the worker has them."""
    instrumentor = CeleryInstrumentor()  # type: ignore[no-untyped-call]
    instrumentor.instrument(tracer_provider=site.provider)
    yield
    instrumentor.uninstrument()


def linked(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def ids(context: SpanContext) -> tuple[int, int]:
    return context.trace_id, context.span_id


def written(context: SpanContext) -> list[tuple[str, str]]:
    """Return a link to a span, as it is written."""
    return [("0x" + format_trace_id(context.trace_id), "0x" + format_span_id(context.span_id))]


def links_of(span: dict[str, Any]) -> list[tuple[str, str]]:
    return [(link["context"]["trace_id"], link["context"]["span_id"]) for link in span["links"]]


def test_a_duplicates_span_is_its_callers_and_links_to_the_original(site: Traced) -> None:
    """While the original waits or runs, and when it has ended, in either way."""
    m, failed, gate = unique(), unique(), site.shared_worker.path("gate")
    gated, fail = site.app.tasks["gated"], site.app.tasks["fail"]
    with site.span("first") as first:
        gated.apply_async((gate,), message_id=m)
        fail.apply_async(message_id=failed)
    with site.span("while it waits or runs"):
        gated.apply_async((gate,), message_id=m)
    assert linked(site.here("duplicate gated", m)) == [ids(first)]
    site.memory.clear()

    Path(gate).touch()
    site.shared_worker.wait_until_done("gated", m)
    site.shared_worker.wait_until_done("fail", failed)
    with site.span("when it is done") as second:
        gated.apply_async((gate,), message_id=m)
        fail.apply_async(message_id=failed)
    for name, of in (("duplicate gated", m), ("duplicate fail", failed)):
        span = site.here(name, of)
        assert linked(span) == [ids(first)]
        assert span.parent is not None
        assert (span.parent.trace_id, span.parent.span_id) == ids(second)
        assert span.attributes is not None
        assert span.attributes["celery_idempotent.status"] == "done"
        assert span.attributes["celery_idempotent.reason"] == "return_first"


def test_a_copy_in_the_worker_is_linked_within_celerys_span(site: Traced, instrumented: None) -> None:
    m, gate = unique(), site.shared_worker.path("gate")
    with site.span("first") as first:
        result = site.app.tasks["gated"].apply_async((gate,), message_id=m)
    site.shared_worker.wait_for_starts("gated", m)
    site.shared_worker.deliver("gated", (gate,), message_id=m, task_id=result.id)
    held = site.in_worker("held gated", m)
    Path(gate).touch()
    skipped = site.in_worker("skipped gated", m)

    for span in (held, skipped):
        assert links_of(span) == written(first)
        assert site.parent_of(span)["name"] == "run/gated"
        assert span["attributes"]["celery_idempotent.first_task_id"] == result.id


def test_other_outcomes_are_events_of_celerys_spans(site: Traced, instrumented: None) -> None:
    m = unique()
    with site.span("first") as first:
        site.app.tasks["echo"].apply_async(("a secret",), message_id=m)
    site.shared_worker.wait_until_done("echo", m)

    def run() -> dict[str, Any] | None:
        return next((s for s in site.spans() if s["attributes"].get("celery.task_name") == "echo" and has(s)), None)

    def has(span: dict[str, Any]) -> bool:
        return any(event["attributes"].get("celery_idempotent.message_id") == m for event in span["events"])

    span = wait_until(run, describe="the span of the run")
    assert span["context"]["trace_id"] == "0x" + format_trace_id(first.trace_id)
    assert [event["name"] for event in span["events"]] == ["celery_idempotent.claimed", "celery_idempotent.completed"]
    assert span["events"][1]["attributes"]["celery_idempotent.ran_seconds"] > 0
    assert "a secret" not in json.dumps(span["events"])
    (caller,) = (one for one in site.memory.get_finished_spans() if one.context == first)
    assert [event.name for event in caller.events] == ["celery_idempotent.recorded"]


def test_without_a_callers_span_it_links_to_the_publication(site: Traced, instrumented: None) -> None:
    m = unique()
    first = site.app.tasks["echo"].apply_async(message_id=m)
    site.shared_worker.wait_until_done("echo", m)
    site.app.tasks["echo"].apply_async(message_id=m)

    (published,) = (
        span
        for span in site.memory.get_finished_spans()
        if span.name == "apply_async/echo" and (span.attributes or {}).get("messaging.message.id") == first.id
    )
    assert published.context is not None
    assert linked(site.here("duplicate echo", m)) == [ids(published.context)]


def test_a_duplicate_without_a_result_names_the_original_and_has_no_link(site: Traced) -> None:
    m = unique()
    unkept = site.app.tasks["traced.unkept"]
    with site.span("first"):
        first = unkept.apply_async(message_id=m)
    site.shared_worker.wait_until_done("traced.unkept", m)
    unkept.apply_async(message_id=m)

    span = site.here("duplicate traced.unkept", m)
    assert span.links == ()
    assert span.attributes is not None
    assert span.attributes["celery_idempotent.first_task_id"] == first.id


def test_the_global_provider_may_be_set_after_the_hook_was_made() -> None:
    """As in a prefork worker, which imports its hooks before it forks, and sets its provider up in each child."""
    script = """
from celery_idempotent.contrib.opentelemetry import hook
from celery_idempotent.hooks import Outcome, OutcomeKind
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
skipped = Outcome(kind=OutcomeKind.SKIPPED, task_name="t", message_id="m")
hook(skipped)
memory, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)
hook(skipped)
print([span.name for span in memory.get_finished_spans()])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['skipped t']"


def test_a_retry_and_what_is_published_from_its_row_keep_the_span(site: Traced) -> None:
    m, queue = unique(), unique("queue")
    with site.span("first") as first:
        site.app.tasks["retry_n"].apply_async((1,), message_id=m, queue=queue)
    with site.app.connection_for_write() as connection:
        assert connection.default_channel.queue_purge(queue) == 1
    Rescue.of(site.app.queue_log).publish_waiting(0.0)
    assert linked(site.here("recovered retry_n", m)) == [ids(first)]

    control = site.shared_worker.app.control
    control.add_consumer(queue, reply=True, timeout=TIMEOUT, limit=1)
    assert site.shared_worker.wait_until_done("retry_n", m).attempt == 1
    control.cancel_consumer(queue, reply=True, timeout=TIMEOUT, limit=1)
    site.app.tasks["retry_n"].apply_async((1,), message_id=m)
    assert linked(site.here("duplicate retry_n", m)) == [ids(first)]
