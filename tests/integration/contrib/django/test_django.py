"""The Django app, by the example's project: its own tests, those of ``cases``, real workers, and processes that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.integration.contrib.django.conftest import Project, on_one_database_at_least
from tests.support.servers import PrivateRedis
from tests.support.waiting import wait_until

#: Each starts Django several times, which takes half a minute on a busy machine.
pytestmark = pytest.mark.timeout(600)


def test_the_examples_tests_pass_the_second_time_as_the_first(project: Project) -> None:
    for _ in range(2):
        assert "OK" in project.manage("test", "--keepdb", "shop")
    # In several processes, each with a database of its own; dropped at the end, that which was kept as well.
    assert "OK" in project.manage(
        "test", "--noinput", "--parallel", "2", "shop.tests.OrdersTest", "shop.tests.CommittedTest"
    )


def test_calls_and_bodies_are_in_djangos_transactions(project: Project) -> None:
    printed = project.manage("test", "--noinput", "cases.transactions", "cases.bodies", SHOP_BROKER="memory://")
    assert "OK" in printed


@on_one_database_at_least
def test_workers_and_threads_in_tests(project: Project) -> None:
    printed = project.manage("test", "--noinput", "cases.threads", SHOP_BROKER="memory://")
    assert "OK" in printed


@on_one_database_at_least
def test_connections_that_are_kept_and_requests_that_are_transactions(project: Project) -> None:
    tests = ("shop", "cases.transactions", "cases.bodies", "cases.threads")
    printed = project.manage("test", "--noinput", *tests, SHOP_BROKER="memory://", DJANGO_SETTINGS_MODULE="kept")
    assert "OK" in printed


@on_one_database_at_least
def test_the_queue_log_in_the_database_of_another_alias(project: Project) -> None:
    assert "No changes detected" in project.manage("makemigrations", "--check", "--dry-run")
    for option in ("--keepdb", "--noinput"):
        printed = project.manage(
            "test", option, "cases.aliases", SHOP_BROKER="memory://", DJANGO_SETTINGS_MODULE="several"
        )
        assert "OK" in printed


@on_one_database_at_least
@pytest.mark.timeout(300)
def test_queue_log_in_djangos_test_cases(project: Project, tmp_path: Path) -> None:
    (tmp_path / "tested.py").write_text(
        f"from project.settings import *\nDATABASES['default']['TEST'] = {{'NAME': {str(tmp_path / 'test_shop.db')!r}}}\n"
    )
    on_a_file = {"DJANGO_SETTINGS_MODULE": "tested", "PYTHONPATH": f"{tmp_path}:{project.environment['PYTHONPATH']}"}
    settings: list[dict[str, Any]] = [{}, on_a_file] if project.database == "sqlite" else [{}]
    for environment in settings:
        printed = project.manage("test", "--noinput", "cases.queue_log", SHOP_BROKER="memory://", **environment)
        assert "OK" in printed


def test_the_migration_makes_the_table_that_init_would_make(project: Project) -> None:
    printed = project.manage_each(
        ("makemigrations", "--check", "--dry-run"),
        ("migrate", "-v", "0"),
        ("idempotent", "init", "--dry-run"),
        ("check", "--database", "default"),
        ("idempotent", "stats"),
        ("migrate", "-v", "0", "celery_idempotent", "zero"),
        ("sqlmigrate", "celery_idempotent", "0001"),
        ("idempotent", "init"),
        ("migrate", "-v", "0", "celery_idempotent"),  # which leaves what is there
        ("idempotent", "stats"),
    )
    assert "No changes detected" in printed[0]
    assert "has this version already" in printed[2]
    assert "no rows" in printed[4]
    assert "CREATE TABLE" in printed[6]
    assert "no rows" in printed[9]


def test_a_process_killed_behind_its_commit_leaves_the_message_to_the_relay(project: Project) -> None:
    project.manage("migrate", "-v", "0")
    place = """
import os, signal
from django.db import transaction
from shop.models import Order
from shop.tasks import charge
with transaction.atomic():
    Order.objects.create(number="o-1", amount=5)
    {first}
    charge.delay("o-1")
    {last}
"""
    project.shell(place.format(first="", last="os.kill(os.getpid(), signal.SIGKILL)"), killed=True)
    assert project.scalar("SELECT count(*) FROM shop_order") == project.scalar("SELECT count(*) FROM queue_log") == 0
    kill = "transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))"
    project.shell(place.format(first=kill, last=""), killed=True)
    assert project.scalar("SELECT count(*) FROM queue_log WHERE published_at IS NULL") == 1
    worker = project.worker()
    try:
        wait_until(lambda: is_paid(project, 1), timeout=120, describe="the relay, the charge and its confirmation")
    finally:
        stop(worker)
    assert project.scalar("SELECT count(*) FROM shop_payment") == 1


def test_a_child_killed_at_any_time_leaves_one_payment(project: Project, private_redis: PrivateRedis) -> None:
    # On a transport that is not asynchronous the children share a pipe, and one that is killed while it waits there stops all others.
    project.environment["SHOP_BROKER"] = private_redis.url
    project.manage("migrate", "-v", "0")
    place = """
import sys
from django.test import Client
from sqlalchemy.exc import OperationalError
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    placed = 0
    while placed < 2:
        try:
            Client().post("/orders/", {"number": f"o-{number}", "amount": 5})
            placed += 1
        except OperationalError as error:
            # Before Django 5.1 a view that reads first may find SQLite's database locked when it writes.
            if "database is locked" not in str(error):
                raise
"""
    worker = project.worker()
    try:
        project.shell(place, "0", "1")
        # A worker whose children die before it has started gives up.
        wait_until(lambda: is_paid(project, 1), timeout=120, describe="the first order")
        with ThreadPoolExecutor(1) as pool:
            placing = pool.submit(project.shell, place, "1", "40")
            for _ in range(4):
                time.sleep(0.5)
                children = psutil.Process(worker.pid).children()
                if children:
                    children[0].kill()
            placing.result()
        wait_until(lambda: is_paid(project, 40), timeout=150, describe="forty orders")
    finally:
        stop(worker)
    counted = "SELECT count(*) FROM (SELECT order_id FROM shop_payment GROUP BY order_id HAVING count(*) <> 1) AS wrong"
    assert project.scalar(counted) == 0


@pytest.mark.skipif(
    os.environ.get("DJANGO_VERSION") == "6.1", reason="django-celery-beat 2.9 is for Django 6.0 at most"
)
@on_one_database_at_least
def test_two_beats_from_the_database_and_results_in_it(project: Project) -> None:
    """By django-celery-beat and django-celery-results."""
    project.environment["DJANGO_SETTINGS_MODULE"] = "scheduled"
    project.manage("migrate", "-v", "0")
    project.shell(
        """
from django_celery_beat.models import IntervalSchedule, PeriodicTask
from shop.models import Order
Order.objects.create(number="o-1", amount=5)
second = IntervalSchedule.objects.create(every=1, period="seconds")
for name in ("charge", "confirm"):
    PeriodicTask.objects.create(name=name, task=f"shop.tasks.{name}", interval=second, args='["o-1"]')
"""
    )
    programs = [project.worker(), *(project.celery("beat", "-l", "INFO", "-s", f"beat-{number}") for number in (1, 2))]
    try:
        ticked = "SELECT count(*) FROM queue_log WHERE task_name <> 'celery.beat' AND processed_status = 'success' AND duplicates >= 2"
        wait_until(lambda: project.scalar(ticked) == 2, timeout=150, describe="some ticks of both jobs")
        printed = project.shell(
            """
from celery import chord
from project.celery import app
from shop.tasks import charge, confirm
first = charge.delay("o-1")
print(first.duplicate, first.get(timeout=30))
parts = [confirm.si(number).set(task_id=f"part-{number}") for number in ("1", "2")]
print(chord(parts)(confirm.si("all").set(task_id="all")).get(timeout=60))
from django_celery_results.models import TaskResult
print(TaskResult.objects.get(task_id=first.id).status, TaskResult.objects.get(task_id="all").status)
"""
        )
    finally:
        for program in programs:
            stop(program)
    assert printed.split() == ["True", "5", "None", "SUCCESS", "SUCCESS"]
    assert project.scalar("SELECT count(*) FROM shop_payment") == 1
    assert project.scalar("SELECT count(*) FROM queue_log WHERE task_name <> 'celery.beat'") == 5
    # The ticks themselves: of each interval one row.
    assert project.scalar("SELECT count(*) FROM queue_log WHERE task_name = 'celery.beat'") == 2


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ('CELERY_IDEMPOTENT_STORE = "django://other"', "names no alias of DATABASES; there are default"),
        ('DATABASES["default"]["AUTOCOMMIT"] = False', "AUTOCOMMIT = False"),
        ('CELERY_IDEMPOTENT_STORE = "sqlite:///elsewhere.db"', "no part of transaction.atomic()"),
        ("CELERY_TASK_ALWAYS_EAGER = True", "CELERY_TASK_ALWAYS_EAGER is on"),
        ('CELERY_IDEMPOTENT_STOR = "django://default"', "did you mean 'CELERY_IDEMPOTENT_STORE'"),
        ("CELERY_IDEMPOTENT_ENABLED = False", "the guard is off for all tasks"),
    ],
)
@pytest.mark.parametrize("project", ["sqlite"], indirect=True)
def test_the_checks_name_what_is_wrong(project: Project, setting: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(f"from project.settings import *\n{setting}\n")
    environment = {
        "DJANGO_SETTINGS_MODULE": "wrong",
        "PYTHONPATH": f"{tmp_path}:{project.environment['PYTHONPATH']}",
    }
    assert told in project.manage("check", "--fail-level", "WARNING", fails=True, **environment)


def is_paid(project: Project, orders: int) -> bool:
    done = "SELECT count(*) FROM queue_log WHERE status = 'done' AND processed_status = 'success'"
    return project.scalar(done) == 2 * orders


def stop(worker: subprocess.Popen[bytes]) -> None:
    os.killpg(worker.pid, signal.SIGKILL)
    worker.wait()
