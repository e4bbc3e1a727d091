"""Rehearse a release: ``python -m tests.support.release [TAG]``. Build, check, install and run what was built; publish nothing.

With a tag it also has to be this version's. The workflow of a release calls it so before it publishes what lies in ``dist/`` then.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from email.parser import BytesParser
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import Metadata

__all__ = ["FaultError", "changelog_fault", "tag_fault"]

ROOT = Path(__file__).resolve().parents[2]
DIST = ROOT / "dist"
PACKAGE = "celery_idempotent"
UV = Path(sys.executable).parent / "uv"

#: What a person who installs the wheel does first.
FIRST = """
import importlib.metadata, sys
import celery_idempotent
for name in celery_idempotent.__all__:
    getattr(celery_idempotent, name)
assert importlib.metadata.version("celery-idempotent") == sys.argv[1]
assert "site-packages" in celery_idempotent.__file__, celery_idempotent.__file__
"""


class FaultError(Exception):
    """Something keeps this version from being released."""


def changelog_fault(version: str, changelog: str, fragments: list[str]) -> str | None:
    """Say what the changelog lacks for this version."""
    if not re.search(rf"^## {re.escape(version)} \(\d{{4}}-\d\d-\d\d\)$", changelog, re.MULTILINE):
        return f"CHANGELOG.md has no entry `## {version} (YYYY-MM-DD)`: run .venv/bin/towncrier build"
    if fragments:
        return f"CHANGELOG.md lacks {len(fragments)} changes of changelog.d, such as {fragments[0]}"
    return None


def tag_fault(version: str, *, wanted: str | None, tagged: str | None, head: str) -> str | None:
    """Say why this version cannot have its tag.

    Args:
        version: As ``pyproject.toml`` has it.
        wanted: The tag that is released, if one is.
        tagged: The commit that has this version's tag already, if one has.
        head: The commit that is built.
    """
    if wanted is not None and wanted != f"v{version}":
        return f"the tag is {wanted}, but pyproject.toml has version {version}"
    if tagged is not None and tagged != head:
        return f"v{version} is the tag of another commit, {tagged[:12]}: give pyproject.toml a new version"
    return None


def main(arguments: list[str]) -> int:
    """Do every step; the first fault ends it."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    try:
        _check_tree(version, arguments[0] if arguments else None)
        wheel, sdist = _build(version)
        _check_contents(wheel, sdist, version)
        _install_and_run(wheel, version)
    except FaultError as fault:
        print(f"NOT READY: {fault}", file=sys.stderr)
        return 1
    print(
        f"celery-idempotent {version} is ready; nothing was published. To release it: git tag v{version}, and push the tag"
    )
    return 0


def _check_tree(version: str, wanted: str | None) -> None:
    fragments = [path.name for path in sorted((ROOT / "changelog.d").glob("*.md")) if path.name != "README.md"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    tagged = _git("rev-parse", "--quiet", "--verify", f"refs/tags/v{version}^{{commit}}", may_fail=True) or None
    head = _git("rev-parse", "HEAD")
    fault = changelog_fault(version, changelog, fragments) or tag_fault(
        version, wanted=wanted, tagged=tagged, head=head
    )
    if fault:
        raise FaultError(fault)
    _say(f"CHANGELOG.md has {version}, and its tag is free" if tagged is None else f"v{version} is this commit's tag")
    if _git("status", "--porcelain"):
        _say("NOTE: there are changes that are not committed, and they are built too")


def _build(version: str) -> tuple[Path, Path]:
    shutil.rmtree(DIST, ignore_errors=True)
    # The wheel is built from the sdist, which shows that the sdist is complete; with the hatchling that the lock file pins.
    _run([UV, "build", "--quiet", "--no-build-isolation", "--python", sys.executable, "--out-dir", DIST, ROOT])
    (DIST / ".gitignore").unlink(missing_ok=True)
    built = sorted(DIST.iterdir())
    expected = [DIST / f"{PACKAGE}-{version}-py3-none-any.whl", DIST / f"{PACKAGE}-{version}.tar.gz"]
    if built != expected:
        raise FaultError(f"dist/ has {[path.name for path in built]}")
    _say(f"built {', '.join(f'{path.name} ({path.stat().st_size // 1024} KiB)' for path in expected)}")
    return expected[0], expected[1]


def _check_contents(wheel: Path, sdist: Path, version: str) -> None:
    tracked = set(_git("ls-files", PACKAGE).splitlines())
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        described = archive.read(f"{PACKAGE}-{version}.dist-info/METADATA")
        licensed = f"{PACKAGE}-{version}.dist-info/licenses/LICENSE" in archive.namelist()
    if names != tracked:
        raise FaultError(f"the wheel is not what git has: {sorted(names ^ tracked)}")
    if not licensed:
        raise FaultError("the wheel has no licence")
    with tarfile.open(sdist) as tar:
        unpacked = {name.partition("/")[2] for name in tar.getnames()}
        member = tar.extractfile(f"{PACKAGE}-{version}/PKG-INFO")
        assert member is not None
        if member.read() != described:
            raise FaultError("sdist and wheel describe themselves differently")
    lacking = tracked | {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"}
    if lacking - unpacked:
        raise FaultError(f"the sdist lacks {sorted(lacking - unpacked)}")
    _check_metadata(described)
    _say(f"{len(tracked)} files in the wheel, as git has them; the metadata is sound")


def _check_metadata(described: bytes) -> None:
    """Check what an index checks on an upload; an ``ExceptionGroup`` names each fault."""
    metadata = Metadata.from_email(described, validate=True)
    if metadata.description_content_type != "text/markdown" or not metadata.description:
        raise FaultError("the description is not the README in Markdown")
    if not BytesParser().parsebytes(described)["License-Expression"]:
        raise FaultError("the metadata has no licence")


def _install_and_run(wheel: Path, version: str) -> None:
    """Install the wheel where nothing else is, with the dependencies that ``make demo`` has, and use it from elsewhere."""
    with tempfile.TemporaryDirectory(prefix="release-") as directory:
        place = Path(directory)
        programs = place / "venv/bin"
        _run([UV, "venv", "--quiet", "--python", sys.executable, place / "venv"])
        install: list[str | Path] = [UV, "pip", "install", "--quiet", "--python", programs / "python", "--no-deps"]
        _run([*install, "--require-hashes", "--requirements", ROOT / "requirements/demo.lock"])
        _run([*install, wheel])
        _run([UV, "pip", "check", "--quiet", "--python", programs / "python"])
        _run([programs / "python", "-W", "error", "-c", FIRST, version], cwd=place)
        helped = _run([programs / "celery", "idempotent", "--help"], cwd=place)
        if "doctor" not in helped:
            raise FaultError(f"`celery idempotent --help` says:\n{helped}")
    _say("the wheel installs, imports, and answers `celery idempotent --help`")


def _git(*arguments: str, may_fail: bool = False) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode and not may_fail:
        raise FaultError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _run(command: list[str | Path], *, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    if done.returncode:
        raise FaultError(
            f"{' '.join(map(str, command))} ended with status {done.returncode}:\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def _say(line: str) -> None:
    print(f"- {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
