"""The thread that renews leases, on a store that records its calls."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence

import pytest

from celery_idempotent.core.records import Claim, Holder, MessageKey, Owner
from celery_idempotent.errors import StoreUnavailableError
from celery_idempotent.worker.lease_renewal import LeaseRenewer, RenewedLease
from tests.support.waiting import wait_until

LEASE = 0.3
KEY = MessageKey("order:1", "shop.charge")


class RecordingStore:
    """The part of a store that renewals speak to."""

    def __init__(self) -> None:
        self.renewed: list[tuple[float, list[Holder], float]] = []
        self.expired: list[Holder] = []
        self.lost: list[Holder] = []
        self.errors: list[Exception] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def renew(self, holders: Sequence[Holder], *, lease: float) -> list[Holder]:
        self.renewed.append((time.monotonic(), list(holders), lease))
        self.meanwhile()
        if self.errors:
            raise self.errors.pop(0)
        return [holder for holder in holders if holder in self.lost]

    def expire(self, holder: Holder) -> bool:
        self.expired.append(holder)
        return True

    def times(self, holder: Holder) -> list[float]:
        return [at for at, holders, _ in list(self.renewed) if holder in holders]


@pytest.fixture
def store() -> RecordingStore:
    return RecordingStore()


@pytest.fixture
def renewals(store: RecordingStore) -> LeaseRenewer:
    return LeaseRenewer(lambda: store)  # type: ignore[arg-type, return-value]


def claim(name: str = "order:1") -> Claim:
    return Claim(MessageKey(name, "shop.charge"), 1)


def wait_for(condition: Callable[[], object]) -> None:
    wait_until(condition, timeout=10.0, interval=0.005)


def test_a_claim_is_renewed_at_each_third_of_its_lease(store: RecordingStore, renewals: LeaseRenewer) -> None:
    began = time.monotonic()
    renewals.hold(claim(), LEASE)
    wait_for(lambda: len(store.times(claim())) >= 3)
    renewals.let_go(claim())

    times = store.times(claim())
    # No sooner; how much later is this machine's affair.
    assert all(at - began >= number * LEASE / 3 for number, at in enumerate(times, 1))
    assert {lease for _, _, lease in store.renewed} == {LEASE}


def test_a_short_claim_is_not_renewed(store: RecordingStore, renewals: LeaseRenewer) -> None:
    witness = claim("witness")
    for number in range(5):
        renewals.hold(claim(str(number)), LEASE)
        renewals.let_go(claim(str(number)))
    renewals.hold(witness, LEASE)
    wait_for(lambda: store.times(witness))
    renewals.let_go(witness)
    assert all(holders == [witness] for _, holders, _ in store.renewed)


def test_a_claim_let_go_is_renewed_no_more(store: RecordingStore, renewals: LeaseRenewer) -> None:
    witness = claim("witness")
    renewals.hold(claim(), LEASE)
    renewals.hold(witness, LEASE)
    wait_for(lambda: store.times(claim()))
    renewals.let_go(claim())
    count = len(store.times(witness))
    # One renewal may have been under way.
    wait_for(lambda: len(store.times(witness)) >= count + 3)
    renewals.let_go(witness)
    assert len(store.times(claim())) <= count + 1


def test_a_short_lease_does_not_wait_for_a_long_one(store: RecordingStore, renewals: LeaseRenewer) -> None:
    renewals.hold(claim("long"), 3600.0)
    renewals.hold(claim("short"), LEASE)
    wait_for(lambda: store.times(claim("short")))
    renewals.let_go(claim("short"))
    assert store.times(claim("long")) == []


@pytest.mark.parametrize("error", [StoreUnavailableError("away"), RuntimeError("a bug")], ids=["outage", "bug"])
def test_a_renewal_that_fails_is_repeated(
    store: RecordingStore, renewals: LeaseRenewer, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store.errors = [error, error]
    with caplog.at_level(logging.CRITICAL, logger="celery_idempotent"):
        renewals.hold(claim(), LEASE)
        wait_for(lambda: len(store.times(claim())) >= 4)
    renewals.let_go(claim())


def test_an_outage_is_answered_by_asking_more_often(
    store: RecordingStore, renewals: LeaseRenewer, caplog: pytest.LogCaptureFixture
) -> None:
    lease = 1.8
    store.errors = [StoreUnavailableError("away")]
    with caplog.at_level(logging.WARNING, logger="celery_idempotent"):
        renewals.hold(claim(), lease)
        wait_for(lambda: len(store.times(claim())) >= 2)
    renewals.let_go(claim())
    assert [record.getMessage() for record in caplog.records] == ["could not renew 1 leases, trying again: away"]
    first, second = store.times(claim())[:2]
    assert second - first < lease / 3


def test_a_claim_that_was_lost_is_let_go(
    store: RecordingStore, renewals: LeaseRenewer, caplog: pytest.LogCaptureFixture
) -> None:
    kept = claim("kept")
    store.lost = [claim()]
    with caplog.at_level(logging.ERROR, logger="celery_idempotent"):
        renewals.hold(claim(), LEASE)
        renewals.hold(kept, LEASE)
        wait_for(lambda: len(store.times(kept)) >= 3)
    renewals.let_go(kept)
    # Asked for once more before it is called lost, and then never again.
    assert len(store.times(claim())) == 2
    assert [record.getMessage() for record in caplog.records] == ["lost the claim on order:1 while its body runs"]


def test_a_run_ending_during_a_renewal_keeps_its_claim(
    store: RecordingStore, renewals: LeaseRenewer, caplog: pytest.LogCaptureFixture
) -> None:
    kept = claim("kept")
    store.lost = [claim()]
    store.meanwhile = lambda: renewals.let_go(claim())
    with caplog.at_level(logging.ERROR, logger="celery_idempotent"):
        renewals.hold(claim(), LEASE)
        renewals.hold(kept, LEASE)
        wait_for(lambda: len(store.times(kept)) >= 3)
    renewals.let_go(kept)
    assert len(store.times(claim())) == 1
    assert caplog.records == []


def test_one_thread_renews_however_many_begin_at_once(store: RecordingStore, renewals: LeaseRenewer) -> None:
    before = set(threading.enumerate())
    barrier = threading.Barrier(8)

    def begin(number: int) -> None:
        barrier.wait()
        renewals.hold(claim(str(number)), 60.0)

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    started = set(threading.enumerate()) - before
    assert [thread.name for thread in started] == ["celery-idempotent-renewal"]


class TestForAChild:
    """A parent keeps the leases of its children, by their owners."""

    OWNER = Owner(KEY, "host:1")

    def test_a_childs_lease_is_renewed_while_it_runs(self, store: RecordingStore, renewals: LeaseRenewer) -> None:
        running = [RenewedLease(self.OWNER, LEASE, os.getpid())]
        renewals.hold_for_child(running[0], lambda: list(running))
        wait_for(lambda: len(store.times(self.OWNER)) >= 2)
        running.clear()
        count = len(store.times(self.OWNER))
        witness = claim("witness")
        renewals.hold(witness, LEASE)
        wait_for(lambda: len(store.times(witness)) >= 2)
        renewals.let_go(witness)
        assert len(store.times(self.OWNER)) <= count + 1

    def test_an_owner_that_holds_nothing_yet_is_not_let_go(self, store: RecordingStore, renewals: LeaseRenewer) -> None:
        store.lost = [self.OWNER]
        running = [RenewedLease(self.OWNER, LEASE, os.getpid())]
        renewals.hold_for_child(running[0], lambda: list(running))
        wait_for(lambda: len(store.times(self.OWNER)) >= 2)
        running.clear()

    def test_a_lease_that_ended_while_it_was_renewed_is_ended_again(
        self, store: RecordingStore, renewals: LeaseRenewer
    ) -> None:
        """Its child dies between the look at who runs and the statement: the lease must not live on without an owner."""
        held = RenewedLease(self.OWNER, LEASE, os.getpid())

        def end() -> None:
            held.ended = True

        store.meanwhile = end
        renewals.hold_for_child(held, lambda: [held])
        wait_for(lambda: store.expired)
        witness = claim("witness")
        renewals.hold(witness, LEASE)
        wait_for(lambda: len(store.times(witness)) >= 2)
        renewals.let_go(witness)
        assert store.expired == [self.OWNER]
        assert len(store.times(self.OWNER)) == 1

    def test_the_lease_of_a_child_that_is_gone_is_ended(self, store: RecordingStore, renewals: LeaseRenewer) -> None:
        held = RenewedLease(self.OWNER, LEASE, ended_child())
        renewals.hold_for_child(held, lambda: [held])
        wait_for(lambda: store.expired)
        assert (store.expired, store.times(self.OWNER)) == ([self.OWNER], [])

    def test_a_terminated_child_keeps_its_lease_until_it_is_gone(
        self, store: RecordingStore, renewals: LeaseRenewer
    ) -> None:
        """Nobody counts it among the running ones. A long lease is not renewed sooner than others, but ends as soon."""
        long = Owner(MessageKey("long", "shop.charge"), "host:1")
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            renewals.hold_until_gone(RenewedLease(self.OWNER, LEASE, child.pid))
            renewals.hold_until_gone(RenewedLease(long, 3600.0, child.pid))
            wait_for(lambda: len(store.times(self.OWNER)) > 3.0 / LEASE)
            assert store.expired == []
        wait_for(lambda: len(store.expired) == 2)
        assert (set(store.expired), renewals.held(), store.times(long)) == ({self.OWNER, long}, [], [])

    def test_a_child_that_ends_its_run_instead_is_let_go(
        self, store: RecordingStore, renewals: LeaseRenewer, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.lost = [self.OWNER]
        renewals.hold_until_gone(RenewedLease(self.OWNER, LEASE, os.getpid()))
        wait_for(lambda: renewals.held() == [])
        assert (len(store.times(self.OWNER)), store.expired, caplog.records) == (2, [], [])


def ended_child() -> int:
    """Return the pid of a process that has ended and was waited for."""
    with subprocess.Popen(["true"]) as child:
        return child.pid


class TestProcesses:
    def test_a_forked_child_renews_what_is_its_own(self, store: RecordingStore, renewals: LeaseRenewer) -> None:
        renewals.hold(claim("parent"), LEASE)
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:  # pragma: no cover - in the child
            try:
                store.renewed.clear()
                renewals.hold(claim("child"), LEASE)
                wait_for(lambda: len(store.times(claim("child"))) >= 2)
                os.write(writer, b"parent's" if store.times(claim("parent")) else b"own")
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            answer = pipe.read()
        os.waitpid(pid, 0)
        renewals.let_go(claim("parent"))
        assert answer == b"own"

    def test_leases_held_at_exit_are_expired(self) -> None:
        """A body of this process that a cold shutdown breaks off, and a child that was killed with its work."""
        program = """
import atexit, os, signal
from celery_idempotent.core.records import Claim, MessageKey, Owner
from celery_idempotent.worker.lease_renewal import RenewedLease, LeaseRenewer

class Store:
    def expire(self, holder):
        print(holder.key.message_id, flush=True)

def child():
    pid = os.fork()
    if not pid:
        signal.pause()
    return pid

dead, alive, ended = child(), child(), child()
# Registered first, done last.
atexit.register(lambda: [os.kill(pid, signal.SIGKILL) for pid in (alive, ended)])
os.kill(dead, signal.SIGKILL)
os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
held = [RenewedLease(Owner(MessageKey(name, "t"), "w"), 60.0, pid)
        for name, pid in (("dead", dead), ("alive", alive), ("ended", ended))]
held[-1].ended = True
renewals = LeaseRenewer(Store)
renewals.hold(Claim(MessageKey("own", "t"), 1), 60.0)
renewals.hold(Claim(MessageKey("let go", "t"), 1), 60.0)
renewals.let_go(Claim(MessageKey("let go", "t"), 1))
renewals.hold_for_child(held[0], lambda: held)
print("ends", flush=True)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.splitlines() == ["ends", "own", "dead"]
        assert done.stderr == ""

    @pytest.mark.timeout(20)
    def test_it_is_collected_though_its_lock_is_never_released(self, store: RecordingStore) -> None:
        """As an interpreter ends, its daemon threads stand still with what they hold."""
        renewals = LeaseRenewer(lambda: store)  # type: ignore[arg-type, return-value]
        # Not let go: with nothing to renew the thread looks again after half a minute only.
        renewals.hold(claim(), LEASE)
        itself = renewals._here()
        thread, gone = itself._thread, weakref.ref(itself)
        assert thread is not None
        held, over = threading.Event(), threading.Event()

        def stand_still(lock: threading.Condition) -> None:
            with lock:
                held.set()
                over.wait()

        still = threading.Thread(target=stand_still, args=(itself._changed,), daemon=True)
        still.start()
        assert held.wait(10)
        try:
            del renewals, itself
            wait_for(lambda: gone() is None)
        finally:
            over.set()
            still.join()
        thread.join(10)
        assert not thread.is_alive()
