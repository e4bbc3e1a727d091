"""Make a method a verb of the store: run it in a session, and repeat it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from celery_idempotent.core.records import MessageKey, Row
from celery_idempotent.stores.redis.connection import Server
from celery_idempotent.stores.redis.layout import identity
from celery_idempotent.stores.redis.rows import Argument, row_of
from celery_idempotent.stores.redis.scripts import Script
from celery_idempotent.stores.redis.session import ScriptSession

__all__ = ["Verbs", "ask", "shows", "verb", "wrote"]

S = TypeVar("S", bound="Verbs")
P = ParamSpec("P")
T = TypeVar("T")


class Verbs:
    """The base of each role's verbs: the server.

    Args:
        server: It gives each attempt at a verb a session.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        self._run = server.run


def verb(method: Callable[Concatenate[S, ScriptSession, P], T]) -> Callable[Concatenate[S, P], T]:
    """Run a method on a session, which its callers do not pass, and repeat it once if the connection breaks.

    On the repeat, ``on.is_retry`` is true: the first attempt may have taken effect.
    """

    @wraps(method)
    def run(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(lambda on: method(self, on, *args, **kwargs))

    del run.__wrapped__  # it has a parameter that callers do not pass
    return run


def ask(on: ScriptSession, script: Script, key: MessageKey, *arguments: Argument) -> Any:
    """Call a script whose first argument is the message's key."""
    ident = identity(key)
    return on.call(script, ident, ident, *arguments)


def wrote(answer: Any) -> bool:
    """Return whether a script answered that it has written; otherwise it answers with the row as it stands, or ``None``."""
    return isinstance(answer, int) and answer == 1


def shows(key: MessageKey, answer: Any, took_effect: Callable[[Row], bool]) -> bool:
    """Return whether a script answered with a row that shows that an earlier attempt took effect."""
    return answer is not None and took_effect(row_of(key, answer))
