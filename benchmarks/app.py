"""The app of a worker and of a producer: ``celery -A benchmarks.app worker``."""

from __future__ import annotations

from benchmarks.marks import Marks
from benchmarks.subjects import Place, subject_named

place = Place.of_this_process()
subject = subject_named(place.subject)
app = place.app()
marks = Marks(place.marks)


@app.task(name="noop", ignore_result=True, **subject.options("noop:{number}"))
def noop(number: int) -> None:
    """Nothing; what it returns is not kept."""
    marks.note(number)


@app.task(name="echo", **subject.options("echo:{number}"))
def echo(number: int) -> int:
    """A result, which is stored."""
    marks.note(number)
    return number


@app.task(name="keyless", ignore_result=True, **subject.options(None))
def keyless(number: int) -> None:
    """Nothing; this library knows it by its task id, which is what ``base=IdempotentTask`` alone does."""
    marks.note(number)
