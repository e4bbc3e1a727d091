"""The ``idempotent_*`` settings: from wherever Celery takes its own, in lower case, each checked by name."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from celery.utils.serialization import jsonify
from kombu.utils.encoding import safe_repr

from celery_idempotent import ConfigurationError, IdempotentTask, QueueLog
from celery_idempotent.settings import OPTION_NAMES, PREFIX, Settings, one_of, seconds, yes_or_no


def configured(**settings: Any) -> Celery:
    app = Celery("settings", set_as_current=False)
    app.conf.update(settings)
    return app


def module(**names: Any) -> ModuleType:
    made = ModuleType("settings_of_a_test")
    vars(made).update(names)
    return made


def test_the_defaults() -> None:
    settings = Settings.from_app(configured())

    assert settings == Settings(
        store="sqlite:///queue_log.db",
        table="queue_log",
        retention=7 * 86400.0,
        recovery_interval=30.0,
        lost_after=300.0,
        on_store_error="retry",
        hooks=(),
        redact=(),
    )


def test_every_setting_is_read() -> None:
    app = configured(
        idempotent_store="postgresql://there/db",
        idempotent_table="ops.queue_log",
        idempotent_retention=timedelta(days=1),
        idempotent_recovery_interval=0,
        idempotent_lost_after=1.5,
        idempotent_on_store_error="raise",
        idempotent_hooks=["there.hook", print],
        idempotent_redact=["password", "*token*"],
    )

    assert Settings.from_app(app) == Settings(
        "postgresql://there/db",
        "ops.queue_log",
        86400.0,
        0.0,
        1.5,
        "raise",
        ("there.hook", print),
        ("password", "*token*"),
    )


@pytest.mark.parametrize("value", ["password", [""], [1], 5, {"password": True}])
def test_names_are_a_list(value: object) -> None:
    with pytest.raises(ConfigurationError, match="setting idempotent_redact must be a list of names, not"):
        Settings.from_app(configured(idempotent_redact=value))


class TestWhereTheyComeFrom:
    """All the ways in which an app is configured lead to the same place."""

    def test_an_attribute(self) -> None:
        app = Celery("settings", set_as_current=False)
        app.conf.idempotent_store = "sqlite:///here.db"
        assert Settings.from_app(app).store == "sqlite:///here.db"

    def test_a_keyword_of_the_app(self) -> None:
        app = Celery("settings", set_as_current=False, idempotent_store="sqlite:///here.db")
        assert Settings.from_app(app).store == "sqlite:///here.db"

    @pytest.mark.parametrize(
        "source", [module(idempotent_store="sqlite:///here.db"), {"idempotent_store": "sqlite:///here.db"}]
    )
    def test_config_from_object(self, source: object) -> None:
        app = Celery("settings", set_as_current=False)
        app.config_from_object(source)
        assert Settings.from_app(app).store == "sqlite:///here.db"

    def test_a_namespace_as_django_projects_have_it(self) -> None:
        app = Celery("settings", set_as_current=False)
        app.config_from_object(
            module(CELERY_IDEMPOTENT_STORE="sqlite:///here.db", CELERY_IDEMPOTENT_ON_DUPLICATE="raise", DEBUG=True),
            namespace="CELERY",
        )

        @app.task(base=IdempotentTask, shared=False)
        def task() -> None: ...

        assert Settings.from_app(app).store == "sqlite:///here.db"
        assert app.tasks[task.name].idempotency.call.on_duplicate == "raise"

    def test_a_later_change_wins_over_the_object(self) -> None:
        app = Celery("settings", set_as_current=False)
        app.config_from_object(module(idempotent_table="first"))
        app.conf.idempotent_table = "second"
        assert Settings.from_app(app).table == "second"

    def test_none_is_the_default(self) -> None:
        app = configured(**dict.fromkeys([PREFIX + "store", PREFIX + "table", PREFIX + "on_store_error"]))
        assert Settings.from_app(app) == Settings()

    def test_settings_made_after_the_tasks_count(self) -> None:
        app = Celery("settings", set_as_current=False)

        @app.task(base=IdempotentTask, shared=False)
        def task() -> None: ...

        assert task.name in app.tasks, "the task is bound"
        app.conf.idempotent_store = "sqlite://"
        app.conf.idempotent_on_duplicate = "raise"

        assert app.tasks[task.name].queue_log.settings.store == "sqlite://"
        assert app.tasks[task.name].idempotency.call.on_duplicate == "raise"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("idempotent_stor", "idempotent_store"),
        ("idempotency_store", "idempotent_store"),
        ("idempotent_on_duplicates", "idempotent_on_duplicate"),
        ("idempotent_retension", "idempotent_retention"),
        ("idemopotent_table", "idempotent_table"),
        ("IDEMPOTENT_LEASE", "idempotent_lease"),
        ("idempotent_recovery", "idempotent_recovery_interval"),
    ],
)
def test_an_unknown_setting_is_refused_and_the_nearest_named(name: str, nearest: str) -> None:
    app = Celery("settings", set_as_current=False)
    app.config_from_object({name: 1})

    with pytest.raises(ConfigurationError, match=rf"unknown setting '{name}'; did you mean '{nearest}'\?"):
        Settings.from_app(app)


def test_in_a_namespace_too() -> None:
    app = Celery("settings", set_as_current=False)
    app.config_from_object(module(CELERY_IDEMPOTENT_STOR="sqlite://"), namespace="CELERY")

    with pytest.raises(ConfigurationError, match=r"'CELERY_IDEMPOTENT_STOR'; did you mean 'CELERY_IDEMPOTENT_STORE'\?"):
        Settings.from_app(app)


def test_other_peoples_settings_are_theirs() -> None:
    app = configured(store="s3://", independent_store="mine", lease=5)
    assert Settings.from_app(app) == Settings()


@pytest.mark.parametrize("name", OPTION_NAMES)
def test_each_task_option_is_a_setting(name: str) -> None:
    Settings.from_app(configured(**{PREFIX + name: None}))


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("idempotent_store", "", "setting idempotent_store must be a non-empty string, not ''"),
        ("idempotent_store", 5, "setting idempotent_store must be a non-empty string, not 5"),
        ("idempotent_table", "", "setting idempotent_table must be a non-empty string, not ''"),
        ("idempotent_retention", 0, "idempotent_retention must be a number of seconds or a timedelta, > 0, not 0"),
        (
            "idempotent_retention",
            "7d",
            "idempotent_retention must be a number of seconds or a timedelta, > 0, not '7d'",
        ),
        ("idempotent_recovery_interval", -1, "idempotent_recovery_interval must be .*, >= 0, not -1"),
        ("idempotent_lost_after", float("nan"), "idempotent_lost_after must be .*, > 0, not nan"),
        ("idempotent_lost_after", True, "idempotent_lost_after must be .*, > 0, not True"),
        (
            "idempotent_on_store_error",
            "rerun",
            r"idempotent_on_store_error must be one of 'retry', 'run', 'raise', not 'rerun'; did you mean 'run'\?",
        ),
    ],
)
def test_a_wrong_value_is_refused_with_the_settings_name(setting: str, value: object, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        Settings.from_app(configured(**{setting: value}))


def test_settings_are_read_at_the_first_use() -> None:
    app = configured(idempotent_stor="sqlite://")
    queue_log = QueueLog(app)
    with pytest.raises(ConfigurationError, match="idempotent_stor"):
        _ = queue_log.settings


class TestSeconds:
    @pytest.mark.parametrize(("value", "is_"), [(5, 5.0), (0.5, 0.5), (timedelta(minutes=2), 120.0)])
    def test_numbers_and_timedeltas(self, value: object, is_: float) -> None:
        assert seconds("lease", value, positive=True) == is_
        assert isinstance(seconds("lease", value, positive=True), float)

    @pytest.mark.parametrize("value", ["5", None, True, float("nan"), float("inf"), -1, timedelta(seconds=-1), [5], 1j])
    def test_nothing_else(self, value: object) -> None:
        with pytest.raises(ConfigurationError, match="lease must be a number of seconds or a timedelta, >= 0, not"):
            seconds("lease", value, positive=False)

    def test_zero_where_it_makes_sense(self) -> None:
        assert seconds("interval", 0, positive=False) == 0.0
        with pytest.raises(ConfigurationError, match="> 0, not 0"):
            seconds("lease", 0, positive=True)


class TestOneOf:
    def test_a_choice(self) -> None:
        assert one_of("on_duplicate", "skip", "skip", "raise") == "skip"

    @pytest.mark.parametrize(("value", "hint"), [("skp", r"'skp'; did you mean 'skip'\?"), ("no", "'no'"), (1, "1")])
    def test_nothing_else(self, value: object, hint: str) -> None:
        with pytest.raises(ConfigurationError, match=f"on_duplicate must be one of 'skip', 'raise', not {hint}$"):
            one_of("on_duplicate", value, "skip", "raise")


@pytest.mark.parametrize("value", ["false", "", 0, 1, None, []])
def test_a_flag_is_a_bool(value: object) -> None:
    assert yes_or_no("atomic", True) is True
    assert yes_or_no("atomic", False) is False
    with pytest.raises(ConfigurationError, match="atomic must be True or False, not"):
        yes_or_no("atomic", value)


# -- what is shown of them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "namespace"), [("idempotent_store", None), ("CELERY_IDEMPOTENT_STORE", "CELERY")], ids=["plain", "Django"]
)
@pytest.mark.parametrize(
    "store",
    [
        "postgresql://shop:tiger@db/shop",
        "redis://:tiger@db/0",
        "sentinel://db:26379/0?master_name=m&sentinel_password=tiger",
        sa.make_url("postgresql://shop:tiger@db/shop"),
        sa.make_url("postgresql://db/shop?password=tiger"),
    ],
    ids=str,
)
def test_the_stores_password_is_not_shown(name: str, namespace: str | None, store: Any) -> None:
    app = Celery("shop", set_as_current=False)
    app.config_from_object({name: store}, namespace=namespace)
    app.conf.broker_transport_options = {"sentinel_kwargs": {"password": "tiger"}}

    shown = [app.bugreport(), app.conf.humanize(), json.dumps(jsonify(app.conf.table(), unknown_type_filter=safe_repr))]

    assert [text for text in shown if "tiger" in text] == []
    assert all("idempotent_store" in text.lower() for text in shown)


def test_settings_do_not_show_the_stores_password() -> None:
    app = Celery("shop", set_as_current=False)
    app.conf.idempotent_store = "postgresql://shop:tiger@db/shop"
    assert "tiger" not in repr(Settings.from_app(app))
    app.conf.idempotent_store = ["postgresql://shop:tiger@db/shop"]
    with pytest.raises(ConfigurationError) as refused:
        Settings.from_app(app)
    assert "tiger" not in str(refused.value)


def test_the_report_of_an_app_masks_the_store(tmp_path: Path) -> None:
    """Its module does not import the library: the command line does."""
    (tmp_path / "shop.py").write_text(
        "from celery import Celery\n"
        "app = Celery('shop', broker='memory://')\n"
        "app.conf.idempotent_store = 'postgresql://shop:tiger@db/shop'\n"
    )
    report = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "shop", "report"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "idempotent_store: '********'" in report.stdout
    assert "tiger" not in report.stdout + report.stderr
