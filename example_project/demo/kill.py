"""The kill: SIGKILL at a moment when institutions are being asked, and what became of those who asked.

A body that is killed between what it does in the world and the note that it has done it does it again: no queue log can know. The
demo has to add up to the same numbers each time, so it strikes where nothing has been done yet. It freezes the worker, reads the
tables, and either kills it or lets it go on.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from example_project import ledger
from example_project.demo.accounts import Message
from example_project.demo.processes import DemoError, wait_until
from example_project.demo.run import Run

#: How many bodies must be running.
RUNNING = 2


@dataclass(frozen=True)
class Killed:
    """What the queue log said of a run while its worker was dead.

    Attributes:
        running: Messages whose body was running.
    """

    running: tuple[Message, ...]

    @classmethod
    def read(cls, run: Run) -> Killed:
        log = Message.read(run.settings, run.book)
        return cls(tuple(message for message in log if message.status == "processing"))

    def ran(self, run: Run) -> int:
        """How many of the bodies that were running have since run to their end, and that once."""
        noted = _noted(run)
        return sum(noted[_enquiry(message)] == 1 for message in self.running)


def kill_asking(guarded: Run, plain: Run, *, seconds: float) -> Killed:
    """Kill the workers of two runs while the guarded one's bodies ask institutions.

    Raises:
        DemoError: There was no such moment in time.
    """
    if not wait_until(lambda: _strike(guarded), seconds=seconds, every=0.05):
        raise DemoError(f"no moment to kill the worker within {seconds:.0f} s")
    plain.worker.kill()
    return Killed.read(guarded)


def _strike(run: Run) -> bool:
    """Kill a worker if this is the moment; whether it was."""
    if not run.callers.ended or not _is_asking(run):
        return False
    with run.worker.frozen():
        # The last thing that a body did may be under way: to a server, where it has arrived by the second look; or into SQLite's
        # file, where the next to open it finds a commit that is not to be seen yet.
        if run.book.at_rest() and _is_asking(run) and _is_asking(run):
            run.worker.kill()
            return True
    return False


def _is_asking(run: Run) -> bool:
    """Return whether every body that runs waits for an institution, half of which have answered, and no copy of a request is left."""
    running = Killed.read(run).running
    if len(running) < RUNNING or any(message.task != "ask" for message in running):
        return False
    noted = _noted(run)
    if any(noted[_enquiry(message)] for message in running):
        return False
    checked, asked, decided, *_ = run.accounts().steps
    # By half time the worker also has the messages that wait until a chord's tasks have ended.
    return checked.balanced and 2 * asked.run.total() >= asked.sent.total() and not decided.run


def _enquiry(message: Message) -> tuple[str, ...]:
    return message.request_id, message.institution, str(message.attempt)


def _noted(run: Run) -> Counter[tuple[str, ...]]:
    """How often the ledger has each attempt at each institution."""
    return run.book.count(ledger.enquiries, f"{run.settings.run}-", "request_id", "institution", "attempt")
