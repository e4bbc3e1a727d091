"""An order, which is to be charged once."""

from __future__ import annotations

from django.db import models

__all__ = ["Order"]


class Order(models.Model):  # type: ignore[misc] # Django has no types
    amount = models.IntegerField()
    placed = models.DateTimeField(auto_now_add=True)
    charged = models.BooleanField(default=False)

    def __str__(self) -> str:
        return f"order {self.pk}"
