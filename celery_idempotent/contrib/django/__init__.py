"""The queue log of a Django project: ``INSTALLED_APPS += ["celery_idempotent.contrib.django"]``.

With ``CELERY_IDEMPOTENT_STORE = "django://default"`` the queue log is a table in that alias's database. A guarded call inside
``transaction.atomic()`` is recorded in its transaction and published after the commit. The body of an ``atomic=True`` task runs in
``transaction.atomic()``, and the same commit completes its message.
"""
