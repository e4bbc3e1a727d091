"""Encode messages and results for the queue log, in the app's own serializer, and decode them.

The content type is kept with the data. Data is decoded only if the app accepts its content type from the broker or the result backend.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from kombu.exceptions import ContentDisallowed, DecodeError, EncodeError
from kombu.serialization import dumps, loads, prepare_accept_content, registry

if TYPE_CHECKING:
    from celery import Celery, Task
    from celery.app.task import Context

__all__ = [
    "UndecodableError",
    "as_moments",
    "content_of",
    "decode_message",
    "decode_result",
    "dumped",
    "encode_message",
    "encode_result",
    "pack_result",
    "serializer_of",
    "trace_of",
    "without_local",
]

logger = logging.getLogger("celery_idempotent")

#: Options of `apply_async` that belong to the caller's process, not to the message.
_LOCAL_OPTIONS = frozenset(
    (
        *(
            "producer",
            "publisher",
            "connection",
            "router",
            "result_cls",
            "add_to_parent",
            "task_type",
            "event_dispatcher",
        ),
        *("declare", "retry", "retry_policy", "timeout", "confirm_timeout"),
    )
)


#: The content type of the serializer ``raw``, whose data may be empty.
_RAW = "application/data"


class UndecodableError(Exception):
    """This app cannot read data of the queue log: its serializer is unknown or not accepted, or the data is damaged."""


def encode_message(
    args: Any,
    kwargs: Any,
    options: Mapping[str, Any],
    *,
    serializer: str,
    now: datetime | None = None,
    trace: str | None = None,
) -> bytes:
    """Encode a call so that it can be published again.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        options: Options of the call; those that belong to the calling process are left out.
        serializer: The serializer that the message itself is published with.
        now: The time of the call. Options relative to it (``countdown``, ``expires``) are kept as absolute times.
        trace: The span of the call, for :func:`trace_of`.

    Raises:
        kombu.exceptions.EncodeError: The serializer cannot take the arguments; publishing would fail too.
    """
    kept = {name: _plain(value) for name, value in without_local(options).items() if value is not None}
    if now is not None:
        kept = as_moments(kept, now)
    try:
        return _pack([list(args or ()), dict(kwargs or {}), kept], serializer, trace)
    except EncodeError as error:
        raise EncodeError(
            f"the serializer {serializer} cannot take the arguments of this call ({error}): pass what it can take, such as a list for a set, "
            f"or give the task another serializer"
        ) from error


def dumped(task: Task, args: Any, kwargs: Any, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the arguments of a call as they are sent: with ``pydantic=True``, Celery 5.7 dumps models when it publishes.

    Calls a private method of Celery; read from 5.7.0.
    """
    dump = getattr(task, "_dump_pydantic_arguments", None)
    if dump is None or serializer_of(task, options) == "pickle":
        return args, kwargs
    args, kwargs = dump(args, kwargs)
    return args, kwargs


def serializer_of(task: Task, options: Mapping[str, Any] | None = None) -> str:
    """Return the serializer that a call of the task with these options is published with."""
    return str((options and options.get("serializer")) or task.serializer or task.app.conf.task_serializer)


def content_of(request: Context) -> dict[str, Any]:
    """Return the serializer and compression of a delivered message, as options of ``apply_async``."""
    properties = request.properties if isinstance(request.properties, Mapping) else {}
    content = {
        "serializer": registry.type_to_name.get(properties.get("content_type")),
        "compression": properties.get("compression"),
    }
    return {name: value for name, value in content.items() if value is not None}


def without_local(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a call without those that belong to the calling process."""
    return {name: value for name, value in options.items() if name not in _LOCAL_OPTIONS}


def as_moments(options: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """Return the options of a call made now, for a later publication: relative times become absolute (``eta``, ``expires``)."""
    moments = dict(options)
    if moments.get("countdown") is not None:
        moments["eta"] = now + timedelta(seconds=moments["countdown"])
    moments.pop("countdown", None)
    if isinstance(moments.get("expires"), (int, float)):
        moments["expires"] = now + timedelta(seconds=moments["expires"])
    return moments


def decode_message(app: Celery, data: bytes | None) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Decode a message from :func:`encode_message`.

    Raises:
        UndecodableError: There is no data, the app does not accept its content type, or it is damaged.
    """
    if data is None:
        raise UndecodableError("the row has no message")
    match _unpack(data, app.conf.accept_content):
        case [list(args), dict(kwargs), dict(options)]:
            return args, kwargs, options
        case _:
            raise UndecodableError("the data is not a message: not a list of arguments, keyword arguments and options")


def encode_result(app: Celery, value: Any, *, trace: str | None = None) -> bytes | None:
    """Encode a return value for replay; return ``None`` if the app's result serializer cannot take it.

    A result that cannot be kept never breaks the task: the result backend then answers a copy of the message. Success empties the
    row's message, so ``trace`` is kept with the result; see :func:`trace_of`.
    """
    try:
        return pack_result(app, value, trace=trace)
    except EncodeError as error:
        logger.warning(
            "result not kept for replay: the serializer %s cannot encode it: %s", app.conf.result_serializer, error
        )
        return None


def pack_result(app: Celery, value: Any, *, trace: str | None = None) -> bytes:
    """Encode a value as :func:`encode_result` does.

    Raises:
        kombu.exceptions.EncodeError: The app's result serializer cannot take it.
    """
    return _pack(value, app.conf.result_serializer, trace)


def decode_result(app: Celery, data: bytes) -> Any:
    """Decode a result from :func:`encode_result`.

    Raises:
        UndecodableError: The app does not accept the content type, or the data is damaged.
    """
    accept = app.conf.result_accept_content
    return _unpack(data, app.conf.accept_content if accept is None else accept)


def trace_of(data: bytes | None) -> str | None:
    """Return the span in which a message was sent, from its encoded message or result.

    The span is in the head of the data, so it can be read even if the app does not accept the content.
    """
    if data is None:
        return None
    parts = data.partition(b"\n")[0].split(b";", 2)
    return parts[2].decode("ascii", errors="replace") if len(parts) > 2 else None


def _plain(value: Any) -> Any:
    # A queue or an exchange may be one of kombu's objects; routing needs only its name.
    name = getattr(value, "name", None)
    return name if type(value).__module__.startswith("kombu.") and isinstance(name, str) else value


def _pack(value: Any, serializer: str, trace: str | None) -> bytes:
    content_type, encoding, payload = dumps(value, serializer)
    if not isinstance(payload, (str, bytes, bytearray, memoryview)):
        raise EncodeError(f"{type(payload).__name__} is neither text nor bytes")  # the serializer `raw` checks nothing
    body = payload.encode() if isinstance(payload, str) else bytes(payload)
    head = f"{content_type};{encoding}" if trace is None else f"{content_type};{encoding};{trace}"
    return f"{head}\n".encode() + body


def _unpack(data: bytes, accept: Any) -> Any:
    head, _, body = data.partition(b"\n")
    content_type, encoding, *_ = (*head.decode(errors="replace").split(";", 2), "")
    # kombu reads data of an unknown type as text, and passes empty data through.
    if content_type not in {*registry.type_to_name, _RAW}:
        raise UndecodableError(
            f"the data begins with {content_type[:64]!r}, not with the content type of a known serializer"
        )
    if not body and content_type != _RAW:
        raise UndecodableError(f"{content_type}: there is no data after the head")
    try:
        return loads(body, content_type, encoding, accept=prepare_accept_content(accept))
    except ContentDisallowed as error:
        raise UndecodableError(f"{content_type} is not in the app's accept_content") from error
    except (DecodeError, LookupError, ValueError) as error:
        raise UndecodableError(f"{content_type}: the data is damaged ({error})") from error
