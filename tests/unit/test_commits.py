"""The check of commit subjects: what passes, what does not, and clones that are too shallow to tell."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.commits import check_history, check_message, faults


@pytest.mark.parametrize(
    "subject",
    [
        "Keep a lease while its body runs",
        "Never wait for a lock where renewals are collected",
        "Docs: say how long a row knows that it was revoked",
        "Embed the diagrams",
        "Bring the tables together",
        "Pass the token on",
        "Make `purge` end at once",
        'Revert "' + "x" * 80 + '"',
        "x".upper() * 72,
    ],
)
def test_good_subjects_pass(subject: str) -> None:
    assert faults(subject) == []


@pytest.mark.parametrize(
    ("subject", "fault"),
    [
        ("X" * 73, "has 73 characters"),
        ("Keep a lease.", "full stop"),
        ("keep a lease", "capital letter"),
        ("fixup! Keep a lease", "capital letter"),
        ("Kept a lease", "imperative"),
        ("Added a test", 'not "Fixed"'),
        ("Adding a test", 'not "Fixing"'),
        ("Adds a test", 'not "Fixes"'),
        ("The lease is kept", "imperative"),
        ("Docs: the lease is kept", "imperative"),
        ("Tests: waits for a worker", 'not "Fixes"'),
    ],
)
def test_bad_subjects_are_named(subject: str, fault: str) -> None:
    (found,) = faults(subject)
    assert fault in found


class TestMessages:
    def test_comments_of_the_editor_are_left_out(self) -> None:
        assert check_message("# Please enter a message\n\nKeep a lease\n\nIt ran out.\n# On branch main\n") == []

    def test_a_subject_ends_with_a_blank_line(self) -> None:
        (found,) = check_message("Keep a lease\nIt ran out.\n")
        assert "blank line" in found

    @pytest.mark.parametrize("message", ["fixup! kept a lease", "Merge branch 'main' into leases which are kept.", ""])
    def test_subjects_written_by_git_pass(self, message: str) -> None:
        assert check_message(message) == []


class Repository:
    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *arguments: str) -> str:
        who = {
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@b",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@b",
        }
        # Not the person's own hooks and signatures; and not the repository that a hook which runs this belongs to.
        outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment = {**outside, **who, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", "-C", str(self.place), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    def commit(self, subject: str) -> str:
        self.git("commit", "--quiet", "--allow-empty", "--message", subject)
        return self.git("rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


class TestHistory:
    def test_commits_before_the_base_are_not_read(self, repository: Repository) -> None:
        repository.commit("the lease was kept.")
        base = repository.commit("so was this.")
        repository.commit("Keep a lease")
        assert check_history(repository.place, base) == []

    def test_commits_after_the_base_are_read(self, repository: Repository) -> None:
        base = repository.commit("Begin")
        commit = repository.commit("Kept a lease")
        repository.commit("Keep a lease")
        found = check_history(repository.place, base)
        assert found is not None
        (fault,) = found
        assert commit.startswith(fault.split()[0])

    def test_merges_are_exempt(self, repository: Repository) -> None:
        base = repository.commit("Begin")
        repository.git("switch", "--quiet", "--create", "side")
        repository.commit("Keep a lease")
        repository.git("switch", "--quiet", "main")
        repository.commit("Keep a token")
        repository.git("merge", "--quiet", "--no-ff", "--message", "merged the side.", "side")
        assert check_history(repository.place, base) == []

    def test_a_shallow_clone_is_not_checked(self, repository: Repository, tmp_path: Path) -> None:
        base = repository.commit("Begin")
        repository.commit("Kept a lease")
        repository.git("clone", "--quiet", "--depth=1", f"file://{repository.place}", str(tmp_path / "shallow"))
        assert check_history(tmp_path / "shallow", base) is None

    def test_a_place_without_a_repository_is_not_checked(self, tmp_path: Path) -> None:
        assert check_history(tmp_path, "0" * 40) is None
