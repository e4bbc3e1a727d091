"""What a fresh queue log costs: guarded and plain tests in turn, each 1,000 times."""

from __future__ import annotations

import json
import statistics

from tests.integration.in_tests.conftest import RunTests

#: Milliseconds of a processor that a guarded test may take more than a plain one: its call, and a queue log that is empty again.
AT_MOST = 1.0

#: What else the machine does makes some rounds dearer and none cheaper, so the cheapest one tells what a test costs.
ROUNDS = 10


def test_a_guarded_test_costs_little_more_than_a_plain_one(run_tests: RunTests) -> None:
    printed = run_tests(
        conftest="""
        import json
        import time
        import pytest

        TIMES = {"plain": [], "guarded": []}

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_protocol(item):
            # Of this process alone: others run beside it.
            began = time.process_time()
            done = yield
            TIMES[item.callspec.params["kind"]].append(1000 * (time.process_time() - began))
            return done

        def pytest_terminal_summary():
            more = [guarded - plain for guarded, plain in zip(TIMES["guarded"], TIMES["plain"], strict=True)]
            print("COSTS", json.dumps(more))
        """,
        test_cost="""
        import pytest
        from shop import app, charge

        @app.task(shared=False)
        def plain(order_id, amount):
            return f"charged {amount}"

        @pytest.mark.parametrize("kind", ["plain", "guarded"])
        @pytest.mark.parametrize("number", range(1000))
        def test_a_call(number, kind):
            task = charge if kind == "guarded" else plain
            assert task.delay("o-1", 500).get() == "charged 500"
        """,
    )
    (line,) = (line for line in printed.splitlines() if line.startswith("COSTS"))
    more = json.loads(line.removeprefix("COSTS"))
    assert "2000 passed" in printed
    length = len(more) // ROUNDS
    medians = [statistics.median(more[first : first + length]) for first in range(0, len(more), length)]
    assert min(medians) <= AT_MOST, medians
