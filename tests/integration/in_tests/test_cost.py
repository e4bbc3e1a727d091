"""What a fresh queue log costs: guarded and plain tests in turn, each 1,000 times."""

from __future__ import annotations

import json

from tests.integration.in_tests.conftest import RunTests

#: How many times the processor time of a plain test a guarded one takes. Milliseconds would depend on what else the machine does.
AT_MOST = 3.0


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
            TIMES[item.callspec.params["kind"]].append(time.process_time() - began)
            return done

        def pytest_terminal_summary():
            print("COSTS", json.dumps({kind: 1000 * sum(times) / len(times) for kind, times in TIMES.items()}))
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
    costs = json.loads(line.removeprefix("COSTS"))
    assert "2000 passed" in printed
    assert costs["guarded"] <= AT_MOST * costs["plain"], costs
