"""The page test-your-tasks.md, followed literally: each block is a file, or a part of one."""

from __future__ import annotations

from tests.integration.in_tests.conftest import RunTests
from tests.support.pages import blocks

PAGE = "docs/how-to/test-your-tasks.md"


def test_the_page(run_tests: RunTests) -> None:
    tasks, conftest, first, rows, crashes, worker, _django = (
        block.text for block in blocks(PAGE) if block.language == "python"
    )
    printed = run_tests(
        *("-p", "celery.contrib.pytest", "-W", "ignore::DeprecationWarning"),
        tasks=tasks,
        conftest=conftest,
        test_tasks=f"{first}\n{rows}\n{crashes}\n{worker}",
    )
    assert "4 passed" in printed
