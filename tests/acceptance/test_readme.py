"""The README's example and the quickstart, word for word: what they say to type is typed here, in a directory of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, _state
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from celery_idempotent import IdempotentTask
from celery_idempotent.core.records import RowFilter, Status
from tests.support.servers import PrivateRedis
from tests.support.stores import postgresql_store, sqlite_store
from tests.support.worker import ROOT, WorkerProcess

QUICKSTART = ROOT / "docs" / "tutorial" / "quickstart.md"


def test_the_readme_has_at_most_600_words() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600


def test_the_first_screen_has_the_two_commands() -> None:
    first_screen = (ROOT / "README.md").read_text().partition("\n## ")[0]
    commands = re.findall(r"```console\n(.*?)```", first_screen, re.DOTALL)
    assert [line.partition("#")[0].split() for line in "".join(commands).splitlines()] == [
        ["make", "demo"],
        ["make", "test"],
    ]


def test_the_readmes_example_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert example.count('"redis://localhost"') == 2
    example = example.replace('broker="redis://localhost"', 'broker="memory://"')
    example = example.replace('backend="redis://localhost"', 'backend="cache+memory://"')
    # Its task would be every app's from now on.
    monkeypatch.setattr(_state, "_on_app_finalizers", set())
    names: dict[str, Any] = {"__name__": "shop"}
    exec(example, names)
    first, again = names["first"], names["again"]
    assert not first.duplicate
    assert (again.duplicate, again.id) == (True, first.id)
    names["app"].queue_log.close()
    names["app"].close()


def test_the_quickstart_works(tmp_path: Path, private_redis: PrivateRedis, postgresql_url: str) -> None:
    quickstart = QUICKSTART.read_text().partition("## Guard a task")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", quickstart, re.DOTALL)
    app, script = (text for kind, text in blocks if kind == "python")
    _, before, after = (text.splitlines() for kind, text in blocks if kind == "console")
    assert "celery -A shop worker" in before

    with postgresql_store(postgresql_url) as store_url:
        # Only the addresses are ours.
        for shown, ours in (("redis://localhost", private_redis.url), ("postgresql://localhost/shop", store_url)):
            assert shown in app
            app = app.replace(shown, ours)
        (tmp_path / "shop.py").write_text(app)

        assert "created" in _typed(before[0], tmp_path)
        worker = WorkerProcess(tmp_path, {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}, app="shop")
        try:
            worker.start()
            assert "already known with other arguments" in _run([sys.executable, "-c", script], tmp_path)
        finally:
            worker.stop()
        stats, shown = (_typed(line, tmp_path) for line in after)
    assert re.search(r"shop\.charge +done +success +1 +1", stats)
    assert "charged 500" in shown


def test_effects_and_messages_in_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The page's task is shared with every app that there is and will be, as Celery has it: here with those of this test only.
    monkeypatch.setattr(_state, "_on_app_finalizers", set())
    section = QUICKSTART.read_text().partition("## Effects and messages in one commit")[2]
    example = section.partition("```python\n")[2].partition("```")[0]

    class Base(DeclarativeBase):
        pass

    class Payment(Base):
        __tablename__ = "payments"
        order_id: Mapped[str] = mapped_column(primary_key=True)

    class Order(Base):
        __tablename__ = "orders"
        id: Mapped[str] = mapped_column(primary_key=True)

    app = Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.idempotent_store = url = sqlite_store(tmp_path)
    engine = create_engine(url)
    Base.metadata.create_all(engine)

    def notify(order_id: str) -> None: ...

    def charge(order_id: str, amount: int) -> None: ...

    tasks = {body.__name__: app.task(base=IdempotentTask, shared=False)(body) for body in (notify, charge)}
    with Session(engine) as session:
        names = {"app": app, "Payment": Payment, **tasks}
        names |= {"session": session, "order": Order(id="o-1")}
        exec(example, names)  # the page's own words
        assert names["settle"].apply(("o-1",)).successful()
        assert [order.id for order in session.scalars(select(Order))] == ["o-1"]
        assert [payment.order_id for payment in session.scalars(select(Payment))] == ["o-1"]
    sent = {row.key.task_name.rpartition(".")[2] for row in app.queue_log.store.rows(RowFilter(status=Status.PENDING))}
    assert sent == {"charge", "notify"}
    assert not app.queue_log.store.unsent(limit=9)
    app.queue_log.close()
    app.close()
    engine.dispose()


def _typed(line: str, directory: Path) -> str:
    """Return the output of a line of the page, which begins with ``celery``."""
    program, *arguments = line.split()
    assert program == "celery"
    return _run([sys.executable, "-m", "celery", *arguments], directory)


def _run(command: list[str], directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
