"""RedBeat's scheduler, with one message for each tick.

Name it in the settings::

    app.conf.beat_scheduler = "celery_idempotent.contrib.redbeat:RedBeatScheduler"
"""

from __future__ import annotations

from typing import Any

import redbeat

from celery_idempotent.beat import IdempotentScheduler

__all__ = ["RedBeatScheduler"]


class RedBeatScheduler(IdempotentScheduler, redbeat.RedBeatScheduler):  # type: ignore[misc]
    """RedBeat's ``RedBeatScheduler``; see :class:`~celery_idempotent.beat.IdempotentScheduler`.

    RedBeat's lock lets one beat send at a time. Here it is no longer needed for that: with ``redbeat_lock_key = None`` all beats send,
    and none waits for the lock of one that died.
    """

    def maybe_due(self, entry: redbeat.RedBeatSchedulerEntry, **kwargs: Any) -> Any:
        """Send an entry if it is due; return when to ask again. RedBeat asks the entry, and not the scheduler (read from 2.4.2)."""
        due, wait = self.is_due(entry)
        return super().maybe_due(entry, **kwargs) if due else wait
