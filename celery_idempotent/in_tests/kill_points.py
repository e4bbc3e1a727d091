"""The kill points of a process that runs a message: it counts them, and kills itself at one.

A point is before a step of the library, before a line of the task's own function when that is first reached, and before its return. This
module is for the child alone: what it puts in place is never taken back.
"""

from __future__ import annotations

import inspect
import json
import linecache
import opcode
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

from celery import signals
from sqlalchemy import Connection, Engine, event

from celery_idempotent.core.records import MessageKey
from celery_idempotent.queue_log import QueueLog

if TYPE_CHECKING:
    from celery_idempotent.task import IdempotentTask

__all__ = ["AT_THE_END", "KillPoints"]

#: The name of the last point.
AT_THE_END = "the acknowledgement"

#: The store's verbs that write, by the names that the points have.
_WRITES = {
    *(
        "record",
        "record_all",
        "claim",
        "take_over",
        "checkpoint",
        "complete",
        "fail",
        "retry",
        "release",
        "expire",
        "abandon",
    ),
    *("keep_steps", "cancel", "forbid", "republish", "not_published", "relayed", "withdraw", "resubmit"),
}


#: The instructions that return from a function, by their numbers.
_RETURNS = {number for name, number in opcode.opmap.items() if name.startswith("RETURN_")}


class KillPoints:
    """Count the points of this process's main thread, and kill it at one of them.

    Args:
        at: The number of the point, from 1; or a part of its name; ``None`` for the last.
        pipe: Where to report. A report is a line of JSON.
        inserted: Returns the messages that this process has inserted.
    """

    def __init__(self, at: int | str | None, pipe: int, inserted: Callable[[], Sequence[MessageKey]]) -> None:
        self._at = at
        self._pipe = pipe
        self._inserted = inserted
        self._counted = 0
        self._names: list[str] = []
        self._thread = threading.get_ident()

    def __call__(self, name: str) -> None:
        """Reach a point."""
        if threading.get_ident() != self._thread:
            return
        self._counted += 1
        self._names.append(name)
        if self._counted == self._at or (isinstance(self._at, str) and self._at in name):
            self.die(at=name)

    def die(self, **report: Any) -> None:
        """Report, and die."""
        keys = [[key.message_id, key.task_name] for key in self._inserted()]
        text = json.dumps({**report, "inserted": keys, "points": self._names}) + "\n"
        data = text.encode()
        while data:
            data = data[os.write(self._pipe, data) :]
        os.kill(os.getpid(), signal.SIGKILL)

    def install(self, task: IdempotentTask) -> None:
        """Reach points from now on, while this process runs a message of a task."""
        stand_in = QueueLog.stand_in
        assert stand_in is not None, "a test's process has one"
        QueueLog.stand_in = staticmethod(lambda queue_log: _Steps(stand_in(queue_log), self))
        event.listen(Engine, "commit", lambda _: self("commit"))
        event.listen(Engine, "engine_connect", self._refuse_memory)
        signals.before_task_publish.connect(lambda sender, **_: self(f"publish of {sender}"), weak=False)
        body = getattr(inspect.unwrap(task.run), "__func__", inspect.unwrap(task.run))
        code = getattr(body, "__code__", None)
        if code is not None:
            (_monitor if sys.version_info >= (3, 12) else _trace)(code, self._line(), self)

    def _line(self) -> Callable[[CodeType, int], None]:
        seen = set[tuple[str, int]]()

        def line(code: CodeType, number: int) -> None:
            if (code.co_filename, number) not in seen:
                seen.add((code.co_filename, number))
                self(f"line {_place(code, number)}")

        return line

    def _refuse_memory(self, connection: Connection) -> None:
        if connection.dialect.name != "sqlite" or threading.get_ident() != self._thread:
            return
        name = connection.engine.url.database or ""
        if name in ("", ":memory:") or "mode=memory" in name:
            self.die(refused="the task uses an in-memory SQLite database, of which a child has a copy: use a file")


class _Steps:
    """A store whose writes are points."""

    def __init__(self, store: Any, reach: KillPoints) -> None:
        self._store = store
        self._reach = reach

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if name not in _WRITES:
            return found

        def step(*args: Any, **kwargs: Any) -> Any:
            self._reach(name)
            return found(*args, **kwargs)

        return step

    def within(self, connection: Connection) -> _Steps:
        return _Steps(self._store.within(connection), self._reach)


def _place(code: CodeType, number: int) -> str:
    path = Path(code.co_filename)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{shown}:{number}: {linecache.getline(code.co_filename, number).strip()}"


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def _trace(body: CodeType, line: Callable[[CodeType, int], None], reach: KillPoints) -> None:
    codes = set(_with_nested(body))

    def trace(frame: FrameType, what: str, argument: object) -> Any:
        code = frame.f_code
        if code not in codes:
            return None
        if what == "line":
            line(code, frame.f_lineno)
        elif what == "return" and code is body and not _is_raising(frame, argument):
            reach(f"the return at {_place(code, frame.f_lineno)}")
        return trace

    sys.settrace(trace)


def _is_raising(frame: FrameType, value: object) -> bool:
    """Return whether a frame ends by an exception, which a trace function is told as a return of ``None``."""
    return value is None and frame.f_lasti >= 0 and frame.f_code.co_code[frame.f_lasti] not in _RETURNS


def _monitor(body: CodeType, line: Callable[[CodeType, int], None], reach: KillPoints) -> None:
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    tool = next(number for number in (4, 3, 5, 2, 1, 0) if monitoring.get_tool(number) is None)
    monitoring.use_tool_id(tool, "celery_idempotent")
    events = monitoring.events
    monitoring.register_callback(tool, events.LINE, line)

    def returns(code: CodeType, offset: int, value: object) -> None:  # noqa: ARG001 - as it is called
        frame = sys._getframe(1)  # noqa: SLF001 - the function that returns
        reach(f"the return at {_place(code, frame.f_lineno)}")

    monitoring.register_callback(tool, events.PY_RETURN, returns)
    for code in _with_nested(body):
        monitoring.set_local_events(tool, code, events.LINE | (events.PY_RETURN if code is body else 0))
