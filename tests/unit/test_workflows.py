"""The workflows keep to what the project says elsewhere: targets, versions, servers, pinned actions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.servers import KINDS
from tests.support.versions import CELLS, PYTHONS

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text())
    return workflow


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_pinned_by_a_commit(path: Path) -> None:
    for use in re.findall(r"uses: (.+)", path.read_text()):
        assert re.fullmatch(r"\./.+|[\w./-]+@[0-9a-f]{40}  # v[\d.]+", use), use


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_their_targets_are_in_the_makefile(path: Path) -> None:
    targets = set(re.findall(r"^([\w./-]+)(?: [\w./-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([\w./-]+)", path.read_text())) <= targets


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_job_may_write(path: Path) -> None:
    workflow = read(path.name)
    assert workflow["permissions"] == {}
    for job in workflow["jobs"].values():
        assert job["permissions"] in ({"contents": "read"}, {"id-token": "write"})


def test_only_the_job_that_publishes_has_a_token() -> None:
    jobs = read("release.yml")["jobs"]
    assert [name for name, job in jobs.items() if "id-token" in job["permissions"]] == ["publish"]
    assert jobs["publish"]["environment"]["name"] == "pypi"
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}


def test_unit_tests_run_on_every_python() -> None:
    assert read("ci.yml")["jobs"]["unit"]["strategy"]["matrix"]["python"] == list(PYTHONS)


def test_the_weekly_versions_are_those_of_make_test_versions() -> None:
    rows = read("weekly.yml")["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert [(row["celery"], row["python"]) for row in rows] == [(cell.celery, cell.python) for cell in CELLS]


def test_every_server_is_a_service_and_is_named() -> None:
    job = read("ci.yml")["jobs"]["test"]
    assert set(job["services"]) == set(KINDS)
    assert set(job["env"]) == {kind.variable for kind in KINDS.values()}
    for name, kind in KINDS.items():
        assert re.search(rf"[@/]{name}[:/]", job["env"][kind.variable])
