"""The states of a run, each with the values that only this state has, and the table of transitions."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from celery_idempotent.core.records import Claim

__all__ = [
    "TRANSITIONS",
    "Checkpointed",
    "Claimed",
    "Finished",
    "HandedOn",
    "Lost",
    "Replayed",
    "RunState",
    "Unguarded",
    "check_transition",
]

logger = logging.getLogger("celery_idempotent")

#: An environment variable, set in our tests and their workers: a transition that is not in the table then raises.
_STRICT = "CELERY_IDEMPOTENT_STRICT"


@dataclass(frozen=True, slots=True)
class Unguarded:
    """The run has no claim: it is not decided on yet, the store does not answer under ``run``, or the guard is off."""

    claim: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """The body is about to run, or runs."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Replayed:
    """The stored result is returned without running the body. There is no claim."""

    value: Any
    claim: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The body has run, here or in the run that this one took over from. Callbacks and result are being sent."""

    claim: Claim
    value: Any


@dataclass(frozen=True, slots=True)
class HandedOn:
    """The row waits for the message's retry or replacement. The claim is the one that wrote this."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Lost:
    """The claim is gone: another worker has taken the message over, or it was ended."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Finished:
    """The row is done, or was released. There is no claim if the run ended an abandoned message."""

    claim: Claim | None


RunState = Unguarded | Claimed | Replayed | Checkpointed | HandedOn | Lost | Finished

#: The states that may follow each state. If the store has forgotten the row, it is claimed again (``Claimed`` to ``Claimed``,
#: ``Checkpointed`` to ``Checkpointed``). If the store goes silent after the claim, the delivery is decided on again. So ``Claimed`` and
#: ``Checkpointed`` lead to all states that a first decision can lead to.
TRANSITIONS: Mapping[type[RunState], frozenset[type[RunState]]] = {
    Unguarded: frozenset({Claimed, Replayed, Finished}),
    Claimed: frozenset({Claimed, Replayed, Checkpointed, HandedOn, Lost, Finished}),
    Replayed: frozenset(),
    Checkpointed: frozenset({Claimed, Replayed, Checkpointed, Lost, Finished}),
    HandedOn: frozenset(),
    Lost: frozenset(),
    Finished: frozenset(),
}


def check_transition(before: RunState, after: RunState, *, whose: object) -> None:
    """Log a transition that is not in the table as critical. Do not raise: our own bug must not lose a message's outcome.

    Args:
        before: The current state.
        after: The next state.
        whose: The run, for the log.

    Raises:
        AssertionError: The transition is not in the table; in our tests only.
    """
    if type(after) in TRANSITIONS[type(before)]:
        return
    text = f"{whose} goes from {type(before).__name__} to {type(after).__name__}, which the table of transitions does not allow"
    if os.environ.get(_STRICT):
        raise AssertionError(text)
    logger.critical("%s: please report this", text)
