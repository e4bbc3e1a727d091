"""The benchmarks: that they run and count, their arithmetic, what they report. Nothing here depends on how long anything takes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from redis import Redis

from benchmarks import own_code, page, rows
from benchmarks.__main__ import _together
from benchmarks.catalogue import MEASURES
from benchmarks.figures import Spread, ratios, spread
from benchmarks.marks import Marks
from benchmarks.relay import Relay
from benchmarks.report import as_markdown, as_text
from benchmarks.run import run
from benchmarks.subjects import PLAIN, STORES
from benchmarks.targets import TARGETS, verdicts
from benchmarks.testbed import open_testbed
from celery_idempotent.core.records import MessageKey
from celery_idempotent.stores import open_store
from celery_idempotent.testing.examples import new_message
from tests.support.servers import PrivateRedis, skip_if_not_installed

# -- arithmetic ---------------------------------------------------------------------------------------------------------------

ROUNDS = [
    {"plain": {"per second": 100.0}, "redis": {"per second": 80.0}, "relier": {"per second": 20.0}},
    {"plain": {"per second": 50.0}, "redis": {"per second": 45.0}, "relier": {"per second": 25.0}},
    {"plain": {"per second": 200.0}, "redis": {"per second": 140.0}},
]


def results(**rounds: Any) -> dict[str, Any]:
    machine = {
        "processor": "any",
        "processors": 2,
        "memory": "1 GiB",
        "system": "Linux",
        "fdatasync_ms": 0.5,
        "versions": {"celery": "5.7.0"},
    }
    return {
        "machine": machine,
        "measures": {
            name: {"count": 2000, "rounds": found, "seed": 1, "date": "2026-11-25", "commit": "abc"}
            for name, found in rounds.items()
        },
    }


def test_a_ratio_is_of_one_round() -> None:
    assert ratios(ROUNDS, "per second", "redis", "plain") == [0.8, 0.9, 0.7]
    assert spread(ratios(ROUNDS, "per second", "redis", "plain")) == Spread(0.8, 0.7, 0.9)


def test_a_round_that_a_subject_was_not_in_has_no_ratio() -> None:
    assert ratios(ROUNDS, "per second", "relier", "plain") == [0.2, 0.5]
    assert spread(ratios(ROUNDS, "per second", "sqlite", "plain")) is None


@pytest.mark.parametrize(("rate", "reached"), [(80.0, True), (79.9, False)])
def test_a_target_is_reached_by_the_median_of_the_ratios(rate: float, reached: bool) -> None:
    rounds = [{"plain": {"per second": 100.0}, "redis": {"per second": value}} for value in (rate, 10.0, 100.0)]

    (verdict,) = verdicts(results(consume=rounds))

    assert (verdict.target.number, verdict.target.bound, verdict.reached) == (2, 0.8, reached)


def test_targets_are_of_measurements_that_are_taken() -> None:
    assert {target.measure for target in TARGETS} <= set(MEASURES)
    assert {target.number for target in TARGETS} == {1, 2, 3, 4, 5}


def test_the_report_has_the_ratio_the_spread_and_the_verdict() -> None:
    found = results(publish=ROUNDS)

    for text in (as_text(found), as_markdown(found)):
        assert "0.80 (0.70..0.90)" in text
        assert "1. publish, redis / plain: 0.80 (0.70..0.90), bound >= 0.75: reached" in text
        # In the rounds that both were in: 80 / 20 and 45 / 25.
        assert "3. publish, redis / relier: 2.90 (1.80..4.00), bound > 1: reached" in text
        assert "celery 5.7.0" in text


def test_the_page_gets_the_figures_between_its_markers(tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks.md"
    copy.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")

    page.write_page(results(publish=ROUNDS), copy)

    text = copy.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "0.80 (0.70..0.90)" in text
    assert "old" not in text
    assert copy.with_suffix(".png").stat().st_size > 10_000
    page.write_page(results(), copy)
    assert "0.80" not in copy.read_text()


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text("no markers")
    with pytest.raises(ValueError, match="between which the figures go"):
        page.write_page(results(), copy)
    assert copy.read_text() == "no markers"


def test_the_page_in_the_documentation_has_markers_and_a_picture() -> None:
    text = page.PAGE.read_text()
    assert text.index(page.BEGIN) < text.index(page.END)
    assert page.PAGE.with_suffix(".png").exists()


def test_a_run_of_some_measurements_keeps_the_others() -> None:
    before, now = results(publish=ROUNDS, consume=ROUNDS), results(publish=ROUNDS[:1])
    both = _together(before, now)
    assert {name: len(found["rounds"]) for name, found in both["measures"].items()} == {"publish": 1, "consume": 3}


def test_a_run_on_another_machine_keeps_nothing() -> None:
    other = results(publish=ROUNDS)
    other["machine"]["versions"]["celery"] = "5.8.0"
    with pytest.raises(SystemExit, match="with other versions"):
        _together(results(consume=ROUNDS), other)


# -- witnesses ----------------------------------------------------------------------------------------------------------------


def test_marks_tell_what_ran_when_and_what_ran_twice(tmp_path: Path) -> None:
    here, elsewhere = Marks(tmp_path / "marks"), Marks(tmp_path / "marks")
    here.note(5)
    elsewhere.note(7)

    ran = here.ran(5, 3)

    assert ran.missing == 1
    assert ran.seconds > 0
    assert (here.has(6), here.has(7), here.again) == (False, True, 0)
    elsewhere.note(5)
    assert here.again == 1


def test_a_relay_counts_round_trips_not_commands(private_redis: PrivateRedis) -> None:
    with Relay(private_redis.url) as relay, Redis.from_url(relay.url) as client:
        client.ping()
        before = relay.counts["trips"]
        with client.pipeline(transaction=False) as commands:
            for number in range(100):
                commands.set(str(number), number)
            commands.execute()
        client.get("1")
        assert relay.counts["trips"] - before == 2


def test_a_relay_counts_commits(postgresql_url: str) -> None:
    with Relay(postgresql_url) as relay:
        engine = sa.create_engine(relay.url, poolclass=sa.StaticPool)
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
            connection.rollback()
            relay.counts.clear()
            connection.execute(sa.text("SELECT 2"))
            connection.commit()
        engine.dispose()
    assert (relay.counts["trips"], relay.counts["commits"]) == (3, 1)  # BEGIN, SELECT, COMMIT


def same_by_the_driver(url: str) -> None:
    told = own_code.compare(url, turns=1)  # which looks at the rows that either has made
    assert {f"{verb} {who}" for verb in own_code.VERBS for who in ("store", "driver", "ratio")} | {"ratio"} == set(told)
    assert min(told.values()) > 0


def test_the_driver_alone_does_what_the_store_has_done(store_url: str) -> None:
    same_by_the_driver(store_url)


def test_the_driver_alone_does_what_the_store_has_done_in_redis(private_redis: PrivateRedis) -> None:
    same_by_the_driver(private_redis.url)


def test_rows_are_counted_measured_and_removed(store_url: str) -> None:
    with closing(open_store(store_url)) as store:
        store.init()
        empty = rows.size(store_url)
        store.record_all([new_message(MessageKey(f"m{number}", "t"), message=b"." * 500) for number in range(500)])
        assert rows.count(store_url) == 500
        assert rows.size(store_url) - empty > 500 * 500
        rows.clear(store_url)
        assert rows.count(store_url) == 0


# -- a run --------------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(500)
@pytest.mark.xdist_group("chaos")
def test_a_short_run() -> None:
    subjects = [PLAIN, STORES["sqlite"], STORES["redis"]]
    measures = [name for name in MEASURES if not name.startswith("own-code")]
    with skip_if_not_installed():
        found = run(subjects, only=measures, rounds=1, seed=7, share=0.02)

    taken = found["measures"]
    assert {name: measure.get("failed") for name, measure in taken.items()} == dict.fromkeys(measures)
    for name in measures:
        (only,) = taken[name]["rounds"]
        assert set(only) == {"plain", "sqlite", "redis"} if name != "rows" else {"sqlite", "redis"}
        assert all(value >= 0 for figures in only.values() for value in figures.values())
    (trips,) = taken["trips"]["rounds"]
    assert (trips["redis"]["publish store"], trips["redis"]["run store"]) == (1, 2)
    assert trips["plain"]["publish broker"] == trips["redis"]["publish broker"] == 1
    assert "publish store" not in trips["sqlite"]
    text = as_text(found)
    assert all(MEASURES[name].title in text for name in measures)


@pytest.mark.xdist_group("chaos")
def test_a_subject_that_does_not_do_its_work_fails() -> None:
    with skip_if_not_installed(), open_testbed([PLAIN]) as testbed:
        deployment = testbed.deployments[PLAIN.name]
        deployment.publish(10)
        with pytest.raises(AssertionError, match="plain was to publish 11 messages; 10 are in its queue"):
            deployment.discard(11)
        with pytest.raises(AssertionError, match=r"(?s)a producer ended:.*no_such_task"):
            deployment.publish(1, task="no_such_task")
