from django.db import models


class Order(models.Model):
    number = models.CharField(max_length=40, unique=True)
    amount = models.IntegerField()

    def __str__(self):
        return f"order {self.number}"


class Payment(models.Model):
    """Money that was taken for an order: one payment each, and no database constraint that says so."""

    order = models.ForeignKey(Order, on_delete=models.CASCADE, related_name="payments")
    amount = models.IntegerField()

    def __str__(self):
        return f"{self.amount} for {self.order}"
