"""The store's URL: short forms written out, mistakes told, passwords kept out of texts."""

from __future__ import annotations

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from celery_idempotent.errors import ConfigurationError

__all__ = ["masked", "parse"]

#: What a URL without a driver means.
_DRIVERS = {
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
    "mariadb": "mariadb+pymysql",
    "sqlite": "sqlite",
}
#: Where a driver's package has another name than SQLAlchemy has for the driver.
_PACKAGES = {"mysqldb": "mysqlclient", "mysqlconnector": "mysql-connector-python", "mariadbconnector": "mariadb"}
_EXTRAS = {"postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}
_EXAMPLE = (
    "write it as postgresql://user:password@host/database, mysql://user:password@host/database or sqlite:///file.db"
)


def parse(text: str | URL) -> URL:
    """Read a store's URL.

    Raises:
        ConfigurationError: It is no URL, names a database that cannot hold the queue log, or its driver is not installed.
    """
    try:
        url = make_url(text)
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
    _require_driver(url)
    return url


def masked(url: URL) -> str:
    """The URL for people: without its password, and without its query, which may hold another."""
    return url.set(query={}).render_as_string(hide_password=True)


def _require_driver(url: URL) -> None:
    backend, _, driver = url.drivername.partition("+")
    try:
        dialect = url.get_dialect()
        dialect.import_dbapi()
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
    if dialect.is_async:
        raise ConfigurationError(
            f"{url.drivername}:// is an asyncio driver, and Celery's workers are not asyncio; use {_DRIVERS[backend]}://"
        )
