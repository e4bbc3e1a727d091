"""How a database carries out each statement that a store sends: by which index, and what it read for that.

The statements are those that the store really sends, explained by the database as it is given them. PostgreSQL is asked by its own
``auto_explain``, whose plans are those that were carried out, with what came out of each node.
"""

from __future__ import annotations

import json
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import sqlalchemy as sa

__all__ = ["Plan", "Plans", "watch"]

#: The indexes, by their columns: partitions have names of their own for them.
_INDEXES = {
    ("message_id", "task_name"): "pkey",
    ("status", "queue", "published_at"): "open",
    ("processed_timestamp", "published_at"): "processed",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """How one statement was carried out.

    Attributes:
        statement: Its text.
        indexes: The indexes by which rows were found: ``pkey``, ``open``, ``processed``.
        scans: Whether the whole table, or a whole index, was read.
        sorts: Whether rows were sorted.
        effort: Rows that were looked at, whether or not they were wanted (PostgreSQL, MariaDB); hundreds of instructions (SQLite).
        text: The plan as the database tells it.
    """

    statement: str
    indexes: frozenset[str]
    scans: bool
    sorts: bool
    effort: int
    text: str


class Plans(ABC):
    """Listens to an engine: :attr:`seen` are the plans of what it has sent on the table.

    Args:
        engine: One that has not connected yet.
        table: The table's name.
    """

    #: The effort of a verb that names some rows by their keys, or reads some hundred from an index: far below a percent of a long log's.
    little: ClassVar[int]

    def __init__(self, engine: sa.Engine, table: str) -> None:
        self.engine = engine
        self.table = table
        self.seen: list[Plan] = []
        self._names = _names_of_indexes(engine, table)
        engine.dispose()

    def _short(self, names: set[str]) -> frozenset[str]:
        return frozenset(self._names[name] for name in names)


class _PostgreSQL(Plans):
    little = 2500

    def __init__(self, engine: sa.Engine, table: str, *, generic: bool) -> None:
        super().__init__(engine, table)
        self._generic = generic
        sa.event.listen(engine, "connect", self._ask)

    def _ask(self, connection: Any, record: object) -> None:
        settings = {
            "log_min_duration": "0",
            "log_analyze": "on",
            "log_timing": "off",
            "log_buffers": "off",
            "log_format": "json",
            "log_level": "notice",
        }
        with connection.cursor() as cursor:
            cursor.execute("LOAD 'auto_explain'")
            for name, value in settings.items():
                cursor.execute(f"SET auto_explain.{name} = '{value}'")
            # A statement that is sent for the sixth time may be planned without a look at its parameters.
            cursor.execute(f"SET plan_cache_mode = force_{'generic' if self._generic else 'custom'}_plan")
        connection.commit()
        connection.prepare_threshold = 0 if self._generic else 5
        connection.add_notice_handler(self._note)

    def _note(self, notice: Any) -> None:
        _, _, text = notice.message_primary.partition("plan:\n")
        if not text:
            return
        told = json.loads(text)
        nodes = list(_nodes(told["Plan"]))
        if not any(node.get("Relation Name", "").startswith(self.table) for node in nodes):
            return
        # What a filter has removed was read, and is counted for each time that its node ran.
        rows = sum(
            node["Actual Loops"]
            * (
                node["Actual Rows"]
                + node.get("Rows Removed by Filter", 0)
                + node.get("Rows Removed by Index Recheck", 0)
            )
            for node in nodes
            if "Scan" in node["Node Type"]
        )
        self.seen.append(
            Plan(
                statement=told["Query Text"],
                indexes=self._short({node["Index Name"] for node in nodes if "Index Name" in node}),
                scans=any(node["Node Type"] in {"Seq Scan", "Sample Scan"} for node in nodes),
                sorts=any("Sort" in node["Node Type"] for node in nodes),
                effort=int(rows),
                text=text,
            )
        )


class _Explained(Plans):
    """Asks for the plan before the statement is carried out, and measures what it takes."""

    explain: ClassVar[str]

    def __init__(self, engine: sa.Engine, table: str) -> None:
        super().__init__(engine, table)
        sa.event.listen(engine, "before_cursor_execute", self._before)
        sa.event.listen(engine, "after_cursor_execute", self._after)
        self._asking: tuple[str, list[Any], int] | None = None

    def _before(self, connection: sa.Connection, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        self._asking = None
        # How rows are inserted is no question; what stands in their way is read by a statement of its own.
        if self.table not in statement or not statement.startswith(("SELECT", "UPDATE", "DELETE")):
            return
        driver = connection.connection.dbapi_connection
        assert driver is not None
        asked = driver.cursor()
        asked.execute(self.explain + statement, parameters)
        told = list(asked.fetchall())
        asked.close()
        self._asking = statement, told, self.taken(driver)

    def _after(self, connection: sa.Connection, cursor: Any, statement: str, *_: object) -> None:
        if self._asking is not None:
            asked, told, before = self._asking
            self._asking = None
            self.seen.append(self.plan(asked, told, self.taken(connection.connection.dbapi_connection) - before))

    @abstractmethod
    def taken(self, driver: Any) -> int:
        """Return what the connection has taken so far."""

    @abstractmethod
    def plan(self, statement: str, told: list[Any], effort: int) -> Plan:
        """Return the plan that the database has told."""


class _MariaDB(_Explained):
    explain = "EXPLAIN "
    little = 2500

    def taken(self, driver: Any) -> int:
        with driver.cursor() as cursor:
            cursor.execute("SHOW SESSION STATUS LIKE 'Handler_read%'")
            return sum(int(value) for name, value in cursor.fetchall() if not name.endswith(("_deleted", "_retry")))

    def plan(self, statement: str, told: list[Any], effort: int) -> Plan:
        # id, select_type, table, type, possible_keys, key, key_len, ref, rows, Extra
        return Plan(
            statement=statement,
            indexes=self._short({line[5] for line in told if line[5]}),
            # What a part of the statement has found is read whole.
            scans=any(line[3] in {"ALL", "index"} and not str(line[2]).startswith("<") for line in told),
            sorts=any("filesort" in (line[9] or "") for line in told),
            effort=effort,
            text="\n".join(" ".join(map(str, line)) for line in told),
        )


class _SQLite(_Explained):
    explain = "EXPLAIN QUERY PLAN "
    little = 600

    def __init__(self, engine: sa.Engine, table: str) -> None:
        super().__init__(engine, table)
        self._hundreds = 0
        sa.event.listen(engine, "connect", self._count)

    def _count(self, connection: sqlite3.Connection, record: object) -> None:
        def one_more() -> int:
            self._hundreds += 1
            return 0

        connection.set_progress_handler(one_more, 100)

    def taken(self, driver: Any) -> int:
        return self._hundreds

    def plan(self, statement: str, told: list[Any], effort: int) -> Plan:
        lines = [str(line[3]) for line in told]
        words = [line.split() for line in lines]
        return Plan(
            statement=statement,
            indexes=self._short({line[line.index("INDEX") + 1] for line in words if "INDEX" in line}),
            # Said too of an index that is read from its end as far as it is wanted: how far, the effort tells.
            # And of what a part of the statement has found.
            scans=any(
                line.startswith("SCAN") and not any(word in line for word in ("INDEX", "CONSTANT", "anon_"))
                for line in lines
            ),
            sorts=any("TEMP B-TREE" in line for line in lines),
            effort=effort,
            text="\n".join(lines),
        )


def watch(engine: sa.Engine, table: str = "queue_log") -> list[Plans]:
    """Listen to engines like this one, once for each way in which the database plans."""
    match engine.dialect.name:
        case "postgresql":
            return [_PostgreSQL(sa.create_engine(engine.url), table, generic=generic) for generic in (False, True)]
        case "sqlite":
            return [_SQLite(sa.create_engine(engine.url), table)]
        case _:
            return [_MariaDB(sa.create_engine(engine.url), table)]


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _names_of_indexes(engine: sa.Engine, table: str) -> dict[str, str]:
    """Return what the indexes are, by the names that the database has for them; of all tables whose names begin so, as partitions' do."""
    names = {"PRIMARY": "pkey", f"sqlite_autoindex_{table}_1": "pkey"}
    inspector = sa.inspect(engine)
    for each in inspector.get_table_names():
        if not each.startswith(table):
            continue
        if name := inspector.get_pk_constraint(each)["name"]:
            names[name] = "pkey"
        for index in inspector.get_indexes(each):
            columns = tuple(str(column) for column in index["column_names"])
            names[str(index["name"])] = _INDEXES.get(columns, str(index["name"]))
    return names
