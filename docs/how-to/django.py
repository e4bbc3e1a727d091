# What django.md takes for granted, and what its examples must have done: see tests/support/pages.py.
# ruff: noqa: ANN201, D100, D103, F401, F821, I001, INP001

# %% before block 1
import sys
from datetime import timedelta

import django
from django.conf import settings
from django.db import connection, models, transaction
from django.http import HttpResponse
from django.utils import timezone
from celery_idempotent import outbox
from celery_idempotent.records import RowFilter

sys.modules["shop"].__path__, sys.modules["shop"].__file__ = ["."], "shop.py"
settings.configure(
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "django.db"}},
    INSTALLED_APPS=["shop"],
    USE_TZ=True,
    DEFAULT_AUTO_FIELD="django.db.models.AutoField",
)
django.setup()

# %% after block 1
with connection.schema_editor() as editor:
    editor.create_model(Order)


def sent():
    return {row.key.message_id for row in app.queue_log.store.rows(RowFilter())}


# %% after block 2
assert place(None).content == b"1"
assert sent() == {"order:1"}

# %% after block 4
Order.objects.create(amount=700)
sweep(0.0)
assert sent() == {"order:1", "order:2"}
app.queue_log.close()
app.close()
connection.close()
