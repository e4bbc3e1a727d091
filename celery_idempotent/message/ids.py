"""Where a message's id comes from: a task's ``message_id`` option turned into a function of the call's arguments.

An id is decided once, by the producer. Arguments are bound to the task's parameters first, so that ``f(1)``, ``f(a=1)`` and
``f(1, b=<default>)`` are one call. Nothing here knows Celery or a database.
"""

from __future__ import annotations

import difflib
import inspect
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from types import MethodType
from typing import Any, cast

from celery_idempotent.core.storable import check_plain
from celery_idempotent.errors import ConfigurationError
from celery_idempotent.message.canonical import canonical, fingerprint, plain

__all__ = [
    "MAX_BYTES",
    "ByArguments",
    "CallSignature",
    "MessageIdSource",
    "arguments_fingerprint",
    "by_arguments",
    "check_message_id",
    "message_id_source",
]

#: Longest message id, in bytes of UTF-8: AMQP writes the property as a short string, whose length is one byte.
MAX_BYTES = 255

#: What the arguments of a call look like: ``apply_async`` takes ``None`` for none.
Args = Sequence[Any] | None
Kwargs = Mapping[str, Any] | None

#: Gives the message id of a call with these positional and keyword arguments.
MessageIdSource = Callable[[Args, Kwargs], str]


class CallSignature:
    """The parameters of a task's body, to which the arguments of a call are bound. Make it once per task.

    Args:
        run: The body. Decorators are seen through by ``__wrapped__``; one that changes the parameters must say so in
            ``__signature__``, or arguments are bound to the parameters of the function inside it.
        bound: Whether the task is its first parameter (``bind=True``) and not yet bound to it. It never counts among
            the arguments; a method that is bound already may be given either way.
        typed: Whether a call must fit. If not (``typing=False``), one that does not is told by its arguments as they are given.

    Raises:
        ConfigurationError: ``run`` has no signature to be found, as some functions written in C.
    """

    __slots__ = ("_defaults", "_keywords", "_outer", "_plain", "_signature", "_typed", "_values", "name")

    def __init__(self, run: Callable[..., Any], *, bound: bool = False, typed: bool = True) -> None:
        self._typed = typed
        #: What the body is called, for errors.
        self.name: str = getattr(run, "__name__", type(run).__name__)
        try:
            signature = inspect.signature(run)
            outer = inspect.signature(run, follow_wrapped=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(
                f"the parameters of {self.name} cannot be told ({error}): give the task a body written in Python"
            ) from error
        if bound and not _is_method(run):
            signature, outer = _without_first(signature), _without_first(outer)
        self._signature = signature
        self._outer = outer
        parameters = signature.parameters.values()
        self._keywords = next((p.name for p in parameters if p.kind is p.VAR_KEYWORD), None)
        self._defaults = {p.name: _Default(p) for p in parameters if _stands_at_something(p)}
        #: The parameters, if each may be given by place and by name, and what those stand at that may be left out.
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

    def positions(self, count: int) -> list[str]:
        """The names of the parameters that so many positional arguments are for; ``*args`` has one name for all that it takes up.

        Raises:
            TypeError: The body does not take so many.
        """
        parameters = list(self._signature.parameters.values())
        names = [p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
        rest = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        if count > len(names) and rest is None:
            raise TypeError(f"{self.name} takes {len(names)} positional arguments, not {count}")
        return [*names, *[str(rest)] * (count - len(names))][:count]

    def bind(self, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """The arguments of a call by parameter, defaults applied.

        What ``*args`` and ``**kwargs`` take up stands under their own names, as a tuple and a dict.

        Raises:
            TypeError: The body cannot be called so.
        """
        arguments = None if self._plain is None else self._bind_plainly(self._plain, args or (), kwargs or {})
        if arguments is not None:
            return arguments
        try:
            call = self._signature.bind(*(args or ()), **(kwargs or {}))
        except TypeError as error:
            if not self._typed:  # sent all the same; the worker says what is wrong with it
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
        """What :mod:`inspect` does at length, for most bodies; ``None`` for a call that does not fit, of which it says why."""
        given = dict(zip(names, args, strict=False))
        if len(args) > len(names) or any(name in given or name not in self._signature.parameters for name in kwargs):
            return None
        given.update(kwargs)
        try:
            return {name: given[name] if name in given else self._values[name] for name in names}
        except KeyError:
            return None

    def names(self, args: Args, kwargs: Kwargs) -> dict[str, Any]:
        """As :meth:`bind`, with what ``**kwargs`` took up by name as well; a parameter goes before a keyword of its name.

        Raises:
            TypeError: The body cannot be called so.
        """
        arguments = self.bind(args, kwargs)
        return arguments if self._keywords not in arguments else {**arguments[self._keywords], **arguments}

    def digest(self, args: Args, kwargs: Kwargs, *, only: Sequence[str] = ()) -> str:
        """SHA-256 hex digest (64 characters) of the call: equal for calls whose arguments are equal once bound.

        An argument that equals its default counts as one not given. That tells calls apart just as well, and holds over
        time: a parameter that a later version adds with a default changes nothing for the calls that do not give it,
        those under way among them.

        Args:
            args: Positional arguments, without the task itself.
            kwargs: Keyword arguments.
            only: The arguments that count; empty for all.

        Raises:
            ConfigurationError: One that counts has no canonical form.
            TypeError: The body cannot be called so.
        """
        if only:
            names = self.names(args, kwargs)
            arguments = {name: names[name] for name in only if name in names}
        else:
            arguments = self.bind(args, kwargs)
        return fingerprint(
            {
                name: value
                for name, value in arguments.items()
                if name not in self._defaults or not self._defaults[name].equals(value)
            }
        )

    def check_names(self, names: Iterable[str], option: str) -> None:
        """Refuse names that no argument can have.

        Args:
            names: What an option takes for names of arguments.
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

    def check_callable(self, option: Callable[..., object]) -> None:
        """Refuse a callable that takes no call of the body.

        Raises:
            ConfigurationError: It cannot be called with the arguments of the body, given by place or by name.
        """
        try:
            takes = inspect.signature(option)
        except (TypeError, ValueError):  # as of some types written in C: it is found out when it is called
            return
        every = list(self._signature.parameters.values())
        for some in (every, [p for p in every if p.default is p.empty]):
            by_place = [p for p in some if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
            by_name = {p.name: None for p in some if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
            only = [p for p in some if p.kind is p.POSITIONAL_ONLY]
            for args, kwargs in (
                (by_place, {p.name: None for p in some if p.kind is p.KEYWORD_ONLY}),
                (only, by_name),
            ):
                try:
                    takes.bind(*args, **kwargs)
                except TypeError:
                    continue
                return
        if any(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in every):
            return  # the body takes any number, and this one its own
        raise ConfigurationError(
            f"the message_id callable of {self.name} takes {takes}, and is called as {self.name} is, with "
            f"{inspect.Signature([p.replace(annotation=p.empty) for p in every])}: give it these parameters; "
            f"a first parameter called `self` is the task"
        )

    def wants_task(self, option: Callable[..., object], owner: type | None = None) -> bool:
        """Whether a ``message_id`` function asks for the task before the arguments, as a method does.

        Args:
            option: What stands in the task's class or was given to the decorator.
            owner: The task's class.
        """
        if inspect.isclass(option) or isinstance(option, MethodType) or not hasattr(type(option), "__get__"):
            return False  # nothing that Python would bind to an object
        try:
            first = next(iter(inspect.signature(option).parameters.values()), None)
        except (TypeError, ValueError):
            return False
        if first is None or first.kind not in {first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD}:
            return False
        if first.name in self._signature.parameters:
            return False
        # One that is written in the class is a method, whatever it calls its task; else the name says it.
        methods = {f"{cls.__qualname__}.message_id" for cls in getattr(owner, "__mro__", ())}
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


def _stands_at_something(parameter: inspect.Parameter) -> bool:
    """Whether a call may leave a parameter out."""
    return parameter.default is not parameter.empty or parameter.kind in {
        parameter.VAR_POSITIONAL,
        parameter.VAR_KEYWORD,
    }


class _Default:
    """What a parameter stands at when a call does not give it."""

    __slots__ = ("_form", "_name", "_value")

    def __init__(self, parameter: inspect.Parameter) -> None:
        self._name = parameter.name
        self._value: Any = parameter.default
        if parameter.kind is parameter.VAR_POSITIONAL:
            self._value = ()
        elif parameter.kind is parameter.VAR_KEYWORD:
            self._value = {}
        self._form: bytes | None = None
        with suppress(ConfigurationError):  # it is a sentinel, which nothing but itself equals
            self._form = canonical({self._name: self._value})

    def equals(self, value: Any) -> bool:
        if value is self._value:
            return True
        # By the form, where True is not 1; under its name, so that an error tells where.
        return self._form is not None and canonical({self._name: value}) == self._form


@dataclass(frozen=True, slots=True, repr=False)
class ByArguments:
    """Message ids computed over arguments; made by :func:`by_arguments`."""

    #: The arguments that count, sorted; empty for all.
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"by_arguments({', '.join(map(repr, self.names))})"

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """The digest of a call whose parameters are not known: positional arguments have no names then.

        As a task's option it is not called like this but bound to the task's parameters, where ``f(1)`` is ``f(a=1)``.

        Raises:
            ConfigurationError: An argument has no canonical form, or one that counts was not given by keyword.
        """
        for name in self.names:
            if name not in kwargs:
                raise ConfigurationError(
                    f"{self!r}: argument {name!r} was not given by keyword; give it by keyword, "
                    f"or make {self!r} itself the task's message_id, which knows the parameters"
                )
        return _ANY_CALL.digest(args, kwargs, only=self.names)


def by_arguments(*names: str) -> ByArguments:
    """A ``message_id`` option: calls with equal arguments are one message.

    The id is a SHA-256 over the canonical form of the arguments (see :mod:`celery_idempotent.message.canonical`), bound to the task's
    parameters and with defaults applied: ``f(1)``, ``f(a=1)`` and ``f(1, b=<default>)`` are one call; ``1`` and ``"1"`` are
    two.

    Args:
        names: The arguments that tell messages apart; none for all of them. Order does not matter.

    Hazard:
        With all arguments, one that differs at every call (the time, a request id) makes every call a new message. With
        some of them, name also whatever the effect depends on; a call that differs elsewhere is refused as a mismatch
        unless ``fingerprint=False``.

    Raises:
        ConfigurationError: A name is not a non-empty string.
    """
    for name in cast("tuple[object, ...]", names):
        if not isinstance(name, str) or not name:
            raise ConfigurationError(
                f"by_arguments takes names of arguments, not {name!r}: "
                f'message_id=by_arguments("order_id"), or by_arguments() for all of them'
            )
    return ByArguments(tuple(sorted(set(names))))


def message_id_source(
    option: object, run: Callable[..., Any] | CallSignature, bound: bool = False
) -> MessageIdSource | None:
    """Turn a task's ``message_id`` option into a function of the call's arguments.

    Args:
        option: One of

            * ``None``: the message is known by its task id;
            * a format string over the bound arguments: ``"order:{order_id}"``, ``"order:{order.id}"``,
              ``"{order[id]}"``, ``"{amount:.2f}"``. Fields are filled with plain data, so that arguments which
              :func:`by_arguments` calls equal give one text: see :func:`~celery_idempotent.message.canonical.plain`;
            * :func:`by_arguments`;
            * a callable, called with the arguments as the task itself is, that returns the id. Bind it to the task first if
              it asks for that: see :meth:`CallSignature.wants_task`.
        run: The task's body, or its signature.
        bound: As for :class:`CallSignature`; of no effect when ``run`` is one.

    Hazard:
        The fields of a format string are joined as text: ``"{a}:{b}"`` gives one id for ``("x:y", "z")`` and
        ``("x", "y:z")``, and ``{a}`` one for ``1`` and ``"1"``. The fingerprint tells such calls apart, by an error.

    Returns:
        The function, which raises ``TypeError`` for arguments that the body does not accept, and ``ConfigurationError``
        when they give no valid id: see :func:`check_message_id`, and a field that is ``None`` or whose text is not the same
        in every process. ``None`` when the option is.

    Raises:
        ConfigurationError: The option is not valid for this task.
    """
    if option is None:
        return None
    signature = run if isinstance(run, CallSignature) else CallSignature(run, bound=bound)
    if isinstance(option, str):
        return _Template(option, signature)
    if isinstance(option, ByArguments):
        signature.check_names(option.names, repr(option))
        names = option.names
        return lambda args, kwargs: signature.digest(args, kwargs, only=names)
    if callable(option) and option is not by_arguments:
        return _Called(option, signature)
    raise ConfigurationError(
        f"message_id={option!r} of {signature.name} is not one of: None for the task id, "
        f'a format string such as "order:{{order_id}}", by_arguments() or by_arguments("order_id"), '
        f"a callable of the call's arguments that returns the id"
    )


def arguments_fingerprint(signature: CallSignature | None, args: Args, kwargs: Kwargs) -> str:
    """SHA-256 hex digest (64 characters) of a call's arguments, by which a message id used for another call is found out.

    Args:
        signature: The task's; ``None`` when it is not known (``send_task`` by name). Positional arguments have no names
            then, so the digest says nothing when compared with one made from the signature.
        args: Positional arguments, without the task itself.
        kwargs: Keyword arguments.

    Raises:
        ConfigurationError: An argument has no canonical form.
        TypeError: The body cannot be called so.
    """
    return (signature or _ANY_CALL).digest(args, kwargs)


def check_message_id(value: object) -> str:
    """The message id, if it can be one.

    A message id is any text from 1 to 255 bytes of UTF-8 without NUL. Blanks count, and so does case.

    Raises:
        ConfigurationError: It cannot; the text says why and what to do.
    """
    text = check_plain("message_id", value)
    if not text:
        raise ConfigurationError("a message_id cannot be empty: leave it out to have the message known by its task id")
    size = len(text) if text.isascii() else len(text.encode())
    if size > MAX_BYTES:
        raise ConfigurationError(
            f"message_id {text[:32]!r}... is {size} bytes long in UTF-8, and AMQP carries {MAX_BYTES}: "
            f"hash what it is made of, with message_id=by_arguments(...)"
        )
    return text


class _Called:
    """Ids by a callable of the call's arguments."""

    __slots__ = ("_option", "_signature")

    def __init__(self, option: Callable[..., str], signature: CallSignature) -> None:
        self._option = option
        self._signature = signature
        signature.check_callable(option)

    def __call__(self, args: Args, kwargs: Kwargs) -> str:
        self._signature.bind(args, kwargs)  # so that a wrong call is reported as the task's, not as the callable's
        value = self._option(*(args or ()), **(kwargs or {}))
        try:
            return check_message_id(value)
        except ConfigurationError as error:
            raise ConfigurationError(
                f"the message_id callable of {self._signature.name} returned {value!r}: {error}"
            ) from None


class _Template(string.Formatter):
    """Ids by a format string over the bound arguments."""

    def __init__(self, template: str, signature: CallSignature) -> None:
        self._signature = signature
        self._template = template
        self._option = f"message_id={template!r}"
        try:
            fields = list(_fields(template))
            for _, _, specification, _ in string.Formatter().parse(template):
                self._check_width(specification or "")
        except ValueError as error:
            raise ConfigurationError(f"{self._option} is not a format string: {error}") from None
        example = f"{{{next(iter(signature.parameters), 'order_id')}}}"
        if not fields:
            raise ConfigurationError(
                f"{self._option} names no argument of {signature.name}, so that every call would be one message: "
                f"name one, such as {example}, or use a callable that returns it if that is meant"
            )
        for name, conversion in fields:
            if not name or name.isdigit():
                raise ConfigurationError(
                    f"{self._option} has a positional field, {{{name}}}: name the parameter, such as {example}"
                )
            if conversion not in {None, "", "s", "r", "a"}:
                raise ConfigurationError(f"{self._option}: there is no conversion !{conversion}; use !s, !r or !a")
        signature.check_names((name for name, _ in fields), self._option)

    def __call__(self, args: Args, kwargs: Kwargs) -> str:
        text = self.vformat(self._template, (), self._signature.names(args, kwargs))
        try:
            return check_message_id(text)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._option}: {error}") from None

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            found, first = super().get_field(field_name, args, kwargs)
            value = plain(object.__getattribute__(found, "_at"))
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ConfigurationError(
                f"{self._option}: {{{field_name}}} is not in the arguments of this call "
                f"({type(error).__name__}: {error})"
            ) from error
        if value is None:
            raise ConfigurationError(
                f"{self._option}: {field_name} is None in this call, and unrelated calls would become one message: "
                f"give it, or use by_arguments(...) where None is a value like another"
            )
        if isinstance(value, (set, frozenset)) or _is_anonymous(value):
            raise ConfigurationError(
                f"{self._option}: the text of {field_name}, of type {type(value).__name__}, "
                f"is not the same in every process: use an attribute or an item of it, or by_arguments(...)"
            )
        return value, first

    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return _Step(super().get_value(key, args, kwargs))

    def format_field(self, value: Any, format_spec: str) -> str:
        self._check_width(format_spec)
        if isinstance(value, Decimal) and value.is_finite() and abs(value.adjusted()) > MAX_BYTES and format_spec:
            raise ConfigurationError(
                f"{self._option}: {value} has more digits than the {MAX_BYTES} bytes that an id may have: leave out {format_spec!r}"
            )
        try:
            return str(format(value, format_spec))
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"{self._option}: {error}") from error

    def convert_field(self, value: Any, conversion: Any) -> Any:
        try:
            return super().convert_field(value, conversion)
        except ValueError as error:  # an int that is too long for decimal text
            raise ConfigurationError(f"{self._option}: {error}") from error

    def _check_width(self, specification: str) -> None:
        """Refuse a width or a precision that no id has room for; it may be a caller's, and of gigabytes."""
        for number in re.findall(r"\d+", specification):
            if len(number) > len(str(MAX_BYTES)) or int(number) > MAX_BYTES:
                raise ConfigurationError(
                    f"{self._option}: {number[:32]} in the format specification {specification[:64]!r} is more than the "
                    f"{MAX_BYTES} bytes that an id may have: use a smaller width or precision"
                )


class _Step:
    """A step into an argument: the same on both sides of the wire, where a model arrives as a dict, and an int key as its text."""

    __slots__ = ("_at",)

    def __init__(self, value: Any) -> None:
        self._at = value

    def __getattribute__(self, name: str) -> _Step:
        value = object.__getattribute__(self, "_at")
        try:
            return _Step(getattr(value, name))
        except AttributeError:
            if isinstance(value, Mapping) and name in value:
                return _Step(value[name])
            raise

    def __getitem__(self, name: int | str) -> _Step:
        value = object.__getattribute__(self, "_at")
        if isinstance(value, Mapping) and isinstance(name, int) and name not in value:
            return _Step(value[str(name)])
        if isinstance(name, str) and callable(getattr(type(value), "model_dump", None)):
            return _Step(getattr(value, name))
        return _Step(value[name])


def _fields(template: str) -> Iterator[tuple[str, str | None]]:
    """The names of a format string's fields, those inside of format specifications among them, with their conversions."""
    for _, field, specification, conversion in string.Formatter().parse(template):
        if field is not None:
            yield re.split(r"[.\[]", field, maxsplit=1)[0], conversion
            yield from _fields(specification or "")


def _is_anonymous(value: object) -> bool:
    """Whether the text of a value is the one that ``object`` makes up, with a memory address."""
    kind = type(value)
    return (kind.__format__, kind.__str__, kind.__repr__) == (object.__format__, object.__str__, object.__repr__)


def _is_method(run: Callable[..., Any]) -> bool:
    return isinstance(inspect.unwrap(run, stop=lambda f: isinstance(f, MethodType)), MethodType)


def _without_first(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        del parameters[0]
    return signature.replace(parameters=parameters)


def _any_call(*args: Any, **kwargs: Any) -> None:
    """Stands for a body whose parameters are not known."""


_ANY_CALL = CallSignature(_any_call)
