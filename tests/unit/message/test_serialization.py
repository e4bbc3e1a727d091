"""What the queue log keeps of a message and a result: the app's serializers, what it accepts, and data that is damaged."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from celery import Celery
from kombu import Queue
from kombu.exceptions import EncodeError

from celery_idempotent.message.serialization import (
    UndecodableError,
    decode_message,
    decode_result,
    encode_message,
    encode_result,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def app_with(**settings: Any) -> Celery:
    app = Celery("serialization", set_as_current=False)
    app.conf.update(settings)
    return app


JSON = app_with()
PICKLE = app_with(
    task_serializer="pickle", result_serializer="pickle", accept_content=["pickle"], result_accept_content=["pickle"]
)


class TestMessages:
    @pytest.mark.parametrize(("app", "serializer"), [(JSON, "json"), (PICKLE, "pickle")], ids=["json", "pickle"])
    def test_it_survives_a_round_trip(self, app: Celery, serializer: str) -> None:
        data = encode_message(
            (1, "ä"), {"b": None}, {"queue": "q", "priority": 3, "shadow": None}, serializer=serializer
        )
        assert decode_message(app, data) == ([1, "ä"], {"b": None}, {"queue": "q", "priority": 3})

    def test_no_arguments(self) -> None:
        assert decode_message(JSON, encode_message(None, None, {}, serializer="json")) == ([], {}, {})

    def test_arguments_come_back_as_celery_delivers_them(self) -> None:
        args = [UUID(int=5), Decimal("1.50"), NOW]
        assert decode_message(JSON, encode_message(args, {}, {}, serializer="json")) == (args, {}, {})

    def test_a_countdown_becomes_an_eta(self) -> None:
        data = encode_message((), {}, {"countdown": 60, "expires": 90.5}, serializer="json", now=NOW)
        _, _, options = decode_message(JSON, data)
        assert options == {"eta": NOW + timedelta(seconds=60), "expires": NOW + timedelta(seconds=90.5)}

    def test_times_survive(self) -> None:
        data = encode_message((), {}, {"eta": NOW, "expires": NOW}, serializer="json", now=NOW - timedelta(days=1))
        assert decode_message(JSON, data)[2] == {"eta": NOW, "expires": NOW}

    def test_options_of_the_calling_process_are_left_out(self) -> None:
        options = {"producer": object(), "connection": object(), "add_to_parent": False, "queue": Queue("money")}
        assert decode_message(JSON, encode_message((), {}, options, serializer="json"))[2] == {"queue": "money"}

    def test_arguments_that_the_serializer_cannot_take(self) -> None:
        with pytest.raises(EncodeError):
            encode_message((object(),), {}, {}, serializer="json")

    def test_the_options_are_not_changed(self) -> None:
        options = {"countdown": 5}
        encode_message((), {}, options, serializer="json", now=NOW)
        assert options == {"countdown": 5}


class TestResults:
    @pytest.mark.parametrize(
        "value", [None, 0, False, "", [], {}, "ä\0", [1, {"a": None}], Decimal("1.50"), UUID(int=5), NOW]
    )
    @pytest.mark.parametrize("app", [JSON, PICKLE], ids=["json", "pickle"])
    def test_it_survives_a_round_trip(self, app: Celery, value: object) -> None:
        data = encode_result(app, value)
        assert data is not None
        decoded = decode_result(app, data)
        assert (type(decoded), decoded) == (type(value), value)

    @pytest.mark.parametrize("value", [b"", b"\0\xff"])
    def test_raw_bytes(self, value: bytes) -> None:
        app = app_with(result_serializer="raw", result_accept_content=["application/data"])
        data = encode_result(app, value)
        assert data is not None
        assert decode_result(app, data) == value

    @pytest.mark.parametrize(
        ("app", "value"),
        [
            (JSON, object()),
            (JSON, {("a", 1): 1}),
            (PICKLE, lambda: None),
            (app_with(result_serializer="raw"), {"a": 1}),
        ],
        ids=["an object", "a dict with keys that JSON has not", "a lambda for pickle", "a dict for raw"],
    )
    def test_a_result_that_cannot_be_kept_is_logged(
        self, app: Celery, value: object, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert encode_result(app, value) is None
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("celery_idempotent", "WARNING")
        assert "result not kept for replay" in record.message


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("it was unpickled",))


class TestWhatTheAppDoesNotAccept:
    def test_nothing_is_unpickled(self) -> None:
        data = b"application/x-python-serialize;binary\n" + pickle.dumps([[], {}, {"bomb": Bomb()}])
        with pytest.raises(UndecodableError, match="application/x-python-serialize is not in the app's accept_content"):
            decode_message(JSON, data)
        with pytest.raises(UndecodableError, match="application/x-python-serialize is not in the app's accept_content"):
            decode_result(JSON, data)

    def test_results_have_a_say_of_their_own(self) -> None:
        data = encode_result(PICKLE, 5)
        assert data is not None
        assert decode_result(app_with(accept_content=["json"], result_accept_content=["pickle"]), data) == 5
        assert decode_result(app_with(accept_content=["json", "pickle"]), data) == 5
        with pytest.raises(UndecodableError):
            decode_result(app_with(accept_content=["pickle"], result_accept_content=["json"]), data)


DAMAGED = {
    "nothing": b"",
    "no head": b"[[1], {}, {}]",
    "an unknown type": b"application/x-new;utf-8\n[[1], {}, {}]",
    "not text": b"\xff\xfe\x00\n[[1], {}, {}]",
    "half of it": b"application/json;utf-8\n[[1], {}",
    "its head only": b"application/json;utf-8\n",
    "no UTF-8": b'application/json;utf-8\n["\xff"]',
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
class TestDamagedData:
    def test_damaged_data_is_no_message(self, data: bytes) -> None:
        with pytest.raises(UndecodableError):
            decode_message(JSON, data)

    def test_damaged_data_is_no_result(self, data: bytes) -> None:
        with pytest.raises(UndecodableError):
            decode_result(JSON, data)


@pytest.mark.parametrize("body", [b"5", b"[]", b"[[1], {}]", b"[{}, [], {}]", b'"abc"', b"null"])
def test_a_value_is_no_message(body: bytes) -> None:
    with pytest.raises(UndecodableError, match="the data is not a message"):
        decode_message(JSON, b"application/json;utf-8\n" + body)


def test_a_message_that_was_emptied() -> None:
    with pytest.raises(UndecodableError, match="the row has no message"):
        decode_message(JSON, None)
