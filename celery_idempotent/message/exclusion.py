"""Leave out what does not count of a call's arguments: ``by_arguments(exclude=("now", "order.seen_at"))``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from celery_idempotent.message.paths import ABSENT, Path, arriving, key_of, refuse, refuse_absent

__all__ = ["ALL", "Exclusion"]

#: Excludes all arguments.
ALL = "*"

#: What is left out below a value: the path, if all of it, or else what is left out of each part.
_Below = dict[str, Any]


class Exclusion:
    """The parts of a call's arguments that do not count.

    Args:
        paths: The paths to them; ``*`` alone leaves out all.
        option: The option as it was written, for errors.
    """

    __slots__ = ("_all", "_option", "_tree")

    def __init__(self, paths: Sequence[Path], option: str) -> None:
        self._all = [path.text for path in paths] == [ALL]
        self._option = option
        self._tree: _Below = {}
        for path in sorted(paths, key=lambda path: len(path.steps)):
            below: Any = self._tree
            for step in path.steps[:-1]:
                below = below.setdefault(step, {})
                if isinstance(below, Path):
                    break  # a part of what is left out anyway
            else:
                below[path.steps[-1]] = path

    def without(
        self, arguments: Mapping[str, Any], defaults: Mapping[str, Any], *, keywords: str | None = None
    ) -> dict[str, Any]:
        """Return a call's arguments without what does not count; nothing is changed in place.

        Args:
            arguments: The arguments by parameter.
            defaults: The parameters' defaults. They may lack parts, because no caller has misspelt those.
            keywords: The parameter that takes all other names, if there is one.

        Raises:
            ConfigurationError: The call lacks a part that it may not lack.
        """
        if self._all:
            return {}
        counted = dict(arguments)
        others: dict[str, Any] = {}
        if keywords in counted:
            others = counted[keywords] = dict(counted[keywords])
        for name, below in self._tree.items():
            holder = counted if name in counted else others
            if name not in holder:
                if keywords in counted and (path := _required(below)) is not None:
                    refuse_absent(self._option, path, (*others, *counted))
            elif isinstance(below, Path):
                del holder[name]
            else:
                strict = not (name in defaults and holder[name] is defaults[name])
                holder[name] = self._pruned(holder[name], below, strict=strict, depth=1)
        return counted

    def _pruned(self, value: Any, below: _Below, *, strict: bool, depth: int) -> Any:
        """Return a copy of a value without some of its parts."""
        value = arriving(value)
        if value is None:
            return None
        found = {step: key for step in below if (key := key_of(value, step)) is not ABSENT}
        if strict:
            for step, each in below.items():
                if step not in found and (path := _required(each)) is not None:
                    refuse(self._option, path, depth, value)

        def part(step: str, part: Any) -> Any:
            each = below[step]
            return None if isinstance(each, Path) else self._pruned(part, each, strict=strict, depth=depth + 1)

        if isinstance(value, Mapping):
            changed = {key: part(step, value[key]) for step, key in found.items() if not isinstance(below[step], Path)}
            gone = {key for step, key in found.items() if isinstance(below[step], Path)}
            return {key: changed.get(key, item) for key, item in value.items() if key not in gone}
        if isinstance(value, (list, tuple)):
            items = list(value)
            for step, key in found.items():
                items[key] = part(step, items[key])  # None in its place, so that the others keep theirs
            return items
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            pruned = copy.copy(value)
            for step, key in found.items():
                object.__setattr__(pruned, key, part(step, getattr(value, key)))  # also of a frozen one
            return pruned
        return value  # of no canonical form: refused if it counts


def _required(below: Any) -> Path | None:
    """Return a path that leads here and may not be missing."""
    if isinstance(below, Path):
        return None if below.optional else below
    return next((path for each in below.values() if (path := _required(each)) is not None), None)
