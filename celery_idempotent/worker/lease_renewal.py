"""Leases are kept alive here, by a thread beside the bodies.

A claim is renewed at a third of its lease for as long as its owner is known to live, so a body that ends sooner costs nothing.
Two processes renew in a prefork pool: the child that runs the body, which is what counts when its parent is killed, and the
parent, which is what counts when the body holds the child's GIL. The parent ends the lease of a child that is gone. In the other
pools there is one process, and a body that holds its GIL for longer than the lease stops the renewal with everything else.

The thread outlives a worker's steps: during a warm shutdown they stop before the pool has drained. It does not outlive its app, which it
refers to only while it renews.
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

#: Renewals in one lease: two may fail before it runs out.
_PER_LEASE = 3

_NEVER = float("inf")

#: Seconds for which the thread waits for another claim when there is none.
_IDLE = 30.0

#: Seconds after which a claim that could not be renewed is asked for again, before it is called lost; and between two looks at a child
#: that was told to end.
_LOOK_AGAIN = 1.0


@dataclass(slots=True, eq=False)
class RenewedLease:
    """A lease that is kept alive.

    Attributes:
        holder: The claim; or its owner, where a parent keeps its child's.
        lease: Seconds that each renewal grants; the first is due after a third of it.
        pid: For an owner: the child that runs the body.
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
    #: Whether the last renewal did not find it.
    missed: bool = field(default=False, init=False)
    pause: float = field(init=False)
    due: float = field(init=False)

    def __post_init__(self) -> None:
        self.pause = self.lease / _PER_LEASE
        self.due = time.monotonic() + self.pause


class LeaseRenewer:
    """The leases that this process keeps alive.

    Args:
        store: Opens the store; called in the thread that renews.
    """

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        # By process id. A forked child inherits what its parent holds, but not the thread, and perhaps a lock that nobody will
        # release: it begins with nothing.
        self._renewals: dict[int, _Renewer] = {}

    @classmethod
    def of(cls, queue_log: QueueLog) -> LeaseRenewer:
        """Return the leases that this process keeps alive for a queue log."""
        return queue_log.part(cls, lambda: cls(lambda: queue_log.store))

    def hold(self, holder: Holder, lease: float, *, asked: float | None = None) -> None:
        """Keep a claim of this process alive until it is let go.

        Args:
            holder: The claim.
            lease: Seconds that it was given, and that each renewal gives it.
            asked: When it was asked for, by the monotonic clock; by default now.
        """
        self._here().hold(RenewedLease(holder, lease, asked=time.monotonic() if asked is None else asked))

    def until(self, holder: Holder) -> float | None:
        """When the lease of a claim of this process runs out at the earliest, by the monotonic clock; ``None`` if it is not held."""
        here = self._renewals.get(os.getpid())
        return None if here is None else here.until(holder)

    def held(self) -> list[RenewedLease]:
        """Return the claims of this process that are kept alive; without those of its children."""
        here = self._renewals.get(os.getpid())
        return [] if here is None else here.held()

    def let_go(self, holder: Holder) -> None:
        """Stop keeping a claim alive; it stays as it is."""
        here = self._renewals.get(os.getpid())
        if here is not None:
            here.let_go(holder)

    def hold_for_child(self, held: RenewedLease, children: Callable[[], Iterable[RenewedLease]]) -> None:
        """Keep a child's lease alive for as long as it is among those that run.

        Args:
            held: The child's.
            children: Gives what all children hold at the time it is called; one function for the whole process.
        """
        self._here().hold_for_child(held, children)

    def hold_until_gone(self, held: RenewedLease) -> None:
        """Keep a child's lease alive until the child, which was told to end, is gone; then end it at once.

        Args:
            held: The child's, which nobody may report the end of.
        """
        held.pause = min(held.pause, _LOOK_AGAIN)
        held.due = time.monotonic() + held.pause
        self._here().hold(held)

    def rest(self) -> None:
        """End this process's thread, if it has nothing to keep alive; another claim begins one anew."""
        here = self._renewals.get(os.getpid())
        if here is not None:
            here.rest()

    def _here(self) -> _Renewer:
        """Return this process's renewal. Without a lock, which a fork could have left locked; ``setdefault`` is atomic."""
        return self._renewals.get(os.getpid()) or self._renewals.setdefault(os.getpid(), _Renewer(self._store))


class _Renewer:
    """What one process keeps alive, and the thread that does it, from the first lease on."""

    def __init__(self, store: Callable[[], Store]) -> None:
        self._store = store
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._held: dict[Holder, RenewedLease] = {}
        self._children: Callable[[], Iterable[RenewedLease]] = tuple
        self._thread: threading.Thread | None = None
        self._wakes_at = _NEVER
        #: When the thread ends if it has nothing to keep alive.
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
            # Behind what was registered since, so that the store can still be asked.
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
        """Return what is to be renewed now; or nothing, and the seconds until then, ``None`` if the thread is to end."""
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
            logger.warning("could not renew %d leases, asking again: %s", len(old), error)
            hurry = _PER_LEASE
        except Exception:
            # The thread must outlive whatever it meets: without it every lease of this process runs out.
            logger.exception("could not renew %d leases", len(old))
        for held in due:
            held.due = time.monotonic() + held.pause / hurry
            if held.holder in kept:
                held.asked = asked
            if held.ended:  # perhaps meanwhile, and before it was renewed
                self.let_go(held.holder)
                self._expire(held)
            # The owner of a body that runs is not let go if it is not found: it has not claimed yet, or has finished.
            elif held.holder in self._held:
                self._note_loss(held, lost=held.holder in lost)

    def _note_loss(self, held: RenewedLease, *, lost: bool) -> None:
        """Report a claim that is gone; but not that of a run which has just ended, and is about to be let go."""
        if not lost:
            held.missed = False
        elif not held.missed:
            held.missed = True
            held.due = min(held.due, time.monotonic() + _LOOK_AGAIN)
        else:
            self.let_go(held.holder)
            if isinstance(held.holder, Claim):
                logger.error("the claim on %s was lost while its body runs", held.holder.key.message_id)

    def _expire(self, held: RenewedLease) -> None:
        try:
            self._store().expire(held.holder)
        except Exception as error:  # noqa: BLE001 - it then runs out by itself
            logger.warning("could not end the lease of %s, it runs out: %s", held.holder.key.message_id, error)

    def give_up(self) -> None:
        """As this process ends, nobody keeps alive any more what did not end before, and nobody has to wait for that.

        In a cold shutdown these are bodies of this very process, and children that were killed with their work.
        """
        if self._process != os.getpid():
            return  # a child that was forked without `exec` leaves by this way too
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
    """Return whether a child of ours still runs; without a child, it is this process, which is about to end."""
    if pid is None:
        return False
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:  # somebody has waited for it already
        return False


def _keep_alive(itself: weakref.ref[_Renewer], changed: threading.Condition) -> None:
    """Do the thread's work. Between two renewals it refers to nothing of the app's, so that this can be collected."""
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
    """End the thread of what was just collected; without waiting, since collection may happen anywhere.

    As an interpreter ends, or behind a fork, the lock may be held by a thread that never runs again. A thread that has it just now looks
    by itself, at the latest after its pause.
    """
    if changed.acquire(blocking=False):
        try:
            changed.notify()
        finally:
            changed.release()


#: Those of this process, and of those that it was forked from, which have had a thread.
_to_give_up: weakref.WeakSet[_Renewer] = weakref.WeakSet()


def _give_up() -> None:
    for renewal in list(_to_give_up):
        renewal.give_up()
