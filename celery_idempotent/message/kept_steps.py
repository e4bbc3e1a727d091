"""What the steps of a body returned, as its row keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kombu.exceptions import EncodeError

from celery_idempotent.message.serialization import UndecodableError, decode_result, pack_result

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["KeptStep", "pack_steps", "unpack_steps"]

#: How each step begins: how many bytes its name, its key and its result have.
_HEAD = re.compile(rb"(\d+) (\d+) (\d+)\n")


@dataclass(frozen=True, slots=True)
class KeptStep:
    """A step that has returned.

    Attributes:
        name: Its name.
        key: Its idempotency key. It differs from that of the same step of an earlier message under the same id.
        result: What its function returned, encoded.
    """

    name: str
    key: str
    result: bytes

    @classmethod
    def of(cls, app: Celery, name: str, key: str, value: Any) -> KeptStep:
        """Encode what a step's function returned.

        Raises:
            kombu.exceptions.EncodeError: The app's result serializer cannot take it.
        """
        try:
            return cls(name, key, pack_result(app, value))
        except EncodeError as error:
            raise EncodeError(
                f"step {name!r} has run, but what it returned ({type(value).__name__}) cannot be kept, since the serializer "
                f"{app.conf.result_serializer} cannot take it: return what it can take, such as an id or a dict ({error})"
            ) from error

    def value(self, app: Celery) -> Any:
        """Decode the result.

        Raises:
            UndecodableError: The app does not accept the content type, or the data is damaged.
        """
        return decode_result(app, self.result)


def pack_steps(steps: Iterable[KeptStep]) -> bytes:
    """Encode steps for the row."""
    return b"".join(map(_packed, steps))


def unpack_steps(data: bytes | None) -> list[KeptStep]:
    """Decode the steps of a row, without their results.

    Raises:
        UndecodableError: The data is damaged.
    """
    steps: list[KeptStep] = []
    rest = data or b""
    while rest:
        head = _HEAD.match(rest)
        ends = [0] if head is None else [head.end()]
        for size in () if head is None else head.groups():
            ends.append(ends[-1] + int(size))
        if head is None or ends[-1] > len(rest):
            raise UndecodableError("the row's steps are damaged")
        name, key, result = (rest[start:end] for start, end in pairwise(ends))
        try:
            steps.append(KeptStep(name.decode(), key.decode(), result))
        except UnicodeDecodeError as error:
            raise UndecodableError("the row's steps are damaged") from error
        rest = rest[ends[-1] :]
    return steps


def _packed(step: KeptStep) -> bytes:
    name, key = step.name.encode(), step.key.encode()
    return b"%d %d %d\n%b%b%b" % (len(name), len(key), len(step.result), name, key, step.result)
