from contextlib import contextmanager

from django.contrib.admin.utils import quote
from django.contrib.auth.models import Permission, User
from django.db import transaction
from django.test import TestCase, TransactionTestCase
from project.celery import app

from celery_idempotent.contrib.django.models import Message
from shop.models import Order, Payment
from shop.tasks import charge, confirm


@contextmanager
def override_eager():
    app.conf.task_always_eager = True
    try:
        yield
    finally:
        app.conf.task_always_eager = False


class OrdersTest(TestCase):
    def test_an_order_and_its_call_are_in_one_transaction(self):
        with self.captureOnCommitCallbacks() as callbacks:
            response = self.client.post("/orders/", {"number": "o-1", "amount": 500})
        self.assertEqual(response.json()["duplicate"], False)
        self.assertEqual(Message.objects.get().message_id, "charge:o-1")
        self.assertEqual(len(callbacks), 1)

    def test_a_repeated_request_is_a_duplicate(self):
        first, again = (self.client.post("/orders/", {"number": "o-1", "amount": 500}).json() for _ in range(2))
        self.assertEqual((first["duplicate"], again["duplicate"]), (False, True))
        self.assertEqual(first["task_id"], again["task_id"])
        self.assertEqual(Message.objects.count(), 1)

    def test_a_rollback_leaves_neither(self):
        with self.assertRaises(RuntimeError), transaction.atomic():
            Order.objects.create(number="o-1", amount=500)
            charge.delay("o-1")
            raise RuntimeError
        self.assertEqual((Order.objects.count(), Message.objects.count()), (0, 0))

    def test_a_savepoint_that_is_rolled_back_takes_its_call_with_it(self):
        with self.captureOnCommitCallbacks() as callbacks, transaction.atomic():
            confirm.delay("kept")
            with self.assertRaises(RuntimeError), transaction.atomic():
                confirm.delay("dropped")
                raise RuntimeError
        self.assertEqual([message.message_id for message in Message.objects.all()], ["confirm:kept"])
        self.assertEqual(len(callbacks), 1)


class EagerTest(TestCase):
    def setUp(self):
        self.enterContext(override_eager())

    def test_an_eager_call_runs_at_once(self):
        Order.objects.create(number="o-1", amount=500)
        self.assertEqual(charge.delay("o-1").get(), 500)
        self.assertEqual(charge.delay("o-1").duplicate, True)
        self.assertEqual(Payment.objects.count(), 1)
        self.assertEqual(Message.objects.get(task_name=charge.name).processed_status, "success")

    def test_in_a_block_it_waits_for_the_commit(self):
        with self.captureOnCommitCallbacks(execute=True), transaction.atomic():
            Order.objects.create(number="o-1", amount=500)
            charge.delay("o-1")
            self.assertEqual(Payment.objects.count(), 0)
        self.assertEqual(Payment.objects.count(), 1)

    def test_a_body_that_fails_leaves_nothing(self):
        with self.assertRaises(Order.DoesNotExist):
            charge.delay("nobody's").get()
        self.assertEqual(Message.objects.get().processed_status, "failure")


class CommittedTest(TransactionTestCase):
    def setUp(self):
        self.enterContext(override_eager())

    def test_an_order_is_paid_once(self):
        for _ in range(2):
            self.client.post("/orders/", {"number": "o-1", "amount": 500})
        self.assertEqual([payment.amount for payment in Payment.objects.all()], [500])


class AdminTest(TestCase):
    def setUp(self):
        Order.objects.create(number="o-1", amount=500)
        with override_eager():
            for number in ("o-1", "nobody's"):
                charge.delay(number)
        self.failed = Message.objects.get(processed_status="failure")

    def sign_in(self, *permissions):
        user = User.objects.create_user("ada", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=["view_message", *permissions]))
        self.client.force_login(user)

    def post(self, action):
        chosen = {"action": action, "_selected_action": [message.pk for message in Message.objects.all()]}
        return self.client.post("/admin/celery_idempotent/message/", chosen, follow=True)

    def test_the_list_is_filtered_and_searched(self):
        self.sign_in()
        for query, found in (("", 3), ("?q=charge:o-1", 1), ("?processed_status__exact=failure", 1)):
            page = self.client.get(f"/admin/celery_idempotent/message/{query}")
            self.assertEqual(len(page.context["cl"].result_list), found, query)

    def test_a_page_shows_arguments_only_to_those_who_may_see_them(self):
        self.sign_in()
        page = f"/admin/celery_idempotent/message/{quote(self.failed.pk)}/change/"
        self.assertNotContains(self.client.get(page), "[&quot;nobody&#x27;s&quot;]")
        self.client.logout()
        User.objects.all().delete()
        self.sign_in("view_arguments")
        self.assertContains(self.client.get(page), "[&quot;nobody&#x27;s&quot;]")

    def test_without_permission_there_are_no_actions(self):
        self.sign_in()
        self.post("requeue")
        self.assertEqual(Message.objects.get(pk=self.failed.pk).status, "done")

    def test_a_failed_message_is_requeued(self):
        self.sign_in("requeue_message")
        page = self.post("requeue")
        self.assertContains(page, "1 requeued.")
        self.assertContains(page, "it succeeded")
        self.assertEqual(Message.objects.get(pk=self.failed.pk).status, "pending")

    def test_finished_messages_are_forgotten(self):
        self.sign_in("forget_message")
        self.assertContains(self.post("forget"), "3 forgotten.")
        self.assertEqual(set(Message.objects.values_list("error", flat=True)), {"forgotten"})
        self.assertContains(self.post("forget"), "it was forgotten before")

    def test_a_message_that_waits_is_neither_requeued_nor_forgotten(self):
        self.sign_in("requeue_message", "forget_message")
        charge.delay("o-2")
        self.assertContains(self.post("requeue"), "[charge:o-2] was not requeued: it already waits")
        self.assertContains(self.post("forget"), "[charge:o-2] was not forgotten: it waits to run; see")
        self.assertEqual(Message.objects.get(message_id="charge:o-2").status, "pending")
