"""The pytest plugin: a fresh queue log for each test, and the fixture ``queue_log``.

pytest loads it by its entry point. ``-p no:celery_idempotent`` turns it off.
"""

from __future__ import annotations

from collections.abc import Generator

import pytest

from celery_idempotent.in_tests import FreshLogs, LogInTest

__all__ = ["queue_log"]

#: The ini option.
FRESH = "idempotent_fresh_log"

_LOGS = pytest.StashKey[FreshLogs]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini option."""
    parser.addini(
        FRESH,
        "whether each test has a fresh queue log in memory (celery-idempotent); false leaves each app its own store",
        type="bool",
        default=True,
    )


def pytest_configure(config: pytest.Config) -> None:
    """Put the tests' queue logs in place of all others, before any test module is imported."""
    config.stash[_LOGS] = FreshLogs(fresh=config.getini(FRESH))
    config.stash[_LOGS].install()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give all apps their own queue logs again."""
    config.stash[_LOGS].empty()
    config.stash[_LOGS].uninstall()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    """Empty the queue logs before the test's fixtures are set up."""
    item.config.stash[_LOGS].empty()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    """Empty the queue logs after the test's fixtures are torn down, so that nothing is left in a shared database."""
    try:
        return (yield)
    finally:
        item.config.stash[_LOGS].empty()


@pytest.fixture
def queue_log(request: pytest.FixtureRequest) -> LogInTest:
    """Look at messages, deliver them again, and kill the processes that run them."""
    return LogInTest(request.config.stash[_LOGS])
