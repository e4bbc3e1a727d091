"""How long a copy is held."""

from __future__ import annotations

import pytest
from celery import Celery

from celery_idempotent.worker.hold import hold_countdown, hold_delay


@pytest.mark.parametrize(("holds", "delay"), [(0, 1.0), (1, 2.0), (5, 32.0), (6, 60.0), (1000, 60.0)])
def test_each_hold_is_twice_as_long(holds: int, delay: float) -> None:
    assert hold_delay(60.0, holds) == delay


@pytest.mark.parametrize(
    ("broker", "options", "longest"),
    [("redis://", {}, 1800.0), ("redis://", {"visibility_timeout": 60}, 30.0), ("amqp://", {}, 900.0)],
)
def test_a_hold_ends_within_the_brokers_patience(broker: str, options: dict[str, int], longest: float) -> None:
    app = Celery(broker=broker, set_as_current=False)
    app.conf.broker_transport_options = options
    assert hold_countdown(app, 1e6) == longest
    assert 10.0 <= hold_countdown(app, 10.0) <= 11.0
    app.close()


def test_no_hold_is_shorter_than_a_quorum_queue_takes() -> None:
    app = Celery(broker="amqp://", set_as_current=False)
    assert hold_countdown(app, 0.1) == 1.0
    app.close()
