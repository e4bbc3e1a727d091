"""``celery -A proj idempotent``, run as people and scripts run it."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click
import pytest
import sqlalchemy as sa
from celery import Celery

from celery_idempotent import QueueLog, SQLStore
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage
from celery_idempotent.message.kept_steps import KeptStep, pack_steps
from celery_idempotent.message.serialization import encode_message, encode_result
from tests.support.cli import RunCelery


def test_init_creates_the_table_once(celery: RunCelery, project: Path) -> None:
    first, second = (celery("idempotent", "init", store="sqlite:///new.db") for _ in range(2))

    assert (first.returncode, first.stdout, first.stderr) == (0, "queue_log created\n", "")
    assert (second.returncode, second.stdout, second.stderr) == (0, "queue_log is up to date\n", "")
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
    off = celery("idempotent", "stats", SETTINGS="{'idempotent_enabled': False}")
    assert (off.stdout, off.stderr) == (for_people.stdout, "the guard is off: idempotent_enabled is False\n")
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


def test_steps_are_shown_on_demand_and_masked(celery: RunCelery, project: Path) -> None:
    app = Celery("filler", set_as_current=False)
    with closing(SQLStore(f"sqlite:///{project / 'steps.db'}")) as store:
        answer = store.claim(NewMessage(MessageKey("m", "shop.charge"), "m"), worker="w:1", lease=60.0, grace=0.0)
        assert isinstance(answer, Claimed)
        taken = {"charge": {"card": "4111", "id": "ch_1"}, "token": "secret"}
        steps = [KeptStep.of(app, name, f"key of {name}", value) for name, value in taken.items()]
        assert store.keep_steps(answer.claim, steps=pack_steps(steps))

    options = {"store": "sqlite:///steps.db", "SETTINGS": repr({"idempotent_redact": ["card", "token"]})}
    plain, shown = (
        celery("idempotent", "show", "m", *arguments, **options) for arguments in ((), ("--arguments", "--json"))
    )
    assert "see --arguments" in plain.stdout
    assert "ch_1" not in plain.stdout
    (row,) = json.loads(shown.stdout)
    assert row["steps"] == {
        "charge": {"key": "key of charge", "result": {"card": "***", "id": "ch_1"}},
        "token": {"key": "key of token", "result": "***"},
    }


def test_show_what_cannot_be_read(filled: Celery, capsys: pytest.CaptureFixture[str]) -> None:
    filled.start(["idempotent", "show", "a*c", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert "not with the content type of a known serializer" in row["undecodable_message"]

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
        (["recover", "--lost-after", "-1"], "sqlite://", 2, "'-1' is not a duration: give seconds, 0 or more"),
        (["recover", "--lost-after", "nan"], "sqlite://", 2, "'nan' is not a duration"),
        (["recover", "--watch", "--interval", "0"], "sqlite://", 2, "the pause of --watch, and must be more than 0"),
        (["recover", "--interval", "5"], "sqlite://", 2, "the pause of --watch"),
        (["purge", "--older-than", "7y"], "sqlite://", 2, "'7y' is not .* with s, m, h, d or w after it, like 7d"),
        (["recover"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
        (["purge"], "postgresql://u:secret@127.0.0.1:1/shop", 1, r"u:\*\*\*@127.0.0.1:1/shop gave no answer"),
        (["stats"], "redis://u:secret@127.0.0.1:1", 1, r"u:\*\*\*@127.0.0.1:1/0 cannot be reached"),
        (["stats"], "mssql://localhost", 2, "begins with mssql://, which is not known"),
        (["list", "--older-than", "soon"], "sqlite://", 2, "'soon' is not a duration"),
        (["requeue"], "sqlite://", 2, "no messages given: name their ids, or choose them"),
        (["requeue", "m", "--error", "x"], "sqlite://", 2, "leave out --error, or the ids"),
        (
            ["requeue", "m", "--task", "shop.*"],
            "sqlite://",
            2,
            "must be the name of a task, without wildcards",
        ),
        (["forget"], "sqlite://", 2, "no messages given"),
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
    assert "no app given: name it, as in celery -A proj idempotent" in run.stderr
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
