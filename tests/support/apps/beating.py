"""The app of beats that run for real: entries of each kind, whose messages say when they were published."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from celery import Celery, signals
from celery.schedules import BaseSchedule, crontab, solar

from celery_idempotent import IdempotentTask

__all__ = ["BeatSpec"]


@dataclass(frozen=True, slots=True)
class BeatSpec:
    """A description of the app; everything in it is JSON.

    Attributes:
        scheduler: The scheduler's path.
        broker: Broker URL; RedBeat keeps its entries there.
        queue: The queue of all messages, and the prefix of RedBeat's keys.
        store: URL of the queue log's store.
        table: Name of its table.
        database: URL of the PostgreSQL that django-celery-beat's models are in; ``None`` without Django.
        sunset: When the sun sets in the place of the solar entry: seconds since 1970.
    """

    scheduler: str
    broker: str
    queue: str
    store: str
    table: str = "queue_log"
    database: str | None = None
    sunset: float = 0.0

    #: The environment variable in which a beat finds its app.
    VARIABLE: ClassVar[str] = "CELERY_IDEMPOTENT_TEST_BEAT"

    def environment(self) -> dict[str, str]:
        """Return what a beat needs to find in its environment."""
        return {BeatSpec.VARIABLE: json.dumps(asdict(self))}

    def schedule(self) -> dict[str, dict[str, Any]]:
        """Return the entries. The first argument of each is its name."""
        schedules: dict[str, Any] = {
            "interval": 2.0,
            "cron": crontab(),
            "solar": self._once_a_day(),
        }
        return {
            f"{kind}.{task}": {"task": f"beating.{task}", "schedule": schedule, "args": [f"{kind}.{task}"]}
            for kind, schedule in schedules.items()
            for task in ("plain", "guarded")
        }

    def _once_a_day(self) -> BaseSchedule:
        moment = datetime.fromtimestamp(self.sunset, UTC)
        if "redbeat" in self.scheduler:  # it cannot keep a solar entry (2.4.2)
            from redbeat.schedules import rrule

            return rrule("DAILY", dtstart=moment.replace(microsecond=0))
        return solar("sunset", 0.0, _longitude_of_sunset(moment))

    def build(self) -> Celery:
        """Build the app; nothing is connected or created."""
        if self.database is not None:
            _set_up_django(self.database)
        app = Celery("beating", broker=self.broker, set_as_current=False)
        app.conf.update(
            beat_schedule=self.schedule(),
            beat_scheduler=self.scheduler,
            beat_max_loop_interval=1.0,
            broker_connection_retry_on_startup=True,
            idempotent_store=self.store,
            idempotent_table=self.table,
            redbeat_key_prefix=f"{self.queue}:",
            redbeat_lock_key=None,
            redbeat_redis_url=self.broker,
            redbeat_redis_options={},
            result_expires=None,  # no entry of Celery's own
            task_default_queue=self.queue,
            task_ignore_result=True,
        )
        for name, options in {"plain": {}, "guarded": {"base": IdempotentTask}}.items():
            app.task(name=f"beating.{name}", shared=False, **options)(_body)
        app.finalize()
        return app


def prepare(app: Celery, files: list[str], ago: timedelta) -> None:
    """Make the tables and the schedules, in which the entries with due times have run last some time ago.

    Args:
        app: The app.
        files: The schedule file of each beat, if its scheduler has one.
        ago: For how long they have not run: they are due as soon as a beat starts.
    """
    from celery.utils.imports import symbol_by_name

    if "django" in app.conf.beat_scheduler:
        from django.core.management import call_command

        call_command("migrate", verbosity=0)
    app.queue_log.init()
    for file in files:
        scheduler = symbol_by_name(app.conf.beat_scheduler)(app, schedule_filename=file)
        for name in app.conf.beat_schedule:
            if not name.startswith("interval"):
                _set_back(app, scheduler, name, app.now() - ago)
        scheduler.close()


def _set_back(app: Celery, scheduler: Any, name: str, last_run: datetime) -> None:
    kind = scheduler.Entry
    if hasattr(kind, "from_key"):  # RedBeat
        kind.from_key(kind.generate_key(app, name), app=app).reschedule(last_run)
        return
    entry = scheduler.schedule[name]
    entry.last_run_at = last_run
    if hasattr(entry, "model"):  # django-celery-beat
        entry.model.last_run_at = last_run
        entry.model.save()


def _body(entry: str) -> str:
    return entry


def _set_up_django(database: str) -> None:
    import django
    from django.conf import settings
    from sqlalchemy import make_url

    url = make_url(database)
    settings.configure(
        INSTALLED_APPS=["django.contrib.contenttypes", "django_celery_beat", "celery_idempotent.contrib.django"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": url.database,
                "USER": url.username,
                "PASSWORD": url.password or "",
                "HOST": url.host,
                "PORT": url.port,
                "OPTIONS": dict(url.query),
            }
        },
        DEFAULT_AUTO_FIELD="django.db.models.AutoField",
        USE_TZ=True,
        TIME_ZONE="UTC",
    )
    django.setup()


def _note_moment(headers: dict[str, Any], **_: Any) -> None:
    headers["published_at"] = time.time()


def _longitude_of_sunset(moment: datetime) -> float:
    """Return where on the equator the sun sets at a moment, to some seconds."""
    clock = Celery("clock", set_as_current=False)
    west, east = -179.0, 179.0

    def sets_in(longitude: float) -> float:
        sunset = solar("sunset", 0.0, longitude, nowfun=lambda: moment, app=clock)
        # From -12 h to +12 h: the nearest one.
        after: float = sunset.remaining_estimate(moment).total_seconds()
        return after if after < 43200 else after - 86400

    # The farther west, the later.
    guess = 0.0
    for _ in range(20):
        guess += sets_in(guess) * 360 / 86400
        guess = (guess - west) % (east - west) + west
    return round(guess, 4)  # django-celery-beat finds no entry again that has more digits than its column


if BeatSpec.VARIABLE in os.environ:
    signals.before_task_publish.connect(_note_moment)
    app = BeatSpec(**json.loads(os.environ[BeatSpec.VARIABLE])).build()
    app.set_current()
    app.set_default()


if __name__ == "__main__":
    prepare(app, sys.argv[2:], timedelta(seconds=float(sys.argv[1])))
