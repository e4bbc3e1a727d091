"""What goes wrong with which request. Only the script of the demo; what happened is counted from tables."""

from __future__ import annotations

from dataclasses import dataclass

CHECK, MESSAGE, FILING = (
    f"example_project.tasks.{name}" for name in ("check_loan", "tell_customer", "file_with_agency")
)


@dataclass(frozen=True)
class Trouble:
    """A way in which a request is duplicated.

    Attributes:
        what: In words.
        calls: How often the caller calls ``apply_async`` for it.
        copied: The tasks whose message the broker delivers twice.
    """

    what: str
    calls: int = 1
    copied: frozenset[str] = frozenset()


TROUBLES = (
    Trouble("the caller asks again", calls=2),
    Trouble("none"),
    Trouble("the message is delivered twice", copied=frozenset({MESSAGE})),
    Trouble("the filing is delivered twice", copied=frozenset({FILING})),
    Trouble("the request is delivered twice", copied=frozenset({CHECK})),
    Trouble("all of these", calls=2, copied=frozenset({CHECK, MESSAGE, FILING})),
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
        the accounts of the demo are to be the same each time.
        """
        return CHECK not in self.trouble.copied

    def id_in(self, run: str) -> str:
        return f"{run}-{self.number:03}"

    @classmethod
    def of_id(cls, request_id: str) -> Request:
        return cls(int(request_id.rpartition("-")[2]))


def script(number: int) -> list[Request]:
    """The requests of a run."""
    return [Request(n) for n in range(1, number + 1)]
