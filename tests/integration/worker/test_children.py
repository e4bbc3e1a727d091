"""What a run sends, in its body or after it, is sent once, whenever its worker dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import WorkerLostError
from celery.result import AsyncResult

from celery_idempotent.core.records import Row, Status
from celery_idempotent.maintenance.recovery import Recovery
from tests.support.apps.children import Moment, deadly
from tests.support.deployment import unique
from tests.support.shared_workers import SharedWorker
from tests.support.versions import CELERY
from tests.support.waiting import TIMEOUT, wait_until

#: How the tasks that these tests call are named. Others of the shared worker leave theirs waiting in the worker.
OURS = ("child", "parent", "hard.", "die.")


def settle(shared_worker: SharedWorker) -> None:
    """Wait until nothing of ours is left to do: what was published twice, and is not absorbed, has run by then."""
    worker = shared_worker.worker
    assert worker is not None
    inspect = shared_worker.app.control.inspect(destination=[worker.hostname], timeout=5.0)

    def queued() -> int:
        with shared_worker.app.connection_for_read() as connection:
            return int(connection.default_channel.queue_declare(shared_worker.spec.queue).message_count)

    def idle() -> bool:
        if queued():
            return False
        for asked in (inspect.active, inspect.reserved, inspect.scheduled):
            answer = asked()
            if not answer:
                return False
            requests = [item.get("request", item) for items in answer.values() for item in items]
            if any(request["name"].startswith(OURS) for request in requests):
                return False
        return not queued()

    wait_until(idle, describe="an idle worker")


def ran(shared_worker: SharedWorker, name: str) -> dict[str, int]:
    """Count how often each child of a test ran, by the rest of its name."""
    notes = [note.detail for note in shared_worker.ledger.entries() if note.task.startswith("child") and note.detail]
    return dict(Counter(detail.partition("|")[0].removeprefix(name) for detail in notes if detail.startswith(name)))


def once(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1)


# -- calls from inside of a body ---------------------------------------------------------------------------------------------

#: Each kind of calls, with how often each child runs, and what the results say that the parent returns.
CALLS: dict[str, tuple[dict[str, int], list[str]]] = {
    "one": (once(""), [""]),
    "three alike": ({"": 3}, ["", "", ""]),
    "raising": (once(""), [""]),
    "identified": (once(""), [""]),
    "explicit": (once(""), [""]),
    "by name": (once(""), [""]),
    "reordered": (once(":1", ":2", ":more"), [":more", ":2", ":1"]),
    "linked": ({":1": 1, ":2": 2}, [":1"]),
    "group": (once(":1", ":2"), [":1", ":2"]),
    "chain": (once(":1", ":2", ":3", ":4"), [":3"]),
    "chord": (once(":1", ":2", ":3"), [":3"]),
    "chord in a chain": (once(":1", ":2", ":3", ":4"), [":4"]),
    "chain of the identified": (once(":1", ":2"), [":2"]),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_body_that_runs_again_makes_the_same_calls(shared_worker: SharedWorker, kind: str) -> None:
    name = unique()
    children, values = CALLS[kind]

    result = shared_worker.task("parent").apply_async((kind, name, shared_worker.path("flag")))

    returned = result.get(timeout=TIMEOUT)
    assert len(shared_worker.ledger.starts("parent", task_id=result.id)) == 2
    settle(shared_worker)
    # The results that the second run has returned are there, whichever run has made them. They are read, not waited for: up to Celery 5.6 only the
    # first of two results with an id gets its value, and the parent's result has the children of a group already.
    assert [AsyncResult(id_, app=shared_worker.app).result for id_ in returned] == [name + end for end in values]
    assert ran(shared_worker, name) == children


def test_a_child_that_failed_is_not_sent_again(shared_worker: SharedWorker) -> None:
    """Although it may be sent again under its id: the body has called it once."""
    name = unique()

    result = shared_worker.task("parent").apply_async(("failing", name, shared_worker.path("flag")))

    (child,) = result.get(timeout=TIMEOUT)
    assert isinstance(AsyncResult(child, app=shared_worker.app).get(timeout=TIMEOUT, propagate=False), ValueError)
    settle(shared_worker)
    assert ran(shared_worker, name) == once("")


@pytest.mark.parametrize("killed", [False, True])
def test_a_retry_makes_calls_of_its_own(shared_worker: SharedWorker, killed: bool) -> None:
    """A body that retries calls its children again, as with Celery's own tasks; one that is run again does not."""
    name = unique()

    result = shared_worker.task("parent").apply_async(("one", name, shared_worker.path("flag") if killed else "", 2))

    assert len(result.get(timeout=TIMEOUT)) == 1
    settle(shared_worker)
    assert ran(shared_worker, name) == {"": 3}
    assert len(shared_worker.ledger.starts("parent", task_id=result.id)) == (4 if killed else 3)


@pytest.mark.skipif(CELERY < (5, 7), reason="Celery has retry_on_worker_lost since 5.7")
@pytest.mark.parametrize("retries", [0, 1])
def test_a_retry_in_place_of_a_lost_worker_makes_the_same_calls(shared_worker: SharedWorker, retries: int) -> None:
    name = unique()

    # It counts the lost run as one of its retries.
    result = shared_worker.task("parent.retried").apply_async(("one", name, shared_worker.path("flag"), 2 * retries))

    assert len(result.get(timeout=TIMEOUT)) == 1
    settle(shared_worker)
    assert [start.retries for start in shared_worker.ledger.starts("parent.retried", task_id=result.id)] == [
        *range(2 + retries)
    ]
    assert ran(shared_worker, name) == {"": 1 + retries}


def test_two_messages_make_calls_of_their_own(shared_worker: SharedWorker) -> None:
    name = unique()

    results = [shared_worker.task("parent").apply_async(("one", name)) for _ in range(2)]

    children = [child for result in results for child in result.get(timeout=TIMEOUT)]
    settle(shared_worker)
    assert len(set(children)) == 2
    assert ran(shared_worker, name) == {"": 2}


def test_a_task_that_is_called_as_a_function_calls_for_its_caller(shared_worker: SharedWorker) -> None:
    name = unique()

    children = shared_worker.task("parent.helped").delay(name).get(timeout=TIMEOUT)

    settle(shared_worker)
    assert len(set(children)) == 2
    assert ran(shared_worker, name) == {"": 2}
    assert {shared_worker.row("child", child).task_id for child in children} == set(children)


def test_a_copy_whose_claim_comes_first_makes_the_calls_of_the_first(shared_worker: SharedWorker) -> None:
    """Two callers' chains share a message, and the first one's waits elsewhere: who takes over goes by the row, which is the first's."""
    name, flag, m = unique(), shared_worker.path("flag"), unique()

    def send(queue: str) -> AsyncResult[Any]:
        parent = shared_worker.task("parent").si("one", name, flag).set(message_id=m, queue=queue)
        return chain(parent, shared_worker.task("child").si(f"{name}:behind"), app=shared_worker.app).apply_async()

    first, second = send(unique("queue")), send(shared_worker.spec.queue)

    assert second.get(timeout=TIMEOUT) == f"{name}:behind"
    settle(shared_worker)
    row = shared_worker.row("parent", m)
    assert (row.task_id, row.ran_task_id) == (first.parent.id, second.parent.id)
    assert ran(shared_worker, name) == once("", ":behind")


# -- what is sent after a body ----------------------------------------------------------------------------------------------

Names = Callable[[str], str]

#: Sends a parent, with children whose names are made of their numbers.
Send = Callable[[SharedWorker, str, Names], "AsyncResult[Any]"]


def _with_links(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    links = [shared_worker.task("child").s(child_name(number)) for number in ("1", "2")]
    return shared_worker.task("parent.value").apply_async((name,), link=links)


def _with_one_link(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    return shared_worker.task("parent.value").apply_async((name,), link=shared_worker.task("child").s(child_name("1")))


def _ignored_with_links(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    links = [shared_worker.task("child").s(child_name(number)) for number in ("1", "2")]
    return shared_worker.task("parent.ignored").apply_async((name,), link=links)


def _with_errbacks(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    errbacks = [shared_worker.task("child").s(child_name(number)) for number in ("1", "2")]
    return shared_worker.task("parent.value").apply_async((name, False), link_error=errbacks)


def _with_one_errback(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    return shared_worker.task("parent.value").apply_async(
        (name, False), link_error=shared_worker.task("child").s(child_name("1"))
    )


def _ignored_with_errbacks(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    errbacks = [shared_worker.task("child").s(child_name(number)) for number in ("1", "2")]
    return shared_worker.task("parent.ignored").apply_async((name, False), link_error=errbacks)


def _in_a_chain(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    child = shared_worker.task("child")
    steps = [shared_worker.task("parent.value").s(name), *(child.s(child_name(number)) for number in ("1", "2"))]
    return chain(*steps, app=shared_worker.app).apply_async()


def _with_a_chain(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    child = shared_worker.task("child")
    link = chain(child.s(child_name("1")), child.s(child_name("2")), app=shared_worker.app)
    return shared_worker.task("parent.value").apply_async((name,), link=link)


def _with_a_group(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    child = shared_worker.task("child")
    link = group([child.s(child_name("1")), child.s(child_name("2"))], app=shared_worker.app)
    return shared_worker.task("parent.value").apply_async((name,), link=link)


def _with_a_chord(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    child = shared_worker.task("child")
    header = [child.s(child_name("1")), child.s(child_name("2"))]
    link = chord(header, child.s(child_name("3")), app=shared_worker.app)
    return shared_worker.task("parent.value").apply_async((name,), link=link)


def _in_a_header(shared_worker: SharedWorker, name: str, child_name: Names) -> AsyncResult[Any]:
    header = [shared_worker.task("parent.value").s(name), shared_worker.task("parent.value").s(name)]
    return chord(header, shared_worker.task("child").s(child_name("1")), app=shared_worker.app).apply_async()


#: Each way to hang something on a message, with the children that are sent in its own dispatch, and all of them.
BEHIND: dict[str, tuple[Send, str, str]] = {
    "a link": (_with_one_link, "1", "1"),
    "two links": (_with_links, "12", "12"),
    "two links, no result": (_ignored_with_links, "12", "12"),
    "an errback": (_with_one_errback, "1", "1"),
    "two errbacks": (_with_errbacks, "12", "12"),
    "a chain": (_in_a_chain, "1", "12"),
    "a link that is a chain": (_with_a_chain, "1", "12"),
    "a link that is a group": (_with_a_group, "12", "12"),
    "a link that is a chord": (_with_a_chord, "12", "123"),
}


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    ("behind", "deadly_one"), [(behind, one) for behind, (_, sent, _) in BEHIND.items() for one in sent]
)
def test_a_dispatch_that_was_cut_off_is_made_whole(
    shared_worker: SharedWorker, behind: str, deadly_one: str, moment: Moment
) -> None:
    """The worker dies just before it publishes the one or the other, or just after that."""
    name, flag = unique(), shared_worker.path("flag")
    send, _, children = BEHIND[behind]

    def child_name(number: str) -> str:
        child = f"{name}:{number}"
        return deadly(child, moment, flag) if number == deadly_one else child

    result = send(shared_worker, name, child_name)

    expected = once(*(f":{number}" for number in children))
    wait_until(
        lambda: ran(shared_worker, name).keys() >= expected.keys(),
        describe=lambda: ran(shared_worker, name),
    )
    settle(shared_worker)
    assert ran(shared_worker, name) == expected
    parents = [note for note in shared_worker.ledger.starts() if note.task_id in _family(result)]
    assert [note.task for note in parents if note.task.startswith("parent")] in (["parent.value"], ["parent.ignored"])


def _family(result: AsyncResult[Any] | None) -> list[str]:
    """Return a result's id, and those of what comes before it in its chain."""
    return [] if result is None else [result.id, *_family(result.parent)]


def test_late_errbacks_get_the_first_failure(shared_worker: SharedWorker) -> None:
    name, flag = unique(), shared_worker.path("flag")

    result = _with_errbacks(shared_worker, name, lambda number: deadly(f"{name}:{number}", "before", flag))

    wait_until(lambda: ran(shared_worker, name) == once(":1", ":2"), describe=lambda: ran(shared_worker, name))
    settle(shared_worker)
    error = result.get(timeout=TIMEOUT, propagate=False)
    assert (type(error).__name__, str(error)) == ("ValueError", name)
    assert len(shared_worker.ledger.starts("parent.value", task_id=result.id)) == 1


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_chords_body_is_sent_once(shared_worker: SharedWorker, moment: Moment) -> None:
    """Celery stores the result of a part before it sends the body, and takes it for done: recovery takes it up from its row."""
    name, flag = unique(), shared_worker.path("flag")

    result = _in_a_header(shared_worker, name, lambda number: deadly(f"{name}:{number}", moment, flag))
    parts = [part.id for part in result.parent.results]

    def rows() -> list[Row]:
        return [shared_worker.row("parent.value", part) for part in parts]

    def left() -> bool:
        return any(row.processed_status and row.status is Status.PROCESSING and row.lease_left <= 0 for row in rows())

    wait_until(left, describe=rows)
    Recovery(shared_worker.app.queue_log).run_pass()
    # Celery remembers for a while that the dead one was about to send the body.
    wait_until(lambda: {row.status for row in rows()} == {Status.DONE}, describe=rows)
    assert result.get(timeout=TIMEOUT).startswith(name)
    settle(shared_worker)
    assert ran(shared_worker, name) == once(":1")


def test_two_links_alike_are_two_messages(shared_worker: SharedWorker) -> None:
    name, flag = unique(), shared_worker.path("flag")
    link = shared_worker.task("child").s(deadly(f"{name}:1", "after", flag))

    result = shared_worker.task("parent.value").apply_async((name,), link=[link, link.clone()])

    assert result.get(timeout=TIMEOUT) == name
    settle(shared_worker)
    assert ran(shared_worker, name) == {":1": 2}


def test_each_callers_link_is_its_own(shared_worker: SharedWorker) -> None:
    """Also where both callers hang the very same on one message."""
    name, m = unique(), unique()

    results = [
        shared_worker.task("parent.value").apply_async(
            (name,), message_id=m, link=shared_worker.task("child").s(f"{name}:1")
        )
        for _ in range(2)
    ]

    assert [result.get(timeout=TIMEOUT) for result in results] == [name, name]
    settle(shared_worker)
    assert ran(shared_worker, name) == {":1": 2}
    assert len(shared_worker.starts("parent.value", m)) == 1


def test_an_errback_of_a_lost_worker_is_sent_once(shared_worker: SharedWorker) -> None:
    """The main process sends it, which knows nothing of the run."""
    name = unique()
    errback = shared_worker.task("child").si(f"{name}:1")

    result = shared_worker.task("die.early").apply_async((shared_worker.path("flag"),), link_error=errback)

    assert isinstance(result.get(timeout=TIMEOUT, propagate=False), WorkerLostError)
    wait_until(lambda: ran(shared_worker, name) == once(":1"), describe=lambda: ran(shared_worker, name))
    settle(shared_worker)
    assert ran(shared_worker, name) == once(":1")


def test_an_errback_of_a_hard_time_limit_is_sent_once(shared_worker: SharedWorker) -> None:
    """Celery reports that failure twice."""
    name = unique()
    errback = shared_worker.task("child").si(f"{name}:1")

    shared_worker.task("hard.early").apply_async((shared_worker.path("flag"),), link_error=errback)

    wait_until(lambda: ran(shared_worker, name), describe="the errback")
    settle(shared_worker)
    assert ran(shared_worker, name) == once(":1")


def test_the_rows_of_callbacks_are_those_of_their_results(shared_worker: SharedWorker) -> None:
    """A callback has its Celery id fixed, as a step of a chain has, and is known by it."""
    name = unique()

    result = _with_one_link(shared_worker, name, lambda number: f"{name}:{number}")

    assert result.get(timeout=TIMEOUT) == name
    (link,) = result.children
    assert link.get(timeout=TIMEOUT) == f"{name}:1"
    assert shared_worker.row("child", link.id).status in (Status.DONE, Status.PROCESSING)
