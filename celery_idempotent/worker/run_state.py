"""The states of a run, each with what is only known in it, and the one table of the ways between them."""

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

#: Set in the environment of our tests, and of their workers: a transition that is not in the table raises there.
_STRICT = "CELERY_IDEMPOTENT_STRICT"


@dataclass(frozen=True, slots=True)
class Unguarded:
    """The run holds no claim: its delivery is not decided on yet, its store gives no answer and the app says ``run``, or its task is turned off."""

    claim: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class Claimed:
    """The body is about to run, or runs."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Replayed:
    """The stored result is returned without running the body. Nothing is held."""

    value: Any
    claim: ClassVar[None] = None


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """The body ran, in this run or in one that this one took over from. Callbacks and result are being sent."""

    claim: Claim
    value: Any


@dataclass(frozen=True, slots=True)
class HandedOn:
    """The row waits for this message's retry or replacement. The claim is the one that wrote so."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Lost:
    """The claim, as it was, is gone: somebody else has taken the message over, or ended it."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Finished:
    """The row is done, or was released. A run that ended an abandoned message never had a claim."""

    claim: Claim | None


RunState = Unguarded | Claimed | Replayed | Checkpointed | HandedOn | Lost | Finished

#: From each state, where a run may go. A claim is had anew (``Claimed`` to ``Claimed``, ``Checkpointed`` to ``Checkpointed``) after the
#: store has forgotten its row. A delivery whose store went silent after the claim is decided on anew, so that what it finds then may lead
#: from ``Claimed`` or ``Checkpointed`` to all that it could have found at first.
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
    """Log a transition that is not in the table, loudly: a worker must not lose a message's outcome because our bookkeeping is wrong.

    Args:
        before: The state that the run has.
        after: The one that it gets.
        whose: The run, for the log.

    Raises:
        AssertionError: It is not in the table, and these are our tests.
    """
    if type(after) in TRANSITIONS[type(before)]:
        return
    text = f"{whose} goes from {type(before).__name__} to {type(after).__name__}, which no run does"
    if os.environ.get(_STRICT):
        raise AssertionError(text)
    logger.critical("%s: please report this", text)
