"""The queue log of a Django project: ``INSTALLED_APPS += ["celery_idempotent.contrib.django"]``.

With ``CELERY_IDEMPOTENT_STORE = "django://default"`` the queue log is a table in the database of that alias. A guarded call inside of
``transaction.atomic()`` is recorded in its transaction and published by its commit. The body of an ``atomic=True`` task runs in
``transaction.atomic()``, and its message is completed by the same commit.
"""
