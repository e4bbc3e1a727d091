"""The *Queue log* page, looked at with a browser while real messages run, fail and are repeated."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from celery_idempotent.core.records import Claimed, MessageKey, NewMessage, ProcessedStatus
from celery_idempotent.message.serialization import encode_message
from tests.integration.contrib.flower.conftest import OPERATOR, wait_for_state
from tests.support.deployment import unique
from tests.support.flower import FlowerProcess
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("flower")

#: What no page may show.
SECRET = "card-4111-1111"


def visit(browser: Chrome, flower: FlowerProcess, path: str, *, credentials: str | None = OPERATOR) -> None:
    """Open a page as somebody whom the browser knows from then on."""
    if credentials is not None:
        address = urlsplit(flower.url)
        browser.get(f"{address.scheme}://{credentials}@{address.netloc}{address.path}{path}")
    # The page's own requests must not have them in their address.
    browser.get(flower.url + path)


def text_of(browser: Chrome, selector: str) -> str:
    """Return the text of a part of the page; nothing while it is being replaced."""
    found = browser.execute_script(
        "const e = document.querySelector(arguments[0]); return e ? e.innerText : ''", selector
    )
    return str(found)


def wait_for_text(browser: Chrome, selector: str, *texts: str, timeout: float = 30.0) -> str:
    """Wait for all of these in the text of a part of the page, which refreshes itself."""

    def there() -> str | None:
        text = text_of(browser, selector)
        return text if all(wanted in text for wanted in texts) else None

    return wait_until(there, timeout=timeout, describe=lambda: f"{texts} in {selector}: {text_of(browser, 'body')}")


def row_of(browser: Chrome, table: str, text: str) -> str:
    """Return the row of a table that has a text."""
    rows = browser.execute_script(
        "return [...document.querySelectorAll(arguments[0] + ' tbody tr')].map(row => row.innerText)", table
    )
    return next((str(row) for row in rows if text in row), "")


def fail(shared_worker: SharedWorker, *, text: str = "no such card") -> str:
    """Return the id of a message that has failed."""
    message_id = unique("failed")
    shared_worker.task("fail").apply_async((text,), message_id=message_id)
    shared_worker.wait_until_done("fail", message_id)
    return message_id


def test_it_shows_what_runs_what_failed_and_what_was_repeated(
    flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome
) -> None:
    failed, gate = fail(shared_worker), shared_worker.path("gate")
    running, repeated = unique("running"), unique("repeated")
    shared_worker.task("once").apply_async((SECRET, gate), message_id=running)
    shared_worker.wait_for_starts("once", running)
    result = shared_worker.task("echo").apply_async((SECRET,), message_id=repeated)
    result.get(timeout=30)
    shared_worker.task("echo").apply_async((SECRET,), message_id=repeated)
    shared_worker.deliver("echo", (SECRET,), message_id=repeated, task_id=result.id)
    held = shared_worker.deliver("once", (SECRET, gate), message_id=running)

    visit(browser, flower, "/queue-log")

    wait_for_text(browser, "#alarms", "failed within the last hour", "ValueError")
    assert "ValueError: no such card" in row_of(browser, "#ql-failed-table", failed)
    assert "left" in row_of(browser, "#ql-running-table", running)
    assert shared_worker.worker.hostname in row_of(browser, "#ql-running-table", running)
    wait_for_text(browser, "#ql-held-table", running, held.id)
    wait_for_text(browser, "#ql-duplicates-table", repeated, shared_worker.worker.hostname)
    wait_until(
        lambda: "success" in (row := row_of(browser, "#ql-duplicates-table", repeated)) and "2" in row.split(),
        describe=lambda: row_of(browser, "#ql-duplicates-table", repeated),
    )
    counts = {
        (count.task_name, count.processed_status): count.rows for count in shared_worker.app.queue_log.store.counts()
    }
    number = counts["fail", ProcessedStatus.FAILURE]
    wait_until(
        lambda: row_of(browser, "#ql-counts-table", "fail").split()[1:2] == [str(number)],
        describe=lambda: (number, text_of(browser, "#ql-counts-table")),
    )
    assert SECRET not in browser.page_source
    Path(gate).touch()


def test_it_is_in_the_navigation_and_leads_to_the_tasks_own_page(
    flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome
) -> None:
    message_id = unique("failed")
    result = shared_worker.task("fail").apply_async(("linked",), message_id=message_id)
    wait_for_state(flower, result.id, "FAILURE")
    visit(browser, flower, "/tasks")

    browser.find_element(By.LINK_TEXT, "Queue log").click()

    wait_for_text(browser, "#ql-failed-table", message_id)
    assert browser.find_element(By.CSS_SELECTOR, ".nav-link.active").text == "Queue log"
    visit(browser, flower, f"/queue-log?q={message_id}", credentials=None)
    browser.find_element(By.LINK_TEXT, result.id).click()
    assert browser.current_url == f"{flower.url}/task/{result.id}"
    wait_for_text(browser, "#task-page", "FAILURE")


def test_a_message_is_found_by_its_id_whatever_that_is(
    flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome
) -> None:
    message_id = f"{unique('ключ')} <b>\"&' 订单%2B+"
    shared_worker.task("echo").apply_async((SECRET,), message_id=message_id).get(timeout=30)
    visit(browser, flower, "/queue-log")

    browser.find_element(By.ID, "ql-search").send_keys(message_id, Keys.ENTER)

    wait_for_text(browser, "h1", message_id)
    sheet = text_of(browser, "#ql-row")
    row = shared_worker.row("echo", message_id)
    assert "done / success" in sheet
    assert row.created_timestamp.strftime("%Y-%m-%d %H:%M:%S") in sheet
    assert str(row.worker) in sheet
    assert SECRET not in browser.page_source


def test_messages_are_found_by_a_pattern(flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome) -> None:
    prefix = unique("order")
    for task, number in (("echo", 1), ("add", 2)):
        shared_worker.task(task).apply_async((1, 2) if task == "add" else (1,), message_id=f"{prefix}:{number}").get(
            timeout=30
        )

    visit(browser, flower, f"/queue-log?q={prefix}:*")

    found = text_of(browser, "#found")
    assert f"{prefix}:1\techo\tsuccess" in found
    assert f"{prefix}:2\tadd\tsuccess" in found
    browser.find_element(By.LINK_TEXT, f"{prefix}:2").click()
    wait_for_text(browser, "h1", f"{prefix}:2")
    visit(browser, flower, f"/queue-log?q={prefix}", credentials=None)
    assert "There is none." in text_of(browser, "#found")


def test_an_absent_message_is_not_found(flower: FlowerProcess) -> None:
    answer = flower.get("/queue-log/message", credentials=OPERATOR, id="nobody's", task="echo")

    assert answer.status == 404
    assert "The queue log has no message of this id and task." in answer.text


def test_a_failed_message_is_requeued_with_a_button(
    flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome
) -> None:
    key = unique("again")
    shared_worker.task("flaky").apply_async((SECRET, shared_worker.path("flag")), message_id=key)
    shared_worker.wait_until_done("flaky", key)
    visit(browser, flower, "/queue-log")
    wait_for_text(browser, "#ql-failed-table", key)
    button = browser.find_element(By.CSS_SELECTOR, f"[data-requeue='{key}']")

    button.click()
    question = browser.switch_to.alert
    assert f"Requeue flaky[{key}]?" in question.text
    question.accept()

    wait_for_text(browser, "#ql-said", "It waits again.")
    shared_worker.wait_for_row("flaky", key, lambda row: row.processed_status is ProcessedStatus.SUCCESS)
    wait_until(lambda: not row_of(browser, "#ql-failed-table", key))
    assert len(shared_worker.starts("flaky", key)) == 2


def test_nothing_is_requeued_by_who_thinks_better_of_it(
    flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome
) -> None:
    message_id = fail(shared_worker)
    visit(browser, flower, f"/queue-log?q={message_id}")

    browser.find_element(By.CSS_SELECTOR, "[data-requeue]").click()
    browser.switch_to.alert.dismiss()

    assert len(shared_worker.starts("fail", message_id)) == 1
    assert shared_worker.row("fail", message_id).processed_status is ProcessedStatus.FAILURE
    assert "ValueError: no such card" in text_of(browser, "#ql-error")


def test_an_abandoned_claim_comes_first(flower: FlowerProcess, shared_worker: SharedWorker, browser: Chrome) -> None:
    message_id = unique("left")
    message = encode_message((SECRET,), {}, {}, serializer="json")
    new = NewMessage(MessageKey(message_id, "echo"), unique("task"), message=message)
    claimed = shared_worker.app.queue_log.store.claim(new, worker="gone@there:7", lease=0.001, grace=30.0)
    assert isinstance(claimed, Claimed)

    visit(browser, flower, "/queue-log")

    wait_for_text(browser, "#alarms", "whose worker died is not taken over")
    assert "ran out" in row_of(browser, "#ql-running-table", message_id)
    assert "gone@there:7" in row_of(browser, "#ql-running-table", message_id)
    visit(browser, flower, f"/queue-log?q={message_id}", credentials=None)
    assert "Its worker died" in text_of(browser, "#ql-state")
    browser.find_element(By.CSS_SELECTOR, f"[data-requeue='{message_id}']").click()
    browser.switch_to.alert.accept()
    wait_for_text(browser, "#ql-said", "It waits again.")
    shared_worker.wait_for_row("echo", message_id, lambda row: row.processed_status is ProcessedStatus.SUCCESS)
