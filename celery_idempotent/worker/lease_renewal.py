"""Renew leases in a thread, while the bodies run.

A claim is renewed after a third of its lease, as long as its owner lives. A body that ends sooner costs nothing.

In a prefork pool, two processes renew. The child that runs the body renews in case its parent is killed. The parent renews in case the body
holds the child's GIL, and ends the lease of a child that is gone. The other pools have one process: a body that holds the GIL for longer than
the lease also stops the renewal.

The thread outlives the worker's bootsteps, which stop before the pool has drained in a warm shutdown. It does not outlive its app, to which
it refers only while it renews.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from celery_idempotent.core.fork_lock import no_fork
from celery_idempotent.core.records import Claim, Holder
from celery_idempotent.errors import StoreError

if TYPE_CHECKING:
    from celery_idempotent.core.store import Store
    from celery_idempotent.queue_log import QueueLog

__all__ = ["LeaseRenewer", "RenewedLease"]

logger = logging.getLogger("celery_idempotent")

#: Renewals per lease: two may fail before it runs out.
_PER_LEASE = 3

_NEVER = float("inf")

#: Seconds for which the thread waits for another claim if there is none.
_IDLE = 30.0

#: Seconds until a claim that the store did not find is checked again, before it is reported as lost; and between two checks of a child
#: that was told to exit.
_LOOK_AGAIN = 1.0


@dataclass(slots=True, eq=False)
class RenewedLease:
    """A lease that is kept alive.

    Attributes:
        holder: The claim; its owner if a parent renews its child's lease.
        lease: Seconds that each renewal grants; the first is due after a third of it.
        pid: The child that runs the body, for an owner.
        asked: When the lease was asked for, by the monotonic clock.
        ended: Whether the owner is known to be dead. Set it before the lease is ended in the store: a renewal that is under
            way then ends the lease again.
        pause: Seconds between two looks at it. It is renewed at the first one after a third of its lease.
    """

    holder: Holder
    lease: float
    pid: int | None = None
    ended: bool = False
    asked: float = field(default_factory=time.monotonic)
    missed: bool = field(default=False, init=False)  # whether the last renewal did not find the claim
    pause: float = field(init=False)
    due: float = field(init=False)

    def __post_init__(self) -> None:
        self.pause = self.lease / _PER_LEASE
        self.due = time.monotonic() + self.pause


class LeaseRenewer:
    """The leases that this process keeps alive.

    Args:
        store: Opens the store; called in the renewing thread.
    """

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        # By process id, since a forked child inherits leases and perhaps a locked lock, but not the thread: each process starts empty.
        self._renewals: dict[int, _Renewer] = {}

    @classmethod
    def of(cls, queue_log: QueueLog) -> LeaseRenewer:
        """Return the leases that this process keeps alive for a queue log."""
        return queue_log.part(cls, lambda: cls(lambda: queue_log.store))

    def hold(self, holder: Holder, lease: float, *, asked: float | None = None) -> None:
        """Keep a claim of this process alive until :meth:`let_go`.

        Args:
            holder: The claim.
            lease: Seconds of its lease, and of each renewal.
            asked: When it was asked for, by the monotonic clock; by default now.
        """
        self._here().hold(RenewedLease(holder, lease, asked=time.monotonic() if asked is None else asked))

    def until(self, holder: Holder) -> float | None:
        """Return when a claim's lease runs out at the earliest, by the monotonic clock; ``None`` if this process does not hold it."""
        here = self._renewals.get(os.getpid())
        return None if here is None else here.until(holder)

    def held(self) -> list[RenewedLease]:
        """Return the renewed leases of this process, without those of its children."""
        here = self._renewals.get(os.getpid())
        return [] if here is None else here.held()

    def let_go(self, holder: Holder) -> None:
        """Stop renewing a claim; its lease stays as it is."""
        here = self._renewals.get(os.getpid())
        if here is not None:
            here.let_go(holder)

    def hold_for_child(self, held: RenewedLease, children: Callable[[], Iterable[RenewedLease]]) -> None:
        """Keep a child's lease alive as long as ``children`` returns it.

        Args:
            held: The child's lease.
            children: Returns the current leases of all children; always the same function in one process.
        """
        self._here().hold_for_child(held, children)

    def hold_until_gone(self, held: RenewedLease) -> None:
        """Keep the lease of a child that was told to exit until the child is gone; then end it at once.

        Args:
            held: The child's lease. Nothing else may report the child's end.
        """
        held.pause = min(held.pause, _LOOK_AGAIN)
        held.due = time.monotonic() + held.pause
        self._here().hold(held)

    def rest(self) -> None:
        """End this process's thread if it has nothing to renew; the next claim starts another one."""
        here = self._renewals.get(os.getpid())
        if here is not None:
            here.rest()

    def _here(self) -> _Renewer:
        """Return this process's renewer. A lock could be left locked by a fork, so rely on ``setdefault``, which is atomic."""
        return self._renewals.get(os.getpid()) or self._renewals.setdefault(os.getpid(), _Renewer(self._store))


class _Renewer:
    """The leases of one process, and the thread that renews them, started with the first lease."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._held: dict[Holder, RenewedLease] = {}
        self._children: Callable[[], Iterable[RenewedLease]] = tuple
        self._thread: threading.Thread | None = None
        self._wakes_at = _NEVER
        #: When the thread ends if it has nothing to renew.
        self._rests_at = _NEVER

    def hold(self, held: RenewedLease) -> None:
        with self._changed:
            self._held[held.holder] = held
            self._expect(held)

    def let_go(self, holder: Holder) -> None:
        with self._changed:
            self._held.pop(holder, None)

    def held(self) -> list[RenewedLease]:
        with self._changed:
            return list(self._held.values())

    def until(self, holder: Holder) -> float | None:
        held = self._held.get(holder)
        return None if held is None else held.asked + held.lease

    def hold_for_child(self, held: RenewedLease, children: Callable[[], Iterable[RenewedLease]]) -> None:
        with self._changed:
            self._children = children
            self._expect(held)

    def _expect(self, held: RenewedLease) -> None:
        if self._thread is None:
            changed = self._changed
            itself = weakref.ref(self, lambda _: _notify(changed))
            self._thread = threading.Thread(
                target=_keep_alive, args=(itself, changed), name="celery-idempotent-renewal", daemon=True
            )
            self._thread.start()
            _to_give_up.add(self)
            # Handlers run in reverse order. Register last, to run before those that close the store.
            atexit.unregister(_give_up)
            atexit.register(_give_up)
        elif held.due < self._wakes_at:
            self._changed.notify()

    def _everything(self) -> list[RenewedLease]:
        return [held for held in (*self._held.values(), *self._children()) if not held.ended]

    def rest(self) -> None:
        with self._changed:
            self._rests_at = 0.0
            self._changed.notify()

    def due(self) -> tuple[list[RenewedLease], float | None]:
        """Return the leases to renew now. If there are none, return the seconds until the next; ``None`` to end the thread."""
        now = time.monotonic()
        everything = self._everything()
        due = [held for held in everything if held.due <= now]
        if everything or self._rests_at == _NEVER:
            self._rests_at = now + _IDLE
        elif self._rests_at <= now:
            self._thread, self._rests_at, self._wakes_at = None, _NEVER, _NEVER
            return [], None
        self._wakes_at = min((held.due for held in everything), default=self._rests_at)
        return due, self._wakes_at - now

    def renew(self, due: list[RenewedLease]) -> None:
        for held in due:
            held.ended = held.ended or _is_gone(held.pid)
        for lease in {held.lease for held in due}:
            with no_fork():
                self._renew([held for held in due if held.lease == lease], lease)

    def _renew(self, due: list[RenewedLease], lease: float) -> None:
        asked, hurry = time.monotonic(), 1
        old = [held.holder for held in due if not held.ended and held.asked + lease / _PER_LEASE <= asked]
        lost: list[Holder] = []
        kept: list[Holder] = []
        try:
            lost = self._store().renew(old, lease=lease)
            kept = [holder for holder in old if holder not in lost]
        except StoreError as error:
            logger.warning("could not renew %d leases, trying again: %s", len(old), error)
            hurry = _PER_LEASE
        except Exception:
            # The thread must outlive whatever it meets: without it every lease of this process runs out.
            logger.exception("could not renew %d leases", len(old))
        for held in due:
            held.due = time.monotonic() + held.pause / hurry
            if held.holder in kept:
                held.asked = asked
            if held.ended:  # perhaps before the renewal
                self.let_go(held.holder)
                self._expire(held)
            # If the owner of a child's body is not found, keep it: it has not claimed yet, or has finished.
            elif held.holder in self._held:
                self._note_loss(held, lost=held.holder in lost)

    def _note_loss(self, held: RenewedLease, *, lost: bool) -> None:
        """Report a claim that is gone at two checks in a row: after the first, its run may just be ending."""
        if not lost:
            held.missed = False
        elif not held.missed:
            held.missed = True
            held.due = min(held.due, time.monotonic() + _LOOK_AGAIN)
        else:
            self.let_go(held.holder)
            if isinstance(held.holder, Claim):
                logger.error("lost the claim on %s while its body runs", held.holder.key.message_id)

    def _expire(self, held: RenewedLease) -> None:
        try:
            self._store().expire(held.holder)
        except Exception as error:  # noqa: BLE001 - the lease then runs out by itself
            logger.warning(
                "could not end the lease of %s, which runs out by itself: %s", held.holder.key.message_id, error
            )

    def give_up(self) -> None:
        """On exit, expire the leases still held, so that other workers need not wait for them.

        In a cold shutdown, these belong to bodies of this process and to killed children.
        """
        if self._process != os.getpid():
            return  # a forked child runs its parent's exit handlers too
        with self._changed:
            left = self._everything()
        for held in left:
            if not _lives(held.pid):
                held.ended = True
                self._expire(held)


def _is_gone(pid: int | None) -> bool:
    """Return whether a child has certainly ended: there is no process of its pid, not even one that took it over."""
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.ESRCH
    return False


def _lives(pid: int | None) -> bool:
    """Return whether a child still runs; ``None`` stands for this process, which is about to exit."""
    if pid is None:
        return False
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:  # other code has already waited for it
        return False


def _keep_alive(itself: weakref.ref[_Renewer], changed: threading.Condition) -> None:
    """Run the thread. Between renewals it does not refer to the app, so that the app can be collected."""
    while True:
        with changed:
            renewal = itself()
            if renewal is None:
                return
            due, pause = renewal.due()
            if pause is None:
                return
            if not due:
                del renewal
                if itself() is not None:
                    changed.wait(pause)
                continue
        renewal.renew(due)
        del renewal


def _notify(changed: threading.Condition) -> None:
    """Wake the thread of a collected renewer, so that it ends. Do not wait for the lock, since collection may happen anywhere.

    At interpreter exit, or after a fork, the lock may be held by a thread that never runs again. Otherwise the thread notices
    by itself, at the latest after its pause.
    """
    if changed.acquire(blocking=False):
        try:
            changed.notify()
        finally:
            changed.release()


#: Renewers that have had a thread, in this process and in those that it was forked from.
_to_give_up: weakref.WeakSet[_Renewer] = weakref.WeakSet()


def _give_up() -> None:
    for renewal in list(_to_give_up):
        renewal.give_up()
