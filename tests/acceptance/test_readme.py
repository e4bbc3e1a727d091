"""README's quickstart, word for word: what it says to type is typed here, in a directory of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.servers import PrivateRedis
from tests.support.stores import postgresql_store
from tests.support.worker import ROOT, WorkerProcess


def test_quickstart(tmp_path: Path, private_redis: PrivateRedis, postgresql_url: str) -> None:
    quickstart = (ROOT / "README.md").read_text().partition("## Quickstart")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(\w+)\n(.*?)```", quickstart, re.DOTALL)
    app, script = (text for kind, text in blocks if kind == "python")
    _, before, after = (text.splitlines() for kind, text in blocks if kind == "console")
    assert "celery -A shop worker" in before

    with postgresql_store(postgresql_url) as store_url:
        # Only the addresses are ours.
        for shown, ours in (("redis://localhost", private_redis.url), ("postgresql://localhost/shop", store_url)):
            assert shown in app
            app = app.replace(shown, ours)
        (tmp_path / "shop.py").write_text(app)

        assert "created" in _typed(before[0], tmp_path)
        worker = WorkerProcess(tmp_path, {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}, app="shop")
        try:
            worker.start()
            assert "already known with other arguments" in _run([sys.executable, "-c", script], tmp_path)
        finally:
            worker.stop()
        stats, shown = (_typed(line, tmp_path) for line in after)
    assert re.search(r"shop\.charge +done +success +1 +1", stats)
    assert "charged 500" in shown


def _typed(line: str, directory: Path) -> str:
    """The output of a line of the README, which begins with ``celery``."""
    program, *arguments = line.split()
    assert program == "celery"
    return _run([sys.executable, "-m", "celery", *arguments], directory)


def _run(command: list[str], directory: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
