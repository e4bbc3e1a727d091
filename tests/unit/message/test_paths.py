"""``by_arguments`` by paths, and without what does not count: one id on both sides of the wire, and an error for what is misspelt."""

from __future__ import annotations

import base64
import copy
import datetime as dt
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, NewType, TypedDict
from uuid import UUID

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kombu.serialization import dumps, loads
from pydantic import BaseModel, ConfigDict, Field

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.call_signature import CallSignature
from celery_idempotent.message.ids import ByArguments, MessageIdSource, by_arguments, message_id_source
from celery_idempotent.message.paths import Path
from tests.support.servers import missing

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


def source(option: object, run: Callable[..., Any]) -> MessageIdSource:
    made = message_id_source(option, run)
    assert made is not None
    return made


def same(option: ByArguments, run: Callable[..., Any], *calls: Call) -> bool:
    """Return whether calls have one id; they have one fingerprint then, or not, too."""
    return len({source(option, run)(*each) for each in calls}) == 1


def comparable(option: ByArguments, run: Callable[..., Any], *calls: Call) -> bool:
    """Return whether calls are equal when they are compared under one id."""
    return len({option.among(CallSignature(run)).digest(*each) for each in calls}) == 1


def charge(order: Any, amount: Any = 0, *, now: Any = None) -> None: ...


def keywords(order: Any, *rest: Any, **more: Any) -> None: ...


@dataclass(frozen=True, slots=True)
class Line:
    sku: str
    seen_at: float = 0.0


@dataclass
class Order:
    id: Any
    lines: list[Line] = field(default_factory=list)
    note: str | None = None

    @property
    def number(self) -> str:
        return f"no. {self.id}"

    def total(self) -> int:
        return 0


class Colour(StrEnum):
    RED = "red"


class Point(NamedTuple):
    x: int
    y: int


class Money:
    def __init__(self, amount: int) -> None:
        self.amount = "not what is sent"
        self.sent = amount

    def __json__(self) -> dict[str, Any]:
        return {"amount": self.sent}


class Model(BaseModel):
    id: UUID
    colour: Colour = Colour.RED


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "steps", "optional", "canonical"),
    [
        ("order", ("order",), False, "order"),
        ("order.id", ("order", "id"), False, "order.id"),
        ("order[id]", ("order", "id"), False, "order.id"),
        ("order.lines[0].sku", ("order", "lines", "0", "sku"), False, "order.lines.0.sku"),
        ("order.lines.0", ("order", "lines", "0"), False, "order.lines.0"),
        ("order[unit price].net", ("order", "unit price", "net"), False, "order[unit price].net"),
        ("order[a.b]", ("order", "a.b"), False, "order[a.b]"),
        ("order[really?]", ("order", "really?"), False, "order[really?]"),
        ("order.note?", ("order", "note"), True, "order.note?"),
        ("bestellung.größe", ("bestellung", "größe"), False, "bestellung.größe"),
    ],
)
def test_a_path_is_parsed(text: str, steps: tuple[str, ...], optional: bool, canonical: str) -> None:
    path = Path.parse(text)
    assert (path.steps, path.optional, str(path)) == (steps, optional, canonical)
    assert Path.parse(str(path)) == path


@pytest.mark.parametrize(
    "text", ["", ".", "order.", ".id", "order..id", "order[", "order[]", "order]", "a b", "?", "a?.b", "a.*", 5, None]
)
def test_what_is_no_path_is_refused(text: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"paths to their parts, not .*: write 'order_id', 'order.id'"):
        by_arguments(text)
    with pytest.raises(ConfigurationError, match="paths to their parts"):
        by_arguments(exclude=(text,))
    if not isinstance(text, str):
        with pytest.raises(ConfigurationError, match="paths to their parts"):
            by_arguments(exclude=text)


def test_one_option_has_one_form() -> None:
    assert by_arguments("order[id]", "amount") == by_arguments("amount", "order.id", "order.id")
    option = by_arguments("order.id", "note?", exclude=["order[seen at]", "now"])
    assert repr(option) == "by_arguments('note?', 'order.id', exclude=('now', 'order[seen at]'))"
    assert eval(repr(option)) == option == pickle.loads(pickle.dumps(option)) == copy.deepcopy(option)
    assert repr(by_arguments(exclude="*")) == "by_arguments(exclude='*')"
    assert eval(repr(by_arguments(exclude="now"))) == by_arguments(exclude=("now",))
    assert len({option, by_arguments(exclude="*"), by_arguments(exclude=("*",)), by_arguments()}) == 3


# -- what counts -------------------------------------------------------------------------------------------------------

ORDERS: list[Any] = [
    {"id": 7, "lines": [{"sku": "a"}]},
    {"lines": ({"sku": "a", "n": 2},), "id": 7, "more": 1},
    Order(7, [Line("a", seen_at=5.0)]),
]


def test_a_path_finds_the_part_in_whatever_holds_it() -> None:
    assert same(by_arguments("order.id", "order.lines[0].sku"), charge, *map(call, ORDERS))
    assert not same(by_arguments("order.id"), charge, call({"id": 7}), call({"id": "7"}))
    assert not same(by_arguments("order.id"), charge, call({"id": 7}), call({"id": None}))
    assert same(by_arguments("order.number"), charge, call(Order(7)), call({"number": "no. 7"}))
    assert same(by_arguments("order[1]"), charge, call({1: "a"}), call({"1": "a"}), call([0, "a"]), call(("x", "a")))
    assert same(by_arguments("order.true", "order.1[5]"), charge, call({True: "a", 1.5: 2, "1": [1] * 6}))
    assert same(by_arguments("order.items"), charge, call({"items": 3}), call({"items": 3, "x": 1}))


def test_a_keyword_that_looks_like_a_path_is_none() -> None:
    assert same(by_arguments("order.id"), keywords, call({"id": 7}, **{"order.id": 8}), call({"id": 7}))


def test_a_path_finds_what_is_sent() -> None:
    assert same(by_arguments("order.amount"), charge, call(Money(5)), call({"amount": 5}))
    model = Model(id=UUID(int=7))
    assert same(by_arguments("order.id", "order.colour"), charge, call(model), call(model.model_dump(mode="json")))
    noon, cet = dt.datetime(2026, 3, 1, 12, tzinfo=dt.UTC), dt.timezone(dt.timedelta(hours=1))
    assert same(by_arguments("order.hour"), charge, call(noon), call(noon.astimezone(cet)))


def test_an_optional_part_is_not_none() -> None:
    option = by_arguments("order.id", "order.note?")
    assert not same(option, charge, call({"id": 7}), call({"id": 7, "note": None}))
    assert same(option, charge, call({"id": 7, "note": "x"}), call(Order(7, note="x")))
    assert same(by_arguments("amount", "order.note.text?"), charge, call(None), call({}), call({"note": None}), call(5))


def test_what_is_excluded_does_not_count() -> None:
    option = by_arguments(exclude=("now", "order.lines[0].seen_at"))
    calls = [call(Order(7, [Line("a", float(n))]), 5, now=n) for n in range(3)]
    assert same(option, charge, *calls)
    assert comparable(option, charge, *calls)
    assert not same(option, charge, calls[0], call(Order(7, [Line("b")]), 5))
    assert not same(option, charge, calls[0], call(Order(7, [Line("a")]), 6))
    assert not same(option, charge, calls[0], call(Order(7, [Line("a"), Line("b")]), 5))
    assert calls[1][0][0].lines[0].seen_at == 1.0  # nobody's order was changed


def test_what_is_excluded_is_not_compared() -> None:
    """The id is of some arguments, and a call that differs in another is refused; but not in these."""
    option = by_arguments("order.id", exclude=("now",))
    first, later, other = call({"id": 7}, 5, now=1), call({"id": 7}, 5, now=2), call({"id": 7}, 6, now=1)
    assert same(option, charge, first, later, other)
    assert comparable(option, charge, first, later)
    assert not comparable(option, charge, first, other)


def test_an_item_of_a_list_that_is_excluded_leaves_the_others_their_places() -> None:
    option = by_arguments(exclude=("order[0]", "order[2].at"))
    assert same(option, charge, call([1, 2, {"at": 1, "n": 3}]), call((9, 2, {"n": 3, "at": 8})))
    assert not same(option, charge, call([1, 2, {"at": 1}]), call([1, 3, {"at": 1}]))


def test_among_keywords_any_name_may_be_excluded() -> None:
    option = by_arguments(exclude=("now", "trace.id", "note?"))
    assert same(option, keywords, *(call("o", 1, now=n, trace={"id": n, "x": 1}, note=n, y=2) for n in range(2)))
    assert same(option, keywords, call("o", now=1, trace={"id": 1}), call("o", now=1, trace={"id": 1}, note=5))
    assert not same(option, keywords, call("o", now=1, trace={"id": 1}), call("o", now=1, trace={"id": 1}, y=5))


def test_a_default_that_is_left_out_counts_as_the_default_does() -> None:
    def run(order: Any, context: Any = {"now": 0, "user": None}, plain: Any = {}) -> None: ...  # noqa: B006

    option = by_arguments(exclude=("context.now", "plain.x"))
    assert same(option, run, call(1), call(1, {"now": 7, "user": None}), call(1, plain={"x": 5}))
    assert not same(option, run, call(1), call(1, {"now": 7, "user": "me"}))


def test_a_container_that_is_none_has_nothing_to_exclude() -> None:
    option = by_arguments(exclude=("order.now",))
    assert same(option, charge, call(None), call(None, 0))
    assert not same(option, charge, call(None), call({"now": 1}))


def test_the_task_alone() -> None:
    option = by_arguments(exclude="*")
    assert same(option, charge, call(1), call(2, 3, now=4))
    assert same(option, keywords, call(1), call(2, 3, now=object()))
    assert same(option, lambda: None, call())
    with pytest.raises(TypeError, match="missing a required argument"):
        source(option, charge)(*call())


def test_within_a_callable() -> None:
    digest = by_arguments("order.id", exclude=("order.id.x",))
    assert digest(order={"id": {"x": 1, "y": 2}}) == digest(order={"id": {"x": 3, "y": 2}}, amount=9)
    assert by_arguments(exclude="*")(1, x=2) == by_arguments(exclude="*")()
    with pytest.raises(ConfigurationError, match="'order' was not given by keyword"):
        digest({"id": 1})


def test_what_a_call_leaves_out_may_be_excluded_later() -> None:
    assert source(by_arguments("order", exclude=("now",)), charge)(*call("o-1", now=5)) == source(
        by_arguments("order"), charge
    )(*call("o-1"))
    assert source(by_arguments(exclude=("now",)), charge)(*call("o-1", now=5)) == source(by_arguments(), charge)(
        *call("o-1")
    )


# -- what is misspelt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "exclude", "says"),
    [
        (("order.id",), ("order.id",), "'order.id' counts, and exclude='order.id' leaves it out"),
        (("order.id",), ("order",), "'order.id' counts, and exclude='order' leaves it out"),
        (("amount",), "*", r"is the task alone: leave out \['amount'\].* set fingerprint=False"),
        ((), ("*", "now"), r"is the task alone: leave out \['now'\]"),
    ],
)
def test_contradictions_are_refused(names: Any, exclude: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        by_arguments(*names, exclude=exclude)


@pytest.mark.parametrize(
    ("option", "each", "says"),
    [
        (by_arguments("order.idx"), call({"id": 7, "n": 1}), r"order has no 'idx' .* \(did you mean 'id'\?\): correct"),
        (by_arguments("order.idx"), call(Order(7)), r"order has no 'idx' in this call \(did you mean 'id'"),
        (by_arguments("order.total"), call(Order(7)), r"order has no 'total' in this call"),
        (by_arguments("order.id"), call(None), r"order is None in this call, so it has no 'id'"),
        (by_arguments("order.id"), call("o-1"), r"order is of type str in this call, which has no parts"),
        (by_arguments("order.name"), call(Colour.RED), r"order is of type Colour in this call, which has no parts"),
        (by_arguments("order.x"), call(Point(1, 2)), r"order has 2 items in this call, and 'x' is none of their ind"),
        (by_arguments("order[2]"), call([1, 2]), r"order has 2 items in this call, and '2' is none of their indexes"),
        (by_arguments("order[-1]"), call([1, 2]), r"'-1' is none of their indexes"),
        (by_arguments("order.a.b"), call({"a": {"c": 1}}), r"order\.a has no 'b' .* write 'order\.a\.b\?' if it may"),
        (by_arguments(exclude=("order.nwo",)), call({"now": 1}), r"order has no 'nwo' in .* mean 'now'\?"),
        (by_arguments(exclude=("order.now",)), call("o-1"), r"order is of type str"),
        (by_arguments(exclude=("order.a.now",)), call({"b": 1}), r"order has no 'a' .* 'order\.a\.now\?' if it may"),
        (by_arguments(exclude=("order.lines[1]",)), call({"lines": [1]}), r"order\.lines has 1 items"),
        (by_arguments("order.id"), call({"id": object()}), r"^order\.id is of type object"),
        (by_arguments("order.lines[0]"), call({"lines": [[1, object()]]}), r"^order\.lines\.0\[1\] is of type object"),
    ],
)
def test_a_call_that_lacks_a_part_is_refused(option: ByArguments, each: Call, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        source(option, charge)(*each)
    assert "is of type object" in says or str(caught.value).startswith(f"{option!r}: ")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (by_arguments(exclude=("nwo",)), r"nwo is not in the arguments of this call \(did you mean 'now'\?\): give it"),
        (
            by_arguments(exclude=("nwo.at",)),
            r"nwo is not in the arguments of this call \(did you mean 'now'\?\): give it",
        ),
        (by_arguments("nwo"), r"nwo is not in the arguments of this call \(did you mean 'now'\?\): give it"),
    ],
)
def test_a_keyword_that_is_not_given_is_refused(option: ByArguments, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        source(option, keywords)(*call("o", now=1))


class Address(TypedDict):
    city: str


Customer = NewType("Customer", Order)


class Strict(BaseModel):
    number: int = Field(alias="no")
    order: Order | None = None


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: int


def hinted(
    order: Order,
    address: Address,
    model: Strict,
    open_: Open,
    lines: list[Line],
    prices: dict[str, Line],
    pair: tuple[int, Line],
    point: Point,
    customer: Customer,
    either: Order | Address | None,
    loose: Order | Any,
    text: str,
    kind: Literal["a"],
    money: Money,
) -> None: ...


@pytest.mark.parametrize(
    "path",
    [
        *("order.id", "order.number", "order.lines[3].sku", "address.city", "model.number", "model.no"),
        *("model.order.id", "open_.whatever", "lines[0].sku", "prices.a.sku", "pair[1].sku", "point[1]"),
        *("customer.id", "either.city", "either.id", "loose.whatever", "kind.whatever", "money.amount", "order.id.x"),
    ],
)
def test_a_path_that_its_types_have_is_taken(path: str) -> None:
    for option in (by_arguments(path), by_arguments(exclude=(path,))):
        assert source(option, hinted) is not None


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("order.idx", r"order, a Order, has no 'idx'; did you mean 'id'\?"),
        ("order.lines.sku", r"order\.lines, a list, has no 'sku'; it has indexes from 0"),
        ("order.lines[0].suk", r"order\.lines\.0, a Line, has no 'suk'; did you mean 'sku'\?"),
        ("address.town", r"address, a Address, has no 'town'; it has city"),
        ("address.city.name", r"address\.city is a str, which has no parts; name 'address\.city' itself"),
        ("model.numbr", r"model, a Strict, has no 'numbr'; did you mean 'number'\?"),
        ("model.order.idx", r"model\.order, [^;]*, has no 'idx'; did you mean 'id'\?"),
        ("lines.first", r"lines, a list, has no 'first'"),
        ("prices.a.suk", r"prices\.a, a Line, has no 'suk'"),
        ("pair[2]", r"pair, a tuple, has no '2'; it has 0, 1"),
        ("point.x", r"point, a Point, has no 'x'; it has 0, 1"),
        ("customer.di", r"customer, a Customer, has no 'di'"),
        ("either.town", r"either, .*, has no 'town'"),
        ("text.id", r"text is a str, which has no parts; name 'text' itself"),
    ],
)
def test_a_path_that_its_types_lack_is_refused_before_any_call(path: str, says: str) -> None:
    for option in (by_arguments(path), by_arguments(exclude=(path,))):
        with pytest.raises(ConfigurationError, match=says) as caught:
            message_id_source(option, hinted)
        assert str(caught.value).startswith(f"{option!r}: ")


def test_annotations_that_cannot_be_read_refuse_nothing() -> None:
    def run(order: NotImported, other: Order) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert source(by_arguments("order.id", "other.whatever"), run) is not None


# -- both sides of the wire --------------------------------------------------------------------------------------------

texts = st.text(max_size=6)
zones = st.none() | st.builds(dt.timezone, st.integers(-1439, 1439).map(lambda minutes: dt.timedelta(minutes=minutes)))
moments = st.dates() | st.datetimes(timezones=zones)
plain = st.none() | st.booleans() | st.floats() | texts | st.binary(max_size=6)
keys = texts | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
rich = st.integers() | moments | st.decimals() | st.uuids() | st.sampled_from(Colour) | st.builds(Money, st.integers())


def nested(
    scalars: st.SearchStrategy[Any], keys: st.SearchStrategy[Any], *others: Callable[..., Any]
) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars,
        lambda children: (
            st.lists(children, max_size=3)
            | st.lists(children, max_size=3).map(tuple)
            | st.dictionaries(keys, children, max_size=3)
            | st.one_of([other(children, children) for other in others] or [st.nothing()])
        ),
        max_leaves=8,
    )


def points(x: st.SearchStrategy[Any], y: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(Point, x, y)


#: What each serializer carries. As kombu calls it, msgpack takes dicts whose keys are text.
KEYS = {"json": keys, "pickle": keys, "yaml": keys, "msgpack": texts}
VALUES = {
    "json": nested(plain | rich, keys, points),
    "pickle": nested(plain | rich | st.builds(Line, texts), keys, points),
    "yaml": nested(plain | st.integers() | moments, keys),
    "msgpack": nested(plain | st.integers(-(2**63), 2**64 - 1), texts, points),
}


def carried(value: Any, serializer: str) -> Any:
    """Return what arrives of a value."""
    if serializer == "msgpack" and find_spec("msgpack") is None:
        missing("msgpack", "a serializer of kombu's, in the group `test`")
    content_type, encoding, data = dumps(value, serializer)
    arrived = loads(data, content_type, encoding, accept={content_type})
    if serializer == "json":
        assume(size(arrived) == size(value))  # otherwise two keys of a dict had one text
    return arrived


def size(value: Any) -> int:
    match value:
        case Money():
            return 2
        case dict():
            return 1 + sum(map(size, value.values()))
        case list() | tuple():
            return 1 + sum(map(size, value))
    return 1


OPTIONS = [
    by_arguments(),
    by_arguments("order"),
    by_arguments("order.part", "amount"),
    by_arguments("order.part", "order[0]?", "order.part.x?", "order.1?"),
    by_arguments(exclude=("now",)),
    by_arguments("amount", exclude=("order.seen", "now")),
    by_arguments(exclude=("order.seen.at?", "order.1?", "order.part[0]?")),
    by_arguments(exclude="*"),
]
MADE = [(option, source(option, charge), option.among(CallSignature(charge))) for option in OPTIONS]


@pytest.mark.parametrize("serializer", sorted(VALUES))
@settings(deadline=None)
@given(data=st.data())
def test_the_consumer_computes_the_producers_id(serializer: str, data: st.DataObject) -> None:
    part, seen, amount = (data.draw(VALUES[serializer], label=name) for name in ("part", "seen", "amount"))
    more = data.draw(st.dictionaries(KEYS[serializer], VALUES[serializer], max_size=2), label="more")
    args = ({**more, "part": part, "seen": seen}, amount)
    arrived = carried([list(args), {"now": 1}], serializer)
    for option, make, compared in MADE:
        assert make(arrived[0], arrived[1]) == make(args, {"now": 1}), option
        assert compared.digest(arrived[0], arrived[1]) == compared.digest(args, {"now": 1}), option


@settings(deadline=None, max_examples=100)
@given(part=VALUES["json"], other=VALUES["json"], seen=VALUES["json"])
def test_only_what_is_named_makes_the_id(part: Any, other: Any, seen: Any) -> None:
    by_part, without = by_arguments("order.part"), by_arguments(exclude=("order.seen",))
    whole = source(by_arguments(), charge)
    one, two = {"part": part, "seen": seen}, {"part": other, "seen": 0}
    equal = whole([part], {}) == whole([other], {})
    assert same(by_part, charge, call(one), call(two)) == equal
    assert same(without, charge, call(one), call(two)) == equal
    assert comparable(without, charge, call(one), call(two)) == equal


def test_yaml_and_json_bodies_of_others_have_one_id() -> None:
    """A producer in another language sends text; keys that are numbers in one format are text in the other."""
    by_yaml = yaml.safe_load("- {1: a, part: [1, 2.5, true, ~], id: !!binary aGk=}\n- 5")
    by_json = json.loads('[{"1": "a", "part": [1, 2.5, true, null]}, 5]')
    by_json[0]["id"] = base64.b64decode("aGk=")
    assert same(by_arguments(), charge, (by_yaml, {}), (by_json, {}))
    assert same(by_arguments("order.1", "order.part[3]"), charge, (by_yaml, {}), (by_json, {}))


def test_a_number_arrives_as_the_number_that_was_sent() -> None:
    assert not same(by_arguments("order.n"), charge, call({"n": 1}), call({"n": 1.0}), call({"n": Decimal(1)}))
