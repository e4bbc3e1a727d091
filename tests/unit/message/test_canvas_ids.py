"""Ids that come out the same each time: by the place of a call and its arguments, and of nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID

import pytest
from celery import Celery, chain, chord, group
from celery.app.task import Context
from celery.canvas import Signature
from hypothesis import given
from hypothesis import strategies as st

from celery_idempotent import IdempotentTask
from celery_idempotent.core.records import MessageKey
from celery_idempotent.message.call_signature import CallSignature
from celery_idempotent.message.canvas_ids import Calls, derived, fix_callbacks, is_derived
from celery_idempotent.message.check_id import check_message_id

KEY = MessageKey("order:1", "shop.order")


def body(order_id: str, amount: int = 1) -> None:
    """Be called."""


SIGNATURE = CallSignature(body)


def calls(key: MessageKey = KEY, first: str = "first", attempt: int = 0) -> Calls:
    return Calls(key, first, attempt)


def ids(made: Calls, names: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, made.next("charge", SIGNATURE, (name,), {}).task_id) for name in names]


@given(st.lists(st.sampled_from("abc")).flatmap(lambda names: st.tuples(st.just(names), st.permutations(names))))
def test_the_order_of_other_calls_does_no_harm(orders: tuple[list[str], list[str]]) -> None:
    once, again = orders
    assert sorted(ids(calls(), once)) == sorted(ids(calls(), again))


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("xyz")))
def test_calls_between_them_do_no_harm(names: list[str], others: list[str]) -> None:
    assert set(ids(calls(), names)) <= set(ids(calls(), [*others, *names, *others]))


@given(st.lists(st.sampled_from("abc")))
def test_each_call_is_a_new_message(names: list[str]) -> None:
    assert len({task_id for _, task_id in ids(calls(), names)}) == len(names)


@pytest.mark.parametrize(
    "other",
    [
        calls(MessageKey("order:2", "shop.order")),
        calls(MessageKey("order:1", "shop.refund")),
        calls(first="sent again under its id"),
        calls(attempt=1),
    ],
)
def test_another_message_or_attempt_makes_calls_of_its_own(other: Calls) -> None:
    assert ids(calls(), "a") != ids(other, "a")


def test_the_arguments_are_those_of_the_signature() -> None:
    told = {
        calls().next("charge", SIGNATURE, args, kwargs).task_id
        for args, kwargs in ((("a",), None), (["a", 1], {}), (None, {"order_id": "a"}))
    }
    assert len(told) == 1
    assert told != {calls().next("refund", SIGNATURE, ("a",), {}).task_id}


def test_calls_without_a_canonical_form_are_numbered() -> None:
    made, again = calls(), calls()
    first, second = (made.next("charge", SIGNATURE, (object(),), {}).task_id for _ in range(2))
    assert [again.next("charge", SIGNATURE, (object(),), {}).task_id for _ in range(2)] == [first, second]
    assert first != second
    # What Celery will refuse is no error of ours.
    assert made.next("charge", SIGNATURE, (), {"unknown": 1}).task_id


def test_a_call_that_was_not_made_leaves_its_place() -> None:
    made = calls()
    first, second = (made.next("charge", SIGNATURE, ("a",), {}) for _ in range(2))
    made.take_back(first)
    assert made.next("charge", SIGNATURE, ("a",), {}) == first
    assert made.next("charge", SIGNATURE, ("a",), {}) not in (first, second)


def test_threads_take_a_place_each() -> None:
    made = calls()
    with ThreadPoolExecutor(8) as pool:
        taken = set(pool.map(lambda _: made.next("charge", SIGNATURE, ("a",), {}).task_id, range(200)))
    assert len(taken) == 200


def test_an_id_has_the_form_of_celerys() -> None:
    position = calls().next("charge", SIGNATURE, ("a",), {})
    assert str(UUID(position.task_id)) == position.task_id
    assert check_message_id(position.message_id) == f"call:{position.task_id}"
    assert is_derived(position.message_id)
    assert not is_derived(position.task_id)
    assert not is_derived("call:me")


def test_ids_stay_what_they_were() -> None:
    """Those of another version too: messages are under way while workers are replaced."""
    assert derived("m", "t", "f", 0, "call", "charge", None, 0) == "1fd816d9-70ab-5097-9923-139c39146768"


# -- signatures --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("children", broker="memory://", set_as_current=False)
    app.conf.idempotent_store = "sqlite://"

    @app.task(base=IdempotentTask, name="child", shared=False)
    def child(*heard: Any) -> None: ...

    @app.task(base=IdempotentTask, name="known", message_id="known:{name}", shared=False)
    def known(name: str) -> None: ...

    @app.task(name="plain", shared=False)
    def plain(*heard: Any) -> None: ...

    app.finalize()
    yield app
    app.queue_log.close()
    app.close()


def leaves(signature: Any) -> list[dict[str, Any]]:
    """Return the tasks of a canvas, in order."""
    parts = [signature["kwargs"][name] for name in ("tasks", "header", "body") if name in signature["kwargs"]]
    if signature.get("subtask_type") not in ("group", "chain", "chord"):
        return [signature]
    return [leaf for part in parts for one in (part if not isinstance(part, dict) else [part]) for leaf in leaves(one)]


def fixed(app: Celery, *links: Any, task_id: str = "parent", name: str = "callbacks") -> list[Any]:
    request = Context({"id": task_id, name: list(links)})
    fix_callbacks(request)
    fix_callbacks(request)  # once more changes nothing
    return list(getattr(request, name))


def as_sent(signature: Signature[Any]) -> Any:
    """Return a signature as it arrives: plain data."""
    return json.loads(json.dumps(signature))


@pytest.mark.parametrize("wire", [False, True])
def test_callbacks_are_given_the_same_ids_each_time(app: Celery, wire: bool) -> None:
    child = app.tasks["child"]

    def links() -> list[Any]:
        made = [
            child.s(1),
            child.s(1),
            group([child.s(1), child.s(2)], app=app),
            chain(child.s(1), child.s(2), app=app),
            chord([child.s(1), child.s(2)], child.s(3), app=app),
        ]
        return [as_sent(link) for link in made] if wire else made

    def ids_of(links: list[Any]) -> list[str]:
        return [leaf["options"]["task_id"] for link in links for leaf in leaves(link)]

    made = ids_of(fixed(app, *links()))
    assert len(set(made)) == len(made) == 9
    assert ids_of(fixed(app, *links())) == made
    assert not set(ids_of(fixed(app, *links(), task_id="other"))) & set(made)
    assert not set(ids_of(fixed(app, *links(), name="errbacks"))) & set(made)
    # A group and a chord keep their group's id too, or their parts would be counted apart.
    grouped = [link["options"].get("task_id") for link in fixed(app, *links())[2:]]
    assert [link["options"].get("task_id") for link in fixed(app, *links())[2:]] == grouped
    assert [bool(id_) for id_ in grouped] == [True, False, True]


def test_an_id_that_a_callback_has_stays(app: Celery) -> None:
    (link,) = fixed(app, app.tasks["child"].s(1).set(task_id="mine"))
    assert link["options"]["task_id"] == "mine"


def test_the_callers_signature_is_not_changed(app: Celery) -> None:
    link = group([app.tasks["child"].s(1)], app=app)
    fixed(app, link)
    assert "task_id" not in link["options"]
    assert "task_id" not in link.tasks[0]["options"]


def test_later_tasks_of_a_canvas_get_message_ids(app: Celery) -> None:
    child, known, plain = (app.tasks[name] for name in ("child", "known", "plain"))

    def marked(made: Calls) -> dict[str, Any]:
        steps = [child.s(1), known.s("a"), plain.s(1), child.s(2).set(message_id="mine"), child.s(3)]
        for step in steps:
            step.freeze()
        steps[-1].options["task_id"] = "the body's own"
        last = child.s(4)
        last.freeze()
        position = made.next("child", None, (1,), {})
        return made.mark({"chain": steps, "chord": last, "link": [child.s(5)]}, position, app, "the body's own")

    first, again = marked(calls()), marked(calls())

    def told(options: dict[str, Any]) -> list[str | None]:
        return [leaf["options"].get("message_id") for leaf in (*options["chain"], options["chord"])]

    assert told(first) == told(again)
    # Not a call with an id of its own, nor one whose id is never looked up, nor a replacement.
    assert [id_ if id_ is None or not is_derived(id_) else "derived" for id_ in told(first)] == [
        *("derived", None, None, "mine", None),
        "derived",
    ]
    assert first["link"][0]["options"]["task_id"] == again["link"][0]["options"]["task_id"]


def test_the_members_of_a_header_carry_one_body(app: Celery) -> None:
    child, made = app.tasks["child"], calls()

    def told(body: Signature[Any]) -> str:
        position = made.next("child", None, (1,), {})
        marked = made.mark({"chord": body}, position, app, "request")
        return str(leaves(marked["chord"])[0]["options"]["message_id"])

    bodies = [child.s(), child.s(), chain(child.s(1), child.s(2), app=app)]
    for each in bodies:
        each.freeze()
    assert [told(each) for each in bodies] == [told(each.clone()) for each in bodies]
    assert len({told(each) for each in bodies}) == 3
