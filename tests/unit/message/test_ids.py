"""Message ids: from a task's option and a call's arguments to the id, and which options and ids are refused."""

from __future__ import annotations

import copy
import enum
import functools
import operator
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn
from uuid import UUID

import pytest
from celery import Celery
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.serialization import dumps, loads

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import CallSignature, arguments_fingerprint
from celery_idempotent.message.canonical import fingerprint
from celery_idempotent.message.check_id import MAX_BYTES, check_message_id
from celery_idempotent.message.ids import ByArguments, MessageIdSource, by_arguments, message_id_source

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def source(option: object, run: Callable[..., Any], bound: bool = False) -> MessageIdSource:
    made = message_id_source(option, run, bound)
    assert made is not None
    return made


def refusal(option: object, run: Callable[..., Any], bound: bool = False) -> str:
    with pytest.raises(ConfigurationError) as caught:
        message_id_source(option, run, bound)
    return str(caught.value)


def charge(order_id: Any, amount: Any = 0, *, currency: Any = "EUR") -> NoReturn:
    raise AssertionError("no id is made by running the body")


def positional(order_id: Any, /, amount: Any = 0, **more: Any) -> None: ...


def keywords(order_id: Any, *lines: Any, **more: Any) -> None: ...


def bound_task(self: Any, order_id: Any, amount: Any = 0) -> None: ...


@dataclass
class Order:
    id: Any
    lines: Any = ()


class Opaque:
    pass


# -- calls that are one ------------------------------------------------------------------------------------------------

ONE_CALL = [
    pytest.param(
        charge, [call("o-1"), call(order_id="o-1"), call("o-1", 0), call("o-1", 0, currency="EUR")], id="plain"
    ),
    pytest.param(charge, [call("o-1", 5), call("o-1", amount=5), call(amount=5, order_id="o-1")], id="by name"),
    pytest.param(charge, [call([1, (2, 3)]), call((1, [2, 3]))], id="list and tuple"),
    pytest.param(positional, [call("o-1"), call("o-1", 0), call("o-1", amount=0)], id="positional only"),
    pytest.param(positional, [call("o-1", x=1, y=2), call("o-1", 0, y=2, x=1)], id="order of keywords"),
    pytest.param(keywords, [call("o-1"), call(order_id="o-1")], id="variable"),
]


@pytest.mark.parametrize(("run", "calls"), ONE_CALL)
def test_equal_calls_have_one_id_and_one_fingerprint(run: Callable[..., Any], calls: list[Call]) -> None:
    ids = {source(by_arguments(), run)(*each) for each in calls}
    assert len(ids) == 1
    assert len({arguments_fingerprint(CallSignature(run), *each) for each in calls}) == 1


@pytest.mark.parametrize(
    "calls",
    [
        [call(1), call("1"), call(True), call(1.0), call(None), call(Decimal(1))],
        [call("o-1"), call("o-1", 5), call("o-1", "0"), call("o-1", False), call("o-1", None)],
        [call("o-1"), call("o-1", currency="USD"), call("o-1", currency=None)],
        [call("a", "b"), call("b", "a"), call("ab")],
    ],
)
def test_other_calls_have_other_ids(calls: list[Call]) -> None:
    make = source(by_arguments(), charge)
    assert len({make(*each) for each in calls}) == len(calls)
    assert len({arguments_fingerprint(CallSignature(charge), *each) for each in calls}) == len(calls)


def test_variable_arguments_do_not_run_into_each_other() -> None:
    calls = [
        call("a"),
        call("a", "b"),
        call("a", "b", "c"),
        call("a", ["b", "c"]),
        call("a", b="b"),
        call("a", lines="b"),
    ]
    make = source(by_arguments(), keywords)
    assert len({make(*each) for each in calls}) == len(calls)


def test_a_positional_only_parameter_is_not_the_keyword_of_its_name() -> None:
    make = source(by_arguments(), positional)
    assert make(*call("o-1", order_id="o-2")) != make(*call("o-2", order_id="o-1"))
    assert source("{order_id}", positional)(*call("o-1", order_id="o-2")) == "o-1"


def test_apply_async_gives_none_for_no_arguments() -> None:
    def run(a: int = 1) -> None: ...

    signature = CallSignature(run)
    assert arguments_fingerprint(signature, None, None) == arguments_fingerprint(signature, (), {})
    assert source("{a}", run)(None, None) == "1"


@settings(deadline=None)
@given(st.data())
def test_however_the_arguments_are_passed_it_is_one_call(data: st.DataObject) -> None:
    arguments = {"order_id": data.draw(st.text()), "amount": data.draw(st.integers()), "currency": "EUR"}
    by_position = data.draw(st.integers(0, 2))
    args = tuple(list(arguments.values())[:by_position])
    rest = data.draw(st.permutations(list(arguments.items())[by_position:]))
    expected = arguments_fingerprint(CallSignature(charge), (), arguments)
    assert arguments_fingerprint(CallSignature(charge), args, dict(rest)) == expected


# -- over time ---------------------------------------------------------------------------------------------------------


def test_a_parameter_added_with_a_default_changes_no_id() -> None:
    def later(
        order_id: str, amount: int = 0, *lines: str, currency: str = "EUR", note: str = "", **more: Any
    ) -> None: ...

    for each in (call("o-1"), call("o-1", 5), call("o-1", currency="USD")):
        assert source(by_arguments(), later)(*each) == source(by_arguments(), charge)(*each)
    assert source(by_arguments(), later)(*call("o-1", note="x")) != source(by_arguments(), charge)(*call("o-1"))


def test_a_sentinel_for_a_default_is_no_obstacle() -> None:
    missing = object()

    def run(order_id: str, amount: Any = missing) -> None: ...

    make = source(by_arguments(), run)
    assert make(*call("o-1")) == make(*call(order_id="o-1"))
    assert make(*call("o-1", None)) != make(*call("o-1"))


def test_a_default_is_equal_by_type_too() -> None:
    def run(flag: Any = True) -> None: ...

    make = source(by_arguments(), run)
    assert make(*call()) == make(*call(True))
    assert make(*call(1)) != make(*call(True))


# -- the signature -----------------------------------------------------------------------------------------------------


def test_bind_applies_defaults() -> None:
    assert CallSignature(charge).bind(("o-1",), {}) == {"order_id": "o-1", "amount": 0, "currency": "EUR"}
    assert CallSignature(keywords).bind(("o-1", 1, 2), {"x": 3}) == {
        "order_id": "o-1",
        "lines": (1, 2),
        "more": {"x": 3},
    }
    assert CallSignature(keywords).bind(("o-1",), None) == {"order_id": "o-1", "lines": (), "more": {}}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (call(), "charge(): missing a required argument: 'order_id'"),
        (call("o-1", 5, 6), "charge(): too many positional arguments"),
        (call("o-1", order_id="o-2"), "charge(): multiple values for argument 'order_id'"),
        (call("o-1", ammount=5), "charge(): got an unexpected keyword argument 'ammount'"),
    ],
)
@pytest.mark.parametrize(
    "option",
    ["{order_id}", by_arguments(), by_arguments("order_id"), lambda *args, **kwargs: "id"],
    ids=["format", "by_arguments()", "by_arguments('order_id')", "callable"],
)
def test_arguments_that_do_not_fit_are_a_type_error(option: object, wrong: Call, says: str) -> None:
    with pytest.raises(TypeError):
        charge(*wrong[0], **wrong[1])
    with pytest.raises(TypeError) as caught:
        source(option, charge)(*wrong)
    assert str(caught.value) == says
    with pytest.raises(TypeError):
        arguments_fingerprint(CallSignature(charge), *wrong)


def logged(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return wrapper


def test_decorators_are_seen_through() -> None:
    expected = source(by_arguments(), charge)(*call("o-1"))
    assert source(by_arguments(), logged(logged(charge)))(*call(order_id="o-1", amount=0)) == expected
    assert source("order:{order_id}", logged(charge))(*call("o-1")) == "order:o-1"


def test_a_signature_changing_decorator_raises_with_advice() -> None:
    @functools.wraps(charge)
    def with_session(order_id: str) -> None: ...

    @functools.wraps(positional)
    def wrapper(*args: Any) -> None: ...

    with pytest.raises(TypeError) as caught:
        CallSignature(wrapper).bind((), {})
    assert ["__signature__" in note for note in caught.value.__notes__] == [True]
    # The decorator would refuse this one too: no note.
    with pytest.raises(TypeError) as caught:
        CallSignature(with_session).bind((), {})
    assert not hasattr(caught.value, "__notes__")


class Callable_:  # noqa: N801
    def __call__(self, order_id: str, amount: int = 0) -> None: ...


class Method:
    def run(self, order_id: str, amount: int = 0) -> None: ...

    @logged
    def logged(self, order_id: str, amount: int = 0) -> None: ...

    @classmethod
    def of_class(cls, order_id: str, amount: int = 0) -> None: ...

    @staticmethod
    def static(order_id: str, amount: int = 0) -> None: ...


@pytest.mark.parametrize(
    ("run", "bound"),
    [
        pytest.param(bound_task, True, id="bind=True"),
        pytest.param(logged(bound_task), True, id="bind=True under a decorator"),
        pytest.param(Method.run, True, id="method of a class"),
        pytest.param(Method().run, True, id="method of an object"),
        pytest.param(Method().run, False, id="method of an object, not told"),
        pytest.param(Method.logged, True, id="decorated method of a class"),
        pytest.param(Method().logged, True, id="decorated method of an object"),
        pytest.param(logged(Method().run), True, id="decorator around a method of an object"),
        pytest.param(Method.of_class, True, id="classmethod"),
        pytest.param(Method.static, False, id="staticmethod"),
        pytest.param(Callable_(), False, id="callable object"),
        pytest.param(functools.partial(bound_task, None), False, id="partial"),
        pytest.param(lambda order_id, amount=0: None, False, id="lambda"),
    ],
)
def test_the_task_itself_is_no_argument(run: Callable[..., Any], bound: bool) -> None:
    assert CallSignature(run, bound=bound).parameters == ("order_id", "amount")
    assert CallSignature(run, bound=bound).bind(("o-1",), {}) == {"order_id": "o-1", "amount": 0}
    assert source("{order_id}", run, bound)(*call("o-1")) == "o-1"
    assert source(by_arguments(), run, bound)(*call("o-1")) == source(by_arguments(), charge)(*call("o-1"))


def test_a_bound_body_that_takes_anything_keeps_it() -> None:
    def run(*args: Any) -> None: ...

    assert CallSignature(run, bound=True).bind(("o-1",), {}) == {"args": ("o-1",)}


def test_the_bodies_of_celery_tasks() -> None:
    app = Celery("message_ids", set_as_current=False)
    for bind in (False, True):
        for options in ({}, {"autoretry_for": (OSError,)}):
            body = bound_task if bind else Method.static
            task = app.task(body, bind=bind, lazy=False, name=f"{bind}-{len(options)}", **options)
            for run in (task.run, type(task).run, task.__wrapped__):
                assert CallSignature(run, bound=bind).parameters == ("order_id", "amount"), (task.name, run)


def test_a_body_without_a_signature_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the parameters of dict .* written in Python"):
        CallSignature(dict)


def test_a_signature_is_made_once_and_used_for_both() -> None:
    signature = CallSignature(charge)
    make = message_id_source("order:{order_id}", signature)
    assert make is not None
    assert make(*call("o-1")) == "order:o-1"
    assert "charge(order_id" in repr(signature)


def test_without_a_signature_the_arguments_are_compared_as_they_come() -> None:
    assert arguments_fingerprint(None, ("o-1",), {"b": 1, "a": 2}) == arguments_fingerprint(
        None, ["o-1"], {"a": 2, "b": 1}
    )
    assert arguments_fingerprint(None, ("o-1",), None) != arguments_fingerprint(None, (), {"order_id": "o-1"})
    assert arguments_fingerprint(None, None, None) == arguments_fingerprint(None, (), {})


# -- by_arguments ------------------------------------------------------------------------------------------------------


def test_some_arguments_make_the_id() -> None:
    make = source(by_arguments("order_id", "currency"), charge)
    assert make(*call("o-1", 5)) == make(*call("o-1", 9, currency="EUR"))
    assert make(*call("o-1", 5)) != make(*call("o-2", 5))
    assert make(*call("o-1")) != make(*call("o-1", currency="USD"))


def test_by_some_arguments_looks_at_no_other() -> None:
    make = source(by_arguments("order_id"), charge)
    assert make(*call("o-1", object())) == make(*call("o-1"))


def test_by_arguments_among_keywords() -> None:
    make = source(by_arguments("order_id", "region"), keywords)
    assert make(*call("o-1", region="eu", x=1)) == make(*call("o-1", region="eu"))
    assert make(*call("o-1", region="eu")) != make(*call("o-1", region="us"))
    with pytest.raises(ConfigurationError, match=r"region is not in .* mean 'regoin'\?.* write 'region\?' if it may"):
        make(*call("o-1", regoin="eu"))
    optional = source(by_arguments("order_id", "region?"), keywords)
    assert optional(*call("o-1")) != optional(*call("o-1", region=None))
    assert optional(*call("o-1", region="eu")) == make(*call("o-1", region="eu"))


def test_by_all_arguments_is_the_fingerprint() -> None:
    digest = source(by_arguments(), charge)(*call("o-1", 5))
    assert digest == arguments_fingerprint(CallSignature(charge), ("o-1", 5), {})
    assert digest == fingerprint({"order_id": "o-1", "amount": 5})
    assert check_message_id(digest) == digest


@pytest.mark.parametrize("option", [by_arguments(), by_arguments("order_id"), by_arguments("order_id", "amount")])
def test_by_arguments_is_a_plain_value(option: ByArguments) -> None:
    assert pickle.loads(pickle.dumps(option)) == option
    assert copy.deepcopy(option) == option
    assert eval(repr(option)) == option
    assert len({option, pickle.loads(pickle.dumps(option))}) == 1


def test_by_arguments_compares_by_names_in_any_order() -> None:
    assert by_arguments("a", "b") == by_arguments("b", "a", "a")
    assert by_arguments("a") != by_arguments("b")
    assert by_arguments() != by_arguments("a")
    assert repr(by_arguments("order_id")) == "by_arguments('order_id')"
    assert repr(by_arguments()) == "by_arguments()"


@pytest.mark.parametrize("name", ["", 1, None, charge])
def test_by_arguments_takes_names(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"names of arguments"):
        by_arguments(name)


def test_by_arguments_names_are_checked_against_the_parameters() -> None:
    assert refusal(by_arguments("order_id", "ammount"), charge) == (
        "by_arguments('ammount', 'order_id'): charge has no parameter 'ammount'; did you mean 'amount'?"
    )
    assert "it has order_id, amount" in refusal(by_arguments("zzz"), bound_task, bound=True)
    assert "it has none" in refusal(by_arguments("zzz"), lambda: None)


def test_by_arguments_names_what_it_cannot_take() -> None:
    with pytest.raises(ConfigurationError, match=r"^order_id\.lines\[1\] is of type object"):
        source(by_arguments(), charge)(*call(Order(1, [0, object()])))
    with pytest.raises(ConfigurationError, match=r"^amount is of type object"):  # one that has a default
        source(by_arguments(), charge)(*call("o-1", object()))
    with pytest.raises(ConfigurationError, match=r"^more\['x'\] is of type object"):
        source(by_arguments(), keywords)(*call("o-1", x=object()))


def test_by_arguments_within_a_callable() -> None:
    digest = by_arguments("order_id")

    def message_id(order_id: str, **_: Any) -> str:
        return f"charge:{digest(order_id=order_id)}"

    make = source(message_id, charge)
    assert make(*call("o-1", amount=5)) == make(*call("o-1", amount=6))
    assert make(*call("o-1")).startswith("charge:")
    assert by_arguments()("o-1", amount=5) == arguments_fingerprint(None, ("o-1",), {"amount": 5})
    with pytest.raises(ConfigurationError, match="'order_id' was not given by keyword"):
        digest("o-1")


# -- format strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "run", "each", "expected"),
    [
        ("order:{order_id}", charge, call("o-1"), "order:o-1"),
        ("order:{order_id}", charge, call(order_id="o-1", amount=3), "order:o-1"),
        ("{order_id}:{amount}:{currency}", charge, call("o-1"), "o-1:0:EUR"),
        ("{order_id.id}", charge, call(Order(7)), "7"),
        ("{order_id.lines[1]}", charge, call(Order(7, ["a", "b"])), "b"),
        ("{order_id[id]}", charge, call({"id": 7}), "7"),
        ("{amount:.2f}", charge, call("o-1", 5), "5.00"),
        ("{amount:>{currency}}", charge, call("o-1", 5, currency=4), "   5"),
        ("{order_id!r}", charge, call("o-1"), "'o-1'"),
        ("{{{order_id}}}", charge, call("o-1"), "{o-1}"),
        ("{order_id}", charge, call(0), "0"),
        ("{order_id}", charge, call(False), "False"),
        ("x{order_id}{amount}", charge, call("", 5), "x5"),
        ("{order_id}:{region}", keywords, call("o-1", region="eu"), "o-1:eu"),
        ("{lines[0]}", keywords, call("o-1", "first"), "first"),
        ("{more[region]}", keywords, call("o-1", region="eu"), "eu"),
        (" {order_id} ", charge, call("o-1"), " o-1 "),
        ("{order_id}", charge, call("日本"), "日本"),
    ],
)
def test_format_string(template: str, run: Callable[..., Any], each: Call, expected: str) -> None:
    assert source(template, run)(*each) == expected


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("order:{ordr_id}", ["message_id='order:{ordr_id}'", "charge has no parameter 'ordr_id'", "mean 'order_id'?"]),
        ("order:{zzz}", ["charge has no parameter 'zzz'", "it has order_id, amount, currency"]),
        ("{amount:{widht}}", ["charge has no parameter 'widht'"]),
        ("{self}", ["charge has no parameter 'self'"]),
        ("order:{}", ["positional field, {}", "name the parameter", "{order_id}"]),
        ("order:{0}", ["positional field, {0}", "name the parameter", "{order_id}"]),
        ("order:{0.id}", ["positional field, {0}"]),
        ("{amount:{}}", ["positional field, {}"]),
        ("nightly", ["names no argument of charge", "all calls would be one message", "{order_id}", "callable"]),
        ("", ["names no argument of charge"]),
        ("{{order_id}}", ["names no argument of charge"]),
        ("order:{order_id", ["is not a format string"]),
        ("order:}", ["is not a format string"]),
        ("{order_id!z}", ["no conversion !z"]),
        ("{order_id:>1000}", ["1000 in the format specification", "255 bytes"]),
    ],
)
def test_format_strings_are_checked_before_any_call(template: str, says: list[str]) -> None:
    text = refusal(template, charge)
    assert [part for part in says if part not in text] == []


def test_the_task_is_no_field() -> None:
    assert "bound_task has no parameter 'self'" in refusal("{self}", bound_task, bound=True)


def test_any_name_may_be_among_keywords() -> None:
    make = source("{region}", keywords)
    with pytest.raises(ConfigurationError, match=r"message_id='\{region\}': \{region\} is not in the arguments"):
        make(*call("o-1"))


@pytest.mark.parametrize(
    ("template", "each", "says"),
    [
        ("order:{order_id}", call(None), ["order_id is None", "unrelated calls", "by_arguments"]),
        ("order:{order_id!r}", call(None), ["order_id is None"]),
        ("order:{order_id.id}", call(Order(None)), ["order_id.id is None"]),
        ("order:{order_id[id]}", call({"id": None}), ["order_id[id] is None"]),
        ("order:{order_id}", call(""), ["order_id is empty", "unrelated calls", "by_arguments"]),
        ("order:{order_id}:{amount}", call("", ""), ["order_id and amount are empty", "unrelated calls"]),
        ("order:{order_id!s:.3}", call(""), ["order_id is empty"]),
        ("{{{order_id.id}}}", call(Order("")), ["order_id.id is empty"]),
        ("{order_id.id}", call({"no": 7}), ["{order_id.id} is not in the arguments", "AttributeError"]),
        ("{order_id[id]}", call({}), ["{order_id[id]} is not in the arguments", "KeyError"]),
        ("{order_id[3]}", call([1]), ["{order_id[3]} is not in the arguments", "IndexError"]),
        ("{order_id[id]}", call("text"), ["{order_id[id]} is not in the arguments", "TypeError"]),
        ("{order_id:d}", call("o-1"), ["message_id='{order_id:d}'", "format code 'd'"]),
        ("{order_id}", call({"b", "a"}), ["order_id, of type set", "differs between processes", "by_arguments"]),
        ("{order_id}", call(Opaque()), ["order_id, of type Opaque", "differs between processes"]),
        ("{amount:>{currency}}", call("o-1", 5, currency=10**9), ["1000000000", "255 bytes", "smaller width"]),
        ("{amount:>{currency}}", call("o-1", 5, currency="٩" * 9), ["255 bytes", "smaller width"]),
        ("{amount:.2f}", call("o-1", Decimal("1E+999999")), ["more digits than the 255 bytes"]),
        ("{amount!s}", call("o-1", 10**5000), ["integer string conversion"]),
        ("{order_id}", call(""), ["message_id='{order_id}'", "order_id is empty"]),
        ("{order_id}", call("x" * 256), ["message_id='{order_id}'", "256 bytes", "by_arguments"]),
        ("{order_id}", call("a\0b"), ["NUL"]),
    ],
)
def test_a_format_string_refuses_what_gives_no_id(template: str, each: Call, says: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        source(template, charge)(*each)
    assert [part for part in says if part not in str(caught.value)] == []


class Colour(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Count(int):
    def __format__(self, _: str) -> str:
        return f"<{int(self)}>"


class Mode(enum.StrEnum):
    FAST = "fast"


class Local(datetime):
    def __str__(self) -> str:
        return "somewhen"


class Point(NamedTuple):
    x: int
    y: int


class Jsonable:
    def __json__(self) -> Any:
        return {"n": Colour.RED}


class Line:
    """As a model of pydantic's."""

    def __init__(self, sku: str) -> None:
        self.sku, self.colour = sku, Colour.RED

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        assert mode == "json"
        return {"sku": self.sku, "colour": "red"}


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
CET = timezone(timedelta(hours=1))
ONE_ID: list[list[Any]] = [
    [Colour.RED, "red"],
    [Mode.FAST, "fast"],
    [Level.HIGH, 3, Count(3)],
    [True],
    [1],
    [-0.0, 0.0],
    [Decimal(1), Decimal("1.00"), Decimal("1E0")],
    [Decimal(100), Decimal("1E2"), Decimal("100.0")],
    [Decimal(0), Decimal("0.00"), Decimal("-0")],
    [Decimal("NaN"), Decimal("-sNaN1")],
    [NOON, NOON.astimezone(CET), Local(2026, 3, 1, 13, tzinfo=CET)],
    [datetime(2026, 3, 1, 12), Local(2026, 3, 1, 12)],  # noqa: DTZ001 - a naive one
    [datetime.min.replace(tzinfo=CET)],
    [time(12, tzinfo=UTC), time(13, tzinfo=CET)],
    [date(2026, 3, 1)],
    [UUID(int=7)],
    [b"ab", bytearray(b"ab"), memoryview(b"ab")],
    [[1, Colour.RED], (1, "red"), [1, "red"]],
    [Point(1, 2), (1, 2), [1, 2]],
    [{1: Level.HIGH, "b": 2}, {"b": 2, "1": 3}],
    [{1: "a", "1": "b"}],
    [Jsonable(), {"n": "red"}],
    [Line(sku="s"), {"sku": "s", "colour": "red"}],
    ["\ud83d\ude00", "\U0001f600"],
]


def _is_carried(value: Any) -> bool:
    """Return whether JSON and pickle carry a value."""
    return not isinstance(value, (bytearray, memoryview)) and value != {1: "a", "1": "b"}


@pytest.mark.parametrize("template", ["{order_id}", "{order_id!s}", "{order_id!r}"])
@pytest.mark.parametrize("values", ONE_ID, ids=lambda values: f"{type(values[0]).__name__} {values[0]}"[:30])
def test_a_format_string_gives_what_by_arguments_calls_equal_one_id(template: str, values: list[Any]) -> None:
    digests = {fingerprint(value) for value in values}
    ids = {source(template, charge)(*call(value)) for value in values}
    assert (len(digests), len(ids)) == (1, 1)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("value", [value for values in ONE_ID for value in values if _is_carried(value)])
def test_a_format_string_gives_the_consumer_the_producers_id(value: Any, serializer: str) -> None:
    make = source("{order_id}", charge)
    if isinstance(value, Line):
        value = value.model_dump(mode="json")  # as Celery does
    content_type, encoding, data = dumps([value], serializer)
    (arrived,) = loads(data, content_type, encoding, accept={content_type})
    assert make(*call(arrived)) == make(*call(value))


@pytest.mark.parametrize(
    ("template", "value", "arrived"),
    [
        ("{order_id.sku}", Line(sku="s"), {"sku": "s"}),
        ("{order_id[sku]}", Line(sku="s"), {"sku": "s"}),
        ("{order_id.colour}", Line(sku="s"), {"colour": "red"}),
        ("{order_id[1]}", {1: "a"}, {"1": "a"}),
        ("{order_id.items}", {"items": 3}, {"items": 3}),
        ("{order_id[0]}", Point(1, 2), [1, 2]),
        ("{order_id:%d.%m.}", NOON.astimezone(timezone(timedelta(hours=13))), NOON),
    ],
)
def test_a_step_into_an_argument_is_the_same_where_it_arrives(template: str, value: Any, arrived: Any) -> None:
    make = source(template, charge)
    assert make(*call(value)) == make(*call(arrived))


@pytest.mark.parametrize("value", ["on", Colour.RED])
def test_an_attribute_of_a_plain_value_is_its_own(value: Any) -> None:
    if isinstance(value, enum.Enum):
        assert source("{order_id.name}", charge)(*call(value)) == "RED"
    with pytest.raises(ConfigurationError, match="AttributeError"):
        source("{order_id._at}", charge)(*call(value))


# -- callables and everything else -------------------------------------------------------------------------------------


def test_a_callable_is_called_as_the_task_is() -> None:
    seen: list[Call] = []

    def message_id(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "id"

    assert source(message_id, charge)(("o-1",), {"amount": 5}) == "id"
    assert source(message_id, bound_task, True)(("o-1",), None) == "id"
    assert seen == [call("o-1", amount=5), call("o-1")]


@pytest.mark.parametrize(
    ("option", "takes"),
    [
        (lambda a, b, c, d: "id", "(a, b, c, d)"),
        (lambda *, other: "id", "(*, other)"),
        (lambda: "id", "()"),
    ],
)
def test_a_callable_that_takes_no_call_of_the_body_is_refused(option: Any, takes: str) -> None:
    text = refusal(option, charge)
    assert f"of charge takes {takes}, but is called like charge, with (order_id, amount=0, *, currency='EUR')" in text


@pytest.mark.parametrize(
    "option",
    [
        lambda order_id: "id",
        lambda order_id, **_: "id",
        lambda *, order_id, amount=0, currency="": "id",
        lambda *a: "id",
        functools.partial(lambda kind, *a, **k: "id", "order"),
        str,
        operator.itemgetter(0),
    ],
)
def test_a_callable_that_takes_some_call_of_the_body_is_taken(option: Any) -> None:
    assert source(option, charge) is not None


def test_a_callable_may_be_a_class_or_an_object() -> None:
    class Ids:
        def __call__(self, order_id: Any, **_: Any) -> str:
            return f"order:{order_id}"

    def run(order_id: Any) -> None: ...

    assert source(Ids(), run)(*call(7)) == "order:7"
    assert source(str, run)(*call(7)) == "7"


@pytest.mark.parametrize("value", [None, 7, b"id", "", "x" * 256])
def test_a_callable_must_return_an_id(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^the message_id callable of charge returned "):
        source(lambda *_, **__: value, charge)(*call("o-1"))


def test_a_callables_error_is_raised() -> None:
    def broken(order_id: str) -> str:
        raise LookupError(order_id)

    with pytest.raises(LookupError):
        source(broken, charge)(*call("o-1"))


def test_without_the_option_the_task_id_is_used() -> None:
    assert message_id_source(None, charge) is None
    assert message_id_source(None, CallSignature(charge)) is None


@pytest.mark.parametrize("option", [7, True, b"order:{order_id}", ["order_id"], object(), by_arguments])
def test_other_options_are_refused(option: object) -> None:
    text = refusal(option, charge)
    assert text.startswith(f"message_id={option!r} of charge is not one of")
    assert "by_arguments()" in text


# -- check_message_id --------------------------------------------------------------------------------------------------


class Name(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    NIGHTLY = "nightly"


@pytest.mark.parametrize("value", ["a", " a ", "\t", "x" * 255, "é" * 127, "日本", "a\nb", "{}", "%", "a/b:c"])
def test_ids_that_are_ids(value: str) -> None:
    assert check_message_id(value) is value


def test_an_id_is_plain_text() -> None:
    assert type(check_message_id(Name.NIGHTLY)) is str
    assert check_message_id(Name.NIGHTLY) == "nightly"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, ["text, not None of type NoneType", "str"]),
        (7, ["text, not 7 of type int", "str"]),
        (b"id", ["text, not b'id' of type bytes"]),
        ("", ["cannot be empty", "leave it out"]),
        ("a\0", ["NUL"]),
        ("a\ud800", ["lone surrogate"]),
        ("x" * 256, ["256 bytes", "255", "by_arguments"]),
        ("é" * 128, ["256 bytes", "255"]),
    ],
)
def test_ids_that_are_none(value: object, says: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_message_id(value)
    assert [part for part in says if part not in str(caught.value)] == []
    assert len(str(caught.value)) < 300


@settings(deadline=None)
@given(st.text(st.characters(), max_size=300))
def test_an_id_is_refused_or_fits_everywhere(value: str) -> None:
    try:
        checked = check_message_id(value)
    except ConfigurationError:
        assert not value or "\0" in value or len(value.encode(errors="surrogatepass")) > MAX_BYTES or surrogate(value)
    else:
        assert checked == value
        assert 0 < len(checked.encode()) <= 255
        assert "\0" not in checked


def surrogate(value: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in value)


class TestCallsThatDoNotFit:
    """``typing=False``: Celery sends such a call, and its worker says what is wrong with it."""

    def test_they_have_an_id_of_their_own(self) -> None:
        def body(a: int, b: int = 2) -> None: ...

        signature = CallSignature(body, typed=False)
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((1,), {}),
            ((1, 2, 3), {}),
            ((1, 2, 4), {}),
            ((1,), {"c": 3}),
            ((1,), {"a": 1}),
            ((), {}),
        ]
        assert len({signature.digest(*call) for call in calls}) == len(calls)
        assert signature.digest((1, 2), {}) == CallSignature(body).digest((1,), {}), "one that fits is told as ever"
        with pytest.raises(TypeError):
            CallSignature(body).digest((1, 2, 3), {})

    def test_a_template_takes_what_is_there(self) -> None:
        def body(a: int, b: int) -> None: ...

        template = message_id_source("m:{a}", CallSignature(body, typed=False))
        assert template is not None
        assert template((1,), {}) == template((), {"a": 1}) == "m:1"
        with pytest.raises(ConfigurationError, match="is not in the arguments of this call"):
            template((), {"b": 1})
