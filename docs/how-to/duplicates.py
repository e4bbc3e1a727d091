# What duplicates.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN001, ANN201, D100, D101, D102, F821, INP001

# %% before block 1
class Provider:
    def __init__(self) -> None:
        self.accepted = {"o-1"}

    def accepts(self, order_id):
        self.accepted.add(order_id)

    def charge(self, order_id):
        if order_id not in self.accepted:
            raise ValueError("the card was declined")
        return f"charged {order_id}"


provider = Provider()
app.conf.update(idempotent_store="sqlite://", task_always_eager=True)
# %% after block 1
assert (again.state, again.get()) == ("SUCCESS", "charged o-1")
# %% after block 2
assert charge.delay("o-2").duplicate
# %% after block 3
assert failed.state == "FAILURE"
app.queue_log.close()
app.close()
