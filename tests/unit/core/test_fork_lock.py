"""A process does not fork while its threads hold a lock, and does not wait for ever."""

from __future__ import annotations

import os
import threading
import time

import pytest

from celery_idempotent.core import fork_lock
from celery_idempotent.core.fork_lock import no_fork


def in_child(status: int = 0) -> int:
    """Fork a child that takes its turn and ends; its status."""
    pid = os.fork()
    if not pid:
        with no_fork():
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hold(seconds: float) -> threading.Thread:
    """Return a thread that holds the lock for so long."""
    begun = threading.Event()

    def work() -> None:
        with no_fork():
            begun.set()
            time.sleep(seconds)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(10)
    return thread


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_waits_for_what_a_thread_is_in_the_midst_of() -> None:
    thread = hold(0.5)
    began = time.monotonic()
    assert in_child(7) == 7
    assert time.monotonic() - began > 0.3
    thread.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_lock, "PATIENCE", 0.1)
    thread = hold(1.5)
    began = time.monotonic()
    assert in_child(7) == 7
    assert time.monotonic() - began < 1.2
    thread.join()
    with no_fork():
        pass  # given back, and not twice


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_by_the_thread_itself_goes_on() -> None:
    with no_fork():
        assert in_child(7) == 7
