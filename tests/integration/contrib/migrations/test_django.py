"""Django: the migration of the page "Create and upgrade the table", applied by Django."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from celery_idempotent import SQLStore
from tests.support.worker import ROOT

PAGE = ROOT / "docs" / "how-to" / "schema.md"

SETTINGS = """
SECRET_KEY = "none"
INSTALLED_APPS = ["shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "django.db"}}
USE_TZ = True
"""

APP = """
import os
from celery import Celery

app = Celery("shop", broker="memory://")
app.conf.idempotent_store = os.environ["STORE"]
"""


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_the_migration_of_the_page_makes_the_table_once(store_url: str, tmp_path: Path) -> None:
    section = PAGE.read_text().partition("## Django")[2].partition("\n## ")[0]
    (migration,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    migrations = tmp_path / "shop" / "migrations"
    migrations.mkdir(parents=True)
    for package in (migrations.parent, migrations):
        (package / "__init__.py").touch()
    (migrations.parent / "celery.py").write_text(APP)
    (migrations / "0001_queue_log.py").write_text(migration)
    (migrations / "0002_queue_log.py").write_text(migration.replace("= []", '= [("shop", "0001_queue_log")]'))
    (tmp_path / "settings.py").write_text(SETTINGS)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        "DJANGO_SETTINGS_MODULE": "settings",
        "STORE": store_url,
    }

    done = subprocess.run(
        [sys.executable, "-m", "django", "migrate"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("... OK") == 2
    with closing(SQLStore(store_url)) as store:
        store.check()
        assert store.outstanding() == []
