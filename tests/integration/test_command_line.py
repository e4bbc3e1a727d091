"""``celery -A proj idempotent``, run as people and scripts run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest
import sqlalchemy as sa
from celery import Celery

from celery_idempotent import QueueLog, SQLStore
from celery_idempotent.records import Claimed, MessageKey, NewMessage
from celery_idempotent.serialization import encode_message, encode_result

ROOT = Path(__file__).resolve().parents[2]

PROJECT = """
import os
from celery import Celery
from celery_idempotent import IdempotentTask

app = Celery("proj", broker="memory://", backend="cache+memory://")
app.conf.update(idempotent_store=os.environ["STORE"], **eval(os.environ.get("SETTINGS", "{}")))

@app.task(base=IdempotentTask, name="shop.charge", message_id="order:{order_id}")
def charge(order_id, amount=0):
    return amount
"""

Run = subprocess.CompletedProcess[str]
RunCelery = Callable[..., Run]


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
    """A project on an SQLite file with some rows."""
    directory = Path(tmp_path_factory.mktemp("project"))
    (directory / "proj.py").write_text(PROJECT)
    with closing(SQLStore(f"sqlite:///{directory / 'filled.db'}")) as store:
        fill(store)
    return directory


@pytest.fixture
def celery(project: Path) -> RunCelery:
    """Run ``celery -A proj ...``."""

    def run(*arguments: str, app: str | None = "proj", store: str = "sqlite:///filled.db", **environment: str) -> Run:
        given = () if app is None else ("-A", app)
        return subprocess.run(
            [sys.executable, "-m", "celery", *given, *arguments],
            cwd=project,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("CELERY_")},
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(project)]),
                "PYTHONWARNINGS": "error",
                "STORE": store,
                **environment,
            },
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture
def filled(project: Path) -> Iterator[Celery]:
    """An app on the same rows, whose ``start`` runs a command in this process: it takes seconds less."""
    app = Celery("filled", set_as_current=False, idempotent_store=f"sqlite:///{project / 'filled.db'}")
    yield app
    QueueLog.of(app).close()
    app.close()


def test_init_creates_the_table_once(celery: RunCelery, project: Path) -> None:
    first, second = (celery("idempotent", "init", store="sqlite:///new.db") for _ in range(2))

    assert (first.returncode, first.stdout, first.stderr) == (0, "queue_log created\n", "")
    assert (second.returncode, second.stdout, second.stderr) == (0, "queue_log is there already\n", "")
    engine = sa.create_engine(f"sqlite:///{project / 'new.db'}", poolclass=sa.NullPool)
    assert sa.inspect(engine).has_table("queue_log")


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_on_a_server_init_comes_first(celery: RunCelery, store_url: str) -> None:
    before = celery("idempotent", "stats", store=store_url)
    created = celery("idempotent", "init", "--json", store=store_url, SETTINGS="{'idempotent_table': 'ours'}")

    assert (before.returncode, before.stdout) == (1, "")
    assert before.stderr == "Error: the table queue_log is missing; run `celery -A proj idempotent init`\n"
    assert (created.returncode, json.loads(created.stdout)) == (0, {"table": "ours", "created": True})
    with closing(SQLStore(store_url, table="ours")) as store:
        assert store.counts() == []


def test_list_for_people(celery: RunCelery) -> None:
    run = celery("idempotent", "list", "--task", "shop.charge")

    assert (run.returncode, run.stderr) == (0, "")
    head, *rows = run.stdout.splitlines()
    assert head.split() == [
        *(
            "message_id",
            "task_name",
            "status",
            "processed_status",
            "attempt",
            "token",
            "duplicates",
            "created_timestamp",
        )
    ]
    assert sorted(row.split("  ")[0] for row in rows) == ["order:o-1", "order:ключ 订单\\n2"]
    (done,) = (row for row in rows if "ключ" in row)
    assert done.split()[2:8] == ["shop.charge", "done", "success", "0", "1", "1"]


def test_list_for_programs(celery: RunCelery) -> None:
    run = celery("idempotent", "list", "--json")

    assert (run.returncode, run.stderr) == (0, "")
    rows = {(row["message_id"], row["task_name"]): row for row in json.loads(run.stdout)}
    assert len(rows) == 5
    done = rows["order:ключ 订单\n2", "shop.charge"]
    assert (done["status"], done["processed_status"], done["duplicates"], done["token"]) == ("done", "success", 1, 1)
    assert (done["task_id"], done["queue"], done["worker"]) == ("id of order:ключ 订单\n2", "money", "w@here:1")
    assert done["created_timestamp"].endswith("+00:00")
    assert rows["order:o-3", "shop.refund"]["error"] == "ValueError: no such card"
    assert not {"message", "result", "read_at", "key"} & set(done)


@pytest.mark.parametrize(
    ("filters", "ids"),
    [
        (["--task", "shop.ref*", "--message-id", "order:*"], ["order:o-1", "order:o-3"]),
        (["--status", "pending"], ["order:o-1"]),
        (["--processed-status", "failure"], ["order:o-3"]),
        (["--status", "done", "--task", "shop.charge", "--message-id", "*订单*"], ["order:ключ 订单\n2"]),
        (["--message-id", "nothing"], []),
    ],
    ids=" ".join,
)
def test_list_filters(filled: Celery, capsys: pytest.CaptureFixture[str], filters: list[str], ids: list[str]) -> None:
    filled.start(["idempotent", "list", "--json", *filters])
    assert sorted(row["message_id"] for row in json.loads(capsys.readouterr().out)) == sorted(ids)


def test_list_says_when_there_may_be_more(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "list", "--limit", "2"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert printed.err == "these are the newest 2; there may be more: see --limit\n"


def test_stats(celery: RunCelery, filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    for_people = celery("idempotent", "stats")
    filled.start(["idempotent", "stats", "--json"])

    assert (for_people.returncode, for_people.stderr) == (0, "")
    assert [line.split() for line in for_people.stdout.splitlines()] == [
        ["task_name", "status", "processed_status", "rows", "duplicates"],
        ["shop.charge", "done", "success", "1", "1"],
        ["shop.charge", "pending", "-", "1", "0"],
        ["shop.refund", "done", "failure", "1", "0"],
        ["shop.refund", "processing", "-", "2", "0"],
    ]
    assert json.loads(capsys.readouterr().out)[0] == {
        "task_name": "shop.charge",
        "status": "done",
        "processed_status": "success",
        "rows": 1,
        "duplicates": 1,
    }


@pytest.mark.parametrize(("option", "printed"), [([], "no rows\n"), (["--json"], "[]\n")], ids=["text", "json"])
def test_an_empty_table(filled: Celery, capsys: pytest.CaptureFixture[str], option: list[str], printed: str) -> None:
    filled.conf.idempotent_store = "sqlite://"
    for command in ("list", "stats"):
        filled.start(["idempotent", command, *option])
        assert capsys.readouterr().out == printed


def test_show_for_people(celery: RunCelery) -> None:
    run = celery("idempotent", "show", "order:ключ 订单\n2")

    assert (run.returncode, run.stderr) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert shown["message_id"] == "order:ключ 订单\\n2"
    assert (shown["status"], shown["processed_status"], shown["lease_expires_at"]) == ("done", "success", "-")
    assert shown["result"] == "{'paid': None}"
    assert "args" not in shown, "a message that succeeded is emptied"


def test_show_for_programs_with_each_task_that_uses_the_id(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "show", "order:o-1", "--json"])

    charge, refund = json.loads(capsys.readouterr().out)
    assert (charge["task_name"], charge["args"], charge["kwargs"]) == ("shop.charge", ["o-1"], {"amount": 500})
    assert (refund["task_name"], refund["status"]) == ("shop.refund", "processing")
    assert "args" not in refund

    filled.start(["idempotent", "show", "order:o-1", "--task", "shop.refund", "--json"])
    assert json.loads(capsys.readouterr().out) == [refund]


def test_show_what_cannot_be_read(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "show", "a*c", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert "does not begin with the content type" in row["undecodable_message"]

    filled.start(["idempotent", "show", "order:o-3", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["undecodable_message"] == "application/x-python-serialize is not in the app's accept_content"
    assert row["error"] == "ValueError: no such card"


def test_a_message_that_is_not_there(celery: RunCelery) -> None:
    run = celery("idempotent", "show", "order:нет", "--task", "shop.charge")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "Error: no message 'order:нет' of task shop.charge\n"


def test_a_terminal_without_unicode(celery: RunCelery) -> None:
    run = celery("idempotent", "list", "--task", "shop.charge", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert (run.returncode, run.stderr) == (0, "")
    assert "order:\\u043a\\u043b\\u044e\\u0447 \\u8ba2\\u5355\\n2" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "store", "status", "says"),
    [
        (["nonsense"], "sqlite://", 2, "No such command 'nonsense'"),
        (["list", "--status", "finished"], "sqlite://", 2, "'finished' is not one of 'pending', 'processing', 'done'"),
        (["list", "--limit", "0"], "sqlite://", 2, "0 is not in the range x>=1"),
        (["show"], "sqlite://", 2, "Missing (argument|parameter)"),
        (["show", "m"], "sqlite://", 1, "no message 'm'"),
        (["stats"], "redis://localhost", 2, "the queue log cannot live in Redis"),
        (["stats"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
    ],
    ids=["command", "choice", "range", "argument", "message", "store", "server"],
)
def test_what_goes_wrong_has_a_status_and_a_text(
    filled: Celery, arguments: list[str], store: str, status: int, says: str
) -> None:
    filled.conf.idempotent_store = store
    with pytest.raises(click.ClickException) as raised:
        filled.start(["idempotent", *arguments])
    assert raised.value.exit_code == status
    assert re.search(says, raised.value.format_message())
    assert "secret" not in raised.value.format_message()


def test_the_status_is_the_programs_and_the_text_is_one_line(celery: RunCelery) -> None:
    usage = celery("idempotent", "stats", SETTINGS="{'idempotent_stor': 1}")
    down = celery("idempotent", "stats", store="postgresql://u:secret@127.0.0.1:1/shop")

    assert (usage.returncode, usage.stdout) == (2, "")
    assert usage.stderr.splitlines()[-1] == (
        "Error: unknown setting 'idempotent_stor'; did you mean 'idempotent_store'?"
    )
    assert (down.returncode, down.stdout) == (1, "")
    assert len(down.stderr.splitlines()) == 1
    assert "gave no answer" in down.stderr
    assert "secret" not in down.stderr


def test_without_an_app_it_asks_which(celery: RunCelery, project: Path) -> None:
    run = celery("idempotent", "list", app=None)
    assert (run.returncode, run.stdout) == (2, "")
    assert "which app? Name it: celery -A proj idempotent" in run.stderr
    assert not (project / "queue_log.db").exists()


def test_it_is_one_of_celerys_commands(celery: RunCelery) -> None:
    overview, own = celery("--help"), celery("idempotent", "--help")
    report = celery("report")

    assert overview.returncode == own.returncode == report.returncode == 0
    assert "idempotent" in overview.stdout
    assert "worker" in overview.stdout
    assert all(f"  {command} " in own.stdout for command in ("init", "list", "show", "stats"))
    assert "idempotent_store: 'sqlite:///filled.db'" in report.stdout
