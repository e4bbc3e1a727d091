# What schema.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN002, ANN003, ANN201, D100, D101, D102, D103, F821, INP001, N801, RUF012

# %% before block 1
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine, inspect
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    pass


class context:
    configured = {}

    def configure(*_, **given):
        context.configured |= given


app.conf.idempotent_store = "sqlite:///shop.db"
engine = create_engine(app.conf.idempotent_store)


def migrate(step):
    with engine.begin() as connection, Operations.context(MigrationContext.configure(connection)):
        step()
    return inspect(engine).has_table("queue_log")


# %% after block 1
assert migrate(upgrade)
assert not migrate(downgrade)

# %% after block 3
assert "queue_log" in Base.metadata.tables
assert not context.configured["include_object"](Base.metadata.tables["queue_log"], "queue_log", "table", True, None)
app.close()
engine.dispose()
