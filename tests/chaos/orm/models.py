"""The tables of :mod:`tests.chaos.effects_db`, which makes them, as models."""

from __future__ import annotations

from django.db import models

__all__ = ["Effect", "Order"]


class _Row(models.Model):
    key = models.CharField(max_length=200)
    sent = models.CharField(max_length=200, null=True)

    class Meta:
        abstract = True


class Effect(_Row):
    """What an atomic body did."""

    class Meta:
        managed = False
        db_table = "effects"


class Order(_Row):
    """What a producer's transaction wrote, together with the message of its call."""

    class Meta:
        managed = False
        db_table = "orders"
