"""All measurements, in the order in which they are taken: those without workers first."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.counted import RowSize, Trips
from benchmarks.measures import Consume, ConsumeBare, Latency, Measure, Publish, PublishBare
from benchmarks.own_code import OwnCode

__all__ = ["MEASURES"]

MEASURES: Mapping[str, Measure] = {
    measure.name: measure
    for measure in (
        Publish("publish", "Publishing: one `delay` for each message", 2000),
        PublishBare("bare", "Publishing a plain task behind the driver's own record: no guard gets further", 2000),
        Publish("keyless", "Publishing a task that is known by its task id", 2000, task="keyless"),
        Publish("group", "Publishing: a group of 1,000", 2000, how="group", turns=2),
        Publish("group-outbox", "Publishing: a group of 1,000, `with outbox()`", 2000, how="group-batch", turns=2),
        Publish("outbox", "Publishing: 1,000 calls in a batch, `with outbox()`", 2000, how="batch", turns=2),
        OwnCode("own-code", "The store's verbs, and their statements sent by the driver alone", 500),
        OwnCode("own-code-memory", "The same, without waiting for the disk", 500, disk=False),
        Trips("trips", "Round trips for each task", 500),
        RowSize("rows", "Size of a row", 5000),
        Consume("consume", "Consuming a no-op, prefork 2", 1000),
        ConsumeBare(
            "bare-consume",
            "Consuming a plain task between the driver's own claim and completion: no guard gets further",
            1000,
        ),
        Consume("results", "Consuming, with results, prefork 2", 1000, task="echo"),
        Latency("latency", "From the call to the body, at 200 calls per second", 600),
    )
}
