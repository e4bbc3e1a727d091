"""The price of safety: ``python -m benchmarks``, or ``make bench``.

Measures plain Celery, this library on each store, and whichever other packages are installed, in rounds in which each has its turn, and
says what each costs beside plain Celery. The exit status is 1 when one of them has not done its work; what it costs is no failure.

``python -m benchmarks profile publish`` (or ``consume``) says where the time goes; ``python -m benchmarks page`` writes a run's tables to the
page in the documentation.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.catalogue import MEASURES
from benchmarks.page import write_page
from benchmarks.profiling import profile
from benchmarks.report import as_markdown, as_text, plot
from benchmarks.run import run
from benchmarks.subjects import PEERS, PLAIN, STORES

__all__: list[str] = []

OUTPUT = Path("bench")


def main() -> int:
    # Or its servers and workers would outlive it.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    match sys.argv[1:2]:
        case ["profile"]:
            return _profile(sys.argv[2:])
        case ["page"]:
            return _page(sys.argv[2:])
        case _:
            return _run(sys.argv[1:])


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    installed = [name for name, subject in PEERS.items() if subject.is_there]
    parser.add_argument("--only", type=_some_of(MEASURES), default=list(MEASURES), help=f"of {','.join(MEASURES)}")
    parser.add_argument("--stores", type=_some_of(STORES), default=list(STORES), help=f"of {','.join(STORES)}")
    parser.add_argument(
        "--peers", type=_some_of(PEERS), default=installed, help=f"of {','.join(PEERS)}; by default those installed"
    )
    parser.add_argument("--rounds", type=_at_least_one, default=5, help="how often each is measured (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds of a tenth: to see that it works")
    parser.add_argument("--seed", type=int, help="of whose turn it is when; by default any, which is printed")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder for tables, figures and picture (%(default)s)"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep what the folder has of other measurements, if the machine is the same"
    )
    arguments = parser.parse_args(words)
    missing = [name for name in arguments.peers if name not in installed]
    if missing:
        parser.error(f"not installed in this environment: {', '.join(missing)}; `make bench` has one in which they are")
    seed = arguments.seed if arguments.seed is not None else random.randrange(1_000_000)
    subjects = [PLAIN, *(STORES[name] for name in arguments.stores), *(PEERS[name] for name in arguments.peers)]
    print(f"seed {seed}; {', '.join(subject.name for subject in subjects)}", flush=True)
    results = run(
        subjects,
        only=arguments.only,
        rounds=2 if arguments.quick else arguments.rounds,
        seed=seed,
        share=0.1 if arguments.quick else 1.0,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "results.json"
    if arguments.keep and file.exists():
        results = _together(json.loads(file.read_text()), results)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (arguments.output / "results.md").write_text(as_markdown(results) + "\n")
    plot(results, arguments.output / "results.png")
    print(f"\n{as_text(results)}\n\n{file}, and beside it results.md and results.png")
    failed = {name: found["failed"] for name, found in results["measures"].items() if "failed" in found}
    for name, why in failed.items():
        print(f"{name} FAILED: {why}")
    return 1 if failed else 0


def _together(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier run has, and this one has not, beside this one's."""
    same = [{**found["machine"], "fdatasync_ms": 0.0} for found in (before, now)]
    # Fewer servers and packages may have been there, but no other ones.
    versions = [machine.pop("versions") for machine in same]
    shared = versions[0].keys() & versions[1].keys()
    if same[0] != same[1] or any(versions[0][name] != versions[1][name] for name in shared):
        sys.exit(
            "--keep: what is there was measured on another machine, or with other versions; choose another --output"
        )
    order = [name for name in MEASURES if name in before["measures"] or name in now["measures"]]
    both = {**before["measures"], **now["measures"]}
    machine = {**now["machine"], "versions": {**versions[0], **versions[1]}}
    return {"machine": machine, "measures": {name: both[name] for name in order}}


def _profile(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks profile", description="Say where the time goes.")
    parser.add_argument("what", choices=["publish", "consume"])
    parser.add_argument("--store", choices=[PLAIN.name, *STORES], default="postgresql", help="%(default)s")
    parser.add_argument("--task", choices=PLAIN.tasks, default="noop", help="%(default)s")
    parser.add_argument("--count", type=_at_least_one, default=5000, help="messages (%(default)s)")
    parser.add_argument("--lines", type=_at_least_one, default=40, help="of each list (%(default)s)")
    arguments = parser.parse_args(words)
    print(profile(arguments.what, arguments.store, task=arguments.task, count=arguments.count, lines=arguments.lines))
    return 0


def _page(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks page", description=(write_page.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("results", type=Path, nargs="?", default=OUTPUT / "results.json", help="%(default)s")
    write_page(json.loads(parser.parse_args(words).results.read_text()))
    return 0


def _some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(names)

    def parse(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return given

    return parse


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than one")
    return number


if __name__ == "__main__":
    sys.exit(main())
