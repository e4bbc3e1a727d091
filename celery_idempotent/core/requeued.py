"""What becomes of a message that is requeued."""

from __future__ import annotations

from dataclasses import dataclass, replace

from celery_idempotent.core.records import MessageKey

__all__ = ["Requeued"]


@dataclass(frozen=True, slots=True)
class Requeued:
    """A message that waits again.

    Attributes:
        key: The message.
        task_id: The Celery id that it is published under.
        renamed: Whether that id is new. A message that was revoked or had expired needs a new one, since workers remember the old one.
        published: Whether the broker has it. If not, a worker publishes it.
    """

    key: MessageKey
    task_id: str
    renamed: bool = False
    published: bool = False

    def handed_over(self) -> Requeued:
        """Return it after its publication."""
        return replace(self, published=True)
