"""A payment provider, as the steps of a body ask one: files that any number of processes share, and that no kill undoes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

__all__ = ["Provider"]


class Provider:
    """A provider in a directory.

    Args:
        directory: Where its books are.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = Path(directory)
        self._directory.mkdir(exist_ok=True)

    def charge(self, what: str, key: str | None = None) -> dict[str, Any]:
        """Charge for something, once for each key; without a key, each time.

        Returns:
            The charge: the first one's, if the key is known.
        """
        self._note("requests", what)
        charge = {"what": what, "id": uuid4().hex}
        place = self._directory / f"charge-{key or uuid4()}"
        draft = self._directory / f"draft-{uuid4()}"
        draft.write_text(json.dumps(charge))
        try:
            os.link(draft, place)  # whole, or not at all; and by one of those that race for it
        except FileExistsError:
            pass
        finally:
            draft.unlink()
        return dict(json.loads(place.read_text()))

    def charges(self) -> list[dict[str, Any]]:
        """Return what was charged, by what it was for."""
        found = [json.loads(path.read_text()) for path in self._directory.glob("charge-*")]
        return sorted(found, key=lambda charge: str(charge["what"]))

    def charged(self) -> list[str]:
        """Return what was charged for, each charge."""
        return [charge["what"] for charge in self.charges()]

    def requests(self) -> list[str]:
        """Return what it was asked to charge for, in order, whatever it made of that."""
        path = self._directory / "requests"
        return path.read_text().splitlines() if path.exists() else []

    def find(self, key: str) -> dict[str, Any] | None:
        """Return the charge of a key."""
        path = self._directory / f"charge-{key}"
        return dict(json.loads(path.read_text())) if path.exists() else None

    def _note(self, where: str, what: str) -> None:
        descriptor = os.open(self._directory / where, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, f"{what}\n".encode())
        finally:
            os.close(descriptor)
