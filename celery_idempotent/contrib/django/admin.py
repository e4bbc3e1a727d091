"""The queue log in Django's admin: look, search, *requeue* and *forget*."""

from __future__ import annotations

import math
from collections.abc import Callable
from pprint import pformat
from typing import Any, ClassVar, NoReturn

from django.contrib import admin, messages
from django.contrib.admin.views.main import ChangeList

from celery_idempotent.contrib.django.models import Message
from celery_idempotent.contrib.django.project import alias_of_log, queue_log
from celery_idempotent.core.records import Row
from celery_idempotent.errors import IdempotentError, RefusedError
from celery_idempotent.maintenance.operations import unfinished
from celery_idempotent.message.contents import contents_of
from celery_idempotent.producer.relay import relay

__all__ = ["MessageAdmin"]

#: Fields after the columns on a message's page; need ``view_arguments``.
_CONTENTS = ("arguments", "result")


class _Newest(ChangeList):
    """Order the list only as requested. Django would add the primary key, which has no index."""

    def _get_deterministic_ordering(self, ordering: list[Any]) -> list[Any]:
        return ordering


@admin.register(Message)
class MessageAdmin(admin.ModelAdmin):
    """Show messages read-only; *requeue* and *forget* change them, each with its own permission."""

    actions: ClassVar = ["requeue", "forget"]
    date_hierarchy = None
    list_display: ClassVar = [
        *("message_id", "task_name", "status", "processed_status", "attempt", "duplicates", "created_timestamp"),
        "processed_timestamp",
    ]
    list_filter: ClassVar = ["status", "processed_status", "task_name"]
    ordering: ClassVar = ["-created_timestamp"]
    search_fields: ClassVar = ["=message_id"]
    search_help_text = "Message id"
    show_full_result_count = False

    def get_changelist(self, request: Any, **options: Any) -> Any:  # noqa: ARG002 - Django's signature
        """Return the class of the list."""
        return _Newest

    def get_fields(self, request: Any, obj: Any = None) -> list[str]:  # noqa: ARG002
        """Return the fields on a message's page."""
        fields = [field.name for field in Message._meta.fields if field.name != "key"]  # noqa: SLF001 - a public API of Django
        return [*fields, *(_CONTENTS if self.has_view_arguments_permission(request) else ())]

    def get_readonly_fields(self, request: Any, obj: Any = None) -> list[str]:
        """Return all fields: the page is read-only."""
        return self.get_fields(request, obj)

    # -- permissions ---------------------------------------------------------------------------------------------------

    def has_module_permission(self, request: Any) -> bool:
        """Return whether the log is in one of Django's databases and this user may see it."""
        return alias_of_log() is not None and super().has_module_permission(request)

    def has_add_permission(self, request: Any) -> bool:  # noqa: ARG002
        """Return ``False``."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:  # noqa: ARG002
        """Return ``False``."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:  # noqa: ARG002
        """Return ``False``."""
        return False

    def has_requeue_permission(self, request: Any) -> bool:
        """Return whether the user may requeue messages."""
        return bool(request.user.has_perm("celery_idempotent.requeue_message"))

    def has_forget_permission(self, request: Any) -> bool:
        """Return whether the user may forget messages."""
        return bool(request.user.has_perm("celery_idempotent.forget_message"))

    def has_view_arguments_permission(self, request: Any) -> bool:
        """Return whether the user may see arguments and results."""
        return bool(request.user.has_perm("celery_idempotent.view_arguments"))

    # -- a message's page ----------------------------------------------------------------------------------------------

    @admin.display(description="Arguments")
    def arguments(self, message: Message) -> str:
        """Return the arguments, formatted, and masked by ``idempotent_redact``."""
        contents = _contents(message)
        return str(contents.get("undecodable_message") or pformat((contents.get("args"), contents.get("kwargs"))))

    @admin.display(description="Result")
    def result(self, message: Message) -> str:
        """Return the result, formatted and masked in the same way."""
        contents = _contents(message)
        return str(contents.get("undecodable_result") or pformat(contents.get("result")))

    # -- actions -------------------------------------------------------------------------------------------------------

    @admin.action(description="Requeue failed and abandoned messages", permissions=["requeue"])
    def requeue(self, request: Any, messages_: Any) -> None:
        """Make failed messages pending again, and publish them."""
        if self._each(request, messages_, lambda row: queue_log().requeue(row, publish=False), "requeued"):
            relay(queue_log(), at_most=math.inf)

    @admin.action(description="Forget finished messages, so that their ids are free", permissions=["forget"])
    def forget(self, request: Any, messages_: Any) -> None:
        """Empty the rows of finished messages."""

        def forget(row: Row) -> None:
            reason = unfinished(row)
            if reason is not None:
                reason += "; see `manage.py idempotent forget --force`"
            elif not queue_log().forget(row):
                reason = "it was forgotten before"
            if reason is not None:
                raise RefusedError(row.key.message_id, row.key.task_name, reason)

        self._each(request, messages_, forget, "forgotten")

    def _each(self, request: Any, chosen: Any, change: Callable[[Row], object], done: str) -> int:
        """Change each message and inform the user; return how many changed."""
        count = 0
        try:
            for message in chosen:
                row = _row_of(message)
                try:
                    change(row or _gone(message))
                except RefusedError as error:
                    self.message_user(request, f"{message} was not {done}: {error.reason}.", messages.WARNING)
                    continue
                count += 1
                self.log_change(request, message, [{"changed": {"name": done, "object": str(message)}}])
        except IdempotentError as error:
            self.message_user(request, str(error), messages.ERROR)
        if count:
            self.message_user(request, f"{count} {done}.", messages.SUCCESS)
        return count


def _row_of(message: Message) -> Row | None:
    return queue_log().find_id(message.task_name, message.message_id)


def _gone(message: Message) -> NoReturn:
    raise RefusedError(message.message_id, message.task_name, "it is gone")


def _contents(message: Message) -> dict[str, Any]:
    log, row = queue_log(), _row_of(message)
    return {} if row is None else contents_of(log.app, row, log.settings.redact)
