"""A real Flower in a process of its own."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self
from uuid import uuid4

from tests.support.apps.spec import AppSpec
from tests.support.processes import kill_tree
from tests.support.servers import free_port
from tests.support.waiting import wait_until

__all__ = ["Answer", "FlowerProcess"]

ROOT = Path(__file__).resolve().parents[2]


class Answer(NamedTuple):
    """What Flower answered."""

    status: int
    text: str


class FlowerProcess:
    """``celery -A tests.support.apps.watched flower``. Use as a context manager.

    Args:
        directory: Where it runs and where its log goes.
        spec: The app.
        arguments: Flower's own.
        environment: Over ours and the app's.
        app: Module of the app.

    Attributes:
        url: Where it answers, with ``url_prefix`` if it was given one.
    """

    def __init__(
        self,
        directory: Path,
        spec: AppSpec,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        app: str = "tests.support.apps.watched",
    ) -> None:
        self.port = free_port()
        given = dict(argument.removeprefix("--").partition("=")[::2] for argument in arguments)
        prefix = given.get("url_prefix", "").strip("/")
        self.url = f"http://127.0.0.1:{self.port}{'/' if prefix else ''}{prefix}"
        self.credentials = given.get("basic_auth")
        self.log = directory / f"flower-{uuid4().hex[:8]}.log"
        self._directory = directory
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **spec.environment(),
            **(environment or {}),
        }
        self._command = [
            *(sys.executable, "-m", "celery", "-A", app, "flower"),
            *(f"--port={self.port}", "--address=127.0.0.1", *arguments),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=self._environment,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, timeout=60.0, describe=self.log_tail)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            kill_tree(self._process)
            self._process = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """Its process."""
        assert self._process is not None, "Flower is not running"
        return self._process

    def log_tail(self, lines: int = 60) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def get(self, path: str, *, credentials: str | None = None, **query: str) -> Answer:
        """Ask it, as somebody with these credentials: ``name:password``."""
        address = f"{self.url}{path}{'?' + urllib.parse.urlencode(query) if query else ''}"
        return self._ask(urllib.request.Request(address), credentials)

    def post(self, path: str, *, credentials: str | None = None, headers: Any = None, **fields: str) -> Answer:
        """Send it a form."""
        data = urllib.parse.urlencode(fields).encode()
        return self._ask(urllib.request.Request(self.url + path, data, headers or {}), credentials)

    def _ask(self, request: urllib.request.Request, credentials: str | None) -> Answer:
        if credentials is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(credentials.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return Answer(answer.status, answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.read().decode())

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"Flower ended:\n{self.log_tail()}"
        try:
            return self.get("/healthcheck").status == 200
        except OSError:
            return False
