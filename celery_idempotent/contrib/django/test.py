"""The queue log in test cases that Django's runner runs."""

from __future__ import annotations

from typing import Any

from celery_idempotent.in_tests import FreshLogs, LogInTest
from celery_idempotent.queue_log import QueueLog

__all__ = ["QueueLogMixin"]


class QueueLogMixin:
    """Give each test of a Django test case ``self.queue_log``, and a fresh queue log where that is not in Django's database.

    Put it before the test case among the bases: ``class OrdersTest(QueueLogMixin, TestCase)``. It also works when pytest runs the class.
    """

    #: The queue logs that the test has used: see the page "Test your tasks".
    queue_log: LogInTest

    def run(self, result: Any = None) -> Any:
        """Run the test."""
        logs = QueueLog.stand_in
        if isinstance(logs, FreshLogs):  # the pytest plugin's, which empties them
            self.queue_log = LogInTest(logs)
            return super().run(result)  # type: ignore[misc]
        logs = FreshLogs()
        self.queue_log = LogInTest(logs)
        logs.install()
        try:
            return super().run(result)  # type: ignore[misc]
        finally:
            logs.empty()
            logs.uninstall()
