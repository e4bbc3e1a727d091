"""The example's settings, with the queue log in the database of another alias than the orders."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

_example = import_module(os.environ["SHOP_SETTINGS"])
globals().update({name: value for name, value in vars(_example).items() if name.isupper()})

_default = _example.DATABASES["default"]
_name = _default["NAME"]
_example.DATABASES["log"] = {
    **_default,
    "NAME": _name.with_name("log.db") if isinstance(_name, Path) else f"{_name}_log",
}
CELERY_IDEMPOTENT_STORE = "django://log"
DATABASE_ROUTERS = ["several.Router"]


class Router:
    """Keeps the queue log in its own database, and everything else out of it."""

    def allow_migrate(self, db: str, app_label: str, **_: Any) -> bool:
        """Return whether an app's tables belong there."""
        return (db == "log") is (app_label == "celery_idempotent")
