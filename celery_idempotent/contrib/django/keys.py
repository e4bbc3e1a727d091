"""A primary key field for the model. The table's key has two columns: Django 5.2 supports that, its admin and older versions do not."""

# ruff: noqa: ARG002, D102 - signatures and meaning are Django's

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db import models
from django.db.models.expressions import Col
from django.db.models.lookups import Exact, In

__all__ = ["MessageKeyField"]

#: The separator between the task's name and the message id.
BETWEEN = "|"


class MessageKeyField(models.CharField):
    """The task's name and the message id in one text; compared column by column, so that the table's key index is used."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_length": 511, "editable": False, **options})

    def db_type(self, connection: Any) -> None:
        """Return nothing: the table has no such column."""

    def check(self, **options: Any) -> list[Any]:
        """Return no warnings: there is no index on it."""
        return []

    def get_col(self, alias: str, output_field: Any = None) -> Any:
        """Return its SQL expression."""
        return _KeyCol(alias, self, output_field)

    def contribute_to_class(self, cls: Any, name: str, private_only: bool = False) -> None:
        super().contribute_to_class(cls, name, private_only=private_only)
        self.column = "message_key"  # no statement names it


class _KeyCol(Col):
    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, list[Any]]:
        task_name, message_id = self.columns(connection)
        if connection.vendor == "mysql":
            return f"CONCAT({task_name}, '{BETWEEN}', {message_id})", []
        return f"({task_name} || '{BETWEEN}' || {message_id})", []

    def columns(self, connection: Any) -> tuple[str, str]:
        quote = connection.ops.quote_name
        of_table = f"{quote(self.alias)}." if self.alias else ""
        return f"{of_table}{quote('task_name')}", f"{of_table}{quote('message_id')}"


def _compared(column: _KeyCol, keys: Iterable[str], connection: Any) -> tuple[str, list[str]]:
    """Return the condition that the columns match one of the keys, split at each separator: names and ids may contain it."""
    task_name, message_id = column.columns(connection)
    pairs = [(key[:place], key[place + 1 :]) for key in keys for place, sign in enumerate(key) if sign == BETWEEN]
    if not pairs:
        return "1 = 0", []
    condition = f"({task_name} = %s AND {message_id} = %s)"
    return f"({' OR '.join([condition] * len(pairs))})", [part for pair in pairs for part in pair]


@MessageKeyField.register_lookup
class _Exact(Exact):
    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, list[str]]:
        return _compared(self.lhs, [self.rhs], connection)


@MessageKeyField.register_lookup
class _In(In):
    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, list[str]]:
        return _compared(self.lhs, self.rhs, connection)
