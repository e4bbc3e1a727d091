"""What the accounts of a run look like to a reader, and whether they add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from example_project.demo.accounts import Accounts, Message
from example_project.demo.kill import Killed
from example_project.demo.run import Run
from example_project.demo.scenario import Request

#: What can come of a request, in the order of the columns: rows of the web server, rows that say what its customer was told, texts
#: that reached the customer, filings at the agency.
EFFECTS = ("requests", "messages", "texts", "filings")


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
            effects = self.of(request)
            if effects != (request.wanted,) * len(EFFECTS):
                came = ", ".join(f"{number} {name}" for number, name in zip(effects, EFFECTS, strict=True))
                found.append(f"request {request.number}: {came}; it should be {request.wanted} of each")
        if self.traces:
            found.append(f"{self.traces} messages of requests that were rolled back are in the queue log")
        for moment in ("before", "after"):
            wanted = sum(request.trouble.worker_dies == moment for request in self.run.requests)
            if self.deaths(moment) != wanted:
                found.append(f"{self.deaths(moment)} processes were killed {moment} their commit, not {wanted}")
        if self.killed is not None and self.killed.ran(self.run) != len(self.killed.running):
            found.append(
                f"{len(self.killed.running)} bodies were killed, {self.killed.ran(self.run)} of them ran again once"
            )
        if self.left:
            found.append(f"{self.left} messages are left on the broker")
        return found

    def of(self, request: Request) -> tuple[int, ...]:
        """Return what came of a request: see :data:`EFFECTS`."""
        name = request.id_in(self.run.settings.run)
        return tuple(counted[name] for counted in self._effects)

    @property
    def totals(self) -> tuple[int, ...]:
        """What came of all requests."""
        return tuple(counted.total() for counted in self._effects)

    @property
    def texts_again(self) -> int:
        """How many texts the gateway was handed again, and knew by their key."""
        return self.accounts.handed - self.accounts.texts.total()

    def deaths(self, moment: str) -> int:
        """How many processes were killed before, or after, they committed what a customer was told."""
        return len(list(self.run.settings.directory.glob(f"killed-{moment}-*")))

    @property
    def traces(self) -> int:
        """How many messages the queue log has of requests that were rolled back."""
        name = self.run.settings.run
        unwanted = {request.id_in(name) for request in self.run.requests if not request.wanted}
        return sum(message.request_id in unwanted for message in self._log())

    @property
    def relayed(self) -> list[float]:
        """Of each request whose caller was killed, the seconds until its message was published."""
        name = self.run.settings.run
        killed = {request.id_in(name) for request in self.run.requests if request.trouble.caller_dies}
        checks = (each for each in self._log() if each.task == "check_loan" and each.request_id in killed)
        return [each.on_the_way for each in checks if each.on_the_way is not None]

    @property
    def _effects(self) -> tuple[Counter[str], ...]:
        return self.accounts.requests, self.accounts.messages, self.accounts.texts, self.accounts.filings

    def _log(self) -> list[Message]:
        return Message.read(self.run.settings, self.run.book)


def progress(run: Run, accounts: Accounts) -> str:
    """Where a run is, on one line."""
    checks, answers, _, messages, filings = (step.run.total() for step in accounts.steps)
    line = f"{run.settings.base:8}{checks:4} checks{answers:5} answers{messages:4} messages{filings:4} filings"
    skipped = sum(step.skipped.total() for step in accounts.steps)
    return f"{line}{skipped:4} copies skipped" if run.settings.base == "guarded" else line


def effects(guarded: Outcome, plain: Outcome) -> str:
    """Return what came of each request, side by side."""
    rows: list[Sequence[object]] = [
        (request.number, request.trouble.what, *guarded.of(request), *plain.of(request))
        for request in guarded.run.requests
    ]
    rows.append(("all", "", *guarded.totals, *plain.totals))
    return _table("request", "what goes wrong", EFFECTS, EFFECTS, rows)


def copies(guarded: Outcome, plain: Outcome) -> str:
    """Return what became of every copy of every message, by task, side by side."""
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


def kills(guarded: Outcome) -> list[str]:
    """Return what became of what was killed, on the guarded side: one line for each kind."""
    lines = []
    if guarded.killed is not None:
        running, again = len(guarded.killed.running), guarded.killed.ran(guarded.run)
        lines.append(f"Killed with the workers: {running} bodies that were asking institutions; run again: {again}.")
    waits = " and ".join(f"{seconds:.1f} s" for seconds in guarded.relayed)
    lines.append(
        f"Killed after their commit: {len(guarded.relayed)} callers; a worker published their calls after {waits}."
    )
    before, after = (guarded.deaths(moment) for moment in ("before", "after"))
    lines.append(
        f"Killed as they told a customer: {before} processes before their commit, {after} after it; "
        f"texts handed in again, under their key: {guarded.texts_again}."
    )
    return lines


def harm(plain: Outcome) -> list[str]:
    """Return what customers and the agency had too much of, and what never came: some lines."""
    of = {request: dict(zip(EFFECTS, plain.of(request), strict=True)) for request in plain.run.requests}
    wanted = [effects for request, effects in of.items() if request.wanted]
    unwanted = [effects for request, effects in of.items() if not request.wanted]
    texts, filings = (sum(max(effects[name] - 1, 0) for effects in wanted) for name in ("texts", "filings"))
    no_text, no_filing = (sum(not effects[name] for effects in wanted) for name in ("texts", "filings"))
    rolled_back = sum(bool(effects["filings"]) for effects in unwanted)
    untold = sum(effects["texts"] > effects["messages"] for effects in wanted)
    lines = [
        f"{texts} texts and {filings} filings too many; customers never told: {no_text}, requests never filed: {no_filing}",
        f"rolled back, and filed all the same: {rolled_back}; texts delivered that no message tells of: {untold}",
    ]
    rest = []
    if returned := sum(step.returned for step in plain.accounts.steps):
        rest.append(f"bodies run again after the kill: {returned}")
    if plain.left:
        rest.append(f"messages left on the broker: {plain.left}")
    if not plain.in_time:
        rest.append("it had not come to rest")
    return [*lines, *(["; ".join(rest)] if rest else [])]


def _table(
    first: str, second: str, guarded: Sequence[str], plain: Sequence[str], rows: Sequence[Sequence[object]]
) -> str:
    """Return a table of two descriptions, the guarded run's numbers and plain Celery's numbers."""

    def line(one: object, two: object, ours: Sequence[object], theirs: Sequence[object]) -> str:
        left, right = ("".join(f"{cell!s:>9}" for cell in cells) for cells in (ours, theirs))
        return f"  {one!s:{narrow}}{two!s:{wide}}{left:{width}} |{right}".rstrip()

    split, width = 2 + len(guarded), 9 * len(guarded)
    narrow, wide = (
        max(len(str(cell)) for cell in column) + 2
        for column in zip((first, second), *(row[:2] for row in rows), strict=True)
    )
    return "\n".join(
        [
            line("", "", ["guarded"], ["plain Celery".rjust(14)]),
            line(first, second, guarded, plain),
            *(line(row[0], row[1], row[2:split], row[split:]) for row in rows),
        ]
    )
