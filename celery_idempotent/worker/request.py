"""The worker's side of a request: what its main process learns of a child that can no longer speak for itself."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import states
from celery.exceptions import InvalidTaskError, Terminated, TimeLimitExceeded, WorkerLostError
from celery.worker.request import Request
from celery.worker.state import active_requests

from celery_idempotent.core.records import ABANDONED, MessageKey, NewMessage, Owner, ProcessedStatus, Status
from celery_idempotent.core.storable import LONGEST, is_text
from celery_idempotent.errors import StoreError
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.canvas_ids import fix_callbacks
from celery_idempotent.message.header import Header
from celery_idempotent.message.identity import Identity, identity_of_sent
from celery_idempotent.message.serialization import UndecodableError, decode_result, encode_message, serializer_of
from celery_idempotent.producer.identify import identify
from celery_idempotent.worker.celery_versions import acknowledges_timeouts, retries_lost_workers
from celery_idempotent.worker.delivery import describe, worker_label
from celery_idempotent.worker.discards import REVOKED, discard
from celery_idempotent.worker.events import announce
from celery_idempotent.worker.lease_renewal import LeaseRenewer, RenewedLease

__all__ = ["IdempotentRequest", "running"]

logger = logging.getLogger("celery_idempotent")


#: Why a row failed whose body was terminated by ``revoke(terminate=True)``.
TERMINATED = "revoked: it was terminated while it ran"


class IdempotentRequest(Request):  # type: ignore[misc]
    """Celery's request, which also ends the claim of a child that died, was killed at its time limit or was terminated.

    Its writes are asked once: it runs in the worker's event loop, which must not wait for a store that is down. A claim that could
    not be ended runs out with its lease.
    """

    #: Who claims the message, once it was accepted; and what is kept alive for it from here, if that is a child.
    owner: Owner | None = None
    held: RenewedLease | None = None

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        # For whoever publishes it again: the pool's process is not told.
        known = {"content_type": message.content_type, "compression": (message.headers or {}).get("compression")}
        content = {name: value for name, value in known.items() if value is not None}
        if message.properties is None or isinstance(message.properties, Mapping):
            self.request_dict["properties"] = {**(message.properties or {}), **content}
        if not is_text(self.id):
            # There is no result under such an id, and one that cannot be hashed ends the worker: Celery rejects the message at once.
            raise InvalidTaskError(
                f"a task id is text of at most {LONGEST} characters without NUL, not {self.id!a:.80}"
            )

    @cached_property
    def identity(self) -> Identity | None:
        """By what the message is known, by what was sent: Celery's context of a request takes long to make.

        ``None`` for a message that no store can keep: whoever is to run it refuses it, and there is no claim on it.
        """
        sent = self.request_dict
        headers = sent.get("headers")
        try:
            return identity_of_sent(
                self.task,
                self.id,
                properties=sent.get("properties"),
                headers=sent if headers is None else headers,
                args=self.args,
                kwargs=self.kwargs,
                exchange=self.delivery_info.get("exchange"),
                node=self.hostname,
            )
        except Exception as refused:  # noqa: BLE001 - a callable of the user's may raise anything; its run says so
            logger.debug("%s is refused where it is run: %r", self.id, refused)
            return None

    @property
    def key(self) -> MessageKey | None:
        """The key of the message's row."""
        return None if self.identity is None else self.identity.key

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Learn who claims the message: the body is about to be run, by a child or here.

        A child's lease is kept alive from here as well, for a body that holds the child's GIL.
        """
        # Where there are no children, Celery calls this in the thread that runs the body. Its pid is then the process's or, with
        # greenlets, the thread's.
        here = pid in (os.getpid(), threading.get_ident())
        queue_log, key, queue = self.task.queue_log, self.key, self.delivery_info["routing_key"]
        if key is not None:
            self.owner = Owner(key, worker_label(self.hostname, None if here else pid))
            self.held = None if here else RenewedLease(self.owner, self.task.idempotency.lease, pid)
        super().on_accepted(pid, time_accepted)
        if key is not None and is_text(queue):
            Rescue.of(queue_log).saw(queue, key)
        if self.held is not None:
            LeaseRenewer.of(queue_log).hold_for_child(self.held, _children)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """End the message as a failure at its hard limit, or give it back when a timeout is not to be acknowledged."""
        fix_callbacks(self._context)
        super().on_timeout(soft, timeout)
        if soft:
            return
        if self.task.acks_late and not acknowledges_timeouts(self.task):
            self._end("release", self.task.queue_log.store.release)
        else:
            self._fail(describe(TimeLimitExceeded(timeout)))

    def on_failure(self, exc_info: ExceptionInfo, send_failed_event: bool = True, return_ok: bool = False) -> Any:
        """End the claim of a lost child at once, before its message goes back to the broker."""
        fix_callbacks(self._context)
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if not return_ok and isinstance(error, (Terminated, WorkerLostError, SystemExit, KeyboardInterrupt)):
            cancelled = self._already_cancelled and not self._already_revoked
            if self._already_revoked or (isinstance(error, Terminated) and not cancelled):
                self._end_terminated()
            elif cancelled:
                # Celery tells its caller that it will run again; whether it does is for its next delivery to decide, and to say.
                self._end("expire", self.task.queue_log.store.expire)
            elif self._had_succeeded():
                return None
            else:
                self._lost()
        announce(self, error)
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """End the claim of a body that was terminated: in this process, it says nothing when it ends."""
        super()._announce_revoked(reason, terminated, signum, expired)
        if terminated and self.owner is not None and not self._held_until_gone():
            self._end_terminated()

    def _announce_cancelled(self, **options: Any) -> None:
        """End the claim of a body that was stopped because the connection to the broker broke: it runs again."""
        super()._announce_cancelled(**options)
        if not self._held_until_gone():
            self._end("expire", self.task.queue_log.store.expire)

    def _held_until_gone(self) -> bool:
        """Have the claim of a child that was told to end follow the child; whether there is one.

        Celery 5.5's pool forgets what it runs when the connection breaks: then nobody calls :meth:`on_failure`.
        """
        if self.held is None:
            return False
        LeaseRenewer.of(self.task.queue_log).hold_until_gone(self.held)
        return True

    def _end_terminated(self) -> None:
        if not self._fail(TERMINATED, OutcomeKind.CANCELLED):
            discard(self.task, self._context, REVOKED)  # it ended before it claimed

    def _had_succeeded(self) -> bool:
        """Return whether the row of a lost child says success, so that it was lost before Celery stored the result: that is done from here."""
        store, key = self.task.queue_log.store, self.key
        if key is None:
            return False
        try:
            row = store.find(key)
            if row is None or row.processed_status is not ProcessedStatus.SUCCESS or row.status is not Status.DONE:
                return False
            if self.owner is None or row.worker != self.owner.worker or row.result is None:
                return False
            value = decode_result(self.app, row.result)
        except (StoreError, UndecodableError) as error:
            logger.error("cannot tell whether %s had succeeded: %s", self, error)
            return False
        logger.warning("%s had succeeded when its process was lost", self)
        if not self.ignore_result:
            self.task.backend.store_result(self.id, value, states.SUCCESS, request=self._context)
        self.on_success((False, value, 0.0))
        return True

    def _lost(self) -> None:
        task = self.task
        # As Celery decides it: the next attempt is sent from here, after this, and moves the row on.
        retried = retries_lost_workers(task) and (task.max_retries is None or self._context.retries < task.max_retries)
        if retried or task.idempotency.delivery.on_abandoned == "rerun":
            self._end("expire", self.task.queue_log.store.expire)
        else:
            self._fail(ABANDONED, OutcomeKind.ABANDONED)

    def _retry_worker_lost(self, exc: BaseException, exc_info: ExceptionInfo) -> Any:
        # Celery sends the next attempt from here, outside of any run: move the row on first, and let the headers say whose it is.
        context = self._context
        key = self.key
        if key is None:
            return super()._retry_worker_lost(exc, exc_info)
        assert self.identity is not None, "a message with a key has one"
        travels = MessageKey(self.identity.message_id, self.task.name)
        header = Header.delivered(travels, self.id, context.headers)
        header = header or Header.new(travels, self.id, self._fingerprint(travels.message_id))
        header = header.next_attempt(lost=True)
        context.headers = header.write(context.headers)
        attempt, delay = context.retries + 1, self.task.default_retry_delay or 0.0
        message = NewMessage(
            key=key,
            task_id=self.id,
            queue=(context.delivery_info or {}).get("routing_key"),
            fingerprint=header.fingerprint,
            attempt=attempt,
            delay=delay,
            message=encode_message(
                context.args,
                context.kwargs,
                {
                    **self.task.signature_from_request(context, retries=attempt).options,
                    "message_id": header.message_id,
                },
                serializer=serializer_of(self.task),
                trace=header.trace,
            ),
        )
        if self._end("hand on", lambda owner: self.task.queue_log.store.retry(owner, message)):
            self._emit(OutcomeKind.RETRIED, "worker_lost", attempt)
        return super()._retry_worker_lost(exc, exc_info)

    def _fingerprint(self, message_id: str) -> str | None:
        computed = self.identity is not None and self.identity.older is not None
        named = None if computed or message_id == self.id else message_id
        _, fingerprint = identify(
            self.task.idempotency,
            self.args,
            self.kwargs,
            message_id=named,
            task_id=self.id,
            task_name=self.task.name,
        )
        return fingerprint

    def _fail(self, error: str, kind: OutcomeKind = OutcomeKind.FAILED) -> bool:
        store, unique_for = self.task.queue_log.store, self.task.idempotency.unique_for
        failed = self._end("fail", lambda owner: store.fail(owner, error=error, unique_for=unique_for))
        if failed:
            self._emit(kind, reason_of(error))
        return failed

    def _end(self, what: str, write: Callable[[Owner], bool]) -> bool:
        """End the claim of a body that cannot end it itself; whether it was there to be ended so."""
        if self.owner is None:
            return False  # never accepted, so never claimed
        if self.held is not None:
            self.held.ended = True
            LeaseRenewer.of(self.task.queue_log).let_go(self.held.holder)
        try:
            # A body that had ended has left a recovery point: what waits on it is still to be sent.
            if write(self.owner):
                return True
            older = self.identity.older if self.identity is not None else None
            if older is not None and write(Owner(older, self.owner.worker)):
                return True
            self.task.queue_log.store.expire(self.owner)
        except StoreError as error:
            logger.error("could not %s the claim of %s; it runs out with its lease: %s", what, self, error)
        return False

    def _emit(self, kind: OutcomeKind, reason: str, attempt: int | None = None) -> None:
        """Tell the app's hooks, if it has any, what became of a message whose child cannot."""
        if self.owner is not None:
            self.task.queue_log.outcomes.emit(
                kind,
                self.key,
                task_id=self.id,
                queue=(self._context.delivery_info or {}).get("routing_key"),
                attempt=self._context.retries if attempt is None else attempt,
                worker=self.owner.worker,
                reason=reason,
            )


def running() -> list[IdempotentRequest]:
    """Return the requests of guarded tasks that this worker runs now."""
    while True:
        try:
            active = list(active_requests)
        except RuntimeError:  # the worker's loop added one meanwhile
            continue
        return [request for request in active if isinstance(request, IdempotentRequest)]


def _children() -> list[RenewedLease]:
    """Return what the children of this worker hold that are running now."""
    return [request.held for request in running() if request.held]
