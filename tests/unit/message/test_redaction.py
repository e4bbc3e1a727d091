"""What is masked, by the names of parameters and keys; and that in doubt nothing is shown."""

from __future__ import annotations

import datetime as dt
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
from celery import Celery

from celery_idempotent import IdempotentTask
from celery_idempotent.message.redaction import MASK, Redaction

SECRET = "hunter2"

Call = tuple[list[Any], dict[str, Any]]


@pytest.fixture
def app() -> Celery:
    app = Celery("redaction", set_as_current=False)

    @app.task(base=IdempotentTask, name="pay", bind=True, shared=False)
    def pay(self: Any, order_id: str, password: str = "", *tokens: str, **options: Any) -> None:
        """Take an order's money."""

    @app.task(base=IdempotentTask, name="plain", shared=False)
    def plain(one: Any, *, card_number: str = "") -> None:
        """Take one argument, and another by name only."""

    app.finalize()
    return app


def shown(app: Celery, task: str, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, *names: str) -> Any:
    return Redaction(names or ("password", "*token*", "card_number"), app.tasks).call(task, args, kwargs or {})


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        (("o-1", SECRET), {}, (["o-1", MASK], {})),
        (("o-1",), {"password": SECRET}, (["o-1"], {"password": MASK})),
        (("o-1",), {"PassWord": SECRET, "amount": 5}, (["o-1"], {"PassWord": MASK, "amount": 5})),
        (("o-1", SECRET, SECRET, SECRET), {}, (["o-1", MASK, MASK, MASK], {})),
        (("o-1",), {"access_token": SECRET}, (["o-1"], {"access_token": MASK})),
        ((), {"order_id": [{"card_number": SECRET, "of": 3}]}, ([], {"order_id": [{"card_number": MASK, "of": 3}]})),
        (({"deep": {"er": ({"Token": [SECRET]},)}},), {}, ([{"deep": {"er": [{"Token": MASK}]}}], {})),
    ],
)
def test_a_named_argument_is_masked_however_it_is_given(
    app: Celery, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Call
) -> None:
    assert shown(app, "pay", args, kwargs) == expected


def test_the_arguments_of_a_signature_are_arguments_too(app: Celery) -> None:
    signature = app.tasks["pay"].s("o-1", SECRET, access_token=SECRET)
    (given,), _ = shown(app, "plain", (dict(signature),))
    assert (given["args"], given["kwargs"]) == (["o-1", MASK], {"access_token": MASK})
    assert SECRET not in str(given)


def test_positional_arguments_without_names_are_masked(app: Celery) -> None:
    assert shown(app, "another.task", ("o-1", 1), {"amount": 5}) == ([MASK, MASK], {"amount": 5})
    assert shown(app, "plain", ("o-1", SECRET)) == ([MASK, MASK], {}), "the body takes one"


def test_an_object_is_shown_by_its_type(app: Celery) -> None:
    @dataclass
    class Card:
        card_number: str

    pair = namedtuple("pair", "of password")  # noqa: PYI024 - as they come
    (one,), _ = shown(app, "plain", ([Card(SECRET), pair("x", SECRET), {1, 2}],))
    assert one == ["<Card>", {"of": "x", "password": MASK}, [1, 2]]


def test_usual_values_are_shown_as_they_are(app: Celery) -> None:
    values = [None, True, 0, 1.5, "text", b"bytes", dt.datetime(2026, 11, 25, tzinfo=dt.UTC), dt.timedelta(1)]
    assert shown(app, "plain", (values,)) == ([values], {})


def test_a_failing_redaction_shows_nothing(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    endless: list[Any] = [SECRET]
    endless.append(endless)
    assert shown(app, "plain", (endless,), {"card_number": SECRET}) == (MASK, MASK)
    assert Redaction(["x"], app.tasks).result(endless) == MASK
    assert "cannot be redacted: RecursionError" in caplog.text
    assert SECRET not in caplog.text


def test_a_result_goes_by_the_name_result(app: Celery) -> None:
    assert Redaction(["password"], app.tasks).result({"password": SECRET, "paid": 5}) == {"password": MASK, "paid": 5}
    assert Redaction(["result"], app.tasks).result({"paid": 5}) == MASK


def test_without_names_everything_is_shown(app: Celery) -> None:
    thing = object()
    assert Redaction([], app.tasks).call("another.task", (thing,), {}) == ((thing,), {})
    assert Redaction([], app.tasks).result(thing) is thing
