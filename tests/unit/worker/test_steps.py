"""The steps of a body: what is kept, given back, refused and lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded
from kombu.exceptions import EncodeError

from celery_idempotent import (
    ConfigurationError,
    IdempotentError,
    IdempotentTask,
    LeaseLostError,
    QueueLog,
    StoreUnavailableError,
)
from celery_idempotent.core.records import Claim, MessageKey, ProcessedStatus, Row, Status
from celery_idempotent.errors import StoreError
from celery_idempotent.maintenance.requeue import Requeued, requeue
from celery_idempotent.message.kept_steps import unpack_steps
from celery_idempotent.worker.lease_renewal import LeaseRenewer
from celery_idempotent.worker.run import Run
from celery_idempotent.worker.time_limits import TimeLimits
from tests.support.apps import close_app

NAME = "shop.charge"


class Provider:
    """A payment provider, which notes what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def charge(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.asked.append((*args, *kwargs.values()))
        return {"charge": len(self.asked)}


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Celery]:
    app = Celery("steps", set_as_current=False, broker="memory://", backend="cache+memory://")
    app.conf.idempotent_store = f"sqlite:///{tmp_path / 'store.db'}"
    yield app
    close_app(app)


@pytest.fixture
def provider() -> Provider:
    return Provider()


def task(app: Celery, body: Any, **options: Any) -> Any:
    body.__name__ = "body"  # Celery cannot compile a lambda's
    options = {"base": IdempotentTask, "bind": True, "name": NAME, "shared": False, **options}
    app.task(**options)(body)
    return app.tasks[options["name"]]


def row(app: Celery, message_id: str = "m", task_name: str = NAME) -> Row:
    found = QueueLog.of(app).store.find(MessageKey(message_id, task_name))
    assert found is not None
    return found


class Died(BaseException):
    """A worker that dies, for an eager run: it writes nothing."""


def die(app: Celery, message_id: str = "m") -> None:
    """Leave a message as its worker's death does."""
    held = row(app, message_id)
    LeaseRenewer.of(app.queue_log).let_go(Claim(held.key, held.token))
    assert app.queue_log.store.expire(Claim(held.key, held.token))


def run(task: Any, *args: Any, task_id: str = "id-1", **options: Any) -> Any:
    """Deliver a message, or a copy of it, under its Celery id."""
    headers = {"idempotent": {"message_id": "m", "task": task.name, "task_id": task_id, **options.pop("header", {})}}
    return task.apply(args, task_id=task_id, headers=headers, **options)


# -- what is kept ----------------------------------------------------------------------------------------------------------


def test_a_step_returns_what_its_function_returns(app: Celery, provider: Provider) -> None:
    charge = task(app, lambda self: self.step("charge", provider.charge, "o-1", amount=5))
    assert charge.apply(message_id="m").get() == {"charge": 1}
    assert provider.asked == [("o-1", 5)]


def test_a_step_may_have_an_argument_called_name(app: Celery) -> None:
    charge = task(app, lambda self: self.step("charge", dict, name="n", function="f"))
    assert charge.apply(message_id="m").get() == {"name": "n", "function": "f"}


@pytest.mark.parametrize("value", [None, 0, False, "", [], {}], ids=repr)
def test_a_rerun_gets_what_the_first_run_got(app: Celery, value: Any) -> None:
    """By status and not by truth: nothing is a result, too."""
    seen: list[Any] = []
    calls: list[int] = []

    def function() -> Any:
        calls.append(1)
        return value

    def body(self: IdempotentTask) -> None:
        seen.append(self.step("charge", function))
        if len(seen) == 1:
            raise Died

    charge = task(app, body, acks_late=True)
    with pytest.raises(Died):
        run(charge)
    die(app)
    run(charge).get()
    assert (seen, calls) == ([value, value], [1])
    assert row(app).token == 2


def test_the_first_run_sees_what_a_rerun_will_see(app: Celery) -> None:
    """A tuple comes back as a list, and an int as a key as text, in both."""
    seen: list[Any] = []

    def body(self: IdempotentTask) -> None:
        seen.append(self.step("charge", lambda: {1: (2, 3)}))
        if not self.request.retries:
            raise self.retry(countdown=0)

    run(task(app, body)).get()
    assert seen == [{"1": [2, 3]}] * 2


def test_a_step_that_raises_is_not_kept(app: Celery, provider: Provider) -> None:
    def fails() -> None:
        provider.charge("asked")
        raise OSError("no answer")

    def body(self: IdempotentTask) -> Any:
        for _ in range(3):  # the body may try again by itself
            with pytest.raises(OSError, match="no answer"):
                self.step("charge", fails)
        if not self.request.retries:
            raise self.retry(countdown=0)
        return self.step("charge", provider.charge)

    assert run(task(app, body)).get() == {"charge": 7}


def test_a_retry_keeps_steps(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> Any:
        charged = self.step("charge", provider.charge, "o-1")
        if self.request.retries < 3:
            raise self.retry(countdown=0)
        return charged

    assert run(task(app, body)).get() == {"charge": 1}
    assert provider.asked == [("o-1",)]


def test_steps_go_on_where_they_were(app: Celery, provider: Provider) -> None:
    """Five steps, in a body that dies after each."""
    deaths = iter(range(5))

    def body(self: IdempotentTask) -> list[Any]:
        results = []
        for number in range(5):
            asked = len(provider.asked)
            results.append(self.step(f"line {number}", provider.charge, number))
            if len(provider.asked) > asked and next(deaths, None) is not None:
                raise Died
        return results

    lines = task(app, body, acks_late=True)
    for _ in range(5):
        with pytest.raises(Died):
            run(lines)
        die(app)
    assert run(lines).get() == [{"charge": number} for number in range(1, 6)]
    assert provider.asked == [(number,) for number in range(5)]


def test_another_step_inside_of_a_step(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> Any:
        def outer() -> Any:
            inner = self.step("inner", provider.charge)
            if not self.request.retries:
                raise self.retry(countdown=0)
            return [inner]

        return self.step("outer", outer)

    assert run(task(app, body)).get() == [{"charge": 1}]


def test_success_empties_the_row_and_failure_keeps_the_steps(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask, wrong: bool) -> None:
        self.step("charge", provider.charge)
        if wrong:
            raise ValueError("wrong")

    charge = task(app, body)
    charge.apply((True,), message_id="m")
    charge.apply((False,), message_id="n")
    assert (row(app).processed_status, row(app).steps is not None) == (ProcessedStatus.FAILURE, True)
    assert (row(app, "n").processed_status, row(app, "n").steps) == (ProcessedStatus.SUCCESS, None)


def test_a_requeued_message_has_its_steps(app: Celery, provider: Provider) -> None:
    keys: list[str] = []

    def body(self: IdempotentTask) -> Any:
        keys.append(self.step_key("charge"))
        charged = self.step("charge", provider.charge)
        if len(keys) == 1:
            raise ValueError("wrong")
        return charged

    charge = task(app, body)
    charge.apply_async(message_id="m", task_id="id-1")
    run(charge)
    assert row(app).status is Status.DONE
    assert isinstance(requeue(app.queue_log, row(app)), Requeued)
    assert run(charge).get() == {"charge": 1}
    assert keys[0] == keys[1]


def test_a_resubmitted_message_begins_anew(app: Celery, provider: Provider) -> None:
    keys: list[str] = []

    def body(self: IdempotentTask) -> Any:
        keys.append(self.step_key("charge"))
        charged = self.step("charge", provider.charge)
        if len(keys) == 1:
            raise ValueError("wrong")
        return charged

    charge = task(app, body, resubmit_failed=True)
    for task_id in ("id-1", "id-2"):
        assert not charge.apply_async(message_id="m", task_id=task_id).duplicate
        result = run(charge, task_id=task_id)
    assert result.get() == {"charge": 2}
    assert keys[0] != keys[1]


def test_a_task_that_replaces_itself_begins_anew(app: Celery, provider: Provider) -> None:
    """A page and the next are two bodies, and so take two steps."""
    keys: list[str] = []

    def body(self: IdempotentTask, page: int) -> Any:
        keys.append(self.step_key("fetch"))
        fetched = self.step("fetch", provider.charge, page)
        if page < 3:
            return self.replace(self.s(page + 1))
        return fetched

    pages = task(app, body)
    assert pages.apply((1,), message_id="m", task_id="id-1").get() == {"charge": 3}
    assert provider.asked == [(1,), (2,), (3,)]
    assert len(set(keys)) == 3


# -- keys ------------------------------------------------------------------------------------------------------------------


def test_a_key_is_the_same_in_every_run_of_a_message(app: Celery) -> None:
    keys: list[str] = []

    def body(self: IdempotentTask) -> None:
        keys.append(self.step_key("charge"))
        self.step("charge", keys.append, self.step_key("charge"))
        if len(keys) == 2:
            raise Died
        if not self.request.retries:
            raise self.retry(countdown=0)

    charge = task(app, body, acks_late=True)
    with pytest.raises(Died):
        run(charge)
    die(app)
    run(charge, task_id="id-2", header={"first": "id-1"}).get()
    assert len(keys) == 4
    assert len(set(keys)) == 1
    assert str(UUID(keys[0])) == keys[0]


def test_a_copy_that_takes_over_has_the_first_ones_key(app: Celery) -> None:
    """Its header does not say whose copy it is: a program without this library has sent the id twice."""
    keys: list[str] = []

    def body(self: IdempotentTask) -> None:
        keys.append(self.step_key("charge"))
        if len(keys) == 1:
            raise Died

    charge = task(app, body, acks_late=True)
    with pytest.raises(Died):
        run(charge)
    die(app)
    run(charge, task_id="id-2")
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_keys_differ_by_message_task_and_name(app: Celery) -> None:
    def body(self: IdempotentTask) -> list[str]:
        return [self.step_key("charge"), self.step_key("mail")]

    one, other = task(app, body), task(app, body, name="shop.refund")
    keys = [key for each, m in ((one, "m"), (one, "n"), (other, "m")) for key in each.apply(message_id=m).get()]
    assert len(set(keys)) == 6


def test_an_id_that_is_free_again_has_another_key(app: Celery) -> None:
    charge = task(app, lambda self: self.step_key("charge"), unique_for=0.001)
    first = charge.apply(message_id="m").get()
    while not row(app).expired:
        pass
    assert charge.apply(message_id="m").get() != first


# -- a claim that is gone --------------------------------------------------------------------------------------------------


def take_over(app: Celery, message_id: str = "m") -> None:
    """Take a message over, as another worker."""
    store, held = app.queue_log.store, row(app, message_id)
    assert store.expire(Claim(held.key, held.token))
    assert store.take_over(row(app, message_id), task_id="id-2", worker="other:1", lease=60.0, attempt=0) is not None


def test_a_run_that_lost_its_claim_keeps_no_step(app: Celery, provider: Provider) -> None:
    errors: list[Exception] = []

    def charge(*_: Any) -> Any:
        take_over(app)
        return provider.charge()

    def body(self: IdempotentTask) -> str:
        self.step("first", provider.charge)
        for name in ("second", "third"):  # it does not let the error pass
            try:
                self.step(name, charge)
            except Exception as error:  # noqa: BLE001 - what is tested
                errors.append(error)
        return "ran on"

    result = run(task(app, body))
    assert [type(error) for error in errors] == [LeaseLostError] * 2
    assert len(provider.asked) == 2
    assert result.result is None or "ran on" not in str(result.result)
    held = row(app)
    assert (held.status, held.worker, held.token) == (Status.PROCESSING, "other:1", 2)
    assert b"second" not in (held.steps or b"")


def test_a_run_that_lost_its_claim_calls_no_other_function(app: Celery, provider: Provider) -> None:
    """The renewal has found out before the step."""

    def body(self: IdempotentTask) -> None:
        take_over(app)
        LeaseRenewer.of(app.queue_log).let_go(Claim(row(app).key, 1))
        self.step("charge", provider.charge)

    run(task(app, body))
    assert provider.asked == []


def test_a_rerun_that_was_overtaken_before_its_first_step_stops(app: Celery, provider: Provider) -> None:
    runs: list[int] = []

    def body(self: IdempotentTask) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise Died
        take_over(app)
        self.step("charge", provider.charge)

    charge = task(app, body, acks_late=True)
    with pytest.raises(Died):
        run(charge)
    die(app)
    run(charge)
    assert (len(runs), provider.asked, row(app).token) == (2, [], 3)


def test_autoretry_does_not_retry_a_lost_claim(app: Celery, provider: Provider) -> None:
    def charge() -> None:
        take_over(app)

    def body(self: IdempotentTask) -> None:
        self.step("charge", charge)

    run(task(app, body, autoretry_for=(Exception,), retry_backoff=False))
    assert (row(app).worker, row(app).status) == ("other:1", Status.PROCESSING)


def test_a_lease_that_ran_out_unnoticed_is_renewed(app: Celery, provider: Provider) -> None:
    """Nobody took over: the body goes on."""

    def body(self: IdempotentTask) -> Any:
        held = row(app)
        LeaseRenewer.of(app.queue_log).let_go(Claim(held.key, held.token))
        assert app.queue_log.store.expire(Claim(held.key, held.token))
        charged = self.step("charge", provider.charge)
        assert row(app).lease_left > 50
        return charged

    assert run(task(app, body)).get() == {"charge": 1}


# -- misuse ----------------------------------------------------------------------------------------------------------------


def refusal(app: Celery, body: Any, **options: Any) -> BaseException:
    result = task(app, body, **options).apply(message_id="m")
    assert isinstance(result.result, BaseException)
    return result.result


def test_a_name_is_used_once_in_a_run(app: Celery, provider: Provider) -> None:
    error = refusal(app, lambda self: [self.step("charge", provider.charge) for _ in range(2)])
    assert type(error) is IdempotentError
    assert "'charge' was taken before in this run: give each step of a body a name of its own" in str(error)
    assert len(provider.asked) == 1


@pytest.mark.parametrize("name", ["", None, 7, b"charge"], ids=repr)
def test_a_name_is_a_text(app: Celery, provider: Provider, name: Any) -> None:
    for body in (lambda self: self.step(name, provider.charge), lambda self: self.step_key(name)):
        assert isinstance(refusal(app, body, name=f"shop.{uuid4()}"), ConfigurationError)
    assert provider.asked == []


def test_a_coroutine_function_is_refused(app: Celery) -> None:
    async def charge() -> None: ...

    assert "asyncio.run()" in str(refusal(app, lambda self: self.step("charge", charge)))


def test_what_cannot_be_kept_is_an_error_of_the_step(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> None:
        self.step("before", provider.charge)
        self.step("charge", object)

    error = refusal(app, body)
    assert isinstance(error, EncodeError)
    assert "step 'charge' has run, but what it returned (object) cannot be kept" in str(error)
    steps = row(app).steps
    assert steps is not None
    assert b"before" in steps
    assert b"charge" not in steps.partition(b"before")[2].replace(b'"charge"', b"")


def test_a_step_in_another_thread_is_refused(app: Celery, provider: Provider) -> None:
    errors: list[Exception] = []

    def body(self: IdempotentTask) -> None:
        def elsewhere() -> None:
            for misuse in (lambda: self.step("charge", provider.charge), lambda: self.step_key("charge")):
                try:
                    misuse()
                except IdempotentError as error:
                    errors.append(error)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()

    task(app, body).apply(message_id="m").get()
    assert len(errors) == 2
    assert all("in the thread that runs its body" in str(error) for error in errors)
    assert provider.asked == []


def test_a_step_after_the_message_was_handed_on_is_refused(app: Celery, provider: Provider) -> None:
    errors: list[Exception] = []

    class Handling(IdempotentTask):
        abstract = True

        def on_success(self, *_: Any) -> None:
            try:
                self.step("late", provider.charge)
            except IdempotentError as error:
                errors.append(error)

    task(app, lambda self: self.step("charge", provider.charge), base=Handling).apply(message_id="m").get()
    assert "comes too late" in str(errors[0])
    assert len(provider.asked) == 1


def test_a_direct_call_calls_and_keeps_nothing(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> tuple[Any, str, str]:
        return self.step("charge", lambda: (1, provider.charge())), self.step_key("charge"), self.step_key("charge")

    charge = task(app, body)
    (first, key, same), (second, other, _) = charge(), charge()
    assert (first, second) == ([1, {"charge": 1}], [1, {"charge": 2}])
    assert key == same != other
    assert list(app.queue_log.store.counts()) == []
    with pytest.raises(IdempotentError, match="taken before"):
        task(app, lambda self: [self.step("a", int), self.step("a", int)], name="shop.twice")()


@pytest.mark.parametrize("how", ["task", "app"])
def test_with_the_guard_off_nothing_is_kept(app: Celery, provider: Provider, how: str) -> None:
    app.conf.idempotent_enabled = how == "task"

    def body(self: IdempotentTask) -> Any:
        charged = self.step("charge", provider.charge)
        keys.append(self.step_key("charge"))
        if not self.request.retries:
            raise self.retry(countdown=0)
        return charged

    keys: list[str] = []
    charge = task(app, body, idempotent=how == "app")
    assert charge.apply(task_id="id-1").get() == {"charge": 2}
    assert len(set(keys)) == 1


# -- the store -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the verbs that the store is asked, by name."""
    store, verbs = QueueLog.of(app).store, []

    def noting(name: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            verbs.append(name)
            return verb(*args, **kwargs)

        return ask

    for name in ("claim", "find", "take_over", "keep_steps", "checkpoint", "complete", "fail", "retry", "renew"):
        monkeypatch.setattr(store, name, noting(name, getattr(store, name)))
    return verbs


def test_a_first_run_writes_each_step_and_reads_nothing(app: Celery, provider: Provider, asked: list[str]) -> None:
    def body(self: IdempotentTask) -> None:
        self.step("a", provider.charge, self.step_key("a"))
        self.step("b", provider.charge, self.step_key("b"))

    charge = task(app, body)
    charge.apply_async(message_id="m", task_id="id-1")
    asked.clear()
    run(charge).get()
    assert asked == ["claim", "keep_steps", "keep_steps", "complete"]


def test_a_later_run_reads_once(app: Celery, provider: Provider, asked: list[str]) -> None:
    def body(self: IdempotentTask) -> None:
        self.step("a", provider.charge)
        self.step("b", provider.charge)
        if not self.request.retries:
            raise self.retry(countdown=0)

    charge = task(app, body)
    charge.apply_async(message_id="m", task_id="id-1")
    asked.clear()
    run(charge).get()
    assert asked == ["claim", "keep_steps", "keep_steps", "retry", "claim", "find", "complete"]


def test_a_later_run_without_steps_reads_nothing(app: Celery, asked: list[str]) -> None:
    def body(self: IdempotentTask) -> None:
        if not self.request.retries:
            raise self.retry(countdown=0)

    charge = task(app, body)
    charge.apply_async(message_id="m", task_id="id-1")
    asked.clear()
    run(charge).get()
    assert asked == ["claim", "retry", "claim", "complete"]


class Failing:
    """A verb of the store that does not answer for a while."""

    def __init__(self, verb: Callable[..., Any], errors: list[Exception]) -> None:
        self._verb = verb
        self.errors = errors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.errors:
            raise self.errors.pop()
        return self._verb(*args, **kwargs)


def silence(app: Celery, monkeypatch: pytest.MonkeyPatch, verb: str, *errors: Exception) -> Failing:
    store = QueueLog.of(app).store
    failing = Failing(getattr(store, verb), list(errors))
    monkeypatch.setattr(store, verb, failing)
    return failing


def test_an_eager_step_raises_what_the_store_raises(
    app: Celery, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence(app, monkeypatch, "keep_steps", StoreUnavailableError("away"))
    error = refusal(app, lambda self: self.step("charge", provider.charge))
    assert isinstance(error, StoreUnavailableError)


def test_with_on_store_error_run_the_body_goes_on(
    app: Celery, provider: Provider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the next step keeps both."""
    app.conf.idempotent_on_store_error = "run"
    silence(app, monkeypatch, "keep_steps", StoreUnavailableError("away"))

    def body(self: IdempotentTask) -> Any:
        self.step("a", provider.charge)
        self.step("b", provider.charge)
        raise ValueError("wrong")

    task(app, body).apply(message_id="m")
    steps = row(app).steps
    assert steps is not None
    assert steps.count(b"charge") == 2
    assert "could not keep a step of" in caplog.text


def test_a_step_that_the_store_refuses_is_left_out(
    app: Celery, provider: Provider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has had its effect, so the body goes on; and so do the others, which are kept."""
    refused = silence(app, monkeypatch, "keep_steps")

    def large() -> str:
        refused.errors.append(StoreError("too large"))
        return "x" * 1000

    def body(self: IdempotentTask) -> Any:
        self.step("a", provider.charge)
        found = self.step("large", large)
        self.step("b", provider.charge)
        raise ValueError(found)

    with caplog.at_level(logging.ERROR):
        task(app, body).apply(message_id="m")
    steps = row(app).steps
    assert steps is not None
    assert (steps.count(b"charge"), b"xxx" in steps) == (2, False)
    assert "step 'large' is not kept" in caplog.text


def test_a_step_after_which_the_soft_limit_strikes_is_kept(
    app: Celery, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body may catch the limit and go on: the next step keeps both, and the same one once more is given back."""

    def put_off(_: TimeLimits, do: Callable[[], Any]) -> Any:
        do()
        raise SoftTimeLimitExceeded

    def body(self: IdempotentTask) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(TimeLimits, "put_off", put_off)
            with pytest.raises(SoftTimeLimitExceeded):
                self.step("a", provider.charge)
        assert self.step("a", provider.charge) == {"charge": 1}
        self.step("b", provider.charge)
        raise ValueError("wrong")

    task(app, body).apply(message_id="m")
    assert [step.name for step in unpack_steps(row(app).steps)] == ["a", "b"]
    assert len(provider.asked) == 2


def test_a_row_that_the_store_forgot_is_recorded_again_with_all_steps(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> Any:
        self.step("a", provider.charge)
        app.queue_log.store.erase()
        self.step("b", provider.charge)
        raise ValueError("wrong")

    task(app, body).apply(message_id="m")
    steps = row(app).steps
    assert steps is not None
    assert steps.count(b"charge") == 2


def test_damaged_steps_are_an_error_and_not_taken_again(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> Any:
        held = row(app)
        assert app.queue_log.store.keep_steps(Claim(held.key, held.token), steps=b"damaged")
        if not self.request.retries:
            raise self.retry(countdown=0)
        return self.step("charge", provider.charge)

    result = run(task(app, body))
    assert "damaged" in str(result.result)
    assert provider.asked == []


def test_a_content_type_that_is_not_accepted_is_an_error(app: Celery, provider: Provider) -> None:
    def body(self: IdempotentTask) -> Any:
        charged = self.step("charge", provider.charge)
        if not self.request.retries:
            app.conf.result_accept_content = ["yaml"]
            raise self.retry(countdown=0)
        return charged

    result = run(task(app, body))
    assert "cannot be read" in str(result.result)
    assert len(provider.asked) == 1


def test_a_worker_waits_for_the_store(app: Celery, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and writing, and what was called is called once. An eager run does not wait, so let this one be none."""
    monkeypatch.setattr(Run, "waits", True)
    store = QueueLog.of(app).store

    def body(self: IdempotentTask) -> Any:
        away = [StoreUnavailableError("away")] * 2
        for verb in ("find", "keep_steps"):
            failing[verb] = Failing(getattr(store, verb), list(away))
            monkeypatch.setattr(store, verb, failing[verb])
        self.step("a", provider.charge)
        self.step("b", provider.charge)
        if not self.request.retries:
            raise self.retry(countdown=0)

    failing: dict[str, Failing] = {}
    run(task(app, body)).get()
    assert failing["find"].errors == []
    assert len(provider.asked) == 2


# -- atomic bodies -----------------------------------------------------------------------------------------------------------


def test_in_an_atomic_body_nothing_is_written_for_a_step(app: Celery, provider: Provider, asked: list[str]) -> None:
    def body(self: IdempotentTask) -> Any:
        return self.step("charge", provider.charge, self.step_key("charge"))

    charge = task(app, body, atomic=True)
    assert charge.apply(message_id="m").get() == {"charge": 1}
    assert "keep_steps" not in asked


def test_a_step_of_an_atomic_body_calls_nothing_after_its_claim_is_lost(app: Celery, provider: Provider) -> None:
    """As far as its renewal knows: while its transaction is open, it does not ask."""

    def body(self: IdempotentTask) -> None:
        LeaseRenewer.of(app.queue_log).let_go(Claim(row(app).key, 1))
        self.step("charge", provider.charge)

    task(app, body, atomic=True).apply(message_id="m")
    assert provider.asked == []
    assert row(app).status is Status.PROCESSING


def test_a_step_of_an_atomic_body_is_undone_with_its_transaction(app: Celery, provider: Provider) -> None:
    import sqlalchemy as sa

    keys: list[str] = []

    def write(self: Any) -> int:
        self.connection.execute(sa.text("CREATE TABLE IF NOT EXISTS paid (n INTEGER)"))
        self.connection.execute(sa.text("INSERT INTO paid VALUES (1)"))
        keys.append(self.step_key("charge"))
        return len(keys)

    def body(self: IdempotentTask) -> Any:
        number = self.step("charge", write, self)
        if not self.request.retries:
            raise self.retry(countdown=0)
        return number

    charge = task(app, body, atomic=True)
    assert run(charge).get() == 2
    assert len(keys) == 2
    assert len(set(keys)) == 1
    with app.queue_log.store.engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM paid")).scalar_one() == 1
