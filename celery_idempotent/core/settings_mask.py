"""Have Celery mask the store's URL, which contains a password, where it shows an app's settings.

``celery report``, ``celery inspect conf`` and Flower's page of a worker show settings by ``Settings.table()``, which masks those whose names
Celery knows to be secret. There is no public API to name another one. A value that masks itself would not work: it is sent as JSON,
which knows no subclass of ``str``, so its readers would get another value than was set.

Read from Celery 5.5 to 5.7, ``celery/app/utils.py``.
"""

from __future__ import annotations

import re

from celery.app import utils

__all__ = ["mask_in_settings"]

#: The name of the setting, in any case and after any namespace.
SETTING = "IDEMPOTENT_STORE$"


def mask_in_settings() -> None:
    """Have Celery mask ``idempotent_store``; calling it again changes nothing."""
    known = utils.HIDDEN_SETTINGS
    if SETTING not in known.pattern:
        utils.HIDDEN_SETTINGS = re.compile(f"{known.pattern}|{SETTING}", known.flags)


mask_in_settings()
