"""Add the page to Flower: its URLs, its templates, its entry in the navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from celery import states
from flower import urls
from tornado.template import Loader, Template
from tornado.web import url

from celery_idempotent.contrib.flower import views
from celery_idempotent.contrib.flower.snapshot import Snapshot

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["add"]

_OURS = Path(__file__).parent / "templates"

#: The end of the first list of Flower's navigation.
_END_OF_LIST = re.compile(rb"</ul>")

_ENTRY = b"""  <li class="nav-item">
          <a class="nav-link{% if active_tab == 'queue-log' %} active{% end %}" href="{{ reverse_url('queue-log') }}"
            {% if active_tab == 'queue-log' %}aria-current="page"{% end %}>Queue log</a>
        </li>
      </ul>"""


class _Templates(Loader):
    """Flower's templates and ours, with our page in the navigation."""

    def _create_template(self, name: str) -> Template:
        if (_OURS / name).is_file():
            return Template((_OURS / name).read_bytes(), name=name, loader=self)
        if name == "navbar.html":
            navigation = (Path(self.root) / name).read_bytes()
            return Template(_END_OF_LIST.sub(lambda _: _ENTRY, navigation, count=1), name=name, loader=self)
        return super()._create_template(name)


def add(app: Celery) -> None:
    """Put our pages before Flower's: its last one answers all other URLs, and our ``/metrics`` extends its own."""
    snapshot = {"snapshot": Snapshot(app)}
    added = [
        url(r"/queue-log", views.QueueLogView, snapshot, name="queue-log"),
        url(r"/queue-log/message", views.MessageView, snapshot, name="queue-log-message"),
        url(r"/api/queue-log/requeue", views.Requeue, snapshot, name="queue-log-requeue"),
        url(r"/metrics", views.Metrics, snapshot, name="queue-log-metrics"),
    ]
    names = {rule.name for rule in added}
    urls.handlers[:] = [*added, *(rule for rule in urls.handlers if getattr(rule, "name", None) not in names)]
    urls.settings["template_loader"] = _Templates(urls.settings["template_path"])
    # A held copy may run next, but Celery ranks unknown states as nearly final.
    states.PRECEDENCE_LOOKUP["HELD"] = states.PRECEDENCE_LOOKUP[states.STARTED]
