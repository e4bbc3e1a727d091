"""Rows that are ended in a thread: in order, as long as the store is silent, and without holding anybody."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from celery_idempotent import StoreUnavailableError
from celery_idempotent.core.backoff import Backoff
from celery_idempotent.worker import row_endings
from celery_idempotent.worker.row_endings import RowEndings
from tests.support.waiting import wait_until


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> RowEndings:
    monkeypatch.setattr(row_endings, "_BACKOFF", Backoff(0.01, longest=0.02))
    return RowEndings()


def test_a_row_is_ended_before_its_task_goes_on(endings: RowEndings) -> None:
    ended: list[int] = []
    for number in range(3):
        endings.add("m", lambda number=number: ended.append(number), wait=True)  # type: ignore[misc]
        assert ended == list(range(number + 1))
    wait_until(lambda: not any("endings" in thread.name for thread in threading.enumerate()), describe="its end")


def test_a_silent_store_is_asked_again_and_holds_one_task_for_a_moment(
    endings: RowEndings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_endings, "_WAIT", 0.2)
    answers, ended = threading.Event(), list[str]()

    def write(name: str) -> None:
        if not answers.is_set():
            raise StoreUnavailableError("no answer")
        ended.append(name)

    began = time.monotonic()
    for name in ("first", "second", "third"):
        endings.add(name, lambda name=name: write(name), wait=True)  # type: ignore[misc]
    assert time.monotonic() - began < 1.0
    assert ended == []
    answers.set()
    wait_until(lambda: ended == ["first", "second", "third"], describe="the rows")
    assert caplog.text.count("are ended once the store answers") == 1
    endings.add("fourth", lambda: write("fourth"), wait=True)
    assert ended[-1] == "fourth"


def test_an_error_ends_one_row_only(endings: RowEndings, caplog: pytest.LogCaptureFixture) -> None:
    def refuse() -> None:
        raise ValueError("no")

    ended: list[int] = []
    with caplog.at_level(logging.ERROR):
        endings.add("bad", refuse, wait=True)
        endings.add("good", lambda: ended.append(1), wait=True)
    assert ended == [1]
    assert "bad ran without the guard, and its row stays as it is: ValueError('no')" in caplog.text


def test_too_many_rows_are_left_and_said(
    endings: RowEndings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(row_endings, "_AT_MOST", 1)
    go_on = threading.Event()
    endings.add("first", go_on.wait, wait=False)
    endings.add("second", lambda: pytest.fail("it has no place"), wait=True)
    assert "second ran without the guard, and its row stays as it is: too many wait for the store" in caplog.text
    go_on.set()


def test_a_closed_app_gives_up_what_is_left(endings: RowEndings, caplog: pytest.LogCaptureFixture) -> None:
    def silent() -> None:
        raise StoreUnavailableError("no answer")

    endings.add("first", silent, wait=False)
    endings.rest()
    wait_until(lambda: "1 rows of messages that ran without the guard stay as they are" in caplog.text, describe="it")
