"""What the accounts of a run look like to a reader, and whether they add up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from example_project.demo.accounts import Accounts
from example_project.demo.kill import Killed
from example_project.demo.run import Run


@dataclass(frozen=True)
class Outcome:
    """A run that has ended.

    Attributes:
        run: The run.
        accounts: Its tables, read after its worker had stopped.
        killed: What the kill hit; ``None`` where no table says it.
        in_time: Whether it came to rest before the deadline.
        left: How many messages it left on the broker.
    """

    run: Run
    accounts: Accounts
    killed: Killed | None
    in_time: bool
    left: int

    def faults(self) -> list[str]:
        """Everything that is not as it should be; empty when all is well."""
        found = [] if self.in_time else ["it did not come to rest in time"]
        for step in self.accounts.steps:
            if not step.balanced:
                recorded = "" if step.recorded is None else f"; the queue log has {step.recorded.total()} done"
                found.append(
                    f"{step.name}: {step.sent.total()} sent, {step.returned} returned, {step.run.total()} run, "
                    f"{step.skipped.total()} skipped{recorded}"
                )
        for request in self.run.requests:
            messages, filings = self.of(request.number)
            if (messages, filings) != (1, 1):
                found.append(f"request {request.number}: {messages} messages to the customer, {filings} filings")
        if self.killed is not None and self.killed.ran(self.run) != len(self.killed.running):
            found.append(
                f"{len(self.killed.running)} bodies were killed, {self.killed.ran(self.run)} of them ran again once"
            )
        if self.left:
            found.append(f"{self.left} messages are left on the broker")
        return found

    def of(self, number: int) -> tuple[int, int]:
        """Messages and filings of a request."""
        name = self.run.requests[number - 1].id_in(self.run.settings.run)
        return self.accounts.messages[name], self.accounts.filings[name]


def progress(run: Run, accounts: Accounts) -> str:
    """Where a run is, on one line."""
    requests, answers, _, messages, filings = (step.run.total() for step in accounts.steps)
    line = f"{run.settings.base:8}{requests:4} requests{answers:5} answers{messages:4} messages{filings:4} filings"
    skipped = sum(step.skipped.total() for step in accounts.steps)
    return f"{line}{skipped:4} copies skipped" if run.settings.base == "guarded" else line


def effects(guarded: Outcome, plain: Outcome) -> str:
    """Messages and filings of each request, side by side."""
    rows: list[Sequence[object]] = [
        (request.number, request.trouble.what, *guarded.of(request.number), *plain.of(request.number))
        for request in guarded.run.requests
    ]
    totals = [(each.accounts.messages.total(), each.accounts.filings.total()) for each in (guarded, plain)]
    rows.append(("all", "", *totals[0], *totals[1]))
    return _table("request", "what goes wrong", ("messages", "filings"), ("messages", "filings"), rows)


def copies(guarded: Outcome, plain: Outcome) -> str:
    """What became of every copy of every message, by task, side by side."""
    what = {
        "check_loan": "a customer asks",
        "ask": "an institution answers",
        "decide": "the best offer is chosen",
        "tell_customer": "the customer is told",
        "file_with_agency": "the agency files",
    }
    rows = [
        (
            *(ours.name, what[ours.name]),
            *(ours.sent.total(), ours.returned, ours.run.total(), ours.skipped.total()),
            *(theirs.sent.total(), theirs.run.total(), theirs.lost),
        )
        for ours, theirs in zip(guarded.accounts.steps, plain.accounts.steps, strict=True)
    ]
    totals = [sum(row[column] for row in rows) for column in range(2, 9)]  # type: ignore[misc]
    heads = ("sent +", "again =", "run +", "skipped"), ("sent =", "run +", "lost")
    return _table("task", "", *heads, [*rows, ("all", "", *totals)])


def after_the_kill(guarded: Outcome) -> str:
    """What became of what a guarded worker was doing when it was killed."""
    if guarded.killed is None:
        return "Nothing was killed."
    running, again = len(guarded.killed.running), guarded.killed.ran(guarded.run)
    return f"Killed: {running} bodies were running; run again: {again}."


def harm(plain: Outcome) -> str:
    """What customers and the agency had too much of, and what never came."""
    asked = [request.id_in(plain.run.settings.run) for request in plain.run.requests]
    made = (plain.accounts.messages, plain.accounts.filings)
    messages, filings = (sum(max(each[name] - 1, 0) for name in asked) for each in made)
    no_message, no_filing = (sum(not each[name] for name in asked) for each in made)
    said = [f"{messages} messages and {filings} filings too many"]
    said.append(f"customers never told: {no_message}, requests never filed: {no_filing}")
    if returned := sum(step.returned for step in plain.accounts.steps):
        said.append(f"bodies run again after the kill: {returned}")
    if plain.left:
        said.append(f"messages left on the broker: {plain.left}")
    if not plain.in_time:
        said.append("it had not come to rest")
    return f"{'; '.join(said)}."


def _table(
    first: str, second: str, guarded: Sequence[str], plain: Sequence[str], rows: Sequence[Sequence[object]]
) -> str:
    """A table of two descriptions, the guarded run's numbers and plain Celery's numbers."""

    def line(one: object, two: object, ours: Sequence[object], theirs: Sequence[object]) -> str:
        left, right = ("".join(f"{cell!s:>9}" for cell in cells) for cells in (ours, theirs))
        return f"  {one!s:17}{two!s:30}{left:{width}} |{right}".rstrip()

    split, width = 2 + len(guarded), 9 * len(guarded)
    return "\n".join(
        [
            line("", "", ["guarded"], ["plain Celery".rjust(14)]),
            line(first, second, guarded, plain),
            *(line(row[0], row[1], row[2:split], row[split:]) for row in rows),
        ]
    )
