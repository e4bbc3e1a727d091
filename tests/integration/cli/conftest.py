"""What the tests of commands share: a project for ``celery -A proj idempotent``, and commands run in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.celery import celery as celery_command

from celery_idempotent import QueueLog, SQLStore
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.message.serialization import encode_message, encode_result
from tests.support.cli import IMPORTED, PROJECT, Run, RunCelery, run_celery_once
from tests.support.shared_workers import SharedWorker

__all__ = ["Command"]

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def command(shared_worker: SharedWorker, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run ``celery idempotent COMMAND --json``; its exit status, and what it printed."""

    def command(*arguments: str, app: Celery | None = None) -> tuple[int, Any]:
        capsys.readouterr()
        # As `app.start` does it, which keeps the status to itself.
        celery_command.params[0].default = app or shared_worker.app
        try:
            status = celery_command.main(["idempotent", *arguments, "--json"], standalone_mode=False)
        finally:
            celery_command.params[0].default = None
        return status or 0, json.loads(capsys.readouterr().out)

    return command


def fill(store: SQLStore) -> None:
    """Four messages of two tasks, one of each kind of end; three of them awkward."""
    app = Celery("filler", set_as_current=False)

    def record(message_id: str, task_name: str, data: bytes | None, *, claim: bool = True) -> Claimed:
        message = NewMessage(MessageKey(message_id, task_name), f"id of {message_id}", "money", "f" * 64, message=data)
        store.record(message)
        if not claim:
            return Claimed(None)  # type: ignore[arg-type]
        claimed = store.claim(message, worker="w@here:1", lease=60.0, grace=30.0)
        assert isinstance(claimed, Claimed)
        return claimed

    data = encode_message(("o-1",), {"amount": 500}, {"queue": "money"}, serializer="json")
    record("order:o-1", "shop.charge", data, claim=False)
    done = record("order:ключ 订单\n2", "shop.charge", data)
    store.complete(done.claim, result=encode_result(app, {"paid": None}))
    store.count_duplicate(done.claim.key)
    failed = record("order:o-3", "shop.refund", b"application/x-python-serialize;binary\n\x80\x04.")
    store.fail(failed.claim, error="ValueError: no such card")
    record("order:o-1", "shop.refund", None)
    record("a*c", "shop.refund", b"damaged")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a project on an SQLite file with some rows."""
    directory = Path(tmp_path_factory.mktemp("project"))
    (directory / "proj.py").write_text(PROJECT)
    (directory / "imported.py").write_text(IMPORTED)
    with closing(SQLStore(f"sqlite:///{directory / 'filled.db'}")) as store:
        fill(store)
    return directory


@pytest.fixture
def celery(project: Path) -> RunCelery:
    """Run ``celery -A proj ...``."""

    def run(*arguments: str, app: str | None = "proj", store: str = "sqlite:///filled.db", **environment: str) -> Run:
        return run_celery_once(project, *arguments, app=app, store=store, **environment)

    return run


@pytest.fixture
def filled(project: Path) -> Iterator[Celery]:
    """Yield an app on the same rows, whose ``start`` runs a command in this process: it takes seconds less."""
    app = Celery("filled", set_as_current=False, idempotent_store=f"sqlite:///{project / 'filled.db'}")
    yield app
    QueueLog.of(app).close()
    app.close()
