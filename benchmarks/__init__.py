"""What a guard costs: this library beside plain Celery, and beside the packages that promise something alike, in one run.

``python -m benchmarks``, or ``make bench``; see :mod:`.__main__`. What it costs in a queue log of millions of rows is :mod:`.scale`.
"""
