"""Who may look, who may requeue, and at which address: the same as for Flower's own pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from tornado.web import create_signed_value

from celery_idempotent.core.records import ProcessedStatus
from tests.integration.contrib.flower.conftest import OPERATOR
from tests.integration.contrib.flower.test_page import fail, text_of, visit, wait_for_text
from tests.support.deployment import unique
from tests.support.flower import Answer, FlowerProcess
from tests.support.shared_workers import SharedWorker
from tests.support.waiting import wait_until

pytestmark = pytest.mark.xdist_group("flower")

REQUEUE = "/api/queue-log/requeue"


def requeue(flower: FlowerProcess, message_id: str, *, task: str = "fail", **options: object) -> Answer:
    return flower.post(REQUEUE, message_id=message_id, task_name=task, **options)  # type: ignore[arg-type]


def untouched(shared_worker: SharedWorker, message_id: str) -> bool:
    row = shared_worker.row("fail", message_id)
    return row.processed_status is ProcessedStatus.FAILURE and row.token == 1


@contextmanager
def open_flower(shared_worker: SharedWorker, *arguments: str, **environment: str) -> Iterator[FlowerProcess]:
    with FlowerProcess(
        shared_worker.ledger.path.parent, shared_worker.spec, *arguments, environment=environment
    ) as flower:
        yield flower


def test_an_unauthenticated_user_sees_and_changes_nothing(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = fail(shared_worker)

    for credentials in (None, "operator:wrong"):
        for path in ("/queue-log", "/queue-log/message"):
            answer = flower.get(path, credentials=credentials, id=message_id, task="fail")
            assert answer == (401, "Access denied")
        assert requeue(flower, message_id, credentials=credentials).status == 401
    assert untouched(shared_worker, message_id)


def test_an_authenticated_user_may_requeue(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = fail(shared_worker)

    answer = requeue(flower, message_id, credentials=OPERATOR)

    assert answer.status == 200
    assert '"message": "It waits again."' in answer.text
    shared_worker.wait_for_starts("fail", message_id, 2)


def test_a_page_of_another_site_may_not(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = fail(shared_worker)

    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://elsewhere.example"}):
        assert requeue(flower, message_id, credentials=OPERATOR, headers=headers).status == 403
    assert untouched(shared_worker, message_id)


def test_a_refused_requeue_changes_nothing_and_says_why(flower: FlowerProcess, shared_worker: SharedWorker) -> None:
    message_id = unique("good")
    shared_worker.task("echo").apply_async((1,), message_id=message_id).get(timeout=30)
    forgotten = fail(shared_worker)
    assert shared_worker.app.queue_log.store.forget(shared_worker.row("fail", forgotten))

    succeeded = requeue(flower, message_id, task="echo", credentials=OPERATOR)

    assert succeeded.status == 409
    assert succeeded.text.startswith("Not requeued: it succeeded;")
    said = "Not requeued: it was forgotten, and its arguments are gone; send it again by a call"
    assert requeue(flower, forgotten, credentials=OPERATOR) == (409, said)
    assert requeue(flower, "nobody's", credentials=OPERATOR) == (404, 'No message "nobody\'s" of task fail')
    assert requeue(flower, "", task="", credentials=OPERATOR).status == 404


def test_without_authentication_one_looks_and_changes_nothing(shared_worker: SharedWorker, browser: Chrome) -> None:
    message_id = fail(shared_worker)
    with open_flower(shared_worker) as flower:
        answer = requeue(flower, message_id)
        visit(browser, flower, "/queue-log", credentials=None)
        wait_for_text(browser, "#ql-failed-table", message_id)
        button = browser.find_element(By.CSS_SELECTOR, f"[data-requeue='{message_id}']")

        assert answer.status == 401
        assert "FLOWER_UNAUTHENTICATED_API" in answer.text
        assert not button.is_enabled()
        assert "Flower allows no changes without authentication" in text_of(browser, "#failed")
    assert untouched(shared_worker, message_id)


def test_an_open_flower_lets_everybody_requeue_under_its_prefix_too(
    shared_worker: SharedWorker, browser: Chrome
) -> None:
    message_id = fail(shared_worker)
    with open_flower(shared_worker, "--url_prefix=tools/flower", FLOWER_UNAUTHENTICATED_API="true") as flower:
        visit(browser, flower, "/tasks", credentials=None)
        browser.find_element(By.LINK_TEXT, "Queue log").click()
        assert browser.current_url == f"{flower.url}/queue-log"
        wait_for_text(browser, "#ql-failed-table", message_id)

        browser.find_element(By.CSS_SELECTOR, f"[data-requeue='{message_id}']").click()
        browser.switch_to.alert.accept()

        wait_for_text(browser, "#ql-said", "It waits again.")
        shared_worker.wait_for_starts("fail", message_id, 2)
        assert "celery_idempotent_queue_log_up 1.0" in flower.get("/metrics").text


def test_a_requeue_needs_flowers_own_token(shared_worker: SharedWorker, browser: Chrome) -> None:
    message_id, secret = fail(shared_worker), "cookies are signed with this"
    arguments = (
        "--auth=operator@example.com",
        f"--cookie_secret={secret}",
        *("--oauth2_key=key", "--oauth2_secret=secret", "--oauth2_redirect_uri=http://127.0.0.1/login"),
    )
    with open_flower(shared_worker, *arguments) as flower:
        signed = create_signed_value(secret, "user", "operator@example.com").decode()
        assert requeue(flower, message_id).status == 403
        assert requeue(flower, message_id, headers={"Cookie": f"user={signed}"}).status == 403
        assert untouched(shared_worker, message_id)
        browser.get(f"{flower.url}/healthcheck")
        browser.add_cookie({"name": "user", "value": signed})
        visit(browser, flower, f"/queue-log?q={message_id}", credentials=None)

        browser.find_element(By.CSS_SELECTOR, "[data-requeue]").click()
        browser.switch_to.alert.accept()

        wait_for_text(browser, "#ql-said", "It waits again.")
        shared_worker.wait_for_starts("fail", message_id, 2)
        assert "requeued from Flower by operator@example.com" in flower.log.read_text()
        browser.delete_all_cookies()


def test_a_read_only_flower_changes_nothing_for_anybody(shared_worker: SharedWorker) -> None:
    message_id = fail(shared_worker)
    with open_flower(shared_worker, f"--basic_auth={OPERATOR}", "--read_only=True") as flower:
        answer = requeue(flower, message_id, credentials=OPERATOR)
        page = flower.get("/queue-log", credentials=OPERATOR)

    assert answer == (403, "Read only mode is enabled")
    assert "Flower is in read-only mode" in page.text
    assert untouched(shared_worker, message_id)


def test_flower_keeps_its_state_over_a_restart(shared_worker: SharedWorker) -> None:
    database = shared_worker.path("flower")
    arguments = ("--persistent=True", f"--db={database}", "--state_save_interval=300")
    with open_flower(shared_worker, *arguments) as flower:
        assert flower.get("/queue-log").status == 200
        result = shared_worker.task("echo").apply_async((1,), message_id=unique())
        result.get(timeout=30)
        wait_until(
            lambda: result.id in flower.get("/tasks/datatable?draw=1&start=0&length=100&order[0][column]=0").text
        )
        flower.process.terminate()
        flower.process.wait(timeout=30)
        assert "Traceback" not in flower.log.read_text()

    with open_flower(shared_worker, *arguments) as flower:
        assert result.id in flower.get("/tasks/datatable?draw=1&start=0&length=100&order[0][column]=0").text
