"""``python -m example_project.demo``: the loan check under duplicates, guarded and with plain Celery side by side."""
