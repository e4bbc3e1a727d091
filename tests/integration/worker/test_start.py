"""A worker that could not guard its tasks says why in one line, and does not start; one whose store is away starts, and waits for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
from billiard.pool import Pool
from celery import Celery
from sqlalchemy import make_url

from celery_idempotent import ConfigurationError, IdempotentTask, StoreUnavailableError
from celery_idempotent.stores import open_store
from celery_idempotent.worker.bootsteps import CheckStep
from tests.support.worker import ROOT

ANSWERS = ["no database", "no account"]


@pytest.fixture(params=["postgresql", "mariadb", "redis"])
def server(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def wrong(server: str, answer: str) -> str:
    """Return the address of a server that is there, and lets nobody in."""
    url, nothing = make_url(server), f"nothing_{uuid4().hex[:8]}"
    if answer == "no database":
        url = url.set(database="4711" if server.startswith("redis") else nothing)
    else:
        url = url.set(username=nothing, password="s3cret")
    return url.render_as_string(hide_password=False)


def check_of_a_start(url: str) -> None:
    app = Celery("start", broker="memory://", set_as_current=False)
    app.conf.idempotent_store = url

    def charge() -> None: ...

    app.task(charge, base=IdempotentTask, shared=False)
    app.finalize()
    try:
        CheckStep.__new__(CheckStep).include_if(SimpleNamespace(app=app, pool_cls=Pool))
    finally:
        app.close()


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_server_that_lets_nobody_in_has_answered(server: str, answer: str) -> None:
    url = wrong(server, answer)
    store = open_store(url)
    # For a process that runs it is an outage: the database may come back.
    with pytest.raises(StoreUnavailableError, match="refused: ") as asked:
        store.counts()
    assert "s3cret" not in str(asked.value)
    assert "gave no answer" not in str(asked.value)
    assert asked.value.unsent
    store.close()
    with pytest.raises(StoreUnavailableError, match="refused: "):
        check_of_a_start(url)


def test_a_store_that_is_away_is_waited_for() -> None:
    for url in ("postgresql://127.0.0.1:1/shop", "mysql://127.0.0.1:1/shop", "redis://127.0.0.1:1/0"):
        check_of_a_start(url)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("idempotent_store='postgresql://nobody@{server}/nothing'", r"refused: .*"),
        ("idempotent_store='{url}', idempotent_table='missing_table'", "the table missing_table is missing; run .*"),
        ("idempotent_leese=5", "unknown setting 'idempotent_leese'.*"),
    ],
)
def test_a_worker_that_cannot_guard_its_tasks_ends(
    tmp_path: Path, postgresql_url: str, settings: str, says: str
) -> None:
    url = make_url(postgresql_url)
    settings = settings.format(server=f"{url.host}:{url.port or 5432}", url=postgresql_url)
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\n"
        "from celery_idempotent import IdempotentTask\n"
        "app = Celery('shop', broker='memory://')\n"
        f"app.conf.update({settings})\n"
        "@app.task(base=IdempotentTask)\n"
        "def charge(): ...\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool=solo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = (line for line in ended.stderr.splitlines() if "CRITICAL" in line)
    assert re.search(f"the worker does not start: .*{says}", line)


def test_a_worker_in_a_program_raises() -> None:
    app = Celery("start", broker="memory://", set_as_current=False)
    app.conf.idempotent_leese = 5
    with pytest.raises(ConfigurationError, match="idempotent_leese"):
        CheckStep.__new__(CheckStep).include_if(SimpleNamespace(app=app, pool_cls=Pool))
    app.close()
