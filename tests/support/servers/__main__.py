"""Run a command with every server that the tests want at hand: ``python -m tests.support.servers COMMAND [ARGUMENT ...]``.

Each server is, in this order: the one that ``CELERY_IDEMPOTENT_TEST_<NAME>`` names; the one at its standard address, if it
lets us in; one started for this run, as an ordinary account with its data in a temporary directory, and ended with it. What is not
installed is first installed with apt-get, where that is there and we are root (``CELERY_IDEMPOTENT_TEST_INSTALL=0`` says
no); so are the browser and PgBouncer, which tests start for themselves. The command finds all of them in its environment. A server that could not be had is said loudly: its tests skip,
and under ``CI=true`` they fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from tests.support import browser
from tests.support.servers import pgbouncer
from tests.support.servers.kinds import KINDS, Kind
from tests.support.servers.private import NotInstalledError, PrivateServer

APT_GET = ("apt-get", "-o", "DPkg::Lock::Timeout=300", "--quiet", "--quiet", "--yes", "--no-install-recommends")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the search for one server ended: an address and how it was come by, or why there is none."""

    kind: Kind
    url: str | None
    how: str


def find_or_start(kinds: Iterable[Kind], started: ExitStack) -> list[Outcome]:
    """Find each server or start one of our own, which lives until ``started`` is closed."""
    kinds = list(kinds)
    with ThreadPoolExecutor(max_workers=len(kinds)) as threads:
        unreachable = dict(zip(kinds, threads.map(Kind.why_unreachable, kinds), strict=True))
    absent = [kind for kind in kinds if unreachable[kind] is not None and not kind.chosen]
    install(
        [kind.package for kind in absent if not is_installed(kind)]
        + ([] if browser.is_installed() else [*browser.PACKAGES])
        + ([] if pgbouncer.is_installed() else [pgbouncer.PACKAGE])
    )
    with ThreadPoolExecutor(max_workers=len(kinds)) as threads:
        ours = dict(zip(absent, threads.map(start, absent), strict=True))

    outcomes = []
    for kind in kinds:
        server = ours.get(kind)
        if unreachable[kind] is None:
            outcomes.append(Outcome(kind, kind.url, f"as {kind.variable} says" if kind.chosen else "was there"))
        elif isinstance(server, PrivateServer):
            started.callback(server.close)
            outcomes.append(Outcome(kind, server.url, "started for this run"))
        elif kind.chosen:
            outcomes.append(Outcome(kind, None, f"{kind.url}, as {kind.variable} says: {unreachable[kind]}"))
        else:
            outcomes.append(Outcome(kind, None, f"{unreachable[kind]}; none started in its place: {server}"))
    return outcomes


def is_installed(kind: Kind) -> bool:
    """Return whether the server's programs are on this machine."""
    server = kind.private()
    try:
        server.command()
    except NotInstalledError:
        return False
    else:
        return True
    finally:
        server.close()


def install(packages: list[str]) -> None:
    """Install Debian's packages of what is missing, if we may; what stays missing is found out by starting it."""
    wanted = os.environ.get("CELERY_IDEMPOTENT_TEST_INSTALL", "1") != "0"
    if not packages or not wanted or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing {', '.join(packages)} with apt-get ...", file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", *packages]):
        done = subprocess.run(
            [*APT_GET, *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{done.stdout}\napt-get {command[0]} ended with status {done.returncode}", file=sys.stderr)


def start(kind: Kind) -> PrivateServer | str:
    """Start a server of our own; the reason, if that fails."""
    try:
        return kind.private().__enter__()
    except (NotInstalledError, AssertionError, OSError) as error:
        return str(error)


def report(outcomes: list[Outcome]) -> None:
    """Say what the tests will run on, and loudly what they will not."""
    fate = "FAIL" if os.environ.get("CI") == "true" else "be SKIPPED"
    for outcome in outcomes:
        print(f"{outcome.kind.name:<11} {outcome.url or 'MISSING'} ({outcome.how})", file=sys.stderr)
    missing = [outcome for outcome in outcomes if outcome.url is None]
    names = [outcome.kind.name for outcome in missing]
    packages = [outcome.kind.package for outcome in missing]
    if not browser.is_installed():
        names.append("browser")
        packages += browser.PACKAGES
    if not pgbouncer.is_installed():
        names.append("PgBouncer")
        packages.append(pgbouncer.PACKAGE)
    if names:
        print(f"\n{'!' * 100}", file=sys.stderr)
        print(f"! NO {', '.join(names).upper()}: every test that needs it will {fate}.", file=sys.stderr)
        print(f"! Debian and Ubuntu: apt-get install {' '.join(packages)}", file=sys.stderr)
        for outcome in missing:
            print(f"! Elsewhere: name one with {outcome.kind.variable}={outcome.kind.default_url}", file=sys.stderr)
        print(f"{'!' * 100}\n", file=sys.stderr)
    print(
        "On servers that were there, the tests use these databases, under names of their own, which they remove. "
        "All tests take tens of minutes; ARGS=tests/contract runs some.",
        file=sys.stderr,
        flush=True,
    )


def main(command: list[str]) -> int:
    """Run the command with the servers, and answer its exit status."""
    if not command:
        print(__doc__, file=sys.stderr)
        return 2
    with ExitStack() as started:
        print(
            "looking for the servers, and starting or installing those that are not there ...",
            file=sys.stderr,
            flush=True,
        )
        outcomes = find_or_start(KINDS.values(), started)
        report(outcomes)
        found = {outcome.kind.variable: outcome.url for outcome in outcomes if outcome.url is not None}
        child = subprocess.Popen(command, env={**os.environ, **found})
        # Whoever ends us ends the command, as from a terminal, so that it and we still clear away what we started.
        signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGINT))
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                # A terminal has told the command too; our part is to be there until it is done.
                print("ending the tests, and the servers that were started for them ...", file=sys.stderr, flush=True)
                if not sys.stdin.isatty():
                    child.send_signal(signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
