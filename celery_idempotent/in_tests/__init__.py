"""The queue log in the tests of an app: fresh for each test, its messages delivered again, and its processes killed.

What the pytest plugin and Django's test cases have in common.
"""

from celery_idempotent.in_tests.fresh import FreshLogs
from celery_idempotent.in_tests.log import LogInTest

__all__ = ["FreshLogs", "LogInTest"]
