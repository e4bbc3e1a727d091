"""Have a Redis broker deliver again at once what was not acknowledged in time, on kombu before 5.7 too.

There it looks for such messages every 100 s, and ``unacked_restore_interval`` and ``unacked_restore_throttle``, which
:func:`tests.support.brokers.redis_broker` sets to 1, do not exist yet.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import redis

__all__ = ["restore_every_second"]


def restore_every_second() -> None:
    """Give an older kombu the pace that a newer one has from these options; doing so again changes nothing."""
    if hasattr(redis.Channel, "unacked_restore_throttle") or hasattr(redis.QoS, "restores_every_second"):
        return
    redis.QoS.restores_every_second = True
    restore, register = redis.QoS.restore_visible, redis.Transport.register_with_event_loop

    def restore_visible(self: Any, start: int = 0, num: int = 10, interval: int = 1) -> Any:
        return restore(self, start, num, interval)

    def register_with_event_loop(self: Any, connection: Any, loop: Any) -> None:
        register(self, connection, loop)
        loop.call_repeatedly(1, self.cycle.maybe_restore_messages)

    redis.QoS.restore_visible = restore_visible
    redis.Transport.register_with_event_loop = register_with_event_loop
