"""The table of :mod:`tests.support.effects`, which makes it, as a model."""

from __future__ import annotations

from django.db import models

__all__ = ["Effect"]


class Effect(models.Model):
    """One effect, by the name that a test gave it."""

    name = models.CharField(max_length=200)
    value = models.IntegerField(default=0)

    class Meta:
        managed = False
        db_table = "effects"
