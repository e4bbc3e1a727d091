from celery import shared_task

from celery_idempotent import IdempotentTask
from shop.models import Order, Payment


@shared_task(base=IdempotentTask, message_id="charge:{number}", atomic=True)
def charge(number):
    """Take the money for an order. The payment commits with the message's completion, or not at all."""
    order = Order.objects.get(number=number)
    Payment.objects.create(order=order, amount=order.amount)
    confirm.delay(number)
    return order.amount


@shared_task(base=IdempotentTask, message_id="confirm:{number}")
def confirm(number):
    """Tell the customer."""
    print(f"order {number} is paid")
