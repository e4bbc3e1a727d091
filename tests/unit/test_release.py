"""What keeps a version from being released."""

from __future__ import annotations

import pytest

from tests.support.release import changelog_fault, tag_fault

CHANGELOG = "# Changelog\n\n## 0.1.0 (2026-11-29)\n\n### Added\n"


class TestChangelog:
    def test_a_version_with_an_entry_is_ready(self) -> None:
        assert changelog_fault("0.1.0", CHANGELOG, []) is None

    @pytest.mark.parametrize("version", ["0.2.0", "0.1", "0.1.0.1"])
    def test_a_version_without_one_is_not(self, version: str) -> None:
        assert "no entry" in (changelog_fault(version, CHANGELOG, []) or "")

    def test_fragments_left_over_are_named(self) -> None:
        assert "lacks 2 changes" in (changelog_fault("0.1.0", CHANGELOG, ["1.added.md", "2.fixed.md"]) or "")


class TestTag:
    def test_a_free_tag_is_ready(self) -> None:
        assert tag_fault("0.1.0", wanted=None, tagged=None, head="a") is None

    def test_a_tag_on_this_commit_is_released(self) -> None:
        assert tag_fault("0.1.0", wanted="v0.1.0", tagged="a", head="a") is None

    def test_a_tag_on_another_commit_is_taken(self) -> None:
        assert "another commit" in (tag_fault("0.1.0", wanted=None, tagged="b", head="a") or "")

    def test_a_tag_of_another_version_is_refused(self) -> None:
        assert "pyproject.toml has version 0.1.0" in (tag_fault("0.1.0", wanted="v0.2.0", tagged=None, head="a") or "")
