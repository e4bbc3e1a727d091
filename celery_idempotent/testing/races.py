"""The contract between processes and threads: if N try at once, one succeeds."""

# ruff: noqa: D102 - a test's name says what it shows

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing.connection import Connection
from threading import Barrier
from typing import Any

import pytest

from celery_idempotent.core.records import Claimed, Inserted, MessageKey
from celery_idempotent.core.store import Store
from celery_idempotent.testing.base import StoreFixtures
from celery_idempotent.testing.examples import (
    claim,
    expired_id,
    new_message,
    pending,
    processing,
    read,
    take,
    try_claim,
)

__all__ = ["RaceContract"]

RACERS = 4
ROUNDS = 15
#: Seconds for a racer to reach the start; after that the race is broken and the test fails.
PATIENCE = 60.0

#: One round of a race: tries a verb on its message, and returns whether it succeeded.
Attempt = Callable[[Store, MessageKey, int], bool]


def _key(number: int) -> MessageKey:
    return MessageKey(f"race:{number}", "shop.charge")


def _run_rounds(store: Store, attempt: Attempt, racer: int, start: Any) -> list[int]:
    """Run all rounds; return those that this racer won."""
    won = []
    for number in range(ROUNDS):
        start.wait(PATIENCE)
        if attempt(store, _key(number), racer):
            won.append(number)
    return won


def _race(orders: Connection, start: Any, racer: int) -> None:
    """Take part in the races that the parent process sends."""
    while True:
        open_store, attempt = orders.recv()
        try:
            store = open_store()
            orders.send(_run_rounds(store, attempt, racer, start))
            store.close()
        except BaseException as error:  # noqa: BLE001 - pass any error on to the test
            start.abort()
            orders.send(f"{type(error).__name__}: {error}")


class Racers:
    """Processes that do the same thing at the same time."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        # Keep a reference while they live: without it the semaphores are gone before a slow process starts.
        self._start = context.Barrier(RACERS)
        self._orders: list[Connection] = []
        for racer in range(RACERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_race, args=(theirs, self._start, racer), daemon=True)
            process.start()
            theirs.close()
            self._orders.append(ours)

    def winners(self, open_store: Callable[[], Store], attempt: Attempt) -> Counter[int]:
        """Run the race; return how many processes won each round."""
        for orders in self._orders:
            orders.send((open_store, attempt))
        answers = [orders.recv() for orders in self._orders]
        assert all(isinstance(answer, list) for answer in answers), answers
        return Counter(number for answer in answers for number in answer)


@cache
def the_racers() -> Racers:
    """Return the test run's racers. Starting them takes seconds. As daemons, they end with the run."""
    return Racers()


ONE_EACH = Counter(dict.fromkeys(range(ROUNDS), 1))


def record(store: Store, key: MessageKey, racer: int) -> bool:
    """Record the message."""
    return isinstance(store.record(new_message(key, task_id=f"racer-{racer}")), Inserted)


def claim_it(store: Store, key: MessageKey, racer: int) -> bool:
    """Claim the message."""
    return isinstance(try_claim(store, new_message(key, task_id=f"task-of-{racer}"), worker=f"racer-{racer}"), Claimed)


def take_over(store: Store, key: MessageKey, racer: int) -> bool:
    """Take the message over."""
    return take(store, read(store, key), worker=f"racer-{racer}") is not None


def run_whole(store: Store, key: MessageKey, racer: int) -> bool:
    """Record, claim and, if claimed, complete it, as producer and worker of one message delivered twice."""
    store.record(new_message(key))
    answer = try_claim(store, new_message(key), worker=f"racer-{racer}")
    return isinstance(answer, Claimed) and store.complete(answer.claim, result=str(racer).encode())


class RaceContract(StoreFixtures):
    """Every promise that says *exactly one*."""

    @pytest.fixture
    def racers(self) -> Racers:
        """Return the racing processes."""
        return the_racers()

    def test_of_many_processes_one_records(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        store.init()
        assert racers.winners(open_store_again, record) == ONE_EACH

    def test_of_many_processes_one_records_an_expired_id(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        for number in range(ROUNDS):
            expired_id(store, key=_key(number))
        assert racers.winners(open_store_again, record) == ONE_EACH
        assert {read(store, _key(number)).token for number in range(ROUNDS)} == {1}

    def test_of_many_processes_one_claims(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        for number in range(ROUNDS):
            pending(store, key=_key(number))
        assert racers.winners(open_store_again, claim_it) == ONE_EACH

    def test_of_many_processes_one_claims_an_absent_message(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        store.init()
        assert racers.winners(open_store_again, claim_it) == ONE_EACH
        assert {read(store, _key(number)).token for number in range(ROUNDS)} == {1}

    def test_of_many_processes_one_claims_an_expired_id(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        for number in range(ROUNDS):
            expired_id(store, key=_key(number))
        assert racers.winners(open_store_again, claim_it) == ONE_EACH
        assert {read(store, _key(number)).token for number in range(ROUNDS)} == {2}

    def test_of_many_processes_one_takes_over(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        for number in range(ROUNDS):
            store.expire(processing(store, key=_key(number)))
        assert racers.winners(open_store_again, take_over) == ONE_EACH

    def test_of_many_processes_one_runs_a_message(
        self, store: Store, open_store_again: Callable[[], Store], racers: Racers
    ) -> None:
        store.init()
        assert racers.winners(open_store_again, run_whole) == ONE_EACH

    def test_many_threads_share_a_store(self, store: Store) -> None:
        for number in range(ROUNDS):
            pending(store, key=_key(number))
        start = Barrier(RACERS * 2)
        with ThreadPoolExecutor(RACERS * 2) as threads:
            races = [threads.submit(_run_rounds, store, claim_it, racer, start) for racer in range(RACERS * 2)]
        assert Counter(number for race in races for number in race.result()) == ONE_EACH

    def test_a_claim_ends_before_the_next_begins(self, store: Store) -> None:
        pending(store)
        for token in range(1, 6):
            held = claim(store)
            assert held.token == token
            store.release(held)
