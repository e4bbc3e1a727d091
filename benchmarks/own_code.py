"""What this library's own code adds to its statements: the store's verbs beside the bare driver, which sends the very same.

What the store hands to its driver is recorded, and then sent again by that driver on a connection that is kept: the same text and the same
parameters, their answers read. The store's verbs and the driver take turns, message by message of some.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

from benchmarks.drivers import Statement, driver_of
from benchmarks.figures import Round
from benchmarks.measures import Column, Measure, shuffled
from benchmarks.rows import clear
from benchmarks.servers import no_waiting_for_the_disk
from benchmarks.subjects import Place, Subject
from benchmarks.testbed import Deployment, Testbed
from celery_idempotent.core.records import Claim, Claimed, Inserted, MessageKey, NewMessage, ProcessedStatus
from celery_idempotent.core.store import Store
from celery_idempotent.stores import open_store
from tests.support.worker import ROOT

__all__ = ["VERBS", "OwnCode", "compare"]

VERBS = ("record", "claim", "complete")

#: Messages of one turn, and turns that are not counted: some drivers prepare a statement that they have sent a few times.
TURN = 50
_WARM = 2

#: Seconds by verb, and statements by verb.
Took = dict[str, float]
Recording = dict[str, list[Statement]]


@dataclass(frozen=True)
class OwnCode(Measure):
    """Microseconds of each verb, and of its statement alone.

    Attributes:
        disk: Whether commits wait for the disk, as they do in all other measurements. That takes most of the time, of either, and more or
            less of it by turns: without it one sees what the code adds.
    """

    disk: bool = True

    columns = (
        *(
            column
            for verb in VERBS
            for column in (
                Column(f"{verb} store", f"{verb}, us", ".0f"),
                Column(f"{verb} driver", "driver", ".0f"),
                Column(f"{verb} ratio", "ratio"),
            )
        ),
        Column("ratio", "all three"),
    )

    def takes(self, subject: Subject) -> bool:
        return subject.guarded

    def round(self, testbed: Testbed, deployments: Mapping[str, Deployment], count: int, order: random.Random) -> Round:
        found: dict[str, Mapping[str, float]] = {}
        for deployment in shuffled(deployments, order):
            name, place = deployment.subject.name, deployment.place
            deployment.clear()
            if self.disk:
                found[name] = _compared(place, count)
                continue
            with no_waiting_for_the_disk(testbed.servers.get(name)), TemporaryDirectory(dir=_MEMORY) as memory:
                if name == "sqlite":
                    place = replace(place, store=f"sqlite:///{memory}/queue_log.db")
                found[name] = _compared(place, count)
        return found


#: A file system in memory, which every Linux has.
_MEMORY = "/dev/shm"


def _compared(place: Place, count: int) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.own_code", str(count)],
        cwd=ROOT,
        env={**os.environ, **place.environment()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


# -- in a process of its own, as a producer's is --------------------------------------------------------------------------------


def main() -> None:
    place = Place.of_this_process()
    assert place.store is not None
    print(json.dumps(compare(place.store, turns=max(int(sys.argv[1]) // TURN, 1))))


def compare(url: str, *, turns: int) -> dict[str, float]:
    """Have the store and its driver take turns; what each verb took, in microseconds, and the ratios."""
    driver = driver_of(url)
    with driver.recording() as statements:
        recorded = _recorded(url, statements)
    spent = {(verb, who): 0.0 for verb in VERBS for who in ("store", "driver")}
    with closing(open_store(url)) as store, driver.connect(store, url) as send:
        for turn in range(-_WARM, turns):
            clear(url)
            sides: list[tuple[str, Callable[[], Took]]] = [
                ("store", partial(_by_store, store, f"turn {turn}")),
                ("driver", partial(_by_driver, send, recorded)),
            ]
            for who, side in sides if turn % 2 else reversed(sides):
                for verb, seconds in side().items():
                    spent[verb, who] += seconds if turn >= 0 else 0.0
        # Or the driver did not do what the store does.
        (counted,) = store.counts()
        assert (counted.rows, counted.processed_status) == (2 * TURN, ProcessedStatus.SUCCESS), counted
    micros = {key: seconds / turns / TURN * 1e6 for key, seconds in spent.items()}
    told = {f"{verb} {who}": value for (verb, who), value in micros.items()}
    told |= {f"{verb} ratio": micros[verb, "store"] / micros[verb, "driver"] for verb in VERBS}
    told["ratio"] = sum(micros[verb, "store"] for verb in VERBS) / sum(micros[verb, "driver"] for verb in VERBS)
    return told


def _recorded(url: str, statements: list[Statement]) -> Recording:
    """Return what each verb sends for the messages of a turn."""
    recorded: Recording = {}

    def note(verb: str) -> None:
        recorded[verb] = list(statements)
        statements.clear()

    with closing(open_store(url)) as store:
        store.init()
        clear(url)
        _by_store(store, "first")  # which looks at the table, or loads the scripts
        statements.clear()
        _by_store(store, "recorded", note)
    lengths = {verb: len(sent) for verb, sent in recorded.items()}
    assert lengths == dict.fromkeys(VERBS, TURN), f"statements of {TURN} messages: {lengths}"
    return recorded


def _by_store(store: Store, name: str, note: Callable[[str], None] = lambda _: None) -> Took:
    """Return a turn of the store's; seconds for each verb."""
    messages = [_message(f"{name} {number}") for number in range(TURN)]
    began = time.perf_counter()
    for message in messages:
        assert isinstance(store.record(message), Inserted)
    note("record")
    recorded = time.perf_counter()
    claims: list[Claim] = []
    for message in messages:
        claimed = store.claim(message, worker="host:1", lease=60.0, grace=5.0)
        assert isinstance(claimed, Claimed)
        claims.append(claimed.claim)
    note("claim")
    claimed_at = time.perf_counter()
    for claim in claims:
        assert store.complete(claim, result=None)
    note("complete")
    return dict(zip(VERBS, (recorded - began, claimed_at - recorded, time.perf_counter() - claimed_at), strict=True))


def _by_driver(send: Callable[[Statement], object], recorded: Recording) -> Took:
    """Return a turn of the driver's."""
    took: Took = {}
    for verb, statements in recorded.items():
        began = time.perf_counter()
        for statement in statements:
            send(statement)
        took[verb] = time.perf_counter() - began
    return took


def _message(name: str) -> NewMessage:
    # As long as those of the no-op are.
    return NewMessage(
        MessageKey(f"noop:{name}", "noop"),
        task_id=f"{name:-<36}",
        queue="celery",
        fingerprint=f"{name:0<64}",
        message=b"." * 200,
    )


if __name__ == "__main__":
    main()
