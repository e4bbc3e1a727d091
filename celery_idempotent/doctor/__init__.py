"""The doctor: find each way in which the set-up of an app, its broker and its store would break the promise."""

from __future__ import annotations

from celery_idempotent.doctor.checks import findings
from celery_idempotent.doctor.facts import Facts
from celery_idempotent.doctor.finding import CODES, Finding, Severity
from celery_idempotent.doctor.reading import read_facts

__all__ = ["CODES", "Facts", "Finding", "Severity", "findings", "read_facts"]
