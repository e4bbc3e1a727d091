"""A clock for the model: the store's own clock, plus the seconds that the model let pass."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, event

__all__ = ["Clock"]


class Clock:
    """Puts on the clock of the database, in the text of every statement that asks for it.

    Nothing that is stored changes, so what is compared and set by its moment stays what it was; and the production code is asked
    as it stands. Real time goes on beside it, a few milliseconds to a step.
    """

    def __init__(self) -> None:
        #: Seconds that have passed in the model.
        self.now = 0

    def attach(self, engine: Engine) -> None:
        """Advance the clock of every statement on this engine."""
        event.listen(engine, "before_cursor_execute", self._put_on, retval=True)

    def _put_on(
        self, connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> tuple[str, Any]:
        if self.now:
            statement = (
                statement.replace("statement_timestamp()", f"(statement_timestamp() + INTERVAL '{self.now} seconds')")
                .replace("UTC_TIMESTAMP(6)", f"DATE_ADD(UTC_TIMESTAMP(6), INTERVAL {self.now} SECOND)")
                .replace("'now'", f"'now', '+{self.now} seconds'")
            )
        return statement, parameters
