"""``each_crash`` and ``crash``: a message's process is killed at each point, and the user's test finds what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.in_tests.conftest import RunTests

BROKEN = (Path(__file__).parent / "broken_tasks.py").read_text()


@pytest.mark.timeout(400)
def test_it_finds_tasks_that_are_broken_and_passes_their_mended_twins(
    run_tests: RunTests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN_TASKS", str(tmp_path))
    printed = run_tests(
        broken_tasks=BROKEN,
        test_shop="""
        import pytest
        from broken_tasks import PAIRS, app, effects, reset

        def wrong(queue_log, task):
            reset()
            task.delay("o-0")
            right = effects() if "fails" not in task.name else {"charges": 1}
            found = [(str(crash), effects()) for crash in queue_log.each_crash(task, "o-1", reset=reset) if effects() != right]
            assert right
            return found

        @pytest.mark.parametrize("task", [broken for broken, _ in PAIRS], ids=lambda task: task.name)
        def test_broken(queue_log, task):
            found = wrong(queue_log, task)
            print(found)
            assert found

        @pytest.mark.parametrize("task", [mended for _, mended in PAIRS], ids=lambda task: task.name)
        def test_mended(queue_log, task):
            assert wrong(queue_log, task) == []
        """,
    )
    assert "24 passed" in printed


def test_the_points_and_what_follows(run_tests: RunTests) -> None:
    run_tests(
        test_shop="""
        import pytest
        import sqlalchemy as sa
        from pathlib import Path
        from celery_idempotent import ConfigurationError, IdempotentTask
        from shop import app

        LEDGER = Path("ledger")

        @app.task(base=IdempotentTask, acks_late=True, shared=False, message_id="m:{order_id}")
        def write(order_id, *, twice=False, reset=None):
            for _ in range(3):
                with LEDGER.open("a") as file:
                    file.write(order_id)
            return [
                letter for letter in order_id
            ]

        def clear():
            LEDGER.write_text("")

        def test_each_point_in_its_order(queue_log):
            found = list(queue_log.each_crash(write, "a", twice=True, reset=clear))
            names = [crash.before for crash in found]
            assert names[:3] == ["the acknowledgement", "claim", names[2]]
            assert names[-2].startswith("the return at test_shop.py:") and names[-1] == "complete"
            assert [name.rpartition(": ")[2] for name in names if name.startswith("line")][:3] == [
                "for _ in range(3):", 'with LEDGER.open("a") as file:', "file.write(order_id)"
            ]
            assert len(set(names)) == len(names)
            assert {crash.row.status for crash in found} == {"done"}
            assert {crash.result.get()[0] for crash in found} == {"a"}
            assert str(found[1]) == "killed before claim"
            assert found[0].result.duplicate is True
            assert LEDGER.read_text() == "aaaaaa"

        def test_a_signature(queue_log):
            for crash in queue_log.each_crash(write.s(reset="mine"), "a", reset=clear):
                assert queue_log.message(write, "a").status == "done", crash

        def test_one_crash(queue_log):
            clear()
            before = write.delay("before")
            crash = queue_log.crash(write, "a", at="complete")
            assert LEDGER.read_text() == "before" * 3 + "aaa" and crash.before == "complete"
            assert queue_log.message(write, "a").status == "processing"
            assert queue_log.deliver_again(crash).failed()  # its lease has not run out
            assert queue_log.expire_leases() == 1
            assert queue_log.deliver_again(crash).get() == ["a"]
            assert LEDGER.read_text() == "before" * 3 + "aaaaaa"
            assert queue_log.deliver_again(crash).duplicate
            assert queue_log.deliver_again(before).duplicate
            with pytest.raises(LookupError, match="did not reach 'nowhere', but only:\\nclaim\\nline"):
                queue_log.crash(write, "b", at="nowhere")

        def test_the_next_log_is_in_memory_again(queue_log):
            assert queue_log.messages() == [] and app.queue_log.store.in_memory

        def test_a_task_that_fails(queue_log):
            @app.task(base=IdempotentTask, shared=False, name="failing")
            def failing():
                raise ValueError("as told")
            with pytest.raises(AssertionError, match="the task fails without having been killed:(.|\\n)*as told"):
                list(queue_log.each_crash(failing, reset=clear))

        def test_a_database_in_memory(queue_log):
            engine = sa.create_engine("sqlite://")
            @app.task(base=IdempotentTask, shared=False, name="in_memory")
            def in_memory():
                engine.connect().execute(sa.text("SELECT 1"))
            with pytest.raises(ConfigurationError, match="uses an in-memory SQLite database"):
                list(queue_log.each_crash(in_memory, reset=clear))
            engine.dispose()

        def test_a_call_of_the_body(queue_log):
            @app.task(base=IdempotentTask, shared=False, name="parent", acks_late=True)
            def parent():
                write.delay("child")
            for crash in queue_log.each_crash(parent, reset=clear):
                assert queue_log.message(write, "child").processed_status == "success", crash
        """
    )
