"""The pages that Flower serves for us: the queue log, a message of it, its requeue, and ``/metrics``."""

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
from kombu.exceptions import OperationalError
from prometheus_client import generate_latest
from tornado.web import authenticated

from celery_idempotent.contrib.flower.alarms import alarms, is_abandoned
from celery_idempotent.contrib.flower.duplicates import latest_duplicates
from celery_idempotent.contrib.flower.metrics import Series
from celery_idempotent.contrib.flower.snapshot import LISTED, Figures, legible
from celery_idempotent.contrib.flower.times import ago, span
from celery_idempotent.core.records import FORGOTTEN, MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.core.storable import is_text
from celery_idempotent.errors import IdempotentError
from celery_idempotent.maintenance.requeue import NotRequeued, obstacle, requeue
from celery_idempotent.message.canvas_ids import is_guarded
from celery_idempotent.producer.relay import relay

__all__ = ["MessageView", "Metrics", "QueueLogView", "Requeue"]

logger = get_logger("celery_idempotent")

#: Seconds for a search by a pattern, for a message, and for a requeue, which publishes.
_SEARCH_WITHIN, _FIND_WITHIN, _REQUEUE_WITHIN = 10.0, 5.0, 10.0

#: Seconds for which Flower's own series wait for ours.
_SCRAPE_WITHIN = 2.0

#: So many rows of a search are shown.
_FOUND = 50

#: So much of an error is shown in a list.
_ERROR = 120


class _Page(BaseHandler):  # type: ignore[misc]
    """What the pages for people have in common."""

    def initialize(self, figures: Figures) -> None:
        self.figures = figures

    def prepare(self) -> None:
        """Follow what Flower hears from workers."""
        self.figures.heard.listen(self.application.events.state)

    def given(self, name: str) -> str:
        """Return a parameter of the address as it was given: Flower's ``get_argument`` escapes it, and an id can be any text."""
        values = self.request.query_arguments.get(name)
        return values[-1].decode("utf-8", "replace") if values else ""

    def show(self, template: str, **names: Any) -> None:
        """Render one of our templates."""
        self.render(
            template,
            figures=self.figures,
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
        """Return what the store is called, without its password; nothing before it is open."""
        opened = vars(self.figures.queue_log).get("store")
        return "" if opened is None else repr(opened)

    def _message_url(self, key: MessageKey) -> str:
        return f"{self.reverse_url('queue-log-message')}?{urlencode({'id': key.message_id, 'task': key.task_name})}"

    def _task_url(self, task_id: str | None) -> str | None:
        """Flower's page of a task; ``None`` where Flower has not heard of it, or not any more."""
        if task_id is None or task_id not in self.application.events.state.tasks:
            return None
        return str(self.reverse_url("task", task_id))

    def _requeueable(self, row: Row) -> bool:
        return obstacle(row) is None and row.error != FORGOTTEN


class QueueLogView(_Page):
    """The queue log: what is wrong, what fails, runs, waits and was skipped; and a search by message id."""

    @authenticated
    async def get(self) -> None:
        """Show it. A store that gives no answer makes a page that says so."""
        wanted = self.given("q")
        await self.figures.look()
        found: list[Row] = []
        error: IdempotentError | None = None
        if wanted and self.figures.error is None:
            try:
                if _is_pattern(wanted):
                    found = await self.figures.search(wanted, limit=_FOUND + 1, patience=_SEARCH_WITHIN)
                else:
                    found = await self.figures.ask(lambda: _search(self.figures, wanted), within=_FIND_WITHIN)
            except IdempotentError as failed:
                error = failed
            if len(found) == 1 and not _is_pattern(wanted):
                self.redirect(self._message_url(found[0].key))
                return
        figures, glance = self.figures, self.figures.glance
        failed_rows, held = figures.failed, figures.heard.held()
        # A copy that something waits on has a row of its own, under its Celery id.
        held_ids = {copy.task_id for copy in held}
        waiting = [row for row in (glance.waiting if glance else ()) if row.key.message_id not in held_ids]
        self.show(
            "queue_log.html",
            wanted=wanted,
            found=found[:_FOUND],
            more=len(found) > _FOUND,
            search_error=error,
            failed=failed_rows,
            alarms=[] if glance is None else alarms(glance, failed_rows, waiting, figures.queue_log.settings),
            held=held,
            waiting=waiting,
            duplicates=[] if glance is None else latest_duplicates(glance, figures.heard),
            by_task=_by_task(figures),
        )


class MessageView(_Page):
    """What is known of one message; never its arguments, nor its result."""

    @authenticated
    async def get(self) -> None:
        """Show it."""
        key = MessageKey(self.given("id"), self.given("task"))
        row, error = None, None
        try:
            row = await self.figures.ask(lambda: _find(self.figures, key), within=_FIND_WITHIN)
        except IdempotentError as failed:
            error = failed
        if row is None and error is None:
            self.set_status(HTTPStatus.NOT_FOUND)
        self.show("queue_log_message.html", key=key, row=row, error=error, copies=self.figures.heard.of(key))


class Requeue(BaseApiHandler):  # type: ignore[misc]
    """Has a failed message wait again: ``POST`` with ``message_id`` and ``task_name``.

    It takes what Flower asks of its own calls that change tasks: authentication, or ``FLOWER_UNAUTHENTICATED_API``; no ``--read-only``;
    and no request that another site's page has sent.
    """

    def initialize(self, figures: Figures) -> None:
        """Keep the figures."""
        self.figures = figures

    @authenticated
    async def post(self) -> None:
        """Requeue it, and publish it at once.

        The answer is JSON, or the reason as plain text: 401 without authentication, 403 in read-only mode, 404 for no such message, 409
        for one that is not requeued, 503 from a store that gave no answer.
        """
        if getattr(self.application.options, "read_only", False):
            self._refuse(HTTPStatus.FORBIDDEN, "Read only mode is enabled")
            return
        key = MessageKey(self._given("message_id"), self._given("task_name"))
        try:
            answer = await self.figures.ask(lambda: _requeue(self.figures, key), within=_REQUEUE_WITHIN)
        except IdempotentError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}; look again whether it was requeued")
            return
        self.figures.changed(key)
        if answer is None:
            self._refuse(HTTPStatus.NOT_FOUND, f"No message {key.message_id!r} of task {key.task_name}")
        elif isinstance(answer, NotRequeued):
            self._refuse(HTTPStatus.CONFLICT, f"It stays as it is: {answer.reason}")
        else:
            logger.info("%s was requeued from Flower by %s", key, self._who())
            self.write(answer)

    def _given(self, name: str) -> str:
        values = self.request.body_arguments.get(name)
        return values[-1].decode("utf-8", "replace") if values else ""

    def _who(self) -> str:
        user = self.current_user
        return user if isinstance(user, str) else f"somebody at {self.request.remote_ip}"

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.set_status(status)
        self.set_header("Content-Type", "text/plain; charset=UTF-8")
        self.finish(text)


class Metrics(monitor.Metrics):  # type: ignore[misc]
    """Flower's ``/metrics``, and the queue log's series after its own."""

    def initialize(self, figures: Figures) -> None:
        """Keep the figures."""
        self.figures = figures
        self.series = Series(figures)

    async def get(self) -> None:
        """Show both; a store that gives no answer is a series."""
        self.figures.heard.listen(self.application.events.state)
        await self.figures.look(patience=_SCRAPE_WITHIN)
        await super().get()
        self.write(generate_latest(self.series.registry))


# -- in threads ----------------------------------------------------------------------------------------------------------


def _search(figures: Figures, wanted: str) -> list[Row]:
    """Return the rows of a message id. By its key: in Redis whatever else finds it reads the whole log."""
    names = {name for name, task in figures.queue_log.app.tasks.items() if is_guarded(task)}
    names |= {count.task_name for count in (figures.counted.counts if figures.counted else ())}
    found = (_find(figures, MessageKey(wanted, name)) for name in sorted(names))
    return [row for row in found if row is not None]


def _find(figures: Figures, key: MessageKey) -> Row | None:
    store = figures.store()
    if store is None or not (is_text(key.message_id) and is_text(key.task_name)):  # what could not be kept is not there
        return None
    row = store.find(key)
    return None if row is None else legible([row])[0]


def _is_pattern(wanted: str) -> bool:
    return "*" in wanted or "?" in wanted


def _requeue(figures: Figures, key: MessageKey) -> dict[str, Any] | NotRequeued | None:
    """Return what was done: as JSON if it waits again."""
    queue_log, row = figures.queue_log, _find(figures, key)
    if row is None:
        return None
    if row.error == FORGOTTEN and obstacle(row) is None:
        return NotRequeued(key, "it was forgotten")
    done = requeue(queue_log, row)
    if isinstance(done, NotRequeued):
        return done
    said = {"message_id": key.message_id, "task_name": key.task_name, "task_id": done.task_id}
    try:
        relay(queue_log)
    except (IdempotentError, OperationalError):
        return {**said, "message": "It waits again; the broker has not got it yet, and a worker publishes it later."}
    renamed = f" Its task id is {done.task_id} now: workers remember the old one as discarded." if done.renamed else ""
    return {**said, "message": f"It waits again.{renamed}"}


# -- what is shown -------------------------------------------------------------------------------------------------------


def _requeue_off(options: Any) -> str | None:
    """Why nobody may requeue here; ``None`` if one may. Flower's own rule for calls that change tasks."""
    if getattr(options, "read_only", False):
        return "Flower is in read-only mode"
    if options.basic_auth or options.auth or strtobool(os.environ.get("FLOWER_UNAUTHENTICATED_API") or "false"):
        return None
    return "Flower takes no changes without authentication: --basic-auth, --auth, or FLOWER_UNAUTHENTICATED_API=true"


def _short(error: str | None) -> str:
    first = (error or "").strip().partition("\n")[0]
    return first if len(first) <= _ERROR else f"{first[: _ERROR - 1]}…"


def _by_task(figures: Figures) -> Mapping[str, Mapping[str, int]]:
    """Lay the counts out as a table: task by task, status by status."""
    table: dict[str, dict[str, int]] = {}
    for count in figures.counted.counts if figures.counted else ():
        row = table.setdefault(
            count.task_name, dict.fromkeys(("pending", "processing", "success", "failure", "duplicates"), 0)
        )
        done = count.status is Status.DONE and count.processed_status is not None
        row[str(count.processed_status) if done else str(count.status)] += count.rows
        row["duplicates"] += count.duplicates
    return table
