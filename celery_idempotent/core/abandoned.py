"""What a task may answer about a message whose owner's lease ran out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Answer", "Done"]


@dataclass(frozen=True, slots=True)
class Done:
    """The message was done: end it as a success, so that its callbacks, its chain or its chord go on.

    Attributes:
        value: Its result, as the body would have returned it.
    """

    value: Any = None


#: What ``on_abandoned`` may answer, if it is a callable.
Answer = Literal["rerun", "fail"] | Done
