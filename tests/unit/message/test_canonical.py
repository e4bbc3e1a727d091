"""The canonical form: one for equal values, another for every other, the same wherever it is computed."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import subprocess
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal, localcontext
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from celery import Celery, chord
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu.utils import json as kombu_json

import celery_idempotent
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.canonical import canonical, fingerprint

UTC = timezone.utc  # noqa: UP017 - `datetime.UTC` is the same, and this reads like the zones beside it
BERLIN = timezone(timedelta(hours=2), "CEST")


class Color(enum.Enum):
    RED = 1
    BLUE = 2


class Shape(enum.Enum):
    RED = 1


class Size(enum.StrEnum):
    LARGE = "large"


class OldSize(str, enum.Enum):  # noqa: UP042 - its str() is not its value
    LARGE = "large"


class Level(enum.IntEnum):
    HIGH = 3


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Item:
    sku: str
    options: Any = None


@dataclasses.dataclass(slots=True)
class Order:
    id: int
    items: list[Any]
    seen_at: float = dataclasses.field(default=0.0, compare=False)


@dataclasses.dataclass
class Invoice:
    id: int
    items: list[Any]


class Model:
    """Shaped like a pydantic model; the library does not import pydantic."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def model_dump(self, *, mode: str = "python") -> dict[str, Any]:
        assert mode == "json"
        return self.fields


class Money:
    """Known to kombu by what it reduces to."""

    def __init__(self, amount: int, currency: str) -> None:
        self.amount = amount
        self.currency = currency

    def __json__(self) -> dict[str, Any]:
        return {"amount": self.amount, "currency": self.currency}


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class Number(int):
    __slots__ = ()

    def __repr__(self) -> str:
        return "Number()"


class Ratio(float):
    __slots__ = ()

    def __repr__(self) -> str:
        return "Ratio()"


json: Any = kombu_json  # without annotations of its own


# -- strategies --------------------------------------------------------------------------------------------------------

zones: st.SearchStrategy[tzinfo | None] = st.none() | st.builds(
    timezone, st.integers(min_value=-1439, max_value=1439).map(lambda minutes: timedelta(minutes=minutes))
)
# With surrogates: file names and user agents bring them.
texts = st.text(st.characters(), max_size=8)
json_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.binary(max_size=8)
    | st.decimals()
    | st.uuids()
    | st.dates()
    | st.datetimes(timezones=zones)
    | st.times(timezones=zones)
    | st.sampled_from([Size.LARGE, OldSize.LARGE, Level.HIGH])
    | st.builds(Money, st.integers(), texts)
)
other_scalars = (
    st.timedeltas() | st.sampled_from(Color) | st.sampled_from(Shape) | st.builds(PurePosixPath, st.sampled_from("abc"))
)
hashables = st.none() | st.booleans() | st.integers() | texts | st.binary(max_size=8) | st.dates() | st.uuids()
json_keys = texts | st.integers() | st.floats() | st.booleans() | st.none() | st.just(Size.LARGE)


def carried(mapping: dict[Any, Any]) -> bool:
    """Return whether JSON carries all of a dict: not two keys under one text."""
    return len(json.loads(json.dumps(dict.fromkeys(mapping)))) == len(mapping)


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.builds(Point, children, children)
        | st.dictionaries(json_keys, children, max_size=4).filter(carried)
    )


json_values = st.recursive(json_scalars, containers, max_leaves=12)
values = st.recursive(
    json_scalars | other_scalars,
    lambda children: containers(children) | st.frozensets(hashables, max_size=4) | st.builds(Item, texts, children),
    max_leaves=12,
)


# -- equal values ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(values)
def test_equal_values_give_equal_forms_in_any_order(value: Any) -> None:
    assert canonical(value) == canonical(reordered(value))


def reordered(value: Any) -> Any:
    """Return an equal value, built from its end to its start, with lists for tuples and tuples for lists."""
    match value:
        case dict():
            return {key: reordered(item) for key, item in reversed(value.items())}
        case frozenset():
            return set(list(value)[::-1])  # noqa: C415 - built in another order
        case tuple():
            return [reordered(item) for item in value]
        case list():
            return tuple(reordered(item) for item in value)
        case _:
            return value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param([1, [2]], (1, (2,)), id="list and tuple"),
        pytest.param(Point(1, 2), [1, 2], id="named tuple and list"),
        pytest.param({"a": 1, "b": 2}, {"b": 2, "a": 1}, id="dict order"),
        pytest.param(OrderedDict(a=1), {"a": 1}, id="ordered dict"),
        pytest.param(defaultdict(int, a=1), {"a": 1}, id="default dict"),
        pytest.param({1: "x"}, {"1": "x"}, id="int key"),
        pytest.param({True: "x", None: "y", 1.5: "z"}, {"true": "x", "null": "y", "1.5": "z"}, id="JSON's other keys"),
        pytest.param({"b", "a", "c"}, frozenset({"c", "b", "a"}), id="set and frozenset"),
        pytest.param(b"ab", bytearray(b"ab"), id="bytes and bytearray"),
        pytest.param(b"ab", memoryview(b"xaxb")[1::2], id="bytes and memoryview"),
        pytest.param(0.0, -0.0, id="negative zero"),
        pytest.param(float("nan"), -float("nan"), id="nan"),
        pytest.param(Decimal("1.0"), Decimal("1.00"), id="decimal zeros"),
        pytest.param(Decimal(100), Decimal("1E2"), id="decimal exponent"),
        pytest.param(Decimal("-0.0"), Decimal("0E+7"), id="decimal zero"),
        pytest.param(Decimal("NaN"), Decimal("-sNaN12"), id="decimal nan"),
        pytest.param(
            datetime(2024, 6, 1, 12, tzinfo=UTC), datetime(2024, 6, 1, 14, tzinfo=BERLIN), id="instant in two zones"
        ),
        pytest.param(
            datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1),
            datetime(2024, 10, 27, 1, 30, tzinfo=UTC),
            id="second pass of a repeated hour",
        ),
        pytest.param(
            datetime.min.replace(tzinfo=timezone(timedelta(hours=23))),
            datetime.min.replace(tzinfo=timezone(timedelta(hours=23), "else")),
            id="instant before the year 1",
        ),
        pytest.param(time(12, tzinfo=UTC), time(14, tzinfo=BERLIN), id="time in two zones"),
        pytest.param(timedelta(hours=1), timedelta(minutes=60), id="timedelta"),
        pytest.param(Size.LARGE, "large", id="StrEnum"),
        pytest.param(OldSize.LARGE, "large", id="str Enum"),
        pytest.param(Level.HIGH, 3, id="IntEnum"),
        pytest.param(Text("a"), "a", id="str subclass"),
        pytest.param(Number(7), 7, id="int subclass"),
        pytest.param(Ratio(7.5), 7.5, id="float subclass"),
        pytest.param("\ud83d\ude00", "\U0001f600", id="surrogate pair"),
        pytest.param(Money(1, "EUR"), {"amount": 1, "currency": "EUR"}, id="__json__"),
        pytest.param(Model(id=1, tags=["a"]), {"id": 1, "tags": ["a"]}, id="pydantic model"),
        pytest.param(Item("a", [1]), Item("a", (1,)), id="dataclass"),
        pytest.param(Order(1, [], seen_at=1.0), Order(1, [], seen_at=2.0), id="field that does not compare"),
        pytest.param(Rights.READ | Rights.WRITE, Rights.WRITE | Rights.READ, id="flags"),
        pytest.param(Path("a/b"), Path("a") / "b", id="path"),
    ],
)
def test_equal_values_have_one_form(one: object, other: object) -> None:
    assert canonical(one) == canonical(other)
    assert fingerprint(one) == fingerprint(other)


# -- other values ------------------------------------------------------------------------------------------------------

DISTINCT: list[object] = [
    None,
    "",
    "None",
    "null",
    False,
    0,
    0.0,
    "0",
    Decimal(0),
    True,
    1,
    1.0,
    "1",
    b"1",
    -1,
    Decimal(1),
    Decimal("Infinity"),
    Decimal("-Infinity"),
    Decimal("NaN"),
    float("inf"),
    float("-inf"),
    float("nan"),
    "nan",
    0.1 + 0.2,
    0.3,
    2**53,
    2**53 + 1,
    float(2**53),
    10**5000,
    10**5000 + 1,
    Decimal("1.0000000000000000000000000000000000000001"),
    Decimal("1.0000000000000000000000000000000000000002"),
    "a",
    b"a",
    "\ud800",
    "\udc00",
    "\ufffd",
    "é",
    "e\u0301",
    [],
    {},
    set(),
    [None],
    [[]],
    [[], []],
    [[[]]],
    ["a", "b"],
    ["ab"],
    ["a", ["b"]],
    ["a,b"],
    ["b", "a"],
    [1, 2],
    [12],
    ["s1:a"],
    {"a": "b"},
    {"a": {"b": None}},
    {"a": None, "b": None},
    {"b": "a"},
    {1: "x"},
    {1: "x", "1": "y"},
    {1: "y", "1": "x"},
    {"a"},
    {"a", "b"},
    {1, 2},
    {b"a": 1},
    {(1, 2): 3},
    {UUID(int=1): 3},
    date(2024, 6, 1),
    datetime(2024, 6, 1),  # noqa: DTZ001 - naive on purpose
    datetime(2024, 6, 1, tzinfo=UTC),
    datetime(2024, 6, 1, tzinfo=BERLIN),
    datetime(2024, 6, 1, 0, 0, 0, 1),  # noqa: DTZ001
    "2024-06-01",
    time(12),
    time(12, tzinfo=UTC),
    time(12, tzinfo=BERLIN),
    timedelta(0),
    timedelta(microseconds=1),
    timedelta(microseconds=-1),
    UUID(int=1),
    UUID(int=2),
    str(UUID(int=1)),
    UUID(int=1).bytes,
    Color.RED,
    Color.BLUE,
    Shape.RED,
    "RED",
    Rights.READ,
    Rights.WRITE,
    Rights.READ | Rights.WRITE,
    Rights(0),
    Order(1, []),
    Order(2, []),
    Order(1, [None]),
    Invoice(1, []),
    {"id": 1, "items": []},
    [1, []],
    PurePosixPath("a"),
    PureWindowsPath("a"),
    PurePosixPath("b"),
]


def test_other_values_give_other_forms() -> None:
    forms: dict[bytes, object] = {}
    for value in DISTINCT:
        form = canonical(value)
        assert form not in forms, (value, forms[form])
        forms[form] = value


def told_apart(value: Any) -> Any:
    """Return a value's identity by another method: hashable, equal for equal values, with its type."""
    match value:
        case None | bool():
            return (type(value), value)
        case str():
            return (str, str.__str__(value).encode("utf-16", "surrogatepass"))
        case int():
            return (int, int(value))
        case float():
            return (float, "nan" if math.isnan(value) else float(value))
        case Decimal():
            return (Decimal, "nan" if value.is_nan() else value)
        case list() | tuple():
            return (list, tuple(told_apart(item) for item in value))
        case dict():
            return (dict, frozenset((key_text(key), told_apart(item)) for key, item in value.items()))
        case Money():
            return told_apart(value.__json__())
        case frozenset():
            return (frozenset, frozenset(told_apart(item) for item in value))
        case datetime() | time():
            return (type(value), value.utcoffset() is None, value)
        case Item():
            return (Item, told_apart(value.sku), told_apart(value.options))
        case _:
            return (type(value), value)


def key_text(key: Any) -> Any:
    text = next(iter(json.loads(json.dumps({key: 0}))))
    return text.encode("utf-16", "surrogatepass")


# Small worlds, in which two draws are often equal, or equal but for one type.
few: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, True, 1, 1.0, "1", b"1", Decimal(1), Size.LARGE, "large", Level.HIGH, 3])
    | st.decimals(0, 2, places=1)
    | st.integers(0, 2)
    | st.sampled_from([time(1), time(1, tzinfo=UTC), time(2, tzinfo=timezone(timedelta(hours=1)))]),
    lambda children: (
        st.lists(children, max_size=2)
        | st.tuples(children)
        | st.dictionaries(st.sampled_from(["1", "a", 2]), children, max_size=2)
        | st.frozensets(st.integers(0, 1), max_size=2)
        | st.builds(Item, st.sampled_from("ab"), children)
    ),
    max_leaves=4,
)


@settings(deadline=None)
@given(few, few)
def test_forms_are_equal_exactly_when_values_are(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (told_apart(one) == told_apart(other))


@settings(deadline=None)
@given(values, values)
def test_no_two_large_values_share_a_form(one: Any, other: Any) -> None:
    assert (canonical(one) == canonical(other)) == (told_apart(one) == told_apart(other))


# -- the same everywhere -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(json_values)
def test_a_value_and_what_arrives_of_it_are_one(value: Any) -> None:
    assert canonical(json.loads(json.dumps(value))) == canonical(value)


def test_a_signature_and_what_arrives_of_it_are_one() -> None:
    app = Celery("canonical", set_as_current=False)
    step = app.signature("shop.charge", args=("o-1", Decimal(5)), kwargs={"at": datetime(2024, 6, 1, tzinfo=UTC)})
    canvas = chord([step, step.clone(args=("o-2",))], body=app.signature("shop.done").on_error(step), app=app)
    for signature in (step, canvas):
        assert canonical(json.loads(json.dumps(signature))) == canonical(signature)
    assert canonical(step) == canonical(dict(step))
    assert canonical(step) != canonical(canvas)


PORTABLE = """
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID
VALUE = {
    "tags": {"red", "green", "blue", "a", "b", "c"},
    "pairs": {("a", 1), ("b", 2), ("c", 3)},
    "nested": {"x": {1: [None, True, 1.5, "é"]}, "y": frozenset({b"1", "1", 1})},
    "when": [date(2024, 6, 1), datetime(2024, 6, 1, 14, tzinfo=timezone(timedelta(hours=2)))],
    "id": UUID(int=7),
    "amount": Decimal("12.50"),
}
"""


def portable_value() -> object:
    names: dict[str, object] = {}
    exec(PORTABLE, names)
    return names["VALUE"]


@pytest.mark.parametrize("seed", ["0", "1", "42"])
def test_another_process_computes_the_same(seed: str) -> None:
    program = f"{PORTABLE}\nfrom celery_idempotent.message.canonical import fingerprint\nprint(fingerprint(VALUE))"
    root = Path(celery_idempotent.__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    assert found.stdout.strip() == fingerprint(portable_value())


def test_the_form_of_version_1_stands() -> None:
    # Digests are in every queue log there is. A change of the form needs another version in FORM, and another digest here.
    assert fingerprint(portable_value()) == "197a277e2f7a9c072386501368f2452f7a3dccc987fb5f97391157724a670745"


def test_the_order_of_a_class_s_fields_does_not_count() -> None:
    before = dataclasses.make_dataclass("Parcel", [("to", str), ("weight", int)])
    after = dataclasses.make_dataclass("Parcel", [("weight", int), ("to", str)])
    assert canonical(before(to="x", weight=1)) == canonical(after(to="x", weight=1))


def test_the_precision_of_the_thread_does_not_count() -> None:
    amount = Decimal("123456789.123456789")
    with localcontext(prec=3):
        assert canonical(amount) == canonical(Decimal("123456789.1234567890"))
        assert canonical(amount) != canonical(Decimal("123456789.123456788"))


def test_a_fingerprint_is_sha256_in_hex() -> None:
    digest = fingerprint({"order_id": "o-1"})
    assert len(bytes.fromhex(digest)) == 32
    assert digest == digest.lower()


# -- what is refused ---------------------------------------------------------------------------------------------------


def generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(object(), id="object"),
        pytest.param(generator(), id="generator"),
        pytest.param(generator, id="function"),
        pytest.param(Order, id="dataclass itself"),
        pytest.param(Model, id="model itself"),
        pytest.param(Money, id="class with __json__"),
        pytest.param(1j, id="complex"),
        pytest.param(range(3), id="range"),
        pytest.param(iter([1]), id="iterator"),
        pytest.param({}.keys(), id="dict view"),
        pytest.param(ValueError("x"), id="exception"),
    ],
)
def test_refuses_what_has_no_form(value: object) -> None:
    with pytest.raises(ConfigurationError, match="no canonical form") as caught:
        canonical({"order": value})
    text = str(caught.value)
    assert text.startswith("order is of type ")
    assert type(value).__qualname__ in text
    assert "plain data" in text
    assert "message_id" in text
    assert "fingerprint=False" in text
    assert repr(value) not in text  # arguments may be secret


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"order": Order(1, [1, 2, object()])}, "order.items[2]"),
        ({"order": {"items": [object()]}}, "order['items'][0]"),
        ({"order": [{7: object()}]}, "order[0][7]"),
        ({"order": Item("a", {"k": (0, object())})}, "order.options['k'][1]"),
        ({"tags": {object()}}, "tags{...}"),
        ({"prices": {object(): 1}}, "prices.keys()"),
        ({"order": Model(lines=[object()])}, "order['lines'][0]"),
        ({"not a name": object()}, "['not a name']"),
        ([0, object()], "[1]"),
        (object(), "the value"),
        # Earlier tokens of this level are not counted.
        ({"a": {"b": [1, {"c": 2}]}, "order": object()}, "order"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_the_place_of_what_it_refuses(value: object, path: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        canonical(value)
    assert str(caught.value).startswith(f"{path} is of type object")


def list_in_itself() -> Any:
    value: list[Any] = [1]
    value.append({"again": value})
    return value


def dict_in_itself() -> Any:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def dataclass_in_itself() -> Any:
    value = Item("a")
    value.options = [value]
    return value


@pytest.mark.parametrize(
    ("make", "path"),
    [(list_in_itself, "[1]['again']"), (dict_in_itself, "self"), (dataclass_in_itself, ".options[0]")],
)
def test_refuses_what_contains_itself(make: Callable[[], Any], path: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        canonical(make())
    assert str(caught.value).startswith(f"{path} contains itself")


def test_one_object_in_two_places_is_no_cycle() -> None:
    shared = {"a": [1]}
    assert canonical([shared, shared, {"x": shared}]) == canonical([{"a": [1]}, {"a": [1]}, {"x": {"a": [1]}}])


def test_refuses_what_is_nested_without_end() -> None:
    value: list[Any] = []
    for _ in range(sys.getrecursionlimit()):
        value = [value]
    with pytest.raises(ConfigurationError, match=r"^order is nested too deeply") as caught:
        canonical({"order": value})
    assert len(str(caught.value)) < 200


def test_a_model_that_cannot_be_dumped_is_refused() -> None:
    class Broken:
        def model_dump(self, *, mode: Literal["json", "python"]) -> dict[str, Any]:
            raise ValueError(f"no serializer for {mode}")

    with pytest.raises(ConfigurationError, match=r"^order is of type .*Broken.*no serializer for json"):
        canonical({"order": Broken()})
