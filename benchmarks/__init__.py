"""What a guard costs: this library beside plain Celery, and beside the packages that promise something alike, in one run.

``python -m benchmarks``, or ``make bench``; see :mod:`.__main__`.
"""
