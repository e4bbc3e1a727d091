# What testing.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: D100, F821, INP001

# %% after block 2
test_a_second_call_is_a_duplicate()

# %% after block 3
test_the_row_counts_the_duplicate()
test_another_amount_is_refused()
app.queue_log.close()
app.close()
