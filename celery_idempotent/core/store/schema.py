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
    """The verbs that create, upgrade and check the store's schema, and close the store."""

    def init(self, *, before: Callable[[Change], None] | None = None) -> bool:
        """Create the table if it is missing, or upgrade one of an older version while it is in use.

        Code that is one version older works on a table of this version. Any number of processes may do this at once.

        Args:
            before: Called before each change, since changing a large table takes long.

        Returns:
            Whether anything was created or changed.

        Raises:
            SchemaError: There is a table of that name, of no known version; it is not touched.

        Atomicity: none over all changes. If it is interrupted, the next ``init`` continues from there.
        """
        ...

    def outstanding(self) -> Sequence[Change]:
        """Return the changes that :meth:`init` would make, in order; none if the schema is of this version. Nothing is created or written.

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
            Whether the schema exists. A store that creates it on first use returns ``False`` until then; others raise.

        Raises:
            SchemaError: The table is missing, or lacks columns.
        """
        ...

    def close(self) -> None:
        """Close the connections. If the store is used again, it opens new ones."""
        ...
