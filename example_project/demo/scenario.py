"""What goes wrong with which request. Only the script of the demo; what happened is counted from tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

CHECK, MESSAGE, FILING = (
    f"example_project.tasks.{name}" for name in ("check_loan", "tell_customer", "file_with_agency")
)


@dataclass(frozen=True)
class Trouble:
    """A way in which a request is duplicated, or does not come through.

    Attributes:
        what: In words.
        calls: How often the customer sends the form in.
        copied: The tasks whose message the broker delivers twice.
        consent: Whether the customer consents; if not, the transaction is rolled back in which the call was made.
        caller_dies: Whether the caller is killed when it has committed and the broker has nothing yet.
        worker_dies: Whether the process that tells the customer is killed ``before`` its commit, with the text sent and the row written,
            or right ``after`` it, when nobody knows of it yet.
    """

    what: str
    calls: int = 1
    copied: frozenset[str] = frozenset()
    consent: bool = True
    caller_dies: bool = False
    worker_dies: Literal["before", "after"] | None = None


TROUBLES = (
    Trouble("the caller asks again", calls=2),
    Trouble("none"),
    Trouble("the message is delivered twice", copied=frozenset({MESSAGE})),
    Trouble("the filing is delivered twice", copied=frozenset({FILING})),
    Trouble("the request is delivered twice", copied=frozenset({CHECK})),
    Trouble("all of these", calls=2, copied=frozenset({CHECK, MESSAGE, FILING})),
    Trouble("rolled back after the call", consent=False),
    Trouble("killed: caller, after its commit", caller_dies=True),
    Trouble("killed: worker, before its commit", worker_dies="before"),
    Trouble("killed: worker, after its commit", worker_dies="after"),
)


@dataclass(frozen=True)
class Request:
    """A customer's question, and what will go wrong with it."""

    number: int

    @property
    def customer(self) -> str:
        return f"customer {self.number}"

    @property
    def amount(self) -> int:
        return 1000 * self.number

    @property
    def trouble(self) -> Trouble:
        return TROUBLES[(self.number - 1) % len(TROUBLES)]

    @property
    def early(self) -> bool:
        """Whether it comes before the workers are killed.

        Not one that is delivered twice: its copy may be held by the worker that dies. Nobody misses a copy of what has run, but
        the accounts of the demo are to be the same each time. Nor one that has a death of its own, or is rolled back: what plain
        Celery makes of it is not to depend on what the kill hits.
        """
        trouble = self.trouble
        return trouble.consent and not (CHECK in trouble.copied or trouble.caller_dies or trouble.worker_dies)

    @property
    def wanted(self) -> int:
        """How many rows, messages, texts and filings it is to have: of what was rolled back nothing is to be seen."""
        return 1 if self.trouble.consent else 0

    def id_in(self, run: str) -> str:
        return f"{run}-{self.number:03}"

    @classmethod
    def of_id(cls, request_id: str) -> Request:
        return cls(int(request_id.rpartition("-")[2]))


def script(number: int) -> list[Request]:
    """Return the requests of a run."""
    return [Request(n) for n in range(1, number + 1)]
