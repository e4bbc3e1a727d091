"""Time is the database's: no statement carries one, and no session's time zone matters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
import sqlalchemy as sa

from celery_idempotent.stores.sql import SQLStore
from celery_idempotent.stores.sql.clock import FromNow, JustAfter, Now, UtcTimestamp, seconds
from celery_idempotent.testing.examples import KEY, new_message, processing, read


def test_no_statement_carries_a_time(store: SQLStore) -> None:
    carried: list[Any] = []

    def note(
        connection: object, cursor: object, statement: str, parameters: Any, context: object, executemany: bool
    ) -> None:
        carried.extend(parameters.values() if isinstance(parameters, dict) else parameters)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        held = processing(store, delay=-5.0)
        store.renew([held], lease=60.0)
        store.retry(held, new_message(attempt=1, delay=5.0))
        store.cancel(KEY, task_id="task-1", error="no", unique_for=60.0)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    assert carried
    assert not [value for value in carried if isinstance(value, datetime)]
    assert not [value for value in carried if isinstance(value, str) and value.startswith("20")]


@pytest.mark.parametrize("store_url", ["postgresql", "mariadb"], indirect=True)
def test_a_sessions_time_zone_does_not_matter(store: SQLStore, store_url: str) -> None:
    url = sa.make_url(store_url)
    if url.get_backend_name() == "postgresql":
        url = url.update_query_dict({"options": f"{url.query['options']} -cTimeZone=Asia/Kolkata"})
    else:
        url = url.update_query_dict({"init_command": "SET time_zone = '+05:30'"})
    elsewhere = SQLStore(url)

    processing(elsewhere, delay=None)

    row, here = read(elsewhere), read(store)
    assert abs(row.read_at - datetime.now(UTC)) < timedelta(hours=1)
    assert (row.created_timestamp, row.lease_expires_at) == (here.created_timestamp, here.lease_expires_at)
    assert 0 < row.lease_left <= 60
    elsewhere.close()


def test_moments_survive_the_database(store: SQLStore) -> None:
    table = sa.Table("moments", sa.MetaData(), sa.Column("moment", UtcTimestamp()))
    moments = [
        datetime(2026, 2, 28, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2026, 3, 1, 1, 30, tzinfo=timezone(timedelta(hours=2))),
        datetime(1999, 12, 31, tzinfo=UTC),
    ]
    with store.engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), [{"moment": moment} for moment in [*moments, None]])
        ordered = connection.execute(
            sa.select(table.c.moment).where(table.c.moment.is_not(None)).order_by(table.c.moment)
        )
        assert [moment.isoformat() for moment in ordered.scalars()] == [
            "1999-12-31T00:00:00+00:00",
            "2026-02-28T23:30:00+00:00",
            "2026-02-28T23:59:59.999999+00:00",
        ]
        found = connection.execute(sa.select(sa.func.count()).where(table.c.moment <= moments[1])).scalar()
        assert found == 2
        assert connection.execute(sa.select(table.c.moment).where(table.c.moment == moments[0])).scalar() == moments[0]


def test_a_moment_without_a_zone_is_refused(store: SQLStore) -> None:
    with store.engine.connect() as connection, pytest.raises(sa.exc.StatementError, match="aware datetimes only"):
        connection.execute(sa.select(sa.bindparam("moment", datetime(2026, 1, 1), UtcTimestamp())))  # noqa: DTZ001


@pytest.mark.parametrize("duration", [0.0, 0.001, 1.5, -1.5, 1e-9, 86400.0 * 365 * 50])
def test_durations_are_added_to_now(store: SQLStore, duration: float) -> None:
    with store.engine.connect() as connection:
        now, moment = connection.execute(sa.select(Now(), FromNow(seconds("p"))), {"p": duration}).one()
        assert moment - now == timedelta(seconds=duration)
        assert connection.execute(sa.select(FromNow(seconds("p"))), {"p": None}).scalar() is None


def test_just_after_is_never_the_same_moment(store: SQLStore) -> None:
    table = sa.Table("moments", sa.MetaData(), sa.Column("moment", UtcTimestamp()))
    ahead = datetime(2200, 1, 1, 12, 0, 0, 5, tzinfo=UTC)
    with store.engine.begin() as connection:
        table.create(connection)
        connection.execute(table.insert(), {"moment": None})
        read_now = sa.select(JustAfter(table.c.moment), Now())
        after, now = connection.execute(read_now).one()
        assert after == now
        connection.execute(table.update(), {"moment": ahead})
        assert connection.execute(read_now).one()[0] == ahead + timedelta(microseconds=1)
        connection.execute(table.update(), {"moment": datetime(2020, 1, 1, tzinfo=UTC)})
        after, now = connection.execute(read_now).one()
        assert after == now
