"""Chaos: ``python -m tests.chaos``, or ``make chaos``.

Sends tasks of every kind while it kills workers, their children and the sender, restarts, kills and pauses the database and the
broker, cuts connections and puts copies on the broker; then it audits what the bodies wrote down. The exit status is 1 when this
library lost or doubled anything. What other packages do is reported and no failure.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from tests.chaos.environment import BROKERS, STORES
from tests.chaos.report import plot, table, write
from tests.chaos.runner import Chaos, run
from tests.chaos.variants import VARIANTS

#: Where the library is tried unless one says otherwise.
PLACES = ("postgresql+redis", "postgresql+rabbitmq", "pgbouncer+redis", "mariadb+redis", "redis+redis")


def main() -> int:
    os.environ["CELERY_IDEMPOTENT_STRICT"] = "1"  # as in the other tests
    # Or its servers and workers would outlive it.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    arguments = _arguments()
    seed = arguments.seed if arguments.seed is not None else random.randrange(1_000_000)
    arguments.output.mkdir(parents=True, exist_ok=True)
    finished: list[Chaos] = []
    violations: list[str] = []
    for variant in arguments.variant:
        for place in arguments.place:
            store, broker = place.split("+")
            print(f"{variant} on {store} and {broker}: seed {seed}", flush=True)
            directory = Path(tempfile.mkdtemp(prefix="chaos-"))
            chaos = run(
                directory,
                seed=seed,
                tasks=arguments.tasks,
                kills=arguments.kills,
                variant=variant,
                store=store,
                broker=broker,
                say=lambda text: print(f"  {text}", flush=True),
            )
            finished.append(chaos)
            found = chaos.audit.violations() + chaos.audit.delays()
            for violation in found:
                print(f"  {violation}")
            if found and variant == "idempotent":
                violations += found
                print(f"  logs and journals: {directory}")
            else:
                shutil.rmtree(directory, ignore_errors=True)
    write(finished, arguments.output / "chaos.json")
    plot(finished, arguments.output / "chaos.png")
    print(f"\n{table(finished)}\n\nseed {seed}; {arguments.output / 'chaos.json'}, {arguments.output / 'chaos.png'}")
    print(f"{len(violations)} violations" if violations else "no violation")
    return 1 if violations else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, help="the same seed makes the same plan; by default any, which is printed")
    parser.add_argument("--tasks", type=int, default=7000, help="messages to send in each run (%(default)s)")
    parser.add_argument("--kills", type=int, default=70, help="processes to kill in each run (%(default)s)")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="what to try; may be given again")
    parser.add_argument(
        "--every-variant", action="store_const", const=list(VARIANTS), dest="variant", help="to compare them all"
    )
    parser.add_argument(
        "--place",
        action="append",
        choices=[f"{store}+{broker}" for store in STORES for broker in BROKERS],
        help=f"store and broker; may be given again (by default {', '.join(PLACES)})",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("chaos"), help="folder for figures and picture (%(default)s)"
    )
    arguments = parser.parse_args()
    arguments.variant = arguments.variant or ["idempotent"]
    arguments.place = arguments.place or list(PLACES)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
