"""Measurements that count, once: round trips of each task, and bytes of each row."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.figures import Round
from benchmarks.measures import Column, Measure
from benchmarks.relay import Relay
from benchmarks.rows import count as count_rows
from benchmarks.rows import size
from benchmarks.subjects import Subject
from benchmarks.testbed import Deployment, Testbed

__all__ = ["RowSize", "Trips"]


@dataclass(frozen=True)
class Trips(Measure):
    """Round trips of each task, to the broker and to the store, counted by relays between the processes and the servers.

    What a package keeps in its broker's Redis counts as the broker's; a queue log in Redis has a relay of its own. A worker that waits asks
    its broker once a second for more, which is in the figures. Atomic tasks are compared with a body that writes the same row in a
    transaction of its own, without a guard.
    """

    once = True
    columns = (
        Column("publish broker", "publish: broker"),
        Column("publish store", "store"),
        Column("run broker", "run: broker"),
        Column("run store", "store"),
        Column("effect store", "own transaction: store"),
        Column("effect commits", "commits"),
        Column("atomic store", "atomic: store"),
        Column("atomic commits", "commits"),
    )

    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        return {name: _trips(testbed, deployment.subject, count) for name, deployment in deployments.items()}


def _trips(testbed: Testbed, subject: Subject, count: int) -> dict[str, float]:
    count = subject.share(count)
    found: dict[str, float] = {}
    store = testbed.store(subject)
    on_a_server = store is not None and not store.startswith("sqlite")
    with ExitStack() as stack:
        relays = {"broker": stack.enter_context(Relay(testbed.broker(subject)))}
        if on_a_server:
            assert store is not None
            relays["store"] = stack.enter_context(Relay(store))
        urls = {name: relay.url for name, relay in relays.items()}
        deployment = stack.enter_context(testbed.deploy(subject, **urls))

        def note(what: str) -> None:
            for name, relay in relays.items():
                found[f"{what} {name}"] = relay.counts["trips"] / count
                relay.counts["trips"] = 0
            if on_a_server:
                found[f"{what} commits"] = relays["store"].counts["commits"] / count
                relays["store"].counts["commits"] = 0

        def run(task: str, what: str) -> None:
            numbers, _ = deployment.publish(count, task=task)
            note("")
            deployment.run(numbers)
            note(what)

        note("")
        deployment.publish(count)
        note("publish")
        deployment.discard(count)
        deployment.clear()
        deployment.start_worker()
        run("noop", "run")
        if subject.has_transactions and on_a_server:
            for task in ("effect", "atomic"):
                deployment.run(deployment.publish(100, task=task)[0])
                note("")
                run(task, task)
            for what, name in (("", "store"), (" commits", "commits")):
                found[f"atomic adds{what}"] = found[f"atomic {name}"] - found[f"effect {name}"]
    return {name: value for name, value in found.items() if not name.startswith(" ")}


@dataclass(frozen=True)
class RowSize(Measure):
    """Bytes of each row of the queue log, with its indexes: as published, and when it is done.

    Of the no-op with its one argument, whose result is ignored; of a thousand calls in a batch, run by a worker. Dead versions of rows, which
    the database has not cleaned up yet, are in the figures.
    """

    once = True
    columns = (Column("pending", "pending, bytes", ",.0f"), Column("done", "done, bytes", ",.0f"))

    def takes(self, subject: Subject) -> bool:
        return subject.guarded

    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        found: dict[str, Mapping[str, float]] = {}
        for name, deployment in deployments.items():
            deployment.stop_worker()
            deployment.clear()
            url = deployment.place.store
            assert url is not None
            empty = size(url)
            numbers, _ = deployment.publish(count, how="batch")
            pending = (size(url) - empty) / count_rows(url)
            deployment.start_worker()
            deployment.run(numbers)
            found[name] = {"pending": pending, "done": (size(url) - empty) / count_rows(url)}
            deployment.stop_worker()
        return found
