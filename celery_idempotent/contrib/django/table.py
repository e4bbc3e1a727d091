"""Create the table in Django's migration."""

from __future__ import annotations

from typing import Any

from django.db.migrations import CreateModel
from sqlalchemy import Dialect, MetaData
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.schema import CreateIndex, CreateTable, DDLElement, DropTable

from celery_idempotent.contrib.django.project import alias_of_log, table_name
from celery_idempotent.stores.sql.table import queue_log_table

__all__ = ["CreateQueueLog"]


class CreateQueueLog(CreateModel):
    """Create the library's table, in the queue log's database; leave an existing one, as after ``init``, unchanged."""

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:  # noqa: ARG002
        """Create the table and its indexes."""
        if not _is_of_log(schema_editor) or _is_there(schema_editor):
            return
        table = queue_log_table(MetaData(), table_name())
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        _execute(schema_editor, CreateTable(table))
        for index in indexes:
            _execute(schema_editor, CreateIndex(index))

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:  # noqa: ARG002
        """Drop the table. Every message id is then free again."""
        if _is_of_log(schema_editor):
            _execute(schema_editor, DropTable(queue_log_table(MetaData(), table_name()), if_exists=True))


def _execute(schema_editor: Any, element: DDLElement) -> None:
    schema_editor.execute(str(element.compile(dialect=_dialect(schema_editor.connection))).strip(), params=None)


def _is_of_log(schema_editor: Any) -> bool:
    return bool(schema_editor.connection.alias == alias_of_log())


def _is_there(schema_editor: Any) -> bool:
    if schema_editor.collect_sql:
        return False
    return table_name() in schema_editor.connection.introspection.table_names()


def _dialect(wrapper: Any) -> Dialect:
    if wrapper.vendor == "mysql":
        return mysql.dialect(is_mariadb=wrapper.mysql_is_mariadb)
    dialect: Dialect = {"postgresql": postgresql, "sqlite": sqlite}[wrapper.vendor].dialect()
    return dialect
