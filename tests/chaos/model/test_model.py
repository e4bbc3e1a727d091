"""Messages in any order of calls, deliveries, crashes, retries, expiries and duplicates keep the invariants.

``CELERY_IDEMPOTENT_TEST_EXAMPLES=2000`` asks for more examples, and for new ones each time; an example that fails is printed as a
program of its steps.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from celery_idempotent.core.store import Store
from celery_idempotent.stores import open_store
from celery_idempotent.stores.sql import SQLStore
from tests.chaos.model.clock import Clock
from tests.chaos.model.invariants import BrokenInvariantError
from tests.chaos.model.machine import Model
from tests.chaos.model.mutants import DECISIONS, RARE, RARE_DECISIONS, STORES
from tests.chaos.model.world import build_app

ASKED = int(os.environ.get("CELERY_IDEMPOTENT_TEST_EXAMPLES", "0"))


def profile(examples: int, *, steps: int = 40, explain: bool = True) -> settings:
    phases = [Phase.explicit, Phase.generate, *([Phase.shrink] if explain else [])]
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=not ASKED,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=phases,
        print_blob=False,
    )


@contextmanager
def models(store: Store) -> Iterator[type[Model]]:
    """Yield a function that begins a new model on the store; Hypothesis says it wants a class."""
    assert isinstance(store, SQLStore)
    clock, app = Clock(), build_app()
    clock.attach(store._database._here().for_statements)
    store.init()
    yield cast("type[Model]", partial(Model, app, store, clock))
    store.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Silence the log: there are thousands of crashes."""
    logger = logging.getLogger("celery_idempotent")
    logger.disabled = True
    yield
    logger.disabled = False


@pytest.mark.timeout(0 if ASKED else 120)
@pytest.mark.parametrize("store_url", ["sqlite", "postgresql", "mariadb"], indirect=True)
def test_every_message_keeps_the_laws_and_ends(store_url: str) -> None:
    examples = ASKED or (60 if store_url.startswith("sqlite") else 12)
    with models(open_store(store_url)) as begin:
        run_state_machine_as_test(begin, settings=profile(examples))


@pytest.mark.timeout(0 if ASKED else 120)
@pytest.mark.parametrize("faulty", [*STORES, *(RARE if ASKED else ())], ids=lambda faulty: faulty.__name__)
def test_a_fault_of_the_store_is_found(faulty: type[SQLStore]) -> None:
    with models(faulty("sqlite://")) as begin, pytest.raises(BrokenInvariantError):
        run_state_machine_as_test(begin, settings=profile(ASKED or 300, explain=False))


@pytest.mark.timeout(0 if ASKED else 120)
@pytest.mark.parametrize("fault", [*DECISIONS, *(RARE_DECISIONS if ASKED else ())])
def test_a_fault_of_the_decision_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "celery_idempotent.worker.apply_decision.decide_delivery", {**DECISIONS, **RARE_DECISIONS}[fault]
    )
    with models(open_store("sqlite://")) as begin, pytest.raises(BrokenInvariantError):
        run_state_machine_as_test(begin, settings=profile(ASKED or 300, explain=False))
