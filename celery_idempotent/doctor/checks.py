"""The checks: pure functions of facts, one module for each group of findings. They know neither Celery nor a server."""

from __future__ import annotations

from celery_idempotent.doctor.app_checks import check_app
from celery_idempotent.doctor.broker_checks import check_queues, check_timeouts
from celery_idempotent.doctor.facts import Facts
from celery_idempotent.doctor.finding import Finding
from celery_idempotent.doctor.row_checks import check_rows
from celery_idempotent.doctor.store_checks import check_servers, check_store

__all__ = ["findings"]

_CHECKS = (check_app, check_timeouts, check_queues, check_store, check_servers, check_rows)


def findings(facts: Facts) -> list[Finding]:
    """Return all findings for these facts, errors first."""
    found = [finding for check in _CHECKS for finding in check(facts)]
    return sorted(found, key=lambda finding: finding.severity)
