"""Queues of each kind that messages are routed to: a broadcast, one behind a topic exchange, one whose rejected messages come back."""

from __future__ import annotations

from celery import Celery, Task
from celery.exceptions import Reject
from kombu import Exchange, Queue
from kombu.common import Broadcast

from tests.support.ledger import Ledger

__all__ = ["register"]


def register(app: Celery, *, base: type[Task], ledger: Ledger) -> None:
    """Declare the queues, and register ``rejects``."""
    own = app.conf.task_default_queue
    kind = {"x-queue-type": app.conf.task_default_queue_type}
    app.conf.task_queues = [
        Queue(own, Exchange(own), routing_key=own),
        Queue(f"{own}-work", Exchange(f"{own}-topic", type="topic"), routing_key=f"{own}.work.#", queue_arguments=kind),
        Broadcast(f"{own}-news"),
        Queue(f"{own}-rejects", queue_arguments={**kind, **_to(f"{own}-later")}),
        Queue(f"{own}-later", queue_arguments={**kind, **_to(f"{own}-rejects"), "x-message-ttl": 200}),
    ]

    @app.task(base=base, bind=True, name="rejects", acks_late=True)
    def rejects(self: Task, times: int) -> int:
        """Reject the message so many times, as a retry by way of a dead-letter queue does."""
        with ledger.run(self):
            before = len(ledger.starts("rejects", task_id=self.request.id)) - 1
            if before < times:
                raise Reject("not yet", requeue=False)
            return before


def _to(queue: str) -> dict[str, str]:
    return {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
