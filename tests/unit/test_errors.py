"""Errors: their tree, their journey through pickle and a result backend, and that their text says what to do."""

from __future__ import annotations

import copy
import pickle

import pytest
from celery import Celery

from celery_idempotent import errors
from celery_idempotent.errors import (
    AlreadyFailedError,
    AlreadyProcessingError,
    ConfigurationError,
    DuplicateMessageError,
    IdempotentError,
    LeaseLostError,
    MessageMismatchError,
    RefusedError,
    SchemaError,
    StoreError,
    StoreUnavailableError,
)

# Of each class: fully given, and with as little as it takes.
EXAMPLES: list[IdempotentError] = [
    IdempotentError("text"),
    ConfigurationError("lease must be positive"),
    DuplicateMessageError("order:1", "0b51-task", "processing"),
    DuplicateMessageError("order:1"),
    MessageMismatchError("order:1", "shop.charge"),
    MessageMismatchError("order:1"),
    MessageMismatchError("order:1", "shop.charge", "amount"),
    AlreadyProcessingError("order:1", 41.5),
    AlreadyProcessingError("order:1"),
    AlreadyFailedError("order:1", "ValueError: no such card"),
    AlreadyFailedError("order:1"),
    LeaseLostError("order:1", 7),
    LeaseLostError("order:1"),
    RefusedError("order:1", "shop.charge", "it runs on celery@w1"),
    RefusedError("order:1"),
    StoreError("no"),
    StoreUnavailableError("connection refused"),
    SchemaError("no table queue_log; run `celery -A proj idempotent init`"),
]

every_example = pytest.mark.parametrize("error", EXAMPLES, ids=[repr(error) for error in EXAMPLES])


def assert_same(rebuilt: BaseException, error: IdempotentError) -> None:
    assert type(rebuilt) is type(error)
    assert rebuilt.args == error.args
    assert vars(rebuilt) == vars(error)
    assert str(rebuilt) == str(error)


@every_example
def test_survives_being_built_again_from_its_args(error: IdempotentError) -> None:
    assert_same(type(error)(*error.args), error)


@every_example
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_survives_pickle(error: IdempotentError, protocol: int) -> None:
    assert_same(pickle.loads(pickle.dumps(error, protocol)), error)


@every_example
def test_survives_copy(error: IdempotentError) -> None:
    assert_same(copy.copy(error), error)
    assert_same(copy.deepcopy(error), error)


@every_example
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_survives_a_result_backend(error: IdempotentError, serializer: str) -> None:
    app = Celery("errors", backend="cache+memory://", set_as_current=False)
    app.conf.result_serializer = serializer
    app.conf.result_accept_content = ["json", "pickle"]
    backend = app.backend
    stored = backend.decode(backend.encode(backend.prepare_exception(error, serializer)))
    assert_same(backend.exception_to_python(stored), error)


def test_every_class_has_an_example() -> None:
    assert {type(error).__name__ for error in EXAMPLES} == set(errors.__all__) - {"EagerStoreWarning"}


def test_every_error_has_its_place_in_the_tree() -> None:
    tree = {name: [base.__name__ for base in getattr(errors, name).__bases__] for name in errors.__all__}
    assert tree == {
        "IdempotentError": ["Exception"],
        "ConfigurationError": ["IdempotentError", "ValueError"],
        "DuplicateMessageError": ["IdempotentError"],
        "MessageMismatchError": ["IdempotentError"],
        "AlreadyProcessingError": ["IdempotentError"],
        "AlreadyFailedError": ["IdempotentError"],
        "LeaseLostError": ["IdempotentError"],
        "RefusedError": ["IdempotentError"],
        "StoreError": ["IdempotentError"],
        "StoreUnavailableError": ["StoreError"],
        "SchemaError": ["StoreError"],
        "EagerStoreWarning": ["UserWarning"],
    }


def test_the_tree_is_drawn_in_the_docstring() -> None:
    assert errors.__doc__ is not None
    for name in errors.__all__:
        assert name in errors.__doc__


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            DuplicateMessageError("order:1", "0b51-task", "processing"),
            ["'order:1'", "already sent", "0b51-task", "processing", "another message_id", "on_duplicate='skip'"],
        ),
        (
            MessageMismatchError("order:1", "shop.charge"),
            ["'order:1'", "shop.charge", "other arguments", "all arguments that matter", "fingerprint=False"],
        ),
        (
            MessageMismatchError("order:1", "shop.charge", "amount, note"),
            ["other arguments (different: amount, note); make"],
        ),
        (AlreadyProcessingError("order:1", 41.52), ["'order:1'", "being processed", "another delivery", "41.5 s"]),
        (
            AlreadyFailedError("order:1", "ValueError: no such card"),
            ["'order:1'", "already failed", "ValueError: no such card", "resubmit_failed=True"],
        ),
        (
            RefusedError("order:1", "shop.charge", "it waits"),
            ["'order:1' of task shop.charge stays as it is: it waits"],
        ),
        (LeaseLostError("order:1", 7), ["'order:1'", "token 7", "lost", "another delivery"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_says_what_happened_and_what_to_do(error: IdempotentError, says: list[str]) -> None:
    text = str(error)
    assert [part for part in says if part not in text] == []


def test_says_nothing_of_what_it_does_not_know() -> None:
    assert "None" not in str(AlreadyProcessingError("order:1"))


def test_schema_error_names_the_command_in_its_docstring() -> None:
    assert "idempotent init" in (SchemaError.__doc__ or "")


def test_errors_have_their_attributes() -> None:
    duplicate = DuplicateMessageError("order:1", "task", "done")
    assert (duplicate.message_id, duplicate.task_id, duplicate.status) == ("order:1", "task", "done")
    mismatch = MessageMismatchError("order:1", "shop.charge")
    assert (mismatch.message_id, mismatch.task_name) == ("order:1", "shop.charge")
    processing = AlreadyProcessingError("order:1", 41.5)
    assert (processing.message_id, processing.retry_after) == ("order:1", 41.5)
    failed = AlreadyFailedError("order:1", "ValueError: no")
    assert (failed.message_id, failed.error) == ("order:1", "ValueError: no")
    lost = LeaseLostError("order:1", 7)
    assert (lost.message_id, lost.token) == ("order:1", 7)


def test_configuration_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="lease"):
        raise ConfigurationError("lease must be positive")


@pytest.mark.parametrize("error", [StoreUnavailableError("down"), SchemaError("behind")])
def test_store_errors_are_caught_as_one(error: StoreError) -> None:
    with pytest.raises(StoreError):
        raise error
