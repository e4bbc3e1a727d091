"""Asking again: how often, for how long, and when not to give up."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_idempotent import SchemaError, StoreUnavailableError
from celery_idempotent.core.store_retry import ask_again, ask_until_answered, ask_until_deadline


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.pauses: list[float] = []
        monkeypatch.setattr("celery_idempotent.core.store_retry.time.monotonic", lambda: self.now)
        monkeypatch.setattr("celery_idempotent.core.store_retry.time.sleep", self.sleep)
        monkeypatch.setattr("kombu.utils.functional.sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Silence:
    """A store that gives no answer so many times.

    Args:
        times: How often.
        unsent: Whether it was not reached: for all times, or time by time.
        answer: What it says then.
    """

    def __init__(self, times: float, *, unsent: bool | list[bool] = True, answer: object = None) -> None:
        self.times = times
        self.unsent = unsent
        self.answer = answer
        self.asked = 0

    def __call__(self) -> object:
        self.asked += 1
        if self.asked > self.times:
            return self.answer
        error = StoreUnavailableError(f"no answer {self.asked}")
        error.unsent = self.unsent if isinstance(self.unsent, bool) else self.unsent[self.asked - 1]
        raise error


def no_table() -> object:
    raise SchemaError("no table")


@pytest.mark.parametrize("answer", [None, 0, False, "row"])
def test_an_answer_is_an_answer(answer: object, clock: Clock) -> None:
    question = Silence(0, answer=answer)
    assert ask_again(question, {}) is answer
    assert ask_until_deadline(question, "claim", "m", lambda: 10.0) is answer
    assert ask_until_answered(question, "write", "m") is answer
    assert question.asked == 3
    assert clock.pauses == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda question: ask_again(question, {"max_retries": 5}),
        lambda question: ask_until_deadline(question, "claim", "m", lambda: 10.0),
        lambda question: ask_until_answered(question, "write", "m"),
    ],
    ids=["again", "until a deadline", "until answered"],
)
def test_other_errors_are_not_repeated(ask: Callable[[Callable[[], object]], object], clock: Clock) -> None:
    with pytest.raises(SchemaError, match="no table"):
        ask(no_table)
    assert clock.pauses == []


class TestAsAProducer:
    def test_the_policy_says_how_often(self, clock: Clock) -> None:
        silence = Silence(100)
        policy = {"max_retries": 3, "interval_start": 0.5, "interval_step": 1.0, "interval_max": 2.0}

        with pytest.raises(StoreUnavailableError, match="no answer 4"):
            ask_again(silence, policy)

        # 0.5 + 1.5 + 2; kombu before 5.6 adds interval_start to interval_max.
        assert sum(clock.pauses) in (4.0, 4.5)

    def test_celerys_default_policy_where_none_is_given(self, clock: Clock) -> None:
        silence = Silence(100)
        with pytest.raises(StoreUnavailableError, match="no answer 4"):
            ask_again(silence, {})
        assert sum(clock.pauses) < 1.0

    def test_it_goes_on_when_the_store_is_back(self, clock: Clock) -> None:
        assert ask_again(Silence(2, answer="row"), {"max_retries": 3}) == "row"

    def test_a_policy_without_end(self, clock: Clock) -> None:
        assert ask_again(Silence(500, answer="row"), {"max_retries": None}) == "row"


class TestAsAConsumer:
    def test_it_gives_up_in_time_what_never_reached_the_store(self, clock: Clock) -> None:
        with pytest.raises(StoreUnavailableError):
            ask_until_deadline(Silence(1000), "claim", "m", lambda: 10.0)
        assert 8.0 <= sum(clock.pauses) <= 10.0

    def test_pauses_grow_to_two_seconds(self, clock: Clock) -> None:
        with pytest.raises(StoreUnavailableError):
            ask_until_deadline(Silence(1000), "claim", "m", lambda: 10.0)
        assert clock.pauses[0] == pytest.approx(0.1)
        assert clock.pauses == sorted(clock.pauses)
        assert max(clock.pauses) == 2.0

    @pytest.mark.parametrize("unsent", [False, [True, True, False, *[True] * 97]], ids=["at once", "later"])
    def test_it_does_not_give_up_what_the_store_may_have_done(
        self, clock: Clock, caplog: pytest.LogCaptureFixture, unsent: bool | list[bool]
    ) -> None:
        silence = Silence(100, unsent=unsent, answer="claimed")

        assert ask_until_deadline(silence, "claim", "m", lambda: 10.0) == "claimed"

        assert sum(clock.pauses) > 60.0
        assert caplog.records[0].message.startswith("cannot claim m, asking again until the store answers: no answer")

    def test_no_patience_asks_once(self, clock: Clock) -> None:
        silence = Silence(10)
        with pytest.raises(StoreUnavailableError):
            ask_until_deadline(silence, "claim", "m", lambda: 0.0)
        assert silence.asked == 1


class TestAtTheEndOfABody:
    def test_it_never_gives_up(self, clock: Clock) -> None:
        silence = Silence(1000, answer=True)
        assert ask_until_answered(silence, "record a success for", "t[m]") is True
        assert silence.asked == 1001
        assert max(clock.pauses) == 2.0

    def test_it_complains_at_once_and_then_now_and_then(self, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
        ask_until_answered(Silence(50, answer=True), "record a success for", "t[m]")

        assert sum(clock.pauses) == pytest.approx(95, abs=10)
        assert [record.levelname for record in caplog.records] == ["ERROR"] * 4, "every thirty seconds"
        assert caplog.records[0].message == (
            "cannot record a success for t[m], asking again until the store answers: no answer 1"
        )
