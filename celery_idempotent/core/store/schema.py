"""The life of a store: its table or keys, and its connections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Change", "Schema"]


@dataclass(frozen=True, slots=True)
class Change:
    """A change that brings the store's schema to this version.

    Attributes:
        what: What it does, in words.
        statement: The SQL; empty if the store has none.
        alters: Whether it alters what exists, rather than creating what is missing.
    """

    what: str
    statement: str = ""
    alters: bool = True


class Schema(Protocol):
    """Creates, upgrades and checks what a store keeps its rows in."""

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        """Create the table if it is missing, or take one of an older version to this one, while it is in use.

        Code that is one version older goes on on a table of this version. Any number may do this at once.

        Args:
            before: Called before each change: a large table takes its time.

        Returns:
            Whether anything was created or changed.

        Raises:
            SchemaError: A table of that name is there and is of no version that this one knows; it is not touched.

        Atomicity: none over all changes. If it is interrupted, the next ``init`` goes on from there.
        """
        ...

    def outstanding(self) -> Sequence[Change]:
        """Return what :meth:`init` would do, in this order; nothing when the schema is of this version. Nothing is made or written.

        Raises:
            SchemaError: As :meth:`init`.
        """
        ...

    def check(self) -> None:
        """Reach the store and compare its schema with this version's.

        Raises:
            SchemaError: The table is missing, or lacks columns.
        """
        ...

    def inspect(self) -> bool:
        """Do what :meth:`check` does, but create and write nothing.

        Returns:
            Whether the schema is there. ``False`` only from a store that makes it on first use: then it is not missing.

        Raises:
            SchemaError: The table is missing, or lacks columns.
        """
        ...

    def close(self) -> None:
        """Let go of connections. The store may be used again and opens new ones."""
        ...
