"""The example's settings, with connections that Django keeps, in its own pool where it has one, and a transaction for each request."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import django

_example = import_module(os.environ["SHOP_SETTINGS"])
globals().update({name: value for name, value in vars(_example).items() if name.isupper()})

_default = _example.DATABASES["default"]
_default["ATOMIC_REQUESTS"] = True
if django.VERSION >= (5, 1) and "postgresql" in _default["ENGINE"] and find_spec("psycopg_pool"):
    _default["OPTIONS"] = {"pool": {"min_size": 1, "max_size": 2}}
else:
    _default["CONN_MAX_AGE"], _default["CONN_HEALTH_CHECKS"] = None, True
