"""Commands that change data ask first in a terminal, and require ``--yes`` elsewhere."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from celery_idempotent import SQLStore
from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, Row, Status
from celery_idempotent.message.serialization import encode_message
from tests.support.cli import PROJECT, popen_arguments

NAMES = ("a", "b")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "proj.py").write_text(PROJECT)
    return tmp_path


@pytest.fixture
def store(project: Path) -> Iterator[SQLStore]:
    """Yield a log with two messages that failed."""
    with closing(SQLStore(f"sqlite:///{project / 'log.db'}")) as store:
        for name in NAMES:
            message = encode_message((name,), {}, {}, serializer="json")
            new = NewMessage(MessageKey(name, "shop.charge"), name, "celery", message=message)
            store.record(new)
            claimed = store.claim(new, worker="w:1", lease=60.0, grace=0.0)
            assert isinstance(claimed, Claimed)
            store.fail(claimed.claim, error="ValueError: no")
        yield store


def rows(store: SQLStore) -> list[Row | None]:
    return [store.find(MessageKey(name, "shop.charge")) for name in NAMES]


def statuses(store: SQLStore) -> list[Status | None]:
    return [None if row is None else row.status for row in rows(store)]


def at_a_terminal(project: Path, *arguments: str, answer: str) -> tuple[int, str]:
    """Run a command where all that it reads and writes is a terminal; its status, and what was to be seen."""
    ours, theirs = pty.openpty()
    given = popen_arguments(project, "idempotent", *arguments, app="proj", store="sqlite:///log.db")
    with subprocess.Popen(**given, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
        os.close(theirs)
        os.write(ours, answer.encode())
        seen = b""
        with suppress(OSError):  # by which Linux tells that the last writer is gone
            while chunk := os.read(ours, 4096):
                seen += chunk
    os.close(ours)
    return process.returncode, seen.decode()


@pytest.mark.parametrize("verb", ["requeue", "forget"])
def test_at_a_terminal_a_no_changes_nothing(project: Path, store: SQLStore, verb: str) -> None:
    before = statuses(store), [row.error for row in rows(store) if row]
    status, seen = at_a_terminal(project, verb, "--task", "*", answer="n\n")
    assert status == 1
    assert f"{verb.capitalize()} 2 messages? [y/N]" in seen
    assert "Aborted!" in seen
    assert (statuses(store), [row.error for row in rows(store) if row]) == before


@pytest.mark.parametrize(
    ("verb", "done", "doing", "becomes"),
    [("requeue", "requeued", "requeueing", Status.PENDING), ("forget", "forgotten", "forgetting", Status.DONE)],
)
def test_a_yes_at_a_terminal_runs_it_with_progress(
    project: Path, store: SQLStore, verb: str, done: str, doing: str, becomes: Status
) -> None:
    status, seen = at_a_terminal(project, verb, "--task", "*", answer="y\n")
    assert status == 0
    assert f"{done} 2" in seen
    assert doing in seen
    assert "100%" in seen
    assert statuses(store) == [becomes, becomes]


FAILURES = ("--older-than", "0", "--processed-status", "failure")


def test_at_a_terminal_purge_asks_before_it_deletes(project: Path, store: SQLStore) -> None:
    status, seen = at_a_terminal(project, "purge", *FAILURES, answer="n\n")
    assert status == 1
    assert "Delete 2 rows of messages that were done 0 s ago or earlier? [y/N]" in seen
    assert statuses(store) == [Status.DONE, Status.DONE]

    # There is nothing to delete: a failure is kept for its own retention.
    for arguments in ((), ("--older-than", "0")):
        status, seen = at_a_terminal(project, "purge", *arguments, answer="")
        assert (status, "purged 0" in seen, "[y/N]" in seen) == (0, True, False)

    status, seen = at_a_terminal(project, "purge", *FAILURES, "--yes", answer="")
    assert status == 0
    assert "100%" in seen
    assert "purged 2" in seen
    assert statuses(store) == [None, None]


def test_at_a_terminal_recover_says_how_far_it_is(project: Path, store: SQLStore) -> None:
    message = encode_message(("late",), {}, {}, serializer="json")
    store.record_all(
        [
            NewMessage(
                MessageKey(f"m{number}", "shop.charge"), f"m{number}", "celery", message=message, published=False
            )
            for number in range(250)
        ]
    )
    status, seen = at_a_terminal(project, "recover", answer="")
    assert status == 0
    assert "so far: relayed 250 never published" in seen
    assert seen.rstrip().endswith("relayed 250 never published")


@pytest.mark.parametrize(
    "arguments",
    [
        ("requeue", "a"),
        ("forget", "a"),
        ("purge",),
        ("purge", *FAILURES),
        ("recover", "--lost-after", "0"),
        ("recover", "--watch", "--lost-after", "0"),
    ],
    ids=" ".join,
)
def test_without_a_terminal_it_needs_yes(project: Path, store: SQLStore, arguments: tuple[str, ...]) -> None:
    given = popen_arguments(project, "idempotent", *arguments, app="proj", store="sqlite:///log.db")
    run = subprocess.run(**given, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert "confirmation required, but stdin is not a terminal: check with --dry-run, then pass --yes" in run.stderr
    assert statuses(store) == [Status.DONE, Status.DONE]


def test_a_dry_run_says_what_would_be_done(project: Path, store: SQLStore) -> None:
    def run(*arguments: str) -> list[str]:
        given = popen_arguments(project, "idempotent", *arguments, "--dry-run", app="proj", store="sqlite:///log.db")
        done = subprocess.run(**given, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return str(done.stdout).splitlines()

    for verb in ("requeue", "forget"):
        head, *listed, last = run(verb, "a", "b")
        assert head.split()[:2] == ["message_id", "task_name"]
        assert [line.split()[0] for line in listed] == ["a", "b"]
        assert last == f"would {verb} 2"
    assert run("purge", *FAILURES) == ["would purge 2"]
    assert run("purge", "--older-than", "0") == ["would purge 0"]
    assert run("purge") == ["would purge 0"]
    assert statuses(store) == [Status.DONE, Status.DONE]
