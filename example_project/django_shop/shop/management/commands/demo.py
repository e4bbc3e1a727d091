import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from django.conf import settings
from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError
from django.db import transaction
from django.test import Client
from project.celery import app

from celery_idempotent.contrib.django.models import Message
from shop.models import Order, Payment
from shop.tasks import charge

ORDERS = 10


class Command(BaseCommand):
    help = "Place each order twice, kill workers in the middle, and count the payments."

    def handle(self, *args, **options):
        for folder in ("queue", "control", "results"):
            (settings.DATA / folder).mkdir(parents=True, exist_ok=True)
        call_command("migrate", verbosity=0)
        workers = [self.start()]
        try:
            self.place_orders()
            self.die_behind_the_commit()
            time.sleep(1)
            for _ in range(2):
                self.stdout.write("a worker is killed (kill -9), and another one started")
                os.killpg(workers[-1].pid, signal.SIGKILL)
                workers.append(self.start())
                time.sleep(3)
            self.wait()
        finally:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        self.report()

    def start(self):
        command = [sys.executable, "-m", "celery", "-A", "project", "worker", "-c", "2", "-l", "INFO"]
        with Path(settings.DATA / "worker.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def place_orders(self):
        client = Client()
        for number in range(ORDERS):
            form = {"number": f"order-{number}", "amount": 100 + number}
            first, again = (client.post("/orders/", form).json() for _ in range(2))
            if first["duplicate"] or not again["duplicate"]:
                raise CommandError(f"{form}: {first}, {again}")
        self.stdout.write(f"{ORDERS} orders were placed, each of them twice")
        with transaction.atomic():
            Order.objects.create(number="rolled-back", amount=1)
            charge.delay("rolled-back")
            transaction.set_rollback(True)
        self.stdout.write("one was rolled back behind its call")

    def die_behind_the_commit(self):
        """Commit an order in a process that is killed before it has published the call."""
        code = (
            "import django, os, signal; django.setup()\n"
            "from django.db import transaction\n"
            "from shop.models import Order\n"
            "from shop.tasks import charge\n"
            "with transaction.atomic():\n"
            "    transaction.on_commit(lambda: os.kill(os.getpid(), signal.SIGKILL))\n"
            "    Order.objects.create(number='unpublished', amount=99)\n"
            "    charge.delay('unpublished')\n"
        )
        subprocess.run([sys.executable, "-c", code], check=False)
        self.stdout.write("one was committed by a process that was killed before it had published the call")

    def wait(self):
        deadline = time.monotonic() + 150
        while Message.objects.filter(status="done").count() < 2 * (ORDERS + 1):
            if time.monotonic() > deadline:
                raise CommandError(f"not done in time; see {settings.DATA / 'worker.log'}")
            time.sleep(0.5)

    def report(self):
        app.close()
        payments = sorted(Payment.objects.values_list("order__number", flat=True))
        orders = sorted(Order.objects.values_list("number", flat=True))
        self.stdout.write(f"{len(orders)} orders, {len(payments)} payments, each order paid once: {payments == orders}")
        if payments != orders or len(orders) != ORDERS + 1:
            raise CommandError(f"orders {orders}, payments {payments}")
