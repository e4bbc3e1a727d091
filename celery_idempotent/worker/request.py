"""Celery's request in the worker's main process, which ends the claims of pool children that died or were killed."""

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

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import ABANDONED, MessageKey, NewMessage, Owner, ProcessedStatus, Status
from celery_idempotent.core.storable import LONGEST, is_text
from celery_idempotent.core.store_retry import ask_until_answered
from celery_idempotent.errors import StoreError
from celery_idempotent.hooks import OutcomeKind, reason_of
from celery_idempotent.maintenance.rescue import Rescue
from celery_idempotent.message.canvas_ids import fix_callbacks
from celery_idempotent.message.header import Header
from celery_idempotent.message.identity import Identity, identity_of_sent
from celery_idempotent.message.serialization import UndecodableError, decode_result, encode_message, serializer_of
from celery_idempotent.producer.identify import identify
from celery_idempotent.producer.unrecorded import is_unrecorded
from celery_idempotent.worker.body_end import Completed, Failed
from celery_idempotent.worker.celery_versions import acknowledges_timeouts, retries_lost_workers
from celery_idempotent.worker.delivery import describe, worker_label
from celery_idempotent.worker.discards import REVOKED, discard
from celery_idempotent.worker.events import announce
from celery_idempotent.worker.lease_renewal import LeaseRenewer, RenewedLease
from celery_idempotent.worker.turned_off import end_later

__all__ = ["IdempotentRequest", "running"]

logger = logging.getLogger("celery_idempotent")


#: The error of a row whose body was terminated by ``revoke(terminate=True)``.
TERMINATED = "revoked: it was terminated while it ran"


class IdempotentRequest(Request):  # type: ignore[misc]
    """Celery's request, which also ends the claim of a child that died, was killed at its time limit or was terminated.

    It runs in the worker's event loop, which must not wait for a store that is down. So each write is tried once. A claim that could
    not be ended runs out with its lease.
    """

    #: The owner of the claim, after the message was accepted; and its lease that this process renews, if the owner is a child.
    owner: Owner | None = None
    held: RenewedLease | None = None

    def __init__(self, message: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(message, *args, **kwargs)
        # For publishing the message again: Celery does not pass these to the pool's process.
        known = {"content_type": message.content_type, "compression": (message.headers or {}).get("compression")}
        content = {name: value for name, value in known.items() if value is not None}
        if message.properties is None or isinstance(message.properties, Mapping):
            self.request_dict["properties"] = {**(message.properties or {}), **content}
        if not is_text(self.id):
            # No result can be stored under such an id, and an unhashable one would crash the worker. Celery rejects the message at once.
            raise InvalidTaskError(
                f"a task id must be text of at most {LONGEST} characters without NUL, not {self.id!a:.80}"
            )

    @cached_property
    def identity(self) -> Identity | None:
        """The identity of the message, computed from the message itself, since Celery's context of a request is slow to make.

        ``None`` for a message that no store can keep. It is refused where it would run, so it has no claim.
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
        except Exception as refused:  # noqa: BLE001 - a user's callable may raise anything; the run reports it
            logger.debug("%s will be refused when it is run: %r", self.id, refused)
            return None

    @property
    def key(self) -> MessageKey | None:
        """The key of the message's row."""
        return None if self.identity is None else self.identity.key

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Note which process claims the message: the body is about to run, in a child or in this process.

        A child's lease is renewed from here too, in case the body holds the child's GIL.
        """
        # In pools without children, Celery calls this in the thread that runs the body. `pid` is then the process's or, with greenlets,
        # the thread's.
        here = pid in (os.getpid(), threading.get_ident())
        if is_unrecorded(self.task):  # then it has no claim, and the event loop asks no store
            super().on_accepted(pid, time_accepted)
            return
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
        """At the hard limit, end the message as a failure; if timeouts are not acknowledged, give it back."""
        fix_callbacks(self._context)
        super().on_timeout(soft, timeout)
        if soft:
            return
        given_back = self.task.acks_late and not acknowledges_timeouts(self.task)
        if is_unrecorded(self.task):
            if not given_back:
                end_later(self.task, self._context, Failed(describe(TimeLimitExceeded(timeout))), wait=False)
        elif given_back:
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
                # Celery reports to the caller that it will run again. Whether it does is decided at its next delivery.
                self._end("expire", self.task.queue_log.store.expire)
            elif self._lost() is False and self._had_succeeded():
                return None
        announce(self, error)
        return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        """End the claim of a body that was terminated: in this process, Celery calls nothing else when it ends."""
        super()._announce_revoked(reason, terminated, signum, expired)
        if terminated and (self.owner is not None or is_unrecorded(self.task)) and not self._held_until_gone():
            self._end_terminated()

    def _announce_cancelled(self, **options: Any) -> None:
        """End the claim of a body that was stopped because the connection to the broker broke; it will run again."""
        super()._announce_cancelled(**options)
        if not self._held_until_gone():
            self._end("expire", self.task.queue_log.store.expire)

    def _held_until_gone(self) -> bool:
        """Keep the lease of a child that was told to exit until the child is gone; return whether there is one.

        When the connection breaks, Celery 5.5's pool forgets what it runs, and :meth:`on_failure` is never called.
        """
        if self.held is None:
            return False
        LeaseRenewer.of(self.task.queue_log).hold_until_gone(self.held)
        return True

    def _end_terminated(self) -> None:
        if is_unrecorded(self.task):
            end_later(self.task, self._context, Failed(TERMINATED), wait=False)
        elif not self._fail(TERMINATED, OutcomeKind.CANCELLED):
            discard(self.task, self._context, REVOKED)  # it ended before it claimed

    def _lost(self) -> bool | None:
        """End the claim of a lost child; whether it was there to be ended, or ``None`` if the store gave no answer.

        Then Celery says that the worker was lost, and another thread corrects that once the store answers: the child may have succeeded.
        """
        task = self.task
        # Celery's own rule for sending the next attempt from this process, which then moves the row to that attempt.
        retried = retries_lost_workers(task) and (task.max_retries is None or self._context.retries < task.max_retries)
        if retried or task.idempotency.delivery.on_abandoned != "fail":
            ended = self._end("expire", self.task.queue_log.store.expire)
        else:
            ended = self._fail(ABANDONED, OutcomeKind.ABANDONED)
        if ended is None:
            threading.Thread(target=self._correct_result, name="celery_idempotent_correct", daemon=True).start()
        return ended

    def _had_succeeded(self) -> bool:
        """Return whether the row of a lost child says success: it was lost before Celery stored the result, which is done from here."""
        try:
            stored = self._stored_success()
        except StoreError as error:
            logger.error("cannot tell whether %s had succeeded: %s", self, error)
            return False
        if stored is None:
            return False
        self._store_success(stored)
        self.on_success((False, stored.value, 0.0))
        return True

    def _correct_result(self) -> None:
        def ask() -> Completed | None:
            with no_fork():
                return self._stored_success()

        try:
            stored = ask_until_answered(ask, "read the row of", self)
            if stored is not None:
                self._store_success(stored)
        except Exception:
            logger.exception("%s may have succeeded, but its result says that its worker was lost", self)

    def _stored_success(self) -> Completed | None:
        """Return what the row keeps of the child's success; ``None`` if it had none, or its value cannot be read.

        Raises:
            StoreError: The store gave no answer.
        """
        key, owner = self.key, self.owner
        row = None if key is None or owner is None else self.task.queue_log.store.find(key)
        if row is None or owner is None or row.worker != owner.worker or row.result is None:
            return None
        if (row.status, row.processed_status) != (Status.DONE, ProcessedStatus.SUCCESS):
            return None
        try:
            return Completed(decode_result(self.app, row.result))
        except UndecodableError as error:
            logger.error("%s had succeeded, but its result cannot be read: %s", self, error)
            return None

    def _store_success(self, stored: Completed) -> None:
        logger.warning("%s had succeeded when its process was lost", self)
        if not self.ignore_result:
            self.task.backend.store_result(self.id, stored.value, states.SUCCESS, request=self._context)

    def _retry_worker_lost(self, exc: BaseException, exc_info: ExceptionInfo) -> Any:
        # Celery sends the next attempt from this process, outside of any run. Move the row to it first, and put our header on it.
        context = self._context
        key = self.key
        if key is None or is_unrecorded(self.task):
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

    def _fail(self, error: str, kind: OutcomeKind = OutcomeKind.FAILED) -> bool | None:
        store, unique_for = self.task.queue_log.store, self.task.idempotency.unique_for
        failed = self._end("fail", lambda owner: store.fail(owner, error=error, unique_for=unique_for))
        if failed:
            self._emit(kind, reason_of(error))
        return failed

    def _end(self, what: str, write: Callable[[Owner], bool]) -> bool | None:
        """End the claim of a body that cannot end it itself; whether it was there to be ended so, or ``None`` without an answer."""
        if self.owner is None:
            return False  # never accepted, so never claimed
        if self.held is not None:
            self.held.ended = True
            LeaseRenewer.of(self.task.queue_log).let_go(self.held.holder)
        try:
            # If the body had ended, `write` finds a recovery point instead. Expire that, so that its callbacks are sent.
            if write(self.owner):
                return True
            older = self.identity.older if self.identity is not None else None
            if older is not None and write(Owner(older, self.owner.worker)):
                return True
            self.task.queue_log.store.expire(self.owner)
        except StoreError as error:
            logger.error("could not %s the claim of %s; it runs out with its lease: %s", what, self, error)
            return None
        return False

    def _emit(self, kind: OutcomeKind, reason: str, attempt: int | None = None) -> None:
        """Report an outcome to the app's hooks for a child that cannot."""
        if self.owner is not None:
            self.task.queue_log.hooks.emit(
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
        except RuntimeError:  # the worker's event loop has changed the set meanwhile
            continue
        return [request for request in active if isinstance(request, IdempotentRequest)]


def _children() -> list[RenewedLease]:
    """Return the leases of this worker's children that run now."""
    return [request.held for request in running() if request.held]
