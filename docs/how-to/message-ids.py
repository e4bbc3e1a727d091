# What message-ids.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: A001, D100, F821, INP001

# %% before block 1
from celery_idempotent import MessageMismatchError

app.conf.update(idempotent_store="sqlite://", task_always_eager=True)
# %% after block 2
refund.delay("o-1", 5)
try:
    refund.delay("o-1", 5, note="again")
except MessageMismatchError:
    pass
else:
    raise AssertionError("was not compared")
# %% after block 4
settle.delay("o-1", 5, now=1)
assert settle.delay("o-1", 5, now=2).duplicate
try:
    settle.delay("o-1", 5, "a note", now=3)
except MessageMismatchError:
    pass
else:
    raise AssertionError("was not compared")
# %% after block 5
assert not ship.delay({"id": (8, "a"), "seen_at": 1, "map": {1: "a"}}).duplicate
assert ship.delay({"id": [8, "a"], "seen_at": 1, "map": {"1": "a"}}).duplicate
# %% before block 6
printed = []
print = printed.append
# %% after block 6
assert str(printed[0]).endswith("order, a Order, has no 'idd'; did you mean 'id'?")
# %% after block 8
assert archive.idempotency.message_id(("o-1",), {}).endswith(":o-1")
app.queue_log.close()
app.close()
