"""Celery apps for the tests, described by one value that both the test and its worker processes build the app from."""

from tests.support.apps.spec import AppSpec, OpenApp, close_app

__all__ = ["AppSpec", "OpenApp", "close_app"]
