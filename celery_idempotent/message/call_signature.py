"""Bind a call's arguments to the parameters of a task's body, so that equal calls look alike.

``f(1)``, ``f(a=1)`` and ``f(1, b=<default>)`` are one call. Nothing here knows Celery or a database.
"""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MethodType
from typing import Any

from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.canonical import canonical, fingerprint
from celery_idempotent.message.default import Default, is_optional
from celery_idempotent.message.exclusion import ALL, Exclusion
from celery_idempotent.message.paths import ABSENT, Path, refuse_absent, value_at
from celery_idempotent.message.type_parts import parts_of_body, refuse_unknown_part

__all__ = ["ANY_CALL", "Args", "CallSignature", "Kwargs", "arguments_fingerprint"]

#: Arguments of a call, as ``apply_async`` takes them: ``None`` for none.
Args = Sequence[Any] | None
Kwargs = Mapping[str, Any] | None


class CallSignature:
    """The parameters of a task's body. Make it once per task.

    Args:
        run: The body. Decorators are followed by ``__wrapped__``. A decorator that changes the parameters must set
            ``__signature__``, or arguments are bound to the parameters of the function that it wraps.
        bound: Whether the task is the first parameter (``bind=True``) and not yet bound to it. The task never counts as
            an argument. For a bound method, both values do the same.
        typed: Whether a call must fit the parameters. With ``False`` (``typing=False``), a call that does not fit is identified by its
            arguments as given.

    Raises:
        ConfigurationError: ``run`` has no signature, as some functions written in C.
    """

    __slots__ = (
        *("_body", "_defaults", "_excluded", "_keywords", "_outer", "_plain", "_signature", "_typed", "_values"),
        "name",
    )

    def __init__(self, run: Callable[..., Any], *, bound: bool = False, typed: bool = True) -> None:
        self._typed = typed
        #: The body's name, for errors.
        self.name: str = getattr(run, "__name__", type(run).__name__)
        try:
            signature = inspect.signature(run)
            outer = inspect.signature(run, follow_wrapped=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"cannot read the parameters of {self.name} ({error}): give the task a body written in Python"
            ) from error
        if bound and not _is_method(run):
            signature, outer = _without_first(signature), _without_first(outer)
        self._body = run
        self._signature = signature
        self._outer = outer
        #: What does not count; ``None`` if all counts.
        self._excluded: Exclusion | None = None
        parameters = signature.parameters.values()
        self._keywords = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self._defaults = {p.name: Default.of(p) for p in parameters if is_optional(p)}
        #: The parameters, if each can be given both by place and by name; and the defaults of those that have one.
        self._plain = (
            tuple(signature.parameters) if all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) else None
        )
        self._values = {p.name: p.default for p in parameters if p.default is not p.empty}

    def __repr__(self) -> str:
        return f"<CallSignature {self.name}{self._signature}>"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters, in order, without the task itself."""
        return tuple(self._signature.parameters)

    @property
    def each(self) -> list[inspect.Parameter]:
        """The parameters, as :mod:`inspect` describes them."""
        return list(self._signature.parameters.values())

    def positions(self, count: int) -> list[str]:
        """Return the parameter for each of ``count`` positional arguments; ``*args`` may occur several times.

        Raises:
            TypeError: The body does not take that many.
        """
        parameters = list(self._signature.parameters.values())
        names = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if count > len(names) and rest is None:
            raise TypeError(f"{self.name} takes {len(names)} positional arguments, not {count}")
        return [*names, *[str(rest)] * (count - len(names))][:count]

    def bind(self, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """Return the arguments of a call by parameter, defaults applied.

        Values of ``*args`` and ``**kwargs`` are under the names of these parameters, as a tuple and a dict.

        Raises:
            TypeError: The arguments do not fit the body.
        """
        arguments = None if self._plain is None else self._bind_plainly(self._plain, args or (), kwargs or {})
        if arguments is not None:
            return arguments
        try:
            call = self._signature.bind(*(args or ()), **(kwargs or {}))
        except TypeError as error:
            if not self._typed:  # Celery sends it anyway, and the worker reports what is wrong
                return {
                    **dict(zip(self.parameters, args or (), strict=False)),
                    **(kwargs or {}),
                    "*": tuple(args or ()),
                }
            raise self._misfit(error, args, kwargs) from None
        call.apply_defaults()
        return dict(call.arguments)

    def _bind_plainly(
        self, names: tuple[str, ...], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Bind as :mod:`inspect` does, but faster; return ``None`` for a call that does not fit, since inspect says why."""
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(name in given or name not in self._signature.parameters for name in kwargs):
            return None
        given.update(kwargs)
        try:
            return {name: given[name] if name in given else self._values[name] for name in names}
        except KeyError:
            return None

    def names(self, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """Bind a call, and add each item of ``**kwargs`` under its own name; a parameter of the same name comes first.

        Raises:
            TypeError: The arguments do not fit the body.
        """
        return self._flat(self.bind(args, kwargs))

    def _flat(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return arguments if self._keywords not in arguments else {**arguments[self._keywords], **arguments}

    def _value_at(self, path: Path, names: Mapping[str, Any], option: str) -> Any:
        name = path.steps[0]
        if name not in names:
            if path.optional or name in self._signature.parameters:  # of a call that does not fit, with `typing=False`
                return ABSENT
            refuse_absent(option, path, names)
        return value_at(path, names, option)

    def excluding(self, paths: Sequence[Path], option: str) -> CallSignature:
        """Return this signature for calls of which some parts do not count: neither in digests nor in differences.

        Args:
            paths: The parts; ``*`` for all.
            option: The option as it was written, for errors.

        Raises:
            ConfigurationError: A path names no argument that a call can have, or all of them one by one.
        """
        everything = [path.text for path in paths] == [ALL]
        if not everything:
            self.check_paths(paths, option)
        if not everything and not set(self.parameters) - {path.text for path in paths} and self.parameters:
            raise ConfigurationError(
                f"{option} excludes every argument of {self.name}, so all its calls would be one message: "
                f"if they are meant to be, write by_arguments(exclude='*')"
            )
        excluded, signature = Exclusion(paths, option), copy.copy(self)
        signature._excluded = excluded  # noqa: SLF001 - of its own class
        signature._defaults = {name: default.without(excluded) for name, default in self._defaults.items()}  # noqa: SLF001
        return signature

    def _counted(self, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """Bind a call, and leave out what does not count."""
        arguments = self.bind(args, kwargs)
        return (
            arguments
            if self._excluded is None
            else self._excluded.without(arguments, self._values, keywords=self._keywords)
        )

    def digest(self, args: Args, kwargs: Kwargs, *, only: Sequence[Path] = (), option: str = "") -> str:
        """Return a SHA-256 hex digest (64 characters) of the call: equal for calls whose arguments are equal once bound.

        An argument that equals its default counts as not given. So digests stay the same, for calls under way too, when a later
        version adds a parameter with a default.

        Args:
            args: Positional arguments, without the task itself.
            kwargs: Keyword arguments.
            only: The arguments and parts that count; empty for all.
            option: The option as it was written, for errors.

        Raises:
            ConfigurationError: An argument that counts has no canonical form, or the call lacks it.
            TypeError: The arguments do not fit the body.
        """
        if only:
            names = self._flat(self._counted(args, kwargs))
            values = {
                path.text: names[path.text]
                if len(path.steps) == 1 and path.text in names
                else self._value_at(path, names, option)
                for path in only
            }
            arguments = {text: value for text, value in values.items() if value is not ABSENT}
        else:
            arguments = self._counted(args, kwargs)
        return fingerprint(
            {
                name: value
                for name, value in arguments.items()
                if name not in self._defaults or not self._defaults[name].equals(value)
            }
        )

    def difference(self, first: tuple[Args, Kwargs], second: tuple[Args, Kwargs]) -> list[str]:
        """Return the names of the arguments that are not the same in two calls, with their types where those are not.

        Raises:
            ConfigurationError: One has no canonical form.
            TypeError: The body cannot be called so.
        """
        was, now = self._flat(self._counted(*first)), self._flat(self._counted(*second))
        names = [name for name in dict.fromkeys((*now, *was)) if name != self._keywords]
        return [
            _with_types(name, was.get(name), now.get(name))
            for name in names
            if canonical(was.get(name)) != canonical(now.get(name))
        ]

    def check_names(self, names: Iterable[str], option: str) -> None:
        """Refuse names that no argument can have.

        Args:
            names: The arguments that an option names.
            option: The option as it was written, for the error.

        Raises:
            ConfigurationError: A name is not a parameter, and the body takes no ``**kwargs``.
        """
        if self._keywords is not None:
            return
        for name in names:
            if name not in self._signature.parameters:
                near = difflib.get_close_matches(name, self.parameters, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(self.parameters) or 'none'}"
                raise ConfigurationError(f"{option}: {self.name} has no parameter {name!r}; {hint}")

    def check_paths(self, paths: Iterable[Path], option: str) -> None:
        """Refuse paths that no argument can have; those of types that say what parts they have, too.

        Raises:
            ConfigurationError: A path begins with no parameter, and the body takes no ``**kwargs``; or the annotation of the parameter has
                no such part.
        """
        self.check_names((path.steps[0] for path in paths), option)
        hints: Mapping[str, Any] | None = None
        for path in paths:
            if len(path.steps) > 1 and path.steps[0] in self._signature.parameters:
                hints = parts_of_body(self._body) if hints is None else hints
                refuse_unknown_part(path, hints.get(path.steps[0], Any), option)

    def wants_task(self, option: Callable[..., object], owner: type | None = None, name: str = "message_id") -> bool:
        """Return whether the function of an option takes the task before its arguments, as a method does.

        Args:
            option: The option, from the task's class or the decorator.
            owner: The task's class.
            name: The option's.
        """
        if inspect.isclass(option) or isinstance(option, MethodType) or not hasattr(type(option), "__get__"):
            return False  # Python would not bind it to an object
        try:
            first = next(iter(inspect.signature(option).parameters.values()), None)
        except (TypeError, ValueError):
            return False
        if first is None or first.kind not in {first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD}:
            return False
        if first.name in self._signature.parameters:
            return False
        # A function defined in the class is a method, whatever its first parameter is called. For others, the name `self` decides.
        methods = {f"{cls.__qualname__}.{name}" for cls in getattr(owner, "__mro__", ())}
        return first.name == "self" or getattr(option, "__qualname__", None) in methods

    def _misfit(self, error: TypeError, args: Args, kwargs: Kwargs) -> TypeError:
        misfit = TypeError(f"{self.name}(): {error}")
        try:
            self._outer.bind(*(args or ()), **(kwargs or {}))
        except TypeError:
            return misfit
        misfit.add_note(
            f"A decorator around {self.name} accepts this call. "
            f"If it changes the parameters, it must set __signature__ on the function it returns."
        )
        return misfit


def _with_types(name: str, was: object, now: object) -> str:
    before, after = type(was).__name__, type(now).__name__
    return name if before == after else f"{name} ({after}, first {before})"


def arguments_fingerprint(signature: CallSignature | None, args: Args, kwargs: Kwargs) -> str:
    """Return a SHA-256 hex digest (64 characters) of a call's arguments, to find out whether its message id was used for another call.

    Args:
        signature: The task's; ``None`` when it is not known (``send_task`` by name). Positional arguments then have no names,
            and the digest cannot be compared with one made from the signature.
        args: Positional arguments, without the task itself.
        kwargs: Keyword arguments.

    Raises:
        ConfigurationError: An argument has no canonical form.
        TypeError: The arguments do not fit the body.
    """
    return (signature or ANY_CALL).digest(args, kwargs)


def _is_method(run: Callable[..., Any]) -> bool:
    return isinstance(inspect.unwrap(run, stop=lambda f: isinstance(f, MethodType)), MethodType)


def _without_first(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return signature.replace(parameters=parameters)


def _any_call(*args: Any, **kwargs: Any) -> None:
    """Stand in for a body whose parameters are not known."""


#: For a call whose task is not known.
ANY_CALL = CallSignature(_any_call)
