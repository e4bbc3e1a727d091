"""The store's URL: write out short forms, name mistakes, keep passwords out of texts."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sqlalchemy import URL, Engine, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from celery_idempotent.errors import ConfigurationError

__all__ = ["masked", "parse", "refuse_asynchronous", "refuse_driver"]

#: The driver of a URL that names none.
_DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "sqlite": "sqlite",
}
#: The drivers that replace an asynchronous one, the preferred first.
_SYNCHRONOUS = {
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg2"),
    "mysql": ("mysql+pymysql", "mysql+mysqldb"),
    "mariadb": ("mariadb+pymysql", "mariadb+mysqldb"),
    "sqlite": ("sqlite",),
}
#: Options of asynchronous drivers, by their names in the driver that replaces it; ``None`` for options that only asynchronous drivers know.
_RENAMED: dict[str, dict[str, str | None]] = {
    "postgresql": {
        "ssl": "sslmode",
        "timeout": "connect_timeout",
        **dict.fromkeys(
            (
                "async_fallback",
                "command_timeout",
                "direct_tls",
                "max_cacheable_statement_size",
                "max_cached_statement_lifetime",
            )
        ),
        **dict.fromkeys(("prepared_statement_cache_size", "prepared_statement_name_func", "statement_cache_size")),
    },
    "mysql": {"async_fallback": None},
    "mariadb": {"async_fallback": None},
    "sqlite": {"async_fallback": None},
}
#: Packages of drivers, where SQLAlchemy calls the driver otherwise.
_PACKAGES = {"mysqldb": "mysqlclient", "mysqlconnector": "mysql-connector-python", "mariadbconnector": "mariadb"}
_EXTRAS = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
#: Drivers that cannot be used, and why.
_REFUSED = {
    "pg8000": "it tells neither its socket nor its server's process, so that no answer could be waited for in bounded time"
}
#: Arguments of `create_engine` that users write into a URL by mistake.
_OF_POOLS = {"pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping", "poolclass", "echo"}
#: A URL with several hosts, as libpq writes it.
_HOSTS = re.compile(r"(?P<scheme>[\w+]+)://(?P<account>[^/]*@)?(?P<hosts>[^/?@]*,[^/?@]*)(?P<rest>[/?].*)?")
_YES, _NO = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}
_EXAMPLE = (
    "write it as postgresql://user:password@host/database, mysql://user:password@host/database, sqlite:///file.db "
    "or, as idempotent_store, redis://host:6379/0"
)


def parse(text: str | URL) -> URL:
    """Read a store's URL.

    Raises:
        ConfigurationError: It is no URL, names a database that cannot hold the queue log, or its driver is not installed.
    """
    whole = _one_host(text) if isinstance(text, str) else text
    try:
        url = make_url(whole)
    except (ArgumentError, ValueError):
        # Neither the text nor the cause: both can hold a password.
        raise ConfigurationError(f"the store's URL cannot be read; {_EXAMPLE}") from None
    scheme = url.drivername
    if scheme.partition("+")[0] in ("redis", "rediss", "sentinel"):
        raise ConfigurationError(f"{scheme}:// leads to Redis, where the queue log is a RedisStore and no SQLStore")
    if scheme.startswith("postgres+"):
        scheme = scheme.replace("postgres+", "postgresql+", 1)
    if scheme.partition("+")[0] not in _DRIVERS:
        raise ConfigurationError(f"the store's URL begins with {scheme}://, which is not known; {_EXAMPLE}")
    url = url.set(drivername=_DRIVERS.get(scheme, scheme))
    refuse_driver(url.get_driver_name())
    url = _synchronous(url)
    _require_driver(url)
    if of_pool := sorted(_OF_POOLS & url.query.keys()):
        raise ConfigurationError(
            f"{', '.join(of_pool)} in the store's URL is no option of a connection; leave it out, as the store's own pool needs none, or give "
            f"an engine: QueueLog(app, store=SQLStore(create_engine(url, {of_pool[0]}=...)))"
        )
    return _with_tls(url)


def refuse_asynchronous(engine: object) -> None:
    """Refuse an asynchronous engine, or its synchronous side.

    Raises:
        ConfigurationError: It is one.
    """
    if hasattr(engine, "sync_engine") or (isinstance(engine, Engine) and engine.dialect.is_async):
        raise ConfigurationError(
            "the store's own connections are synchronous, and cannot be made by an asynchronous engine: give its URL, SQLStore(engine.url), "
            "or an engine of create_engine()"
        )


def refuse_driver(name: str) -> None:
    """Refuse a driver that the store cannot use.

    Raises:
        ConfigurationError: It is one.
    """
    if name in _REFUSED:
        raise ConfigurationError(
            f"the queue log cannot use the driver {name}: {_REFUSED[name]}; use postgresql:// (psycopg): "
            f"pip install 'celery-idempotent[postgresql]'"
        )


def _one_host(text: str) -> str:
    """Return a URL whose several hosts, written as for libpq (``h1:5432,h2``), are options, as SQLAlchemy wants them."""
    found = _HOSTS.fullmatch(text)
    if found is None:
        return text
    if not found["scheme"].startswith("postgres"):
        raise ConfigurationError(
            f"the store's URL names several hosts, which the driver of {found['scheme']}:// does not understand; name one, such as a "
            f"proxy's or a name that leads to the primary"
        )
    rest = found["rest"] or "/"
    path, _, query = rest.partition("?")
    hosts = "&".join(f"host={host}" for host in found["hosts"].split(","))
    return f"{found['scheme']}://{found['account'] or ''}{path}?{hosts}{query and f'&{query}'}"


def _with_tls(url: URL) -> URL:
    """Return ``?ssl=true`` as PyMySQL's option, a mapping: TLS, without checking the server's identity."""
    asked = url.query.get("ssl")
    if url.get_driver_name() != "pymysql" or asked is None:
        return url
    if str(asked).lower() not in _YES | _NO:
        raise ConfigurationError(
            "ssl in the store's URL is true or false; to know the server by its certificate, say ssl_ca=/path/to/ca.pem"
        )
    url = url.difference_update_query(["ssl"])
    if str(asked).lower() in _NO:
        return url.update_query_dict({"ssl_disabled": "true"})
    return url if "ssl_ca" in url.query else url.update_query_dict({"ssl_verify_cert": "false"})


def masked(url: URL) -> str:
    """Return the URL for logs: without its password, and without its query, which may contain another."""
    return url.set(query={}).render_as_string(hide_password=True)


def _synchronous(url: URL) -> URL:
    """Replace an asynchronous driver by an installed synchronous one, since the store's own connections wait in threads.

    Raises:
        ConfigurationError: None is installed.
    """
    try:
        if not url.get_dialect().is_async:
            return url
    except NoSuchModuleError:
        return url
    backend = url.get_backend_name()
    named = url.drivername
    for drivername in _SYNCHRONOUS[backend]:
        url = url.set(drivername=drivername)
        if _is_installed(url):
            return _with_other_names(url, _RENAMED[backend])
    raise ConfigurationError(
        f"the store's URL begins with {named}://, and the store also needs a synchronous driver for its own connections: "
        f"pip install 'celery-idempotent[{_EXTRAS[backend]}]' (or use {' or '.join(_packages(backend))})"
    )


def _packages(backend: str) -> list[str]:
    drivers = [drivername.partition("+")[2] for drivername in _SYNCHRONOUS[backend]]
    return [_PACKAGES.get(driver, driver) for driver in drivers]


def _is_installed(url: URL) -> bool:
    try:
        url.get_dialect().import_dbapi()
    except ImportError:
        return False
    return True


def _with_other_names(url: URL, names: Mapping[str, str | None]) -> URL:
    query = {names.get(name, name): value for name, value in url.query.items()}
    return url.set(query={name: value for name, value in query.items() if name is not None})


def _require_driver(url: URL) -> None:
    backend, _, driver = url.drivername.partition("+")
    try:
        url.get_dialect().import_dbapi()
    except NoSuchModuleError:
        raise ConfigurationError(
            f"the store's URL begins with {url.drivername}://, whose driver is not known"
        ) from None
    except ImportError as error:
        extra = _EXTRAS.get(backend)
        # The extra brings the driver of the short form; any other is for its user to install.
        ours = extra and url.drivername == _DRIVERS[backend]
        install = f"'celery-idempotent[{extra}]'" if ours else _PACKAGES.get(driver, driver or backend)
        raise ConfigurationError(
            f"the driver of {url.drivername}:// is not installed ({error}); run: pip install {install}"
        ) from error
