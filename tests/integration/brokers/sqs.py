"""A broker that does what Amazon documents of SQS standard queues, as far as kombu's own transport for it lets a worker see.

What is taken from kombu 5.7, ``kombu/transport/SQS/__init__.py``:

* The delivery tag is the receipt handle (``_envelope_payload``), and each receipt has another one.
* No delivery says ``redelivered``: what SQS delivers again after its visibility timeout is the text that was sent. A message that
  kombu puts back is not sent anew but made visible (``_put``), so it does not say so either.
* ``basic_ack`` deletes by receipt handle; that of an earlier receipt is forgiven. Amazon: such a request succeeds, "but the
  message might not be deleted"; both are here.
* A message's delay is a property of its own, ``DelaySeconds``, of 900 s at most (``MAX_DELAY_SECONDS``); kombu cuts what is more,
  SQS refuses it, and so does this. Celery does not use it: what has a countdown or an ETA is kept by the worker that has received it,
  unacknowledged.

A queue is a folder, a message a file in it, named ``<when visible>_<receipt>_<id>.<queue>.msg``; a receipt renames it.
"""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from queue import Empty
from typing import Any
from uuid import uuid4

from kombu.transport import filesystem
from kombu.utils.json import dumps, loads

__all__ = ["MAX_DELAY_SECONDS", "Channel", "Transport"]

MAX_DELAY_SECONDS = 900


class Channel(filesystem.Channel):  # type: ignore[misc]
    """Needs the transport options of the filesystem transport, ``visibility_timeout`` and ``stale_handles_delete``."""

    def _put(self, queue: str, payload: dict[str, Any], **_: Any) -> None:
        folder = Path(self.data_folder_out)
        properties = payload["properties"]
        if payload.get("redelivered"):
            self._move(folder / properties["delivery_tag"], visible_at=time.time())
            return
        delay = properties.get("DelaySeconds", properties.get("delay_seconds", 0))
        if not 0 <= delay <= MAX_DELAY_SECONDS:
            raise ValueError(f"InvalidParameterValue: {delay} for parameter DelaySeconds is invalid")
        name = _name(time.time() + delay, uuid4().hex, queue)
        written = folder / f"{name}.part"
        written.write_text(dumps(payload))
        written.rename(folder / name)

    def _get(self, queue: str) -> dict[str, Any]:
        now = time.time()
        for path in sorted(Path(self.data_folder_in).glob(f"*.{queue}.msg")):
            if int(path.name.partition("_")[0]) > _microseconds(now):
                break
            received = self._move(path, visible_at=now + self.transport_options["visibility_timeout"])
            if received is None:
                continue  # another worker has just received it
            payload: dict[str, Any] = loads(received.read_text())
            if queue in self._without_ack:
                received.unlink()
            payload["properties"]["delivery_tag"] = received.name
            return payload
        raise Empty

    def _size(self, queue: str) -> int:
        return len(list(Path(self.data_folder_in).glob(f"*.{queue}.msg")))

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        if no_ack:
            self._without_ack.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        self._forget(delivery_tag)
        super().basic_ack(delivery_tag, multiple)

    def basic_reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if not requeue:
            self._forget(delivery_tag)
        super().basic_reject(delivery_tag, requeue=requeue)

    @cached_property
    def _without_ack(self) -> set[str]:
        return set()

    def _forget(self, receipt: str) -> None:
        folder = Path(self.data_folder_in)
        (folder / receipt).unlink(missing_ok=True)
        if self.transport_options["stale_handles_delete"]:
            *_, message = receipt.split("_", 2)
            for path in folder.glob(f"*_{message}"):
                path.unlink(missing_ok=True)

    def _move(self, path: Path, *, visible_at: float) -> Path | None:
        *_, message = path.name.split("_", 2)
        identity, _, queue = message.removesuffix(".msg").partition(".")
        try:
            return path.rename(path.with_name(_name(visible_at, identity, queue)))
        except FileNotFoundError:
            return None


class Transport(filesystem.Transport):  # type: ignore[misc]
    Channel = Channel


def _name(visible_at: float, identity: str, queue: str) -> str:
    return f"{_microseconds(visible_at):020}_{uuid4().hex}_{identity}.{queue}.msg"


def _microseconds(at: float) -> int:
    return round(at * 1_000_000)
