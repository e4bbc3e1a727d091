"""SQLite: a child that is forked while its parent writes is not locked out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_idempotent.core.records import Inserted, MessageKey, NewMessage
from celery_idempotent.stores.sql import SQLStore
from tests.support.waiting import wait_until


@pytest.fixture
def busy(tmp_path: Path) -> Iterator[SQLStore]:
    """Yield a store that a thread of this process writes to all the time."""
    store = SQLStore(f"sqlite:///{tmp_path / 'store.db'}")
    store.init()
    written, stopped = 0, threading.Event()

    def write() -> None:
        nonlocal written
        while not stopped.is_set():
            written += 1
            store.record(NewMessage(MessageKey(f"parent:{written}", "t"), "id"))

    thread = threading.Thread(target=write)
    thread.start()
    wait_until(lambda: written)
    yield store
    stopped.set()
    thread.join()
    store.close()


def test_children_of_a_process_that_writes_can_write(busy: SQLStore) -> None:
    for number in range(10):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:  # pragma: no cover - in the child
            try:
                answer = busy.record(NewMessage(MessageKey(f"child:{number}", "t"), "id"))
                os.write(writer, b"recorded" if answer == Inserted() else b"found")
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == b"recorded"
        os.waitpid(pid, 0)
