"""The store's URL: accept the forms that users of Celery know, explain mistakes, keep passwords out of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url

from celery_idempotent.errors import ConfigurationError

__all__ = ["Address", "parse"]

_EXAMPLE = (
    "write it as redis://:password@host:6379/0, rediss://host/0, redis+socket:///path?db=0, "
    "sentinel://host:26379;sentinel://host:26379/0?master_name=name or redis+cluster://host:6379"
)

#: Simultaneous calls of a process, unless the URL says otherwise (``max_connections``). A call takes a millisecond.
AT_ONCE = 20

#: Options of a client rather than of a connection: the store decides on these itself.
_NOT_OURS = ("decode_responses", "encoding", "encoding_errors", "protocol", "retry_on_timeout")
#: The values of ssl_cert_reqs in Celery's URLs, and redis-py's names for them.
_CERT_REQS = {"CERT_NONE": "none", "CERT_OPTIONAL": "optional", "CERT_REQUIRED": "required"}
_KINDS: dict[str, Literal["server", "sentinel", "cluster"]] = {
    "redis": "server",
    "rediss": "server",
    "redis+socket": "server",
    "unix": "server",
    "sentinel": "sentinel",
    "redis+cluster": "cluster",
    "rediss+cluster": "cluster",
}


@dataclass(frozen=True, slots=True)
class Address:
    """The address of the log, and the options of its connections.

    Attributes:
        kind: A single server; the one that Sentinels name as the master; or a cluster.
        text: The URL for people, without its password.
        hosts: Host and port of each named server; none for a socket in the file system.
        connection: The class of connections.
        options: The options of every connection, except its host and port.
        master_name: What the Sentinels call the master.
        sentinel_options: The options of a connection to a Sentinel.
        at_once: How many simultaneous calls a process makes, and so how many connections to one server it keeps.
    """

    kind: Literal["server", "sentinel", "cluster"]
    text: str
    hosts: tuple[tuple[str, int], ...]
    connection: type[Connection | UnixDomainSocketConnection]
    options: Mapping[str, Any] = field(repr=False)
    master_name: str = ""
    sentinel_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    at_once: int = AT_ONCE


def parse(url: str) -> Address:
    """Read a store's URL.

    Raises:
        ConfigurationError: It is not one of Redis, or something in it is wrong.
    """
    scheme = url.partition("://")[0]
    if scheme not in _KINDS:
        raise ConfigurationError(f"the store's URL begins with {scheme}://, which is not known; {_EXAMPLE}")
    try:
        address = _parse(url, scheme, _KINDS[scheme])
        # It connects nowhere, and refuses unknown options.
        address.connection(**address.options)
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001 - redis-py's and urllib's are many
        # Neither the text nor the cause: both can hold a password.
        what = " (an option is not known)" if isinstance(error, TypeError) else ""
        raise ConfigurationError(f"the store's URL cannot be read{what}; {_EXAMPLE}") from None
    return address


def _parse(url: str, scheme: str, kind: Literal["server", "sentinel", "cluster"]) -> Address:
    # Sentinels as in Celery: one URL each, separated by semicolons, and the rest after the last.
    parts = [urlsplit(part if "://" in part else f"{scheme}://{part}") for part in url.split(";")]
    last = parts[-1]
    if kind == "server" and (len(parts) > 1 or "," in last.netloc.rpartition("@")[2]):
        raise ConfigurationError(
            f"the store's URL names more than one server, and {scheme}:// is of one: name Sentinels by sentinel://a;sentinel://b/0?master_name=..., "
            f"or the nodes of a cluster by redis+cluster://a;b"
        )
    socket = scheme in {"unix", "redis+socket"}
    if not socket and last.path.strip("/") and not last.path.strip("/").isdigit():
        raise ConfigurationError("the store's URL names a database of Redis by its number, as in redis://host/0")
    hosts = () if socket else tuple((unquote(part.hostname or "localhost"), part.port or _port(kind)) for part in parts)
    query = {name: values[-1] for name, values in parse_qs(last.query, keep_blank_values=True).items()}

    credentials = next((part.netloc.rpartition("@")[0] + "@" for part in parts if "@" in part.netloc), "")
    secured = scheme.startswith("rediss") or query.get("ssl", "").lower() in {"true", "1", "yes"}
    plain = "unix" if socket else "rediss" if secured else "redis"
    parse_options: Callable[[str], dict[str, Any]] = parse_url
    options = parse_options(f"{plain}://{credentials}{'' if socket else 'localhost'}{last.path}?{last.query}")
    for name in ("host", "port", "connection_class", "ssl", *_NOT_OURS):
        options.pop(name, None)
    ours = {name: options.pop(name, None) for name in ("master_name", "sentinel_username", "sentinel_password")}
    if (virtual_host := options.pop("virtual_host", None)) is not None:
        options["db"] = int(virtual_host)
    if "ssl_cert_reqs" in options:
        options["ssl_cert_reqs"] = _CERT_REQS.get(options["ssl_cert_reqs"], options["ssl_cert_reqs"])
    at_once = options.pop("max_connections", AT_ONCE)
    if at_once < 1:
        raise ConfigurationError(
            "the store's URL allows no connection: leave max_connections out, or let it be at least 1"
        )
    if kind == "sentinel" and not ours["master_name"]:
        raise ConfigurationError("the store's URL has to name the master that its Sentinels watch: ?master_name=...")
    if kind == "cluster" and options.pop("db", 0):
        raise ConfigurationError("a Redis Cluster has no other database than 0")
    of_tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
    of_sentinel = {"username": ours["sentinel_username"], "password": ours["sentinel_password"]}

    user = unquote(credentials.partition(":")[0].rstrip("@"))
    who = f"{user}:***@" if ":" in credentials else f"{user}@" if user else ""
    where = last.path if socket else ";".join(f"{host}:{port}" for host, port in hosts)
    database = "" if socket or kind == "cluster" else f"/{options.get('db', 0)}"
    return Address(
        kind=kind,
        text=f"{scheme}://{who}{where}{database}",
        hosts=hosts,
        connection=UnixDomainSocketConnection if socket else SSLConnection if secured else Connection,
        options=options,
        master_name=ours["master_name"] or "",
        sentinel_options={**of_tls, **{name: value for name, value in of_sentinel.items() if value}},
        at_once=at_once,
    )


def _port(kind: str) -> int:
    return 26379 if kind == "sentinel" else 6379
