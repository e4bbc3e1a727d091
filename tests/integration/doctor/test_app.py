"""What doctor finds in an app's own settings; the servers are good."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery import Celery
from celery.bin.celery import celery

from celery_idempotent import QueueLog
from celery_idempotent.message.canvas_ids import is_guarded
from tests.integration.doctor.conftest import MakeApp, codes, doctor_says, examine


def test_with_a_good_set_up_nothing_is_found(make_app: MakeApp, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = doctor_says(make_app(), capsys)
    assert (status, said["findings"], said["errors"], said["warnings"], said["tasks"]) == (0, [], 0, 0, 1)
    assert "redis://" in said["broker"]
    assert "RedisStore" in said["store"]


@pytest.mark.parametrize(
    ("code", "status", "settings", "task"),
    [
        ("late-ack-worker-lost", 3, {"task_reject_on_worker_lost": False}, {}),
        ("early-ack-failure", 3, {"task_acks_late": False}, {"message_id": "order:{order_id}"}),
        ("no-result-backend", 3, {"result_backend": "disabled://"}, {}),
        ("track-started", 3, {"task_track_started": True}, {}),
        ("recovery-off", 3, {"idempotent_recovery_interval": 0}, {}),
        ("retention-short", 3, {"idempotent_retention": 600}, {}),
        ("unique-for-short", 3, {}, {"unique_for": 600}),
        ("visibility-lease", 3, {"broker_transport_options": {"visibility_timeout": 60}}, {}),
        ("visibility-time-limit", 3, {"task_time_limit": 7200}, {}),
        ("visibility-time-limit", 3, {}, {"soft_time_limit": 3600}),
        ("visibility-eta", 3, {}, {"default_retry_delay": 7200}),
        ("visibility-eta", 3, {}, {"autoretry_for": (ValueError,), "retry_backoff": True, "retry_backoff_max": 4000}),
        ("atomic-store", 1, {}, {"atomic": True}),
        ("always-eager", 1, {"task_always_eager": True}, {}),
        ("settings", 1, {}, {"on_duplicate": "skipp"}),
        ("settings", 1, {}, {"Request": "nowhere:Request"}),
    ],
)
def test_each_fault_gives_its_finding_alone(
    make_app: MakeApp,
    capsys: pytest.CaptureFixture[str],
    code: str,
    status: int,
    settings: dict[str, object],
    task: dict[str, object],
) -> None:
    app = make_app(task=task, **settings)
    ended, said = doctor_says(app, capsys)
    assert ([each["code"] for each in said["findings"]], ended) == ([code], status)
    (found,) = said["findings"]
    assert found["severity"] == ("error" if status == 1 else "warning")
    assert found["see"] == f"the documentation, page doctor, section {code}"
    assert all(found[name] for name in ("what", "stake", "remedy"))
    assert doctor_says(app, capsys, "--ignore", code)[0] == 0


def test_hooks_that_were_replaced_are_found(make_app: MakeApp) -> None:
    app = make_app()
    (task,) = (task for task in app.tasks.values() if is_guarded(task))
    for hook, found in (("__call__", []), ("before_start", ["past-the-guard"])):
        setattr(type(task), hook, lambda self, *args: None)
        assert codes(app) == found


def test_settings_of_no_effect_are_not_found(make_app: MakeApp) -> None:
    for task in (
        {"acks_late": False, "reject_on_worker_lost": False},
        {"acks_late": False, "message_id": "order:{order_id}", "on_abandoned": "fail"},
        {"acks_late": False, "message_id": "order:{order_id}", "resubmit_failed": True},
        {"reject_on_worker_lost": False, "on_abandoned": "fail"},
        {"reject_on_worker_lost": False, "retry_on_worker_lost": True},
        {"acks_late": False, "time_limit": 7200},
        {"default_retry_delay": 7200, "max_retries": 0},
        {"track_started": True, "ignore_result": True},
    ):
        assert codes(make_app(task=task)) == []


def test_an_app_without_guarded_tasks(make_app: MakeApp) -> None:
    app = make_app()
    del app.tasks["shop.charge"]
    assert codes(app) == ["no-guarded-tasks"]


@pytest.mark.parametrize(
    "option", [{"message_id": "order:{order_id}"}, {"unique_for": 60}, {"atomic": False}, {"on_duplicate": "skip"}]
)
def test_a_task_whose_base_was_forgotten(make_app: MakeApp, option: dict[str, object]) -> None:
    app = make_app()

    def mail(order_id: str) -> str:
        return order_id

    app.task(mail, name="shop.mail", shared=False, **option)
    app.task(mail, name="shop.plain", shared=False, retention=5)
    (found,) = examine(app)
    assert (found.code, found.tasks) == ("base-missing", ("shop.mail",))
    del app.tasks["shop.charge"]
    assert {*codes(app)} == {"base-missing", "no-guarded-tasks"}


def test_a_store_that_depends_on_the_working_directory(
    make_app: MakeApp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    app = make_app(idempotent_store=None)
    (found,) = examine(app)
    assert (found.code, str(tmp_path / "queue_log.db") in found.what) == ("store-relative-file", True)
    celery.params[0].default = app
    try:
        celery.main(["idempotent", "doctor"], standalone_mode=False)
    finally:
        celery.params[0].default = None
    assert f" at {tmp_path / 'queue_log.db'}, guarded tasks: 1" in capsys.readouterr().out.splitlines()[0]
    for url in (f"sqlite:///{tmp_path}/queue_log.db", f"sqlite:///file:{tmp_path}/queue_log.db?uri=true"):
        assert codes(make_app(idempotent_store=url)) == []


def test_a_setting_that_is_unknown_is_a_finding(make_app: MakeApp, capsys: pytest.CaptureFixture[str]) -> None:
    app = make_app(init=False, idempotent_leese=5)
    status, said = doctor_says(app, capsys)
    assert (status, [each["code"] for each in said["findings"]]) == (1, ["settings"])
    assert "did you mean 'idempotent_lease'" in said["findings"][0]["what"]


@pytest.mark.parametrize("url", ["nonsense", "mssql://host/db", "postgresql+nodriver://u:secret@h/d"])
def test_a_store_url_that_cannot_be_read_is_a_finding(
    make_app: MakeApp, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    status, said = doctor_says(make_app(init=False, idempotent_store=url), capsys)
    assert (status, [each["code"] for each in said["findings"]]) == (1, ["settings"])
    assert "secret" not in str(said)


@pytest.mark.parametrize(
    "url", ["nonsense://u:secret@h", "redis://u:secret@127.0.0.1:1/0", "amqp://u:secret@127.0.0.1:1//"]
)
def test_a_broker_that_is_away_is_a_finding(make_app: MakeApp, capsys: pytest.CaptureFixture[str], url: str) -> None:
    app = make_app()
    app.conf.broker_url = url
    status, said = doctor_says(app, capsys)
    assert (status, [each["code"] for each in said["findings"]]) == (1, ["broker-unreachable"])
    assert "secret" not in str(said)


def test_a_store_of_ones_own_is_read_too(make_app: MakeApp) -> None:
    from celery_idempotent import SQLStore

    app: Celery = make_app(init=False, idempotent_store="postgresql://nowhere/x")
    QueueLog(app, store=SQLStore("sqlite://"))
    assert codes(app) == ["store-in-memory"]


def test_clocks_that_differ_are_found_by_the_stores(make_app: MakeApp) -> None:
    app = make_app()
    assert codes(app, ahead=0.5) == []
    (found,) = examine(app, ahead=60.0)
    assert (found.code, "60.0 s ahead of" in found.what or "59.9 s ahead of" in found.what) == ("clock-skew", True)
    (found,) = examine(app, ahead=-7.0)
    assert "behind that of" in found.what
