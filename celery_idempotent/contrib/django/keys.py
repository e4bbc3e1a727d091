"""A primary key for the model: the table's is of two columns, which Django 5.2 knows, but not its admin, nor older versions."""

# ruff: noqa: ARG002, D102 - signatures and meaning are Django's

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.db import models
from django.db.models.expressions import Col
from django.db.models.lookups import Exact, In

__all__ = ["MessageKeyField"]

#: What stands between the task's name and the message id.
BETWEEN = "|"


class MessageKeyField(models.CharField):
    """The task's name and the message id, in one text; compared column by column, so that the table's own key finds it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_length": 511, "editable": False, **options})

    def db_type(self, connection: Any) -> None:
        """Return nothing: there is no such column."""

    def check(self, **options: Any) -> list[Any]:
        """Return no warnings: there is no index over it."""
        return []

    def get_col(self, alias: str, output_field: Any = None) -> Any:
        """Return what stands for it in SQL."""
        return _KeyCol(alias, self, output_field)

    def contribute_to_class(self, cls: Any, name: str, private_only: bool = False) -> None:
        super().contribute_to_class(cls, name, private_only=private_only)
        self.column = "message_key"  # which no statement names


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
    """Return the condition that the columns are those of one of the keys. A task's name may have the sign in it that stands between."""
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
