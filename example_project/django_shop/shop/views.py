from django.db import transaction
from django.http import JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from shop.models import Order
from shop.tasks import charge


@csrf_exempt
@require_POST
def order(request):
    """Create an order and call for its charge, in one transaction. A repeated request finds both."""
    number, amount = request.POST["number"], int(request.POST["amount"])
    with transaction.atomic():
        _, created = Order.objects.get_or_create(number=number, defaults={"amount": amount})
        result = charge.delay(number)
    return JsonResponse({"created": created, "duplicate": result.duplicate, "task_id": result.id})
