"""A run: measurement by measurement, round by round."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks import machine
from benchmarks.catalogue import MEASURES
from benchmarks.figures import Round
from benchmarks.subjects import Subject
from benchmarks.testbed import open_testbed

__all__ = ["run"]


def run(
    subjects: Sequence[Subject],
    *,
    only: Sequence[str],
    rounds: int,
    seed: int,
    share: float = 1.0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Take measurements.

    Args:
        subjects: Who takes part; plain Celery among them.
        only: Which measurements.
        rounds: How often each is taken; those that count are taken once.
        seed: Of whose turn it is when.
        share: How much of a measurement's messages are sent in each round.
        say: Is told how it goes.

    Returns:
        ``machine``, and ``measures`` by name: each with its ``rounds`` (by subject figures by name), ``count``, ``seed``, ``date`` and
        ``commit``; with ``failed``, and why, where a subject has not done what it was to do.

    Raises:
        NotInstalledError: A server's programs are not on this machine.
    """
    order = random.Random(seed)
    found: dict[str, Any] = {}
    with open_testbed(subjects) as testbed:
        described = machine.describe(testbed.servers, testbed.directory)
        for name in (name for name in MEASURES if name in only):
            measure = MEASURES[name]
            count = max(int(measure.count * share), 1)
            taken: list[Round] = []
            found[name] = {
                "count": count,
                "rounds": taken,
                "seed": seed,
                "date": f"{datetime.now(UTC):%Y-%m-%d}",
                "commit": machine.commit(),
            }
            try:
                with measure.ready(testbed) as deployments:
                    for number in range(1 if measure.once else rounds):
                        say(f"{name}: round {number + 1}")
                        taken.append(measure.round(testbed, deployments, count, order))
            except AssertionError as error:
                say(f"{name} FAILED: {error}")
                found[name]["failed"] = str(error)
                for deployment in testbed.deployments.values():
                    deployment.stop_worker()
    return {"machine": described, "measures": found}
