"""Run the loan check twice at once, guarded and with plain Celery; duplicate messages, roll back, kill; then count."""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from example_project.demo import report
from example_project.demo.kill import Killed, kill_asking
from example_project.demo.processes import DemoError
from example_project.demo.report import Outcome
from example_project.demo.run import Run
from example_project.demo.scenario import TROUBLES

STARTED = time.monotonic()
#: Seconds between two looks at the tables, and between two lines about a run.
POLL, PROGRESS = 0.4, 2.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m example_project.demo", description=__doc__)
    parser.add_argument("--requests", type=int, default=20, help="how many customers ask (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=180, help="seconds for all of it (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep logs and tables when all is well, too")
    chosen = parser.parse_args()
    if chosen.requests < len(TROUBLES):
        parser.error(f"--requests must be {len(TROUBLES)} or more: something of everything is to go wrong")

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # however it is stopped, it stops its processes
    directory = Path(tempfile.mkdtemp(prefix="loan-demo-"))
    try:
        outcomes = carry_out(directory, requests=chosen.requests, seconds=chosen.deadline)
        faults = summarise(*outcomes)
    except DemoError as error:
        say(f"{error}; logs and tables are in {directory}")
        return 1
    except KeyboardInterrupt:
        say(f"stopped; logs and tables are in {directory}")
        return 128 + signal.SIGINT
    except BaseException:
        say(f"failed; logs and tables are in {directory}")
        raise
    if faults or chosen.keep:
        say(f"logs and tables are in {directory}")
    else:
        shutil.rmtree(directory)
    return 1 if faults else 0


def carry_out(directory: Path, *, requests: int, seconds: float) -> tuple[Outcome, Outcome]:
    """Run the loan check guarded and plain, side by side."""
    deadline = time.monotonic() + seconds
    mark = secrets.token_hex(3)
    with ExitStack() as stack:
        plain, guarded = runs = [
            stack.enter_context(Run(base, mark=mark, directory=directory / base, requests=requests))
            for base in ("plain", "guarded")
        ]
        say("starting two workers: one with plain Celery, one with the queue log")
        for run in runs:
            run.prepare()
        start_workers(runs)
        early = [request for request in guarded.requests if request.early]
        doomed = [request for request in guarded.requests if request.trouble.caller_dies]
        late = [request for request in guarded.requests if request not in (*early, *doomed)]
        say(f"{len(early)} customers ask for a loan, and some messages are sent or delivered twice")
        for run in runs:
            run.start_callers(early)
        killed = kill_asking(guarded, plain, seconds=60)
        say(f"SIGKILL: both workers are dead; {len(killed.running)} guarded bodies were asking institutions")
        for run in runs:
            say(report.progress(run, run.accounts()))
        say(
            f"{len(doomed)} customers ask, and their callers are killed with the commit behind and the broker before them"
        )
        for run in runs:
            run.start_doomed_callers(doomed)
        say("starting two new workers")
        start_workers(runs)
        for run in runs:
            run.bury_doomed_callers()
        say(f"{len(late)} more customers ask")
        for run in runs:
            # The last of them later than `idempotent_lost_after`: it is by overtaking a message that it shows it to be lost.
            run.start_callers(late, pace=4 / len(late))
        at_rest = watch(runs, deadline=deadline)
        for run in runs:
            run.worker.ask_to_stop()
        for run in runs:
            run.worker.stop()
        return outcome(guarded, killed, in_time=guarded in at_rest), outcome(plain, None, in_time=plain in at_rest)


def start_workers(runs: Sequence[Run]) -> None:
    """Start a worker for each run, and wait until they are ready."""
    for run in runs:
        run.start_worker()
    for run in runs:
        run.worker.wait_for(" ready.", seconds=60)


def outcome(run: Run, killed: Killed | None, *, in_time: bool) -> Outcome:
    """Return what the tables and the broker say of a run whose worker has stopped."""
    return Outcome(run, run.accounts(), killed, in_time, run.left_on_broker())


def watch(runs: Sequence[Run], *, deadline: float) -> list[Run]:
    """Show progress until every run has come to rest; return those that did before the deadline."""
    resting: list[Run] = []
    next_line = time.monotonic()
    while len(resting) < len(runs) and time.monotonic() < deadline:
        time.sleep(POLL)
        due = time.monotonic() >= next_line
        for run in runs:
            if run in resting:
                continue
            accounts, at_rest = run.look()
            if at_rest:
                resting.append(run)
                say(f"{report.progress(run, accounts)}  done")
            elif due:
                say(report.progress(run, accounts))
        if due:
            next_line = time.monotonic() + PROGRESS
    return resting


def summarise(guarded: Outcome, plain: Outcome) -> list[str]:
    """Print what the tables say; return what is wrong with the guarded run."""
    print(f"\n{report.effects(guarded, plain)}\n")
    print(
        "  Plain Celery has no outbox. The calls that were rolled back it made before the commit, all others after it."
    )
    print(f"\n{report.copies(guarded, plain)}\n")
    print(f"  Institutions did not answer and were asked again: {guarded.accounts.unanswered} times.")
    print(*(f"  {line}" for line in report.kills(guarded)), "", sep="\n")
    faults = guarded.faults()
    if faults:
        print("  The guarded run does not add up:", *faults, sep="\n  - ")
    else:
        print(
            "  Guarded: each copy was run or skipped; each request has one row, message, text and filing, or was rolled back."
        )
    print("  Plain Celery:", *report.harm(plain), sep="\n  - ")
    return faults


def say(line: str) -> None:
    """Print a line of progress."""
    print(f"{time.monotonic() - STARTED:5.1f} s  {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
