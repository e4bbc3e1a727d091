"""Log one line per outcome, with its fields as attributes.

``idempotent_hooks = ["celery_idempotent.contrib.log.hook"]`` logs to ``celery_idempotent.outcomes``.
"""

from __future__ import annotations

import logging
from dataclasses import fields

from celery_idempotent.hooks import Outcome, OutcomeKind

__all__ = ["hook"]

logger = logging.getLogger("celery_idempotent.outcomes")

#: Outcomes logged as WARNING; all others are logged as INFO.
_WARNINGS = frozenset(
    (
        OutcomeKind.ABANDONED,
        OutcomeKind.LEASE_LOST,
        OutcomeKind.MISMATCHED,
        OutcomeKind.RECOVERED,
        OutcomeKind.TAKEN_OVER,
        OutcomeKind.UNGUARDED,
        OutcomeKind.WITHDRAWN,
    )
)

_FIELDS = tuple(field.name for field in fields(Outcome) if field.name != "kind")


def hook(outcome: Outcome, /) -> None:
    """Log an outcome.

    The record has an attribute ``outcome``, the kind, and one for each known field of the outcome, under the field's name: ``task_name``,
    ``message_id`` and so on. A JSON formatter, or structlog's ``ExtraAdder``, finds them there.
    """
    level = logging.WARNING if outcome.kind in _WARNINGS else logging.INFO
    if not logger.isEnabledFor(level):
        return
    known = {name: value for name in _FIELDS if (value := getattr(outcome, name)) is not None}
    what = f"{outcome.count} rows" if outcome.message_id is None else f"{outcome.task_name}[{outcome.message_id}]"
    why = "" if outcome.reason is None else f" ({outcome.reason})"
    logger.log(level, "%s: %s%s", what, outcome.kind.value, why, extra={"outcome": outcome.kind.value, **known})
