"""The hot path: hand statements that were compiled once to the driver.

SQLAlchemy compiles all statements of the store, and keeps its connections. But its work for one execution (a context, a result,
processors, events) takes longer than the driver's, and half as long as that of a database on the same host. A task executes three statements.
So these are compiled once per process and dialect, and executed by the driver's own cursor. If SQLAlchemy's events have listeners,
SQLAlchemy executes them, because the driver would call no listener.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, Engine, Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.sql.compiler import SQLCompiler

__all__ = ["Answer", "DirectConnection", "Plans", "directly"]

E = TypeVar("E", bound=Executable)

_OPTION = "celery_idempotent_directly"

#: What SQLAlchemy tells of an execution through its dialect.
_DIALECT_EVENTS = ("do_execute", "do_execute_no_params", "handle_error")


def directly(statement: E) -> E:
    """Mark a statement to be handed to the driver: its results need no conversion, and it is executed with one set of values."""
    marked: E = statement.execution_options(**{_OPTION: True})
    return marked


class Answer:
    """The result of a statement, with the attribute names of a SQLAlchemy result.

    Attributes:
        rowcount: Rows that matched.
        lastrowid: The driver's attribute of that name.
    """

    __slots__ = ("_rows", "lastrowid", "rowcount")

    def __init__(self, rows: Sequence[Any], rowcount: int, lastrowid: int | None) -> None:
        self._rows = rows
        self.rowcount = rowcount
        self.lastrowid = lastrowid

    def first(self) -> Any:
        """Return the first row, or ``None``."""
        return self._rows[0] if self._rows else None

    def scalar_one_or_none(self) -> Any:
        """Return the first column of the only row, or ``None``."""
        return self._rows[0][0] if self._rows else None


class _Plan:
    """A statement compiled for a driver."""

    def __init__(self, statement: Executable, engine: Engine) -> None:
        compiled = cast("SQLCompiler", statement.compile(dialect=engine.dialect))  # type: ignore[attr-defined]
        self.text = str(compiled)
        self.returns = bool(compiled.effective_returning)
        self._names = compiled.positiontup if compiled.positional else None
        self._constants: dict[str, Any] = {}
        self._convert: dict[str, Callable[[Any], Any]] = {}
        for name, bind in compiled.binds.items():
            processor = bind.type.dialect_impl(engine.dialect).bind_processor(engine.dialect)
            if not bind.required:
                value = bind.effective_value
                self._constants[name] = value if processor is None else processor(value)
            elif processor is not None:
                self._convert[name] = processor

    def values(self, parameters: Mapping[str, Any]) -> dict[str, Any] | tuple[Any, ...]:
        """Return the values of the placeholders."""
        values = {**self._constants, **parameters}
        for name, convert in self._convert.items():
            values[name] = convert(values[name])
        return values if self._names is None else tuple([values[name] for name in self._names])


class Plans:
    """The plans of one engine's statements. They live as long as their statements, which the stores keep."""

    def __init__(self) -> None:
        self._plans: dict[Executable, _Plan | None] = {}

    def of(self, statement: Executable, engine: Engine) -> _Plan | None:
        """Return the plan of a statement; ``None`` if SQLAlchemy executes it."""
        if not statement.get_execution_options().get(_OPTION):
            return None
        plan = self._plans.get(statement)
        if plan is None:
            plan = self._plans.setdefault(statement, _Plan(statement, engine))
        return plan


class DirectConnection(Connection):
    """A connection in autocommit that hands the statements of the hot path to the driver, and all others to SQLAlchemy.

    Args:
        engine: An engine in autocommit, without a user's listeners.
        plans: The engine's.
    """

    def __init__(self, engine: Engine, plans: Plans) -> None:
        super().__init__(engine)
        self._plans = plans

    def execute(self, statement: Any, parameters: Any = None, **options: Any) -> Any:
        """Execute a statement; see :func:`directly`.

        Raises:
            sqlalchemy.exc.DBAPIError: As SQLAlchemy raises it.
        """
        plan = None if self.watched else self._plans.of(statement, self.engine)
        if plan is None or not isinstance(parameters, Mapping):
            return super().execute(statement, parameters, **options)
        driver = self.connection
        cursor = driver.cursor()
        try:
            cursor.execute(plan.text, plan.values(parameters))
            rows = cursor.fetchall() if plan.returns else ()
            return Answer(rows, cursor.rowcount, getattr(cursor, "lastrowid", None))
        except self.dialect.loaded_dbapi.Error as error:
            raise self._explained(plan, error, driver.dbapi_connection, cursor) from error
        finally:
            cursor.close()

    @property
    def watched(self) -> bool:
        """Whether SQLAlchemy's execution events have listeners, such as for tracing: then it executes everything."""
        if self._has_events or self.engine._has_events:  # noqa: SLF001 - as it asks itself before each event
            return True
        # SQLAlchemy keeps execution events at the dialect, together with those of connecting.
        told = self.dialect.dispatch
        return self.dialect._has_events and any(bool(getattr(told, name)) for name in _DIALECT_EVENTS)  # noqa: SLF001

    def _explained(self, plan: _Plan, error: Any, driver: Any, cursor: Any) -> DBAPIError:
        lost = self.dialect.is_disconnect(error, driver, cursor)
        if lost:
            # As SQLAlchemy does: the pool's other connections are most likely lost as well.
            self.invalidate(error)
            self.engine.dispose()
        return cast(
            "DBAPIError",
            DBAPIError.instance(
                plan.text,
                None,
                error,
                self.dialect.loaded_dbapi.Error,
                hide_parameters=True,
                connection_invalidated=lost,
                dialect=self.dialect,
            ),
        )
