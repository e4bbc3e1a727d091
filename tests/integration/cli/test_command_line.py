"""``celery -A proj idempotent``, run as people and scripts run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import sqlalchemy as sa
from celery import Celery
from kombu import Connection

from celery_idempotent import QueueLog, SQLStore, queue_log_table
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, RowFilter
from celery_idempotent.message.serialization import encode_message, encode_result
from tests.support.processes import kill_tree
from tests.support.servers import PrivatePostgreSQL, PrivateRedis
from tests.support.waiting import TIMEOUT, wait_until

ROOT = Path(__file__).resolve().parents[3]

PROJECT = """
import os
from celery import Celery
from celery_idempotent import IdempotentTask

app = Celery("proj", broker=os.environ.get("BROKER", "memory://"), backend="cache+memory://")
app.conf.update(idempotent_store=os.environ["STORE"], **eval(os.environ.get("SETTINGS", "{}")))

@app.task(base=IdempotentTask, name="shop.charge", message_id="order:{order_id}")
def charge(order_id, amount=0):
    return amount
"""

#: A module that only the setting `imports` names.
IMPORTED = """
from proj import app
from celery_idempotent import IdempotentTask

@app.task(base=IdempotentTask, name="shop.late")
def late(amount):
    return amount
"""

SETTINGS = {
    "imports": ["imported"],
    "idempotent_lost_after": 300,
    "idempotent_retention": 86400,
    "broker_transport_options": {"socket_connect_timeout": 2},
}

DAY = 86400.0

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
    """Return a project on an SQLite file with some rows."""
    directory = Path(tmp_path_factory.mktemp("project"))
    (directory / "proj.py").write_text(PROJECT)
    (directory / "imported.py").write_text(IMPORTED)
    with closing(SQLStore(f"sqlite:///{directory / 'filled.db'}")) as store:
        fill(store)
    return directory


def command(project: Path, *arguments: str, app: str | None, store: str, **environment: str) -> dict[str, Any]:
    """Return what starts ``celery -A proj ...``: arguments of :class:`subprocess.Popen`."""
    given = () if app is None else ("-A", app)
    return {
        "args": [sys.executable, "-m", "celery", *given, *arguments],
        "cwd": project,
        "env": {
            **{name: value for name, value in os.environ.items() if not name.startswith("CELERY_")},
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(project)]),
            "PYTHONWARNINGS": "error",
            "STORE": store,
            **environment,
        },
    }


@pytest.fixture
def celery(project: Path) -> RunCelery:
    """Run ``celery -A proj ...``."""

    def run(*arguments: str, app: str | None = "proj", store: str = "sqlite:///filled.db", **environment: str) -> Run:
        return subprocess.run(
            **command(project, *arguments, app=app, store=store, **environment),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=100,
            check=False,
        )

    return run


@pytest.fixture
def filled(project: Path) -> Iterator[Celery]:
    """Yield an app on the same rows, whose ``start`` runs a command in this process: it takes seconds less."""
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


CREATED = ["create the table ours", "create the index ours_open", "create the index ours_processed"]


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_on_a_server_init_comes_first(celery: RunCelery, store_url: str) -> None:
    before = celery("idempotent", "stats", store=store_url)
    created = celery("idempotent", "init", "--json", store=store_url, SETTINGS="{'idempotent_table': 'ours'}")

    assert (before.returncode, before.stdout) == (1, "")
    assert before.stderr == "Error: the table queue_log is missing; run `celery -A proj idempotent init`\n"
    assert (created.returncode, json.loads(created.stdout)) == (
        0,
        {"table": "ours", "created": True, "changes": CREATED},
    )
    with closing(SQLStore(store_url, table="ours")) as store:
        assert store.counts() == []


def test_list_prints_a_table(celery: RunCelery) -> None:
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


def test_list_prints_json(celery: RunCelery) -> None:
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
        (["--error", "*such card"], ["order:o-3"]),
        (["--newer-than", "1h", "--status", "done"], ["order:o-3", "order:ключ 订单\n2"]),
        (["--older-than", "1h"], []),
    ],
    ids=" ".join,
)
def test_list_applies_its_filters(
    filled: Celery, capsys: pytest.CaptureFixture[str], filters: list[str], ids: list[str]
) -> None:
    filled.start(["idempotent", "list", "--json", *filters])
    assert sorted(row["message_id"] for row in json.loads(capsys.readouterr().out)) == sorted(ids)


def test_errors_are_listed_where_there_are_some(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "list", "--error", "ValueError*"])
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[-1] == "error"
    assert row.endswith("  ValueError: no such card")


def test_list_says_when_there_may_be_more(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "list", "--limit", "2"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 3
    assert printed.err == "these are the newest 2; there may be more: see --limit\n"

    filled.start(["idempotent", "list", "--limit", "1", "--oldest", "--json"])
    oldest = capsys.readouterr()
    assert [row["message_id"] for row in json.loads(oldest.out)] == ["order:o-1"]
    assert oldest.err == ""


def test_stats_counts_rows(celery: RunCelery, filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_an_empty_table_is_reported(
    filled: Celery, capsys: pytest.CaptureFixture[str], option: list[str], printed: str
) -> None:
    filled.conf.idempotent_store = "sqlite://"
    for command in ("list", "stats"):
        filled.start(["idempotent", command, *option])
        assert capsys.readouterr().out == printed


def test_show_prints_a_sheet(celery: RunCelery) -> None:
    run = celery("idempotent", "show", "order:ключ 订单\n2")

    assert (run.returncode, run.stderr) == (0, "")
    shown = dict(line.split(maxsplit=1) for line in run.stdout.splitlines())
    assert shown["message_id"] == "order:ключ 订单\\n2"
    assert (shown["status"], shown["processed_status"], shown["lease_expires_at"]) == ("done", "success", "-")
    assert shown["result"] == "see --arguments"
    assert "paid" not in run.stdout
    assert "args" not in shown, "a message that succeeded is emptied"


def test_show_with_arguments_for_people(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "show", "order:o-1", "--task", "shop.charge"])
    without = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    filled.start(["idempotent", "show", "order:o-1", "--task", "shop.charge", "--arguments"])
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    assert (without.pop("args"), without.pop("kwargs")) == ("see --arguments",) * 2
    assert (shown.pop("args"), shown.pop("kwargs")) == ("['o-1']", "{'amount': 500}")
    assert shown == without


def test_show_for_programs_with_each_task_that_uses_the_id(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "show", "order:o-1", "--json", "--arguments"])

    charge, refund = json.loads(capsys.readouterr().out)
    assert (charge["task_name"], charge["args"], charge["kwargs"]) == ("shop.charge", ["o-1"], {"amount": 500})
    assert (refund["task_name"], refund["status"]) == ("shop.refund", "processing")
    assert "args" not in refund

    filled.start(["idempotent", "show", "order:o-1", "--task", "shop.refund", "--json"])
    assert json.loads(capsys.readouterr().out) == [refund]


def test_json_has_arguments_and_results_on_demand_only(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    ids = ("order:o-1", "order:ключ 订单\n2")
    for message_id in ids:
        filled.start(["idempotent", "show", message_id, "--task", "shop.charge", "--json"])
    printed = capsys.readouterr().out
    assert not any(word in printed for word in ("args", "result", "amount", "paid"))
    filled.start(["idempotent", "show", ids[1], "--json", "--arguments"])
    (done,) = json.loads(capsys.readouterr().out)
    assert done["result"] == {"paid": None}


def test_a_callers_argsrepr_is_shown(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    message = encode_message(("4111 1111",), {}, {"argsrepr": "('4111 ...',)"}, serializer="json")
    key = MessageKey("redacted", "shop.pay")
    QueueLog.of(filled).store.record(NewMessage(key, "id", message=message))
    filled.start(["idempotent", "show", "redacted"])
    printed = capsys.readouterr().out
    QueueLog.of(filled).store.withdraw(key, task_id="id")

    assert "argsrepr" in printed
    assert "('4111 ...',)" in printed
    assert "4111 1111" not in printed


def test_redacted_arguments_are_masked_even_then(celery: RunCelery, project: Path) -> None:
    app = Celery("filler", set_as_current=False)
    with closing(SQLStore(f"sqlite:///{project / 'redacted.db'}")) as store:
        done, waits = (NewMessage(MessageKey(name, "shop.charge"), name) for name in ("done", "waits"))
        data = encode_message(("o-secret", 5), {"meta": {"Card": "4111", "of": 3}}, {}, serializer="json")
        store.record(replace(waits, message=data))
        claimed = store.claim(done, worker="w:1", lease=60.0, grace=0.0)
        assert isinstance(claimed, Claimed)
        store.complete(claimed.claim, result=encode_result(app, {"card": "4111", "paid": 5}))

    settings = {"idempotent_redact": ["order_*", "card"]}
    options = {"store": "sqlite:///redacted.db", "SETTINGS": repr(settings)}
    for_people = celery("idempotent", "show", "waits", "--arguments", **options)
    shown = dict(line.split(maxsplit=1) for line in for_people.stdout.splitlines())
    assert (shown["args"], shown["kwargs"]) == ("['***', 5]", "{'meta': {'Card': '***', 'of': 3}}")
    for_programs = [
        celery("idempotent", "show", name, "--arguments", "--json", **options) for name in ("waits", "done")
    ]
    (waiting,), (ended,) = (json.loads(run.stdout) for run in for_programs)
    assert (waiting["args"], waiting["kwargs"]) == (["***", 5], {"meta": {"Card": "***", "of": 3}})
    assert ended["result"] == {"card": "***", "paid": 5}


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
        (["recover", "--lost-after", "-1"], "sqlite://", 2, "'-1' is not a number of seconds, 0 or more"),
        (["recover", "--lost-after", "nan"], "sqlite://", 2, "'nan' is not a number of seconds"),
        (["recover", "--watch", "--interval", "0"], "sqlite://", 2, "the pause of --watch, and more than 0"),
        (["recover", "--interval", "5"], "sqlite://", 2, "the pause of --watch"),
        (["purge", "--older-than", "7y"], "sqlite://", 2, "'7y' is not .* with s, m, h, d or w after it, like 7d"),
        (["recover"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
        (["purge"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
        (["stats"], "redis://u:secret@127.0.0.1:1", 1, r"u:\*\*\*@127.0.0.1:1/0 cannot be reached"),
        (["stats"], "mssql://localhost", 2, "begins with mssql://, which is not known"),
        (["list", "--older-than", "soon"], "sqlite://", 2, "'soon' is not a number of seconds"),
        (["requeue"], "sqlite://", 2, "which messages\\? Name their ids, or choose them"),
        (["requeue", "m", "--error", "x"], "sqlite://", 2, "leave out --error, or the ids"),
        (["requeue", "m", "--task", "shop.*"], "sqlite://", 2, "the name of a task, without wildcards"),
        (["forget"], "sqlite://", 2, "which messages\\?"),
        (["forget", "m", "--status", "done"], "sqlite://", 2, "leave out --status, or the ids"),
        (["requeue", "m"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
        (["stats"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
    ],
    ids=[
        *("command", "choice", "range", "argument", "message"),
        *("negative", "nan", "no-pause", "no-watch", "unit", "recover", "purge", "redis", "kind", "age"),
        *("requeue-what", "requeue-both", "requeue-wildcard", "forget-what", "forget-both", "requeue", "server"),
    ],
)
def test_an_error_has_a_status_and_a_text(
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
    assert all(
        f"  {name} " in own.stdout
        for name in ("init", "list", "purge", "recover", "requeue", "forget", "show", "stats")
    )
    assert "idempotent_store: '********'" in report.stdout


# -- recover, purge --------------------------------------------------------------------------------------------------------


@dataclass
class LostMessages:
    """A queue log and a broker, between which messages went missing."""

    project: Path
    url: str
    store: SQLStore
    broker: PrivateRedis

    @property
    def environment(self) -> dict[str, str]:
        return {"store": self.url, "BROKER": self.broker.url, "SETTINGS": repr(SETTINGS)}

    def pending(self, name: str, task: str = "shop.charge", queue: str | None = "celery", **changes: Any) -> MessageKey:
        key = MessageKey(name, task)
        message = encode_message((7,), {}, {"queue": queue} if queue else {}, serializer="json")
        self.store.record(NewMessage(key, f"id of {name}", queue, message=message, **changes))
        return key

    def unsent(self, name: str) -> MessageKey:
        return self.pending(name, published=False)

    def claimed(self, name: str, **changes: Any) -> Claimed:
        key = self.pending(name, **changes)
        claimed = self.store.claim(NewMessage(key, f"id of {name}"), worker="w:1", lease=3600.0, grace=0.0)
        assert isinstance(claimed, Claimed)
        return claimed

    def lapsed(self, name: str, **changes: Any) -> MessageKey:
        claim = self.claimed(name, **changes).claim
        self.store.expire(claim)
        return claim.key

    def done(self, name: str) -> MessageKey:
        claim = self.claimed(name).claim
        self.store.complete(claim, result=b"1")
        return claim.key

    def age(self, seconds: float, *keys: MessageKey) -> None:
        """Let time pass for some rows."""
        table = queue_log_table(sa.MetaData())
        with self.store.engine.begin() as connection:
            for key in keys:
                where = (table.c.message_id == key.message_id, table.c.task_name == key.task_name)
                row = connection.execute(sa.select(table).where(*where)).mappings().one()
                times = ("created_timestamp", "processed_timestamp", "published_at")
                older = {name: row[name] - timedelta(seconds=seconds) for name in times if row[name] is not None}
                connection.execute(sa.update(table).where(*where).values(older))

    def published(self) -> list[str]:
        """Return the ids of the messages on the queue, which is empty then."""
        with Connection(self.broker.url) as connection, closing(connection.SimpleQueue("celery", no_ack=True)) as queue:
            found = []
            with suppress(queue.Empty):
                while True:
                    found.append(queue.get_nowait().properties["message_id"])
        return sorted(found)


@pytest.fixture
def lost_messages(project: Path, private_redis: PrivateRedis, tmp_path: Path) -> Iterator[LostMessages]:
    url = f"sqlite:///{tmp_path / 'lost.db'}"
    with closing(SQLStore(url)) as store:
        store.init()
        yield LostMessages(project, url, store, private_redis)


def test_recover_publishes_what_is_due_and_says_so(celery: RunCelery, lost_messages: LostMessages) -> None:
    lost_messages.lapsed("lapsed", task="shop.late")
    lost_messages.unsent("unsent")
    lost_messages.age(2 * DAY, lost_messages.done("old:1"), lost_messages.done("old:2"))
    lost_messages.pending("waits")
    lost_messages.lapsed("of another app", task="another.task")

    first = celery("idempotent", "recover", **lost_messages.environment)
    second = celery("idempotent", "recover", **lost_messages.environment)

    said = "taken back 1 whose worker died, relayed 1 never published, purged 2\n"
    assert (first.returncode, first.stdout) == (0, said)
    assert first.stderr.splitlines() == [
        "shop.late[lapsed] is published again: it was processing",
        "shop.charge[unsent] is published: it waited in the queue log",
    ]
    assert (second.returncode, second.stdout, second.stderr) == (0, "nothing was due\n", "")
    assert lost_messages.published() == ["lapsed", "unsent"]


def test_a_dry_run_of_recover_lists_what_is_due_and_changes_nothing(
    celery: RunCelery, lost_messages: LostMessages
) -> None:
    lost_messages.lapsed("lapsed", task="shop.late")
    lost_messages.lapsed("of another app", task="another.task")
    lost_messages.unsent("unsent")
    lost_messages.pending("being published", published=False, publish_within=60.0)
    lost_messages.age(2 * DAY, lost_messages.done("old"))
    lost_messages.age(1000.0, lost_messages.pending("overtaken"), lost_messages.pending("elsewhere", queue="other"))
    lost_messages.claimed("overtaking")
    before = list(lost_messages.store.rows(RowFilter()))
    lost_messages.broker.stop()

    people = celery("idempotent", "recover", "--dry-run", **lost_messages.environment)
    programs = celery(
        "idempotent", "recover", "--dry-run", "--lost-after", "900", "--json", **lost_messages.environment
    )

    assert (people.returncode, people.stderr) == (0, "")
    head, *listed, last = people.stdout.splitlines()
    assert head.split() == ["message_id", "task_name", "status", "queue", "would"]
    assert [line.split() for line in listed] == [
        ["lapsed", "shop.late", "processing", "celery", "be", "taken", "back"],
        ["unsent", "shop.charge", "pending", "celery", "be", "relayed"],
        ["overtaken", "shop.charge", "pending", "celery", "be", "published", "again"],
    ]
    assert (
        last == "would take back 1 whose worker died, relay 1 never published, publish again 1 presumed lost, purge 1"
    )
    said = json.loads(programs.stdout)
    assert {row["message_id"] for row in said["lost"]} == {"overtaken", "elsewhere"}
    assert (said["dry_run"], said["purged"]) == (True, 1)
    assert [replace(row, read_at=None) for row in lost_messages.store.rows(RowFilter())] == [  # type: ignore[arg-type]
        replace(row, read_at=None)  # type: ignore[arg-type]
        for row in before
    ]

    lost_messages.broker.start()
    lost_messages.store.relayed([MessageKey("being published", "shop.charge")], published=True)
    done = celery("idempotent", "recover", **lost_messages.environment)
    assert done.stdout == (
        "taken back 1 whose worker died, relayed 1 never published, published again 1 presumed lost, purged 1\n"
    )
    assert celery("idempotent", "recover", "--dry-run", **lost_messages.environment).stdout == "nothing is due\n"


def test_recover_goes_on_until_nothing_more_is_due(celery: RunCelery, lost_messages: LostMessages) -> None:
    names = sorted(lost_messages.unsent(f"m:{number:03}").message_id for number in range(450))
    run = celery("idempotent", "recover", "--json", **lost_messages.environment)
    assert (run.returncode, json.loads(run.stdout)) == (0, {"taken_back": 0, "relayed": 450, "lost": 0, "purged": 0})
    assert lost_messages.published() == names


@pytest.mark.parametrize("over", [False, True], ids=["runs", "ran"])
def test_recover_knows_by_what_runs_or_ran_what_was_overtaken(
    celery: RunCelery, lost_messages: LostMessages, over: bool
) -> None:
    older = [
        lost_messages.pending("lost"),
        lost_messages.pending("backlog", queue="other"),
        lost_messages.pending("somewhere", queue=None),
    ]
    lost_messages.age(1000.0, *older)

    lost_messages.claimed("of unknown queue", queue=None)
    before = celery("idempotent", "recover", "--json", **lost_messages.environment)
    overtaking = lost_messages.claimed("overtaking").claim
    if over:
        lost_messages.store.complete(overtaking, result=b"1")
    after = celery("idempotent", "recover", "--json", **lost_messages.environment)

    assert [json.loads(run.stdout)["lost"] for run in (before, after)] == [0, 1]
    assert lost_messages.published() == ["lost"]


def test_recover_all_that_waits_for_a_broker_that_was_emptied(celery: RunCelery, lost_messages: LostMessages) -> None:
    older = [
        lost_messages.pending("a"),
        lost_messages.pending("b", queue="celery"),
        lost_messages.pending("c", task="shop.late"),
    ]
    lost_messages.age(120.0, *older)
    lost_messages.pending("young")
    assert json.loads(celery("idempotent", "recover", "--json", **lost_messages.environment).stdout)["lost"] == 0

    run = celery("idempotent", "recover", "--lost-after", "1m", "--yes", **lost_messages.environment)

    assert (run.returncode, run.stdout) == (0, "published again 3 presumed lost\n")
    assert lost_messages.published() == ["a", "b", "c"]


def test_recover_without_a_broker_loses_nothing(celery: RunCelery, lost_messages: LostMessages) -> None:
    lost_messages.unsent("unsent")
    lost_messages.lapsed("lapsed")
    lost_messages.broker.stop()
    run = celery("idempotent", "recover", **lost_messages.environment)

    assert (run.returncode, run.stdout) == (1, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("Error: the broker took no message: ")
    assert line.endswith("; what was not published waits in the queue log")

    lost_messages.broker.start()
    assert celery("idempotent", "recover", **lost_messages.environment).returncode == 0
    assert lost_messages.published() == ["lapsed", "unsent"]


def test_a_message_requeued_while_the_broker_is_down_waits_in_the_log(
    celery: RunCelery, lost_messages: LostMessages
) -> None:
    keys = [lost_messages.claimed("failed", task="shop.late").claim, lost_messages.claimed("failed too").claim]
    for claim in keys:
        lost_messages.store.fail(claim, error="ConnectionError: no")
    lost_messages.broker.stop()
    arguments = ("idempotent", "requeue", "--error", "ConnectionError*", "--yes")
    run = celery(*arguments, **lost_messages.environment)

    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.splitlines()[-1].endswith("; what was not published waits in the queue log")

    lost_messages.broker.start()
    again = celery(*arguments, "--json", **lost_messages.environment)
    assert (again.returncode, json.loads(again.stdout)["requeued"]) == (0, [])
    assert celery("idempotent", "recover", **lost_messages.environment).stdout == "relayed 2 never published\n"
    assert lost_messages.published() == ["failed", "failed too"]


def test_an_id_of_several_tasks_is_said(celery: RunCelery, lost_messages: LostMessages) -> None:
    lost_messages.pending("shared")
    lost_messages.pending("shared", task="shop.late")
    forget = ("idempotent", "forget", "shared", "--force", "--dry-run")
    both = celery(*forget, **lost_messages.environment)
    assert (both.returncode, both.stdout.splitlines()[-1]) == (0, "would forget 2")
    says = "shared is the id of messages of several tasks (shop.charge, shop.late); --task NAME chooses one\n"
    assert both.stderr == says
    one = celery(*forget, "--task", "shop.late", **lost_messages.environment)
    assert (one.returncode, one.stdout.splitlines()[-1], one.stderr) == (0, "would forget 1", "")


def test_messages_not_requeued_are_named(celery: RunCelery, lost_messages: LostMessages) -> None:
    lost_messages.store.fail(lost_messages.claimed("failed").claim, error="no")
    lost_messages.pending("waits")
    run = celery("idempotent", "requeue", "failed", "waits", "never", "--yes", **lost_messages.environment)

    assert (run.returncode, run.stdout) == (1, "requeued 1\n")
    assert run.stderr.splitlines() == [
        "shop.charge[failed] is published: it waited in the queue log",
        "no message 'never'",
        "shop.charge[waits] stays as it is: it waits already; if the broker has lost it, see `recover --lost-after`",
    ]
    assert lost_messages.published() == ["failed"]


def test_purge_removes_old_rows(celery: RunCelery, lost_messages: LostMessages) -> None:
    old, young, waiting = lost_messages.done("old"), lost_messages.done("young"), lost_messages.pending("waiting")
    lost_messages.age(2 * DAY, old, waiting)
    lost_messages.age(2 * 3600.0, young)

    by_retention = celery("idempotent", "purge", "--yes", **lost_messages.environment)
    by_age = [
        celery("idempotent", "purge", "--older-than", age, "--yes", "--json", **lost_messages.environment)
        for age in ("3h", "1h")
    ]

    assert (by_retention.returncode, by_retention.stdout, by_retention.stderr) == (0, "purged 1\n", "")
    assert [(run.returncode, json.loads(run.stdout)) for run in by_age] == [(0, {"purged": 0}), (0, {"purged": 1})]
    assert [row.key for row in lost_messages.store.rows(RowFilter())] == [waiting]


class Watch:
    """``celery -A proj idempotent recover --watch``, which runs until it is told to stop."""

    def __init__(self, lost_messages: LostMessages, directory: Path, *options: str) -> None:
        self._out, self._err = directory / "out", directory / "err"
        arguments = ("idempotent", "recover", "--watch", "--interval", "0.2", *options)
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                **command(lost_messages.project, *arguments, app="proj", **lost_messages.environment),
                stdout=out,
                stderr=err,
            )

    @property
    def lines(self) -> list[str]:
        return self._out.read_text().splitlines()

    @property
    def log(self) -> str:
        return self._err.read_text()

    def wait_for(self, condition: Callable[[], object]) -> None:
        def holds() -> bool:
            assert self.process.poll() is None, self.log
            return bool(condition())

        wait_until(holds, describe=lambda: f"{self.lines}\n{self.log}")

    def stop(self, signum: signal.Signals) -> int:
        self.process.send_signal(signum)
        return self.process.wait(TIMEOUT)


@pytest.fixture
def watch(lost_messages: LostMessages, tmp_path: Path) -> Iterator[Callable[..., Watch]]:
    watches: list[Watch] = []

    def watch(*options: str) -> Watch:
        watches.append(Watch(lost_messages, tmp_path, *options))
        return watches[-1]

    yield watch
    for started in watches:
        if started.process.poll() is None:
            kill_tree(started.process)


def test_watch_says_each_step_that_did_something_and_waits_for_the_broker(
    lost_messages: LostMessages, watch: Callable[..., Watch]
) -> None:
    lost_messages.unsent("first")
    watching = watch("--json")
    watching.wait_for(lambda: len(watching.lines) == 1)

    lost_messages.broker.stop()
    lost_messages.unsent("second")
    watching.wait_for(lambda: watching.log.count("recovery goes on in") >= 2)
    lost_messages.broker.start()
    watching.wait_for(lambda: len(watching.lines) == 2)

    assert watching.stop(signal.SIGTERM) == 0
    relayed = {"taken_back": 0, "relayed": 1, "lost": 0, "purged": 0}
    assert [json.loads(line) for line in watching.lines] == [relayed, relayed]
    assert "recovery goes on in 0.4 s" in watching.log
    assert "recovery goes on in 0.8 s" in watching.log
    assert "Traceback" not in watching.log
    assert lost_messages.published() == ["first", "second"]


def test_watch_waits_for_the_store(
    lost_messages: LostMessages, private_postgresql: PrivatePostgreSQL, watch: Callable[..., Watch]
) -> None:
    with closing(SQLStore(private_postgresql.url)) as store:
        store.init()
        lost_messages.url, lost_messages.store = private_postgresql.url, store
        lost_messages.unsent("first")
        watching = watch()
        watching.wait_for(lambda: watching.lines)
        private_postgresql.stop()
        watching.wait_for(lambda: "recovery goes on in" in watching.log)
        private_postgresql.start()
        lost_messages.unsent("second")
        watching.wait_for(lambda: len(watching.lines) == 2)

    assert watching.stop(signal.SIGINT) == 0
    assert watching.lines == ["relayed 1 never published"] * 2
    assert "Traceback" not in watching.log
    assert lost_messages.published() == ["first", "second"]


def test_watch_publishes_all_that_waits_once(lost_messages: LostMessages, watch: Callable[..., Watch]) -> None:
    """Again and again, a backlog would be published for being one."""
    names = [lost_messages.pending(f"waiting:{number}").message_id for number in range(3)]
    lost_messages.age(60.0, *(MessageKey(name, "shop.charge") for name in names))
    watching = watch("--lost-after", "0", "--yes")
    watching.wait_for(lambda: watching.lines)
    lost_messages.unsent("later")
    watching.wait_for(lambda: len(watching.lines) == 2)

    assert watching.stop(signal.SIGTERM) == 0
    assert watching.lines == ["published again 3 presumed lost", "relayed 1 never published"]
    assert lost_messages.published() == ["later", *names]
