"""Steps as a row keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import EncodeError

from celery_idempotent.message.kept_steps import KeptStep, pack_steps, unpack_steps
from celery_idempotent.message.serialization import UndecodableError

texts = st.text(st.characters(codec="utf-8"))
steps = st.lists(st.builds(KeptStep, texts, texts, st.binary()))


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("steps", set_as_current=False)
    yield app
    app.close()


@given(steps)
def test_steps_come_back_as_they_were(kept: list[KeptStep]) -> None:
    assert unpack_steps(pack_steps(kept)) == kept


@given(steps, st.integers(1, 20))
def test_steps_that_were_cut_are_damaged_or_fewer(kept: list[KeptStep], cut: int) -> None:
    data = pack_steps(kept)[:-cut]
    try:
        found = unpack_steps(data)
    except UndecodableError:
        return
    assert found == kept[: len(found)]
    assert len(found) < len(kept) or not kept


@pytest.mark.parametrize("data", [b"x", b"1 1\nab", b"1 1 1\nab", b"-1 1 1\nabc", b"1 1 0\n\xffk", b"0 0 0\nx"])
def test_damaged_steps_are_told(data: bytes) -> None:
    with pytest.raises(UndecodableError, match="the row's steps are damaged"):
        unpack_steps(data)


def test_no_steps() -> None:
    assert unpack_steps(None) == unpack_steps(b"") == []


@pytest.mark.parametrize(("value", "kept"), [((1, 2), [1, 2]), (None, None), ({1: "ü"}, {"1": "ü"})])
def test_a_result_is_as_its_serializer_has_it(app: Celery, value: Any, kept: Any) -> None:
    assert KeptStep.of(app, "s", "k", value).value(app) == kept


def test_what_the_serializer_cannot_take_is_named(app: Celery) -> None:
    with pytest.raises(EncodeError, match=r"step 'charge' has run, but what it returned \(object\) .*json cannot take"):
        KeptStep.of(app, "charge", "k", object())
