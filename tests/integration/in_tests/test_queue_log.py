"""The fixture ``queue_log``: rows, copies and leases, with eager calls and with a worker."""

from __future__ import annotations

from tests.integration.in_tests.conftest import RunTests


def test_rows_and_copies_of_eager_calls(run_tests: RunTests) -> None:
    run_tests(
        test_shop="""
        import pytest
        from celery_idempotent import ConfigurationError, IdempotentTask
        from shop import RUNS, app, charge, resize

        def test_a_row(queue_log):
            assert queue_log.message(charge, "o-1", 500) is None
            charge.delay("o-1", 500)
            row = queue_log.message(charge, "o-1", 500)
            assert (row.status, row.processed_status, row.token, row.duplicates) == ("done", "success", 1, 0)
            assert queue_log.message(charge, order_id="o-1", amount=7).task_id == row.task_id
            assert queue_log.message(charge.s("o-1"), 500).task_id == row.task_id

        def test_a_row_of_a_task_without_ids(queue_log):
            result = resize.delay(7)
            assert queue_log.message(result).key.message_id == result.id
            with pytest.raises(ConfigurationError, match="give the result of the call"):
                queue_log.message(resize, 7)
            with pytest.raises(TypeError, match="is not a task with base=IdempotentTask"):
                queue_log.message(len)
            named = charge.apply_async(("o-2", 1), message_id="mine")
            assert queue_log.message(named).key.message_id == "mine"

        def test_messages_are_in_their_order(queue_log):
            for number in range(3):
                charge.delay(number, 1)
            assert [row.key.message_id for row in queue_log.messages()] == ["order:0", "order:1", "order:2"]

        def test_a_copy_of_a_message(queue_log):
            seen = []
            @app.task(base=IdempotentTask, name="seeing", bind=True, shared=False)
            def seeing(self, value):
                seen.append((self.request.id, self.request.headers.get("mine"), self.request.delivery_info.get("redelivered")))
                if len(seen) == 1:
                    raise ValueError
            first = seeing.apply_async(("a",), headers={"mine": 1})
            del seen[0]
            again = queue_log.deliver_again(first)
            assert again.duplicate and again.failed() and seen == []
            app.tasks.pop("seeing")

        def test_a_copy_gets_the_first_result(queue_log):
            RUNS.clear()
            first = charge.delay("o-1", 500)
            for number in (1, 2):
                again = queue_log.deliver_again(first)
                assert (again.id, again.get(), again.duplicate) == (first.id, "charged 500", True)
                assert queue_log.message(first).duplicates == number
            assert RUNS == ["o-1"]

        def test_a_copy_of_what_was_not_sent(queue_log):
            with pytest.raises(LookupError, match="no guarded message was sent in this test"):
                queue_log.deliver_again(app.AsyncResult("unknown"))

        def test_a_retried_message(queue_log):
            runs = []
            @app.task(base=IdempotentTask, name="trying", autoretry_for=(ValueError,), shared=False, acks_late=True)
            def trying():
                runs.append(1)
                if len(runs) < 3:
                    raise ValueError
                return len(runs)
            first = trying.delay()
            assert first.get() == 3
            again = queue_log.deliver_again(first)
            assert (again.get(), again.duplicate, len(runs)) == (3, True, 3)
            app.tasks.pop("trying")

        def test_leases(queue_log):
            seen = []
            @app.task(base=IdempotentTask, name="leased", message_id=lambda: "leased", shared=False, acks_late=True)
            def leased():
                seen.append(queue_log.message(leased).lease_left > 0)
                seen.append(queue_log.expire_leases())
                seen.append(queue_log.message(leased).lease_left > 0)
            leased.delay()
            assert seen == [True, 1, False]
            assert queue_log.expire_leases() == 0
            app.tasks.pop("leased")
        """
    )


def test_with_celerys_worker(run_tests: RunTests) -> None:
    run_tests(
        *("-p", "celery.contrib.pytest", "-W", "ignore::DeprecationWarning"),
        conftest="""
        import pytest

        @pytest.fixture(scope="session")
        def celery_config():
            return {"broker_url": "memory://", "result_backend": "cache+memory://"}

        @pytest.fixture(scope="session")
        def celery_worker_parameters():
            return {"perform_ping_check": False}
        """,
        test_shop="""
        import pytest
        from celery import shared_task
        from celery_idempotent import IdempotentTask

        RUNS = []

        @shared_task(base=IdempotentTask, message_id="order:{order_id}")
        def charge(order_id, amount):
            RUNS.append(order_id)
            return f"charged {amount}"

        @pytest.mark.parametrize("number", range(2))
        def test_a_worker(celery_app, celery_worker, queue_log, number):
            first = charge.delay("o-1", 500)
            assert first.get(timeout=10) == "charged 500"
            assert charge.delay("o-1", 500).duplicate
            again = queue_log.deliver_again(first)
            assert (again.id, again.get(timeout=10), again.duplicate) == (first.id, "charged 500", True)
            assert RUNS == ["o-1"] * (number + 1)
            row = queue_log.message(charge, "o-1", 500)
            assert (row.status, row.processed_status, row.token) == ("done", "success", 1)
            assert row.duplicates == 2
            assert [row.key] == [each.key for each in queue_log.messages()]

        def test_without_a_worker(celery_app, queue_log):
            first = charge.delay("o-1", 500)
            assert queue_log.message(charge, "o-1", 500).status == "pending"
            with pytest.raises(TimeoutError, match="no worker has taken the message"):
                queue_log.deliver_again(first, timeout=0.1)
        """,
    )
