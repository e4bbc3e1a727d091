# What from-python.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: A001, D100, F821, INP001

# %% before block 1
from celery_idempotent.core.records import NewMessage

app.conf.update(idempotent_store="sqlite://")
# %% before block 4
assert row.key.message_id == "order:o-1"
assert (row.task_id, row.duplicates) == (result.id, 1)
# %% after block 4
assert [state_of(order_id) for order_id in ("o-1", "o-2")] == ["pending", "not ordered"]
lost = charge.delay("o-3", 5)
store, message = app.queue_log.store, app.queue_log.find(charge, "o-3", 5)
claimed = store.claim(NewMessage(message.key, lost.id), worker="w:1", lease=60.0, grace=0.0)
assert store.fail(claimed.claim, error="ConnectionError: no gateway")
# %% after block 5
assert [row.key.message_id for row in failed] == ["order:o-3"]
printed = []
print = printed.append
# %% after block 6
assert printed == []
assert app.queue_log.find_id(charge, "order:o-3").published_at is not None
# %% after block 7
app.queue_log.close()
app.close()
