"""What the environment may choose. Every default needs nothing but Python.

=============== ============================== ==================================================================
variable        default                        for example
=============== ============================== ==================================================================
LOAN_BROKER     files under LOAN_DIR           ``redis://localhost``, ``amqp://guest:guest@localhost``
LOAN_STORE      SQLite under LOAN_DIR          ``postgresql+psycopg://localhost/loans``, ``mysql+pymysql://...``
LOAN_BACKEND    files under LOAN_DIR           ``redis://localhost``
LOAN_BASE       ``guarded``                    ``plain``: the stock ``celery.Task``, to see what it does
LOAN_DIR        ``./loan-files``               where the files of the defaults are
LOAN_RUN        ``loan``                       begins every request id and names the queue, so that runs share servers
=============== ============================== ==================================================================
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = "filesystem://localhost"


@dataclass(frozen=True)
class Settings:
    """Where everything is, and which base class the tasks have."""

    run: str
    base: str
    directory: Path
    broker: str
    store: str
    backend: str

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        base = environ.get("LOAN_BASE", "guarded")
        if base not in ("guarded", "plain"):
            raise ValueError(f"LOAN_BASE is {base!r}; it can be 'guarded' or 'plain'")
        directory = Path(environ.get("LOAN_DIR", "loan-files")).absolute()
        results = directory / "results"
        results.mkdir(parents=True, exist_ok=True)
        return cls(
            run=environ.get("LOAN_RUN", "loan"),
            base=base,
            directory=directory,
            broker=environ.get("LOAN_BROKER", FILES),
            store=environ.get("LOAN_STORE", f"sqlite:///{directory}/loans.db"),
            backend=environ.get("LOAN_BACKEND", f"file://{results}"),
        )

    def environ(self) -> dict[str, str]:
        """Return the variables that choose these settings, for a process to be started."""
        return {
            "LOAN_RUN": self.run,
            "LOAN_BASE": self.base,
            "LOAN_DIR": str(self.directory),
            "LOAN_BROKER": self.broker,
            "LOAN_STORE": self.store,
            "LOAN_BACKEND": self.backend,
        }

    @property
    def queue(self) -> str:
        return f"loans-{self.run}"

    @property
    def transport(self) -> str | None:
        """The kombu transport, where the broker's URL does not already say it."""
        return "example_project.filesystem_broker:Transport" if self.broker == FILES else None

    @property
    def transport_options(self) -> dict[str, Any]:
        if self.broker.startswith("redis"):
            # What a killed worker had not acknowledged stays here, where each run has its own to be deleted.
            return {f"unacked{part}_key": f"{self.queue}-unacked{part}" for part in ("", "_index", "_mutex")}
        if self.broker != FILES:
            return {}
        folders = {name: self.directory / "broker" / name for name in ("queue", "control", "processed")}
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
        return {
            "data_folder_in": str(folders["queue"]),
            "data_folder_out": str(folders["queue"]),
            "control_folder": str(folders["control"]),
            # By default kombu takes a message by moving it to the system's temporary folder. Where that is another file
            # system, a move is a copy, and two workers can take one message; a folder next to the queue rules that out.
            "store_processed": True,
            "processed_folder": str(folders["processed"]),
            "polling_interval": 0.05,  # seconds
        }
