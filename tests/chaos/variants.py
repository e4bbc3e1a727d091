"""What is put through the same chaos: this library, Celery as it is, and each package that promises something alike.

The packages are compared as their own documentation has them set up for a task that is known by its arguments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

from celery import Celery, Task

from celery_idempotent import IdempotentTask

__all__ = ["VARIANTS", "Variant"]


@dataclass(frozen=True)
class Variant:
    """One way to run the tasks.

    Attributes:
        name: As in ``--variant``.
        base: Module and class of the tasks; ``None`` for Celery's own.
        settings: Settings of the app; ``{redis}`` in a text stands for the result backend's URL.
        options: Options of each task.
        prepare: What its documentation has one do once per app.
    """

    name: str
    base: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Celery], None] = lambda app: None

    #: The environment variable by which workers and senders know theirs.
    VARIABLE: ClassVar[str] = "CELERY_IDEMPOTENT_CHAOS_VARIANT"

    @classmethod
    def of_this_process(cls) -> Variant:
        """Return the variant that this worker, or this sender, was started for."""
        return VARIANTS[os.environ.get(cls.VARIABLE, "idempotent")]

    @property
    def guarded(self) -> bool:
        """Whether it is this library."""
        return self.name == "idempotent"

    @property
    def task_options(self) -> dict[str, Any]:
        """What each task is made with."""
        base: type[Task] = IdempotentTask if self.guarded else Task
        if self.base is not None:
            module, _, name = self.base.partition(":")
            base = getattr(import_module(module), name)
        return {"base": base, **self.options}

    def if_guarded(self, **options: Any) -> dict[str, Any]:
        """Options of this library, left out elsewhere."""
        return options if self.guarded else {}

    def app_settings(self, redis: str) -> dict[str, Any]:
        """Return settings of the app."""
        return {name: _filled(value, redis) for name, value in self.settings.items()}


def _filled(value: Any, redis: str) -> Any:
    if isinstance(value, Mapping):
        return {name: _filled(inner, redis) for name, inner in value.items()}
    return value.replace("{redis}", redis) if isinstance(value, str) else value


def _prepare_once_task(app: Celery) -> None:
    package: Any = import_module("celery_once_task")
    package.configure(redis_url=app.conf.result_backend)
    package.setup_once_task_signals()
    app.steps["worker"].add(package.OnceTaskUnlockBootStep)


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("idempotent"),
        Variant("plain"),
        Variant("built-in", settings={"worker_deduplicate_successful_tasks": True}),
        Variant(
            "celery-once",
            base="celery_once:QueueOnce",
            settings={
                "ONCE": {
                    "backend": "celery_once.backends.Redis",
                    "settings": {"url": "{redis}", "default_timeout": 3600},
                }
            },
            options={"once": {"graceful": True}},
        ),
        Variant(
            "celery-singleton",
            base="celery_singleton:Singleton",
            settings={"singleton_backend_url": "{redis}"},
        ),
        Variant(
            "celery-heimdall",
            base="celery_heimdall:HeimdallTask",
            options={"heimdall": {"unique": True}},
        ),
        Variant("celery-once-task", base="celery_once_task:OnceTask", prepare=_prepare_once_task),
    )
}
