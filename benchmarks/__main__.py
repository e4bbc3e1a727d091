"""The price of safety: ``python -m benchmarks``, or ``make bench``.

Measures plain Celery, this library on each store, and whichever other packages are installed, in rounds in which each has its turn,
and says what each costs beside plain Celery.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
from collections.abc import Callable, Iterable

from benchmarks.measures import MEASURES
from benchmarks.report import table
from benchmarks.site import open_site
from benchmarks.subjects import PEERS, PLAIN, STORES

__all__: list[str] = []


def main() -> int:
    # Or its servers and workers would outlive it.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    arguments = _arguments()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1_000_000)
    order = random.Random(seed)
    subjects = [PLAIN, *(STORES[name] for name in arguments.stores), *(PEERS[name] for name in arguments.peers)]
    print(f"seed {seed}; {', '.join(subject.name for subject in subjects)}", flush=True)
    with open_site(subjects) as site:
        for name in arguments.only:
            measure = MEASURES[name]
            count = arguments.count or measure.count
            with measure.ready(site) as stands:
                rounds = [measure.round(stands, count, order) for _ in range(arguments.rounds)]
            print(f"\n{measure.title}; {len(rounds)} rounds of {count}")
            print("\n".join(table(rounds, list(stands), PLAIN.name)), flush=True)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", type=_of(MEASURES), default=list(MEASURES), help=f"of {','.join(MEASURES)}")
    parser.add_argument("--stores", type=_of(STORES), default=list(STORES), help=f"of {','.join(STORES)}")
    installed = [name for name, subject in PEERS.items() if subject.is_there]
    parser.add_argument("--peers", type=_of(PEERS), default=installed, help=f"of {','.join(PEERS)}; those installed")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--count", type=int, help="messages of each subject in each round")
    parser.add_argument("--seed", type=int, help="of the order of turns; by default any, which is printed")
    return parser.parse_args()


def _of(names: Iterable[str]) -> Callable[[str], list[str]]:
    known = list(names)

    def parse(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
        return given

    return parse


if __name__ == "__main__":
    sys.exit(main())
