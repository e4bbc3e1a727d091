"""The pages in Flower: the queue log, one message, its requeue, and ``/metrics``."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from celery.utils.log import get_logger
from flower.api import BaseApiHandler
from flower.utils import strtobool
from flower.views import BaseHandler, monitor
from prometheus_client import generate_latest
from tornado.web import authenticated

from celery_idempotent.contrib.flower.alarms import alarms, is_abandoned
from celery_idempotent.contrib.flower.duplicates import latest_duplicates
from celery_idempotent.contrib.flower.metrics import Series
from celery_idempotent.contrib.flower.snapshot import LISTED, Snapshot, legible
from celery_idempotent.contrib.flower.times import ago, span
from celery_idempotent.core.records import MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.errors import IdempotentError, RefusedError
from celery_idempotent.maintenance.requeue import obstacle
from celery_idempotent.message.canvas_ids import is_guarded

__all__ = ["MessageView", "Metrics", "QueueLogView", "Requeue"]

logger = get_logger("celery_idempotent")

#: Seconds for a search by a pattern, for finding a message, and for a requeue, which publishes.
_SEARCH_WITHIN, _FIND_WITHIN, _REQUEUE_WITHIN = 10.0, 5.0, 10.0

#: Seconds for which Flower's own series wait for ours.
_SCRAPE_WITHIN = 2.0

#: How many rows of a search are shown.
_FOUND = 50

#: How many characters of an error are shown in a list.
_ERROR = 120


class _Page(BaseHandler):  # type: ignore[misc]
    """The base of the pages for people."""

    def initialize(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def prepare(self) -> None:
        """Listen to the workers' events that Flower receives."""
        self.snapshot.event_log.listen(self.application.events.state)

    def given(self, name: str) -> str:
        """Return a parameter of the URL unchanged. Flower's ``get_argument`` escapes it, but an id can be any text."""
        values = self.request.query_arguments.get(name)
        return values[-1].decode("utf-8", "replace") if values else ""

    def show(self, template: str, **names: Any) -> None:
        """Render one of our templates."""
        self.render(
            template,
            snapshot=self.snapshot,
            store=self._store(),
            ago=ago,
            span=span,
            short=_short,
            is_abandoned=is_abandoned,
            message_url=self._message_url,
            task_url=self._task_url,
            requeueable=self._requeueable,
            requeue_off=_requeue_off(self.application.options),
            refresh=bool(self.application.options.auto_refresh),
            limit=LISTED,
            Status=Status,
            ProcessedStatus=ProcessedStatus,
            time=time.monotonic,
            clock=lambda: datetime.now(UTC),
            **names,
        )

    def _store(self) -> str:
        """Return the store's name, without its password; empty until it is open."""
        opened = vars(self.snapshot.queue_log).get("store")
        return "" if opened is None else repr(opened)

    def _message_url(self, key: MessageKey) -> str:
        return f"{self.reverse_url('queue-log-message')}?{urlencode({'id': key.message_id, 'task': key.task_name})}"

    def _task_url(self, task_id: str | None) -> str | None:
        """Return the URL of Flower's page for a task; ``None`` if Flower does not know the task, or has forgotten it."""
        if task_id is None or task_id not in self.application.events.state.tasks:
            return None
        return str(self.reverse_url("task", task_id))

    def _requeueable(self, row: Row) -> bool:
        return obstacle(row) is None


class QueueLogView(_Page):
    """The queue log: alarms; messages that failed, run, wait or were skipped; and a search by message id."""

    @authenticated
    async def get(self) -> None:
        """Show the page. If the store does not answer, the page says so."""
        wanted = self.given("q")
        await self.snapshot.look()
        found: list[Row] = []
        error: IdempotentError | None = None
        if wanted and self.snapshot.error is None:
            try:
                if _is_pattern(wanted):
                    found = await self.snapshot.search(wanted, limit=_FOUND + 1, patience=_SEARCH_WITHIN)
                else:
                    found = await self.snapshot.ask(lambda: _search(self.snapshot, wanted), within=_FIND_WITHIN)
            except IdempotentError as failed:
                error = failed
            if len(found) == 1 and not _is_pattern(wanted):
                self.redirect(self._message_url(found[0].key))
                return
        snapshot, glance = self.snapshot, self.snapshot.glance
        failed_rows, held = snapshot.failed, snapshot.event_log.held()
        # A copy with a waiting caller or canvas has a row of its own, under its Celery id.
        held_ids = {copy.task_id for copy in held}
        waiting = [row for row in (glance.waiting if glance else ()) if row.key.message_id not in held_ids]
        self.show(
            "queue_log.html",
            wanted=wanted,
            found=found[:_FOUND],
            more=len(found) > _FOUND,
            search_error=error,
            failed=failed_rows,
            alarms=[] if glance is None else alarms(glance, failed_rows, waiting, snapshot.queue_log.settings),
            held=held,
            waiting=waiting,
            duplicates=[] if glance is None else latest_duplicates(glance, snapshot.event_log),
            by_task=_by_task(snapshot),
        )


class MessageView(_Page):
    """One message, without its arguments and its result."""

    @authenticated
    async def get(self) -> None:
        """Show the page."""
        key = MessageKey(self.given("id"), self.given("task"))
        row, error = None, None
        try:
            row = await self.snapshot.ask(lambda: _find(self.snapshot, key), within=_FIND_WITHIN)
        except IdempotentError as failed:
            error = failed
        if row is None and error is None:
            self.set_status(HTTPStatus.NOT_FOUND)
        self.show("queue_log_message.html", key=key, row=row, error=error, copies=self.snapshot.event_log.of(key))


class Requeue(BaseApiHandler):  # type: ignore[misc]
    """Requeue a failed message: ``POST`` with ``message_id`` and ``task_name``.

    It requires what Flower requires for changes of tasks: authentication, or ``FLOWER_UNAUTHENTICATED_API``; no ``--read-only``; and no
    request from another site's page.
    """

    def initialize(self, snapshot: Snapshot) -> None:
        """Keep the snapshot."""
        self.snapshot = snapshot

    @authenticated
    async def post(self) -> None:
        """Requeue the message, and publish it at once.

        The answer is JSON, or the reason as plain text: 401 without authentication, 403 in read-only mode, 404 for an unknown message, 409
        for one that cannot be requeued, 503 if the store does not answer.
        """
        if getattr(self.application.options, "read_only", False):
            self._refuse(HTTPStatus.FORBIDDEN, "Read only mode is enabled")
            return
        key = MessageKey(self._given("message_id"), self._given("task_name"))
        try:
            answer = await self.snapshot.ask(lambda: _requeue(self.snapshot, key), within=_REQUEUE_WITHIN)
        except RefusedError as error:
            self.snapshot.changed(key)
            self._refuse(HTTPStatus.CONFLICT, f"Not requeued: {error.reason}")
            return
        except IdempotentError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}; check whether it was requeued")
            return
        self.snapshot.changed(key)
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"No message {key.message_id!r} of task {key.task_name}")
        else:
            logger.info("%s was requeued from Flower by %s", key, self._who())
            self.write(answer)

    def _given(self, name: str) -> str:
        values = self.request.body_arguments.get(name)
        return values[-1].decode("utf-8", "replace") if values else ""

    def _who(self) -> str:
        user = self.current_user
        return user if isinstance(user, str) else f"a user at {self.request.remote_ip}"

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(text)


class Metrics(monitor.Metrics):  # type: ignore[misc]
    """Flower's ``/metrics``, and the queue log's series after its own."""

    def initialize(self, snapshot: Snapshot) -> None:
        """Keep the snapshot."""
        self.snapshot = snapshot
        self.series = Series(snapshot)

    async def get(self) -> None:
        """Show both. Whether the store answers is a series too."""
        self.snapshot.event_log.listen(self.application.events.state)
        await self.snapshot.look(patience=_SCRAPE_WITHIN)
        await super().get()
        self.write(generate_latest(self.series.registry))


# -- in threads ----------------------------------------------------------------------------------------------------------


def _search(snapshot: Snapshot, wanted: str) -> list[Row]:
    """Return the rows of a message id, by key, because any other search in Redis reads the whole log."""
    names = {name for name, task in snapshot.queue_log.app.tasks.items() if is_guarded(task)}
    names |= {count.task_name for count in (snapshot.counted.counts if snapshot.counted else ())}
    found = (_find(snapshot, MessageKey(wanted, name)) for name in sorted(names))
    return [row for row in found if row is not None]


def _find(snapshot: Snapshot, key: MessageKey) -> Row | None:
    row = _found(snapshot, key)
    return None if row is None else legible([row])[0]


def _found(snapshot: Snapshot, key: MessageKey) -> Row | None:
    return None if snapshot.store() is None else snapshot.queue_log.find_id(key.task_name, key.message_id)


def _is_pattern(wanted: str) -> bool:
    return "*" in wanted or "?" in wanted


def _requeue(snapshot: Snapshot, key: MessageKey) -> dict[str, Any] | None:
    """Requeue a message; return a JSON object, or ``None`` if there is no such message.

    Raises:
        RefusedError: It cannot be requeued.
    """
    row = _found(snapshot, key)
    if row is None:
        return None
    done = snapshot.queue_log.requeue(row)
    text = "It waits again."
    if not done.published:
        text += " The broker does not have it yet; a worker will publish it."
    elif done.renamed:
        text += f" Its task id is now {done.task_id}, because workers remember the old one as discarded."
    return {"message_id": key.message_id, "task_name": key.task_name, "task_id": done.task_id, "message": text}


# -- what is shown -------------------------------------------------------------------------------------------------------


def _requeue_off(options: Any) -> str | None:
    """Return why requeuing is off; ``None`` if it is on. The rule is Flower's own for changes of tasks."""
    if getattr(options, "read_only", False):
        return "Flower is in read-only mode"
    if options.basic_auth or options.auth or strtobool(os.environ.get("FLOWER_UNAUTHENTICATED_API") or "false"):
        return None
    return (
        "Flower allows no changes without authentication: set --basic-auth, --auth, or FLOWER_UNAUTHENTICATED_API=true"
    )


def _short(error: str | None) -> str:
    first = (error or "").strip().partition("\n")[0]
    return first if len(first) <= _ERROR else f"{first[: _ERROR - 1]}…"


def _by_task(snapshot: Snapshot) -> Mapping[str, Mapping[str, int]]:
    """Return the counts as a table, by task and status."""
    table: dict[str, dict[str, int]] = {}
    for count in snapshot.counted.counts if snapshot.counted else ():
        row = table.setdefault(
            count.task_name, dict.fromkeys(("pending", "processing", "success", "failure", "duplicates"), 0)
        )
        done = count.status is Status.DONE and count.processed_status is not None
        row[str(count.processed_status) if done else str(count.status)] += count.rows
        row["duplicates"] += count.duplicates
    return table
