# What steps.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D101, D102, D103, E402, F821, I001, INP001, N801, N805

# %% before block 1
requests, charges, mails = [], {}, []


class provider:
    def charge(order_id, amount, key):
        requests.append(order_id)
        return charges.setdefault(key, {"id": f"ch_{len(charges) + 1}", "amount": amount, "paid": True})

    def find(reference):
        return charges.get(reference)


class mail:
    def send_receipt(order_id, charge_id):
        mails.append((order_id, charge_id))
        if len(mails) == 1:
            raise OSError("the mail server is away")


# %% after block 1
from celery_idempotent.maintenance.requeue import Requeued, requeue
from celery_idempotent.core.records import MessageKey

failed = checkout.apply_async(("o-1", 500))
header = {"idempotent": {"message_id": "order:o-1", "task": checkout.name, "task_id": failed.id}}
assert isinstance(checkout.apply(("o-1", 500), task_id=failed.id, headers=header).result, OSError)
row = app.queue_log.store.find(MessageKey("order:o-1", checkout.name))
assert isinstance(requeue(app.queue_log, row), Requeued)
assert checkout.apply(("o-1", 500), task_id=failed.id, headers=header).get() == "ch_1"
assert (requests, len(charges), len(mails)) == (["o-1"], 1, 2)

# %% after block 2
assert charge_or_find("o-1", 500, "a new key")["id"] == "ch_2"
assert charge_or_find("o-1", 500, "a new key")["id"] == "ch_2"
assert len(charges) == 2

# %% after block 3
import time

from celery_idempotent.core.records import NewMessage


def died(order_id, charged):
    key = MessageKey(f"order:{order_id}", charge.name)
    app.queue_log.store.claim(NewMessage(key, order_id), worker="gone", lease=0.01, grace=0.0)
    time.sleep(0.1)
    header = {"idempotent": {"message_id": key.message_id, "task": charge.name, "task_id": order_id}}
    if charged is not None:
        from celery_idempotent.message.canvas_ids import derived

        charges[derived("step", charge.name, key.message_id, order_id, 0, "charge")] = {"id": "found", "paid": charged}
    return charge.apply((order_id, 5), task_id=order_id, headers=header)


requests.clear()
assert died("o-7", True).get() == "found"
assert "abandoned" in str(died("o-8", False).result)
assert requests == []
assert died("o-9", None).get().startswith("ch_")
assert requests == ["o-9"]
