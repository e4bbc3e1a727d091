"""Bad input of every kind: the error names what is wrong and what to write instead, and nothing is recorded or sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from celery import Celery
from kombu.exceptions import EncodeError, SerializerNotInstalled

from celery_idempotent import (
    ConfigurationError,
    DuplicateMessageError,
    IdempotentTask,
    MessageMismatchError,
    QueueLog,
    SchemaError,
    SQLStore,
    StoreError,
    StoreUnavailableError,
    by_arguments,
    queue_log_table,
)
from celery_idempotent.core.records import RowFilter


@pytest.fixture
def app(tmp_path: Path) -> Celery:
    """Return an app with a store of its own; its broker takes messages in memory."""
    app = Celery("bad", broker="memory://", set_as_current=False)
    app.conf.idempotent_store = f"sqlite:///{tmp_path / 'queue_log.db'}"
    return app


def charge(order_id: Any, amount: int = 1, *, note: str = "") -> None: ...


def nothing_is_recorded(app: Celery) -> bool:
    return not list(QueueLog.of(app).store.rows(RowFilter()))


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("idempotent_stroe", "sqlite://", "'idempotent_store'"),
        ("idempotent_on_duplicat", "skip", "'idempotent_on_duplicate'"),
        ("idempotent_lease_seconds", 5, "'idempotent_lease'"),
        ("idempotent_on_store_error", "retyr", "idempotent_on_store_error must be one of 'retry', 'run', 'raise'"),
        ("idempotent_retention", "7 days", "idempotent_retention must be a number of seconds or a timedelta"),
        ("idempotent_recovery_interval", -1, "idempotent_recovery_interval"),
        ("idempotent_lost_after", 0, "idempotent_lost_after"),
        ("idempotent_table", "", "idempotent_table"),
    ],
)
def test_settings(app: Celery, setting: str, value: Any, says: str) -> None:
    app.conf[setting] = value
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with pytest.raises(ConfigurationError) as caught:
        task.delay("o-1")
    assert says in str(caught.value)


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_duplicat": "raise"}, "did you mean 'on_duplicate'?"),
        ({"message_ids": "{order_id}"}, "did you mean 'message_id'?"),
        ({"unique_fro": 5}, "did you mean 'unique_for'?"),
    ],
)
def test_misspelt_options_are_refused_when_the_task_is_made(app: Celery, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        _ = app.task(base=IdempotentTask, shared=False, lazy=False, **options)(charge)
    assert says in str(caught.value)
    assert "charge" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_duplicate": "drop"}, "on_duplicate must be one of 'skip', 'raise'"),
        ({"on_processing": "wait"}, "on_processing must be one of 'hold', 'skip', 'raise'"),
        ({"on_abandoned": "rerunn"}, "did you mean 'rerun'?"),
        ({"resubmit_failed": "no"}, "resubmit_failed must be True or False"),
        ({"keep_result": 0}, "keep_result must be True or False"),
        ({"fingerprint": "sha256"}, "fingerprint must be True or False"),
        ({"lease": 0}, "lease must be a number of seconds or a timedelta, > 0"),
        ({"lease": "60"}, "lease must be a number"),
        ({"unique_for": float("nan")}, "unique_for must be a number"),
        ({"atomic": "yes"}, "atomic must be True or False"),
        ({"message_id": "order"}, "names no argument"),
        ({"message_id": "{0}"}, "positional field"),
        ({"message_id": "{order}"}, "did you mean 'order_id'?"),
        ({"message_id": "{order_id"}, "is not a format string"),
        ({"message_id": 5}, "message_id=5"),
        ({"message_id": by_arguments("oder_id")}, "did you mean 'order_id'?"),
    ],
)
def test_options(app: Celery, options: dict[str, Any], says: str) -> None:
    task = app.task(base=IdempotentTask, shared=False, **options)(charge)
    with pytest.raises(ConfigurationError) as caught:
        task.delay("o-1")
    assert says in str(caught.value)
    assert "charge" in str(caught.value)
    assert nothing_is_recorded(app)


# -- calls -------------------------------------------------------------------------------------------------------------


class Opaque:
    pass


@dataclass(frozen=True)
class Order:
    items: tuple[Any, ...]


@pytest.mark.parametrize(
    ("make", "call", "says"),
    [
        ({}, {"message_id": ""}, "cannot be empty"),
        ({}, {"message_id": "x" * 256}, "by_arguments"),
        ({}, {"message_id": 7}, "convert it to str"),
        ({}, {"message_id": "a\0b"}, "NUL"),
        ({}, {"message_id": "m", "task_id": "a\0b"}, "task_id"),
        ({}, {"message_id": "m", "task_id": 7}, "task_id is text"),
        ({}, {"message_id": "m", "task_id": "x" * 256}, "256 characters"),
        ({}, {"retries": 2**70}, "retries is a whole number"),
        ({}, {"mesage_id": "m"}, "message_id"),
        ({"message_id": lambda order_id, amount=1, note="": None}, {}, "returned None"),
        ({"message_id": "order:{order_id}"}, {"args": (None,)}, "order_id is None"),
        ({"message_id": by_arguments()}, {"args": (Opaque(),)}, "order_id"),
        ({"message_id": by_arguments()}, {"args": (Order(items=(1, Opaque())),)}, "items[1]"),
    ],
)
def test_calls(app: Celery, make: dict[str, Any], call: dict[str, Any], says: str) -> None:
    task = app.task(base=IdempotentTask, shared=False, **make)(charge)
    with pytest.raises(ConfigurationError) as caught:
        task.apply_async(**{"args": ("o-1",), **call})
    assert says in str(caught.value)
    assert nothing_is_recorded(app)


@pytest.mark.parametrize("options", [{}, {"message_id": "{order_id}"}, {"fingerprint": True}], ids=repr)
@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "charge.*order_id"),
        ({"args": ("o-1", 1, 2)}, "charge.*positional argument"),
        ({"args": ("o-1",), "kwargs": {"amuont": 1}}, "charge.*unexpected keyword argument 'amuont'"),
        ({"args": "o-1"}, "task args must be a list or tuple"),
        ({"args": ("o-1",), "kwargs": ["amount"]}, "task keyword arguments must be a mapping"),
    ],
    ids=["missing", "too many", "unknown", "no tuple", "no mapping"],
)
def test_arguments_that_do_not_fit_are_a_type_error_as_without_us(
    app: Celery, options: dict[str, Any], call: dict[str, Any], says: str
) -> None:
    task = app.task(base=IdempotentTask, shared=False, **options)(charge)
    with pytest.raises(TypeError, match=says):
        task.apply_async(**call)
    assert nothing_is_recorded(app)


@pytest.mark.parametrize(
    "call", [{"args": (object(),)}, {"args": ("o-1",), "serializer": "jsno"}], ids=["value", "name"]
)
def test_an_unserializable_argument_raises_the_serializers_error(app: Celery, call: dict[str, Any]) -> None:
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with pytest.raises((EncodeError, SerializerNotInstalled)):
        task.apply_async(**call)
    assert nothing_is_recorded(app)


def test_an_error_of_the_users_own_callable_is_theirs(app: Celery) -> None:
    task = app.task(base=IdempotentTask, shared=False, message_id=lambda order_id: order_id.number)(charge)
    with pytest.raises(AttributeError, match="number"):
        task.delay("o-1")
    assert nothing_is_recorded(app)


def test_an_annotation_is_checked_like_an_option(app: Celery) -> None:
    app.conf.task_annotations = {"*": {"on_duplicat": "raise"}}
    with pytest.raises(
        ConfigurationError, match=r"charge: unknown option 'on_duplicat'; did you mean 'on_duplicate'\?"
    ):
        app.task(base=IdempotentTask, shared=False, lazy=False)(charge)


def test_a_duplicate_and_a_mismatch_say_what_to_do(app: Celery) -> None:
    task = app.task(base=IdempotentTask, shared=False, message_id="order:{order_id}", on_duplicate="raise")(charge)
    first = task.delay("o-1", 500)
    with pytest.raises(DuplicateMessageError, match="on_duplicate='skip'") as duplicate:
        task.delay("o-1", 500)
    assert (duplicate.value.task_id, duplicate.value.status) == (first.id, "pending")
    with pytest.raises(MessageMismatchError, match="fingerprint=False"):
        task.delay("o-1", 900)


def test_a_mismatch_names_the_arguments_and_shows_no_value(app: Celery) -> None:
    task = app.task(base=IdempotentTask, shared=False, message_id="order:{order_id}")(charge)
    task.delay("o-1", 500)
    for amount, note, says in ((900, "", "amount"), ("s3cret", "s3cret", "amount (str, first int), note")):
        with pytest.raises(MessageMismatchError) as mismatch:
            task.delay("o-1", amount, note=note)
        assert (mismatch.value.differs, f"(different: {says})" in str(mismatch.value)) == (says, True)
        assert "s3cret" not in str(mismatch.value)
    app.conf.accept_content = ["yaml"]  # the row is not read
    with pytest.raises(MessageMismatchError, match="with other arguments; make") as mismatch:
        task.delay("o-1", 900)
    assert mismatch.value.differs is None


@pytest.mark.parametrize(
    ("argument", "error", "says"),
    [
        (object(), ConfigurationError, "amount is of type object, which has no canonical form: pass plain data"),
        (
            {1, 2},
            EncodeError,
            r"the serializer json cannot take .*set is not JSON serializable.*such as a list for a set",
        ),
    ],
)
def test_an_argument_that_cannot_be_sent(app: Celery, argument: object, error: type[Exception], says: str) -> None:
    task = app.task(base=IdempotentTask, shared=False, message_id="order:{order_id}")(charge)
    with pytest.raises(error, match=says):
        task.delay("o-1", argument)
    assert nothing_is_recorded(app)


# -- stores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("no url", "idempotent_store"),
        ("oracle://scott:tiger@db/x", "redis://host"),
        ("redis://:tiger@localhost/queue", "by its number"),
        ("postgresql+psycopg2://u:tiger@localhost/x", "run: pip install psycopg2"),
        ("mysql+mysqldb://u:tiger@localhost/x", "run: pip install mysqlclient"),
        ("postgresql://u:tiger@localhost:port/x", "postgresql://user:password@host/database"),
        ("http://u:tiger@localhost/x", "begins with http://"),
    ],
)
def test_stores(app: Celery, url: str, says: str) -> None:
    app.conf.idempotent_store = url
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with pytest.raises(ConfigurationError) as caught:
        task.delay("o-1")
    assert says in str(caught.value)
    assert "tiger" not in str(caught.value)


@pytest.mark.parametrize("missing", ["postgresql", "mariadb"])
def test_a_missing_table_on_a_server_names_init(
    app: Celery, missing: str, request: pytest.FixtureRequest, closing: Callable[[Celery], None]
) -> None:
    app.conf.idempotent_store = request.getfixturevalue(f"{missing}_url")
    app.conf.idempotent_table = "queue_log_that_is_not_there"
    closing(app)
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with pytest.raises(SchemaError, match="idempotent init"):
        task.delay("o-1")


@pytest.fixture
def closing() -> Any:
    """Close what an app has opened."""
    apps: list[Celery] = []
    yield apps.append
    for app in apps:
        QueueLog.of(app).close()


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        ("psycopg", "postgresql://u:tiger@localhost/x", "'celery-idempotent[postgresql]'"),
        ("pymysql", "mysql://u:tiger@localhost/x", "'celery-idempotent[mysql]'"),
        ("pymysql", "mariadb://u:tiger@localhost/x", "'celery-idempotent[mysql]'"),
    ],
)
def test_a_missing_driver_names_the_extra(
    app: Celery, monkeypatch: pytest.MonkeyPatch, package: str, url: str, extra: str
) -> None:
    for loaded in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, package, None)
    app.conf.idempotent_store = url
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with pytest.raises(ConfigurationError) as caught:
        task.delay("o-1")
    assert f"run: pip install {extra}" in str(caught.value)
    assert "tiger" not in str(caught.value)


@pytest.mark.parametrize(
    ("server", "option", "says"),
    [
        ("postgresql", "nonsense=1", 'invalid connection option "nonsense"'),
        ("postgresql", "connect_timeout=soon", "connect_timeout"),
        ("mariadb", "nonsense=1", "nonsense"),
        ("mariadb", "read_timeout=soon", "soon"),
    ],
)
def test_a_wrong_option_in_the_url_is_named(
    app: Celery, request: pytest.FixtureRequest, server: str, option: str, says: str
) -> None:
    url = sa.make_url(request.getfixturevalue(f"{server}_url")).set(password="tiger")
    app.conf.idempotent_store = f"{url.render_as_string(hide_password=False)}?{option}"
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with pytest.raises((ConfigurationError, StoreError)) as caught:
        task.delay("o-1")
    assert not isinstance(caught.value, StoreUnavailableError), "asking again would not help"
    assert says in str(caught.value)
    assert "tiger" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://shop:tiger@127.0.0.1:1/shop",
        "postgresql://shop:tiger@127.0.0.1:1/shop?password=tiger",
        "mysql://shop:tiger@127.0.0.1:1/shop",
        "mysql://shop:tiger@127.0.0.1:1/shop?passwd=tiger",
    ],
)
def test_a_password_is_never_shown(app: Celery, url: str, caplog: pytest.LogCaptureFixture) -> None:
    app.conf.update(idempotent_store=url, task_publish_retry=False)
    task = app.task(base=IdempotentTask, shared=False)(charge)
    with caplog.at_level("DEBUG"), pytest.raises(StoreUnavailableError) as caught:
        task.delay("o-1")
    for shown in (str(caught.value), repr(caught.value), repr(task.queue_log.store), caplog.text):
        assert "tiger" not in shown
    assert "127.0.0.1:1/shop" in str(caught.value)


def test_a_url_is_no_store(app: Celery) -> None:
    with pytest.raises(ConfigurationError, match=r"takes a store such as SQLStore\(url\).*setting idempotent_store"):
        QueueLog(app, store="sqlite://")  # type: ignore[arg-type]


@pytest.mark.parametrize("store_url", ["sqlite", "postgresql", "mariadb"], indirect=True)
class TestATableThatIsBehind:
    @pytest.fixture
    def behind(self, app: Celery, store_url: str) -> Iterator[Celery]:
        engine = sa.create_engine(SQLStore(store_url).engine.url, poolclass=sa.NullPool)
        table = queue_log_table(sa.MetaData())
        table._columns.remove(table.c.token)
        table._columns.remove(table.c.duplicates)
        with engine.begin() as connection:
            table.create(connection)
        app.conf.idempotent_store = store_url
        yield app
        QueueLog.of(app).close()

    def test_is_reported_and_not_used(self, behind: Celery) -> None:
        task = behind.task(base=IdempotentTask, shared=False)(charge)
        with pytest.raises(SchemaError) as caught:
            task.delay("o-1")
        assert "queue_log lacks token, duplicates" in str(caught.value)
        assert "add the columns by a migration" in str(caught.value)
        assert "idempotent init" in str(caught.value)

    def test_is_not_touched_by_init(self, behind: Celery) -> None:
        with pytest.raises(SchemaError, match="was not touched"):
            QueueLog(behind).init()


class TestADamagedRow:
    @pytest.fixture
    def damage(self, app: Celery) -> Callable[[str], None]:
        """Change the one row past the library."""

        def damage(assignment: str) -> None:
            with QueueLog.of(app).store.engine.begin() as connection:  # type: ignore[attr-defined]
                assert connection.execute(sa.text(f"UPDATE queue_log SET {assignment}")).rowcount == 1

        return damage

    @pytest.mark.parametrize("assignment", ["status = 'finished'", "status = 'done', processed_status = 'ok'"])
    def test_an_unknown_status_is_named(self, app: Celery, damage: Callable[[str], None], assignment: str) -> None:
        task = app.task(base=IdempotentTask, shared=False, message_id="{order_id}")(charge)
        task.delay("o-1")
        damage(assignment)
        store = QueueLog.of(app).store

        for use in (
            lambda: task.delay("o-1"),
            lambda: task.apply(("o-1",), throw=True),
            lambda: list(store.rows(RowFilter())),
        ):
            with pytest.raises(StoreError) as caught:
                use()
            assert "'o-1'" in str(caught.value)
            assert "is damaged" in str(caught.value)
            assert "correct the row, or delete it" in str(caught.value)
        with pytest.raises(StoreError, match="is damaged"):
            store.counts()

    @pytest.mark.parametrize("damaged", ["X'00ff'", "X''", "CAST('application/json;utf-8' AS BLOB)"])
    def test_a_result_that_cannot_be_read_is_no_result(
        self, app: Celery, damage: Callable[[str], None], damaged: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        runs: list[str] = []
        app.conf.task_always_eager = True
        task = app.task(base=IdempotentTask, shared=False, message_id="{order_id}")(_noting(runs))
        assert task.delay("o-1").get() == "o-1"
        damage(f"result = {damaged}")

        again = task.delay("o-1")

        assert again.duplicate
        assert again.get() is None
        assert runs == ["o-1"], "what is damaged is the result, not the fact that it ran"
        assert "cannot read" in caplog.text


def _noting(runs: list[str]) -> Callable[[str], str]:
    def note(order_id: str) -> str:
        runs.append(order_id)
        return order_id

    return note
