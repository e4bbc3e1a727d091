# What index.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: D100, F821, INP001

# %% after block 1
assert charge.delay("o-1", 500).duplicate
app.queue_log.close()
app.close()
