"""Refusals mean one thing, whichever redis-py and whichever server worded them."""

from __future__ import annotations

from typing import Any

import pytest
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

from celery_idempotent.stores.redis.pool import read_replies


class Answering:
    """A connection on which these answers come."""

    def __init__(self, *answers: object) -> None:
        self._answers = list(answers)

    def read_response(self) -> Any:
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def replies(*answers: object) -> list[Any]:
    connection: Any = Answering(*answers)
    return read_replies(connection, len(answers))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("CLUSTERDOWN The cluster is down", ClusterDownError),
        ("READONLY You can't write against a read only replica.", ReadOnlyError),
        ("OOM command not allowed", OutOfMemoryError),
        ("WRONGTYPE Operation against a key", ResponseError),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refusal_has_the_type_of_its_code(text: str, kind: type[ResponseError], wrapped: bool) -> None:
    """Redis-py 5 has types for a cluster's refusals only in `RedisCluster`; Redis 6.2 wraps the refusal of a script's command."""
    wrapping = "Error running script (call to f_0a1b): @user_script:3: @user_script: 3: -"
    (refusal,) = replies(ResponseError(f"{wrapping if wrapped else ''}{text}"))
    assert type(refusal) is kind
    assert str(refusal) == (text if kind is ResponseError else text.partition(" ")[2])


def test_a_redirection_says_where_to() -> None:
    moved, ask = replies(ResponseError("MOVED 3999 127.0.0.1:6381"), ResponseError("ASK 3999 127.0.0.1:6382"))
    assert (type(moved), moved.slot_id, moved.host, moved.port) == (MovedError, 3999, "127.0.0.1", 6381)
    assert (type(ask), ask.port) == (AskError, 6382)


def test_a_refusal_is_no_reason_to_leave_the_next_answer_unread() -> None:
    typed = NoScriptError("No matching script.")
    assert replies(typed, 1) == [typed, 1]
