"""``recover`` and ``purge``, run as people and scripts run them."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from kombu import Connection

from celery_idempotent import SQLStore, queue_log_table
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, RowFilter
from celery_idempotent.message.serialization import encode_message
from tests.support.cli import SETTINGS, RunCelery, popen_arguments
from tests.support.processes import kill_tree
from tests.support.servers import PrivatePostgreSQL, PrivateRedis
from tests.support.waiting import TIMEOUT, wait_until

DAY = 86400.0


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
    assert line.endswith("; unpublished messages wait in the queue log")

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
    assert run.stderr.splitlines()[-1].endswith("; unpublished messages wait in the queue log")

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
        "shop.charge[waits] stays as it is: it already waits; if the broker has lost it, see `recover --lost-after`",
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
                **popen_arguments(lost_messages.project, *arguments, app="proj", **lost_messages.environment),
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
    watching.wait_for(lambda: watching.log.count("recovery continues in") >= 2)
    lost_messages.broker.start()
    watching.wait_for(lambda: len(watching.lines) == 2)

    assert watching.stop(signal.SIGTERM) == 0
    relayed = {"taken_back": 0, "relayed": 1, "lost": 0, "purged": 0}
    assert [json.loads(line) for line in watching.lines] == [relayed, relayed]
    assert "recovery continues in 0.4 s" in watching.log
    assert "recovery continues in 0.8 s" in watching.log
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
        watching.wait_for(lambda: "recovery continues in" in watching.log)
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
