"""Celery's own tests with IdempotentTask as the base of every task: ``make celery-suite``."""
