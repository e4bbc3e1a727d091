"""A short run of chaos; `make chaos` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.plan import FAULTS, KILLS
from tests.chaos.report import plot, table, write
from tests.chaos.runner import run
from tests.support.servers import skip_if_not_installed


@pytest.mark.timeout(500)
@pytest.mark.xdist_group("chaos")
@pytest.mark.parametrize("store", ["postgresql", "redis", "django-postgresql"])
def test_a_short_run(tmp_path: Path, store: str) -> None:
    with skip_if_not_installed():
        chaos = run(tmp_path, seed=20, tasks=400, kills=10, store=store, broker="redis")

    assert chaos.audit.violations() == [], f"{table([chaos])}\n{[done for done in chaos.done if done.kind in KILLS]}"
    # It has seen what it is there for.
    assert set(chaos.faults) >= {*FAULTS, "kill a child", "kill a worker"}
    assert chaos.audit.sent >= 400
    assert chaos.audit.again
    if store != "redis":  # which has no transactions to share
        assert chaos.audit.effects > 10
        assert chaos.audit.orders > 10
        assert chaos.plan.rolled_back()
    write([chaos], tmp_path / "chaos.json")
    plot([chaos], tmp_path / "chaos.png")
    assert (tmp_path / "chaos.png").stat().st_size > 10_000
