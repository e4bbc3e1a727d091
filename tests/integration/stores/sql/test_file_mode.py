"""The SQLite file of a queue log holds arguments and results: it is made for its owner alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_idempotent import SQLStore
from celery_idempotent.core.records import MessageKey, NewMessage


def mode(path: Path) -> str:
    return oct(path.stat().st_mode & 0o777)


@pytest.fixture(autouse=True)
def generous() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    store = SQLStore(f"sqlite:///{tmp_path / 'queue_log.db'}")
    store.record(NewMessage(MessageKey("m", "t"), "id"))

    assert {path.name: mode(path) for path in tmp_path.iterdir()} == {
        f"queue_log.db{journal}": "0o600" for journal in ("", "-wal", "-shm")
    }
    store.close()


def test_a_file_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "queue_log.db"
    path.touch(0o660)
    store = SQLStore(f"sqlite:///{path}")
    store.record(NewMessage(MessageKey("m", "t"), "id"))

    assert mode(path) == "0o660"
    store.close()


def test_an_impossible_path_raises_sqlites_error(tmp_path: Path) -> None:
    store = SQLStore(f"sqlite:///{tmp_path / 'nowhere' / 'queue_log.db'}")
    with pytest.raises(Exception, match="unable to open database file"):
        store.record(NewMessage(MessageKey("m", "t"), "id"))
    store.close()
