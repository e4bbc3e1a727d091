"""A task's options: the decorator over the class over the app's settings over the defaults, checked at the first use."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache, partialmethod
from typing import Any

import pytest
from celery import Celery, Task

from celery_idempotent import ConfigurationError, IdempotentTask, by_arguments
from celery_idempotent.core.decision import CallPolicy, DeliveryPolicy
from celery_idempotent.options import Options, refuse_misspelt_call
from celery_idempotent.settings import OPTION_NAMES


@pytest.fixture
def app() -> Celery:
    return Celery("options", set_as_current=False, broker="memory://", idempotent_store="sqlite://")


def declare(app: Celery, **options: Any) -> IdempotentTask:
    """Return a bound task with these arguments of the decorator."""

    @app.task(**{"base": IdempotentTask, "name": "charge", "shared": False, **options})
    def charge(order_id: str, amount: int = 0) -> None: ...

    task: IdempotentTask = app.tasks["charge"]
    return task


def options_of(app: Celery, **given: Any) -> Options:
    return declare(app, **given).idempotency


def test_the_defaults(app: Celery) -> None:
    options = options_of(app)

    assert options.message_id is None
    assert options.call == CallPolicy(on_duplicate="skip", resubmit_failed=False, lost_after=300.0)
    assert options.delivery == DeliveryPolicy(on_processing="hold", on_abandoned="fail")
    assert (options.lease, options.unique_for, options.fingerprint, options.keep_result) == (60.0, None, None, True)
    assert options.atomic is False


def test_every_option(app: Celery) -> None:
    app.conf.idempotent_lost_after = 10
    options = options_of(
        app,
        message_id="order:{order_id}",
        on_duplicate="raise",
        on_processing="skip",
        on_abandoned="rerun",
        resubmit_failed=True,
        lease=timedelta(minutes=2),
        unique_for=3600,
        fingerprint=False,
        atomic=True,
        keep_result=False,
    )

    assert options.message_id is not None
    assert options.message_id(("o-1",), {}) == "order:o-1"
    assert options.call == CallPolicy(on_duplicate="raise", resubmit_failed=True, lost_after=10.0)
    assert options.delivery == DeliveryPolicy(on_processing="skip", on_abandoned="rerun")
    assert (options.lease, options.unique_for) == (120.0, 3600.0)
    assert (options.fingerprint, options.atomic, options.keep_result) == (False, True, False)


@pytest.mark.parametrize(("acks_late", "on_abandoned"), [(True, "rerun"), (False, "fail")])
def test_on_abandoned_follows_acks_late(app: Celery, acks_late: bool, on_abandoned: str) -> None:
    assert options_of(app, acks_late=acks_late).delivery.on_abandoned == on_abandoned


def test_acks_late_may_be_the_apps(app: Celery) -> None:
    app.conf.task_acks_late = True
    assert options_of(app).delivery.on_abandoned == "rerun"


class TestPrecedence:
    def test_a_setting_is_the_default_of_every_task(self, app: Celery) -> None:
        app.conf.update(idempotent_on_duplicate="raise", idempotent_lease=5, idempotent_keep_result=False)
        options = options_of(app)
        assert (options.call.on_duplicate, options.lease, options.keep_result) == ("raise", 5.0, False)

    def test_the_decorator_wins_over_the_setting(self, app: Celery) -> None:
        app.conf.update(idempotent_on_duplicate="raise", idempotent_keep_result=False)
        options = options_of(app, on_duplicate="skip", keep_result=True)
        assert (options.call.on_duplicate, options.keep_result) == ("skip", True)

    def test_a_base_class_sets_them_for_its_tasks(self, app: Celery) -> None:
        class Ours(IdempotentTask):
            abstract = True
            on_duplicate = "raise"
            lease = 7
            message_id = by_arguments("order_id")

        inherited = declare(app, base=Ours)
        assert (inherited.idempotency.call.on_duplicate, inherited.idempotency.lease) == ("raise", 7.0)
        assert inherited.idempotency.message_id is not None

    def test_the_decorator_wins_over_the_base_class(self, app: Celery) -> None:
        class Ours(IdempotentTask):
            abstract = True
            on_duplicate = "raise"

        assert declare(app, base=Ours, on_duplicate="skip").idempotency.call.on_duplicate == "skip"

    def test_none_leaves_it_to_the_setting(self, app: Celery) -> None:
        app.conf.idempotent_lease = 5
        assert options_of(app, lease=None).lease == 5.0

    def test_task_annotations_count(self, app: Celery) -> None:
        app.conf.task_annotations = {"charge": {"on_duplicate": "raise"}}
        assert options_of(app).call.on_duplicate == "raise"


class TestMessageId:
    def test_a_callable_stays_a_function(self, app: Celery) -> None:
        def by_order(order_id: str, amount: int = 0) -> str:
            return f"{order_id}-{amount}"

        class Ours(IdempotentTask):
            abstract = True
            message_id = by_order

        for task in (declare(app, message_id=by_order), declare(Celery("other", set_as_current=False), base=Ours)):
            assert task.idempotency.message_id is not None
            assert task.idempotency.message_id(("o-1",), {"amount": 5}) == "o-1-5"

    @pytest.mark.parametrize("bind", [False, True])
    def test_a_callable_that_asks_for_the_task_gets_it(self, app: Celery, bind: bool) -> None:
        def body(order_id: str, amount: int = 0) -> None: ...

        def bound(self: Task, order_id: str, amount: int = 0) -> None: ...

        asks = app.task(
            bound if bind else body,
            base=IdempotentTask,
            bind=bind,
            name="asks",
            shared=False,
            message_id=lambda self, order_id, amount=0: f"{self.name}:{order_id}",
        )
        assert asks.idempotency.message_id is not None
        assert asks.idempotency.message_id(("o-1", 5), {}) == "asks:o-1"
        assert asks.idempotency.message_id((), {"order_id": "o-2"}) == "asks:o-2"

    def test_a_body_with_an_argument_called_self_keeps_it(self, app: Celery) -> None:
        def body(self: str, other: str) -> None: ...

        task = app.task(
            body, base=IdempotentTask, name="own", shared=False, message_id=lambda self, other: f"{self}:{other}"
        )
        assert task.idempotency.message_id(("a", "b"), {}) == "a:b"

    def test_methods_of_every_kind_are_called_as_python_would(self, app: Celery) -> None:
        class Charge(IdempotentTask):
            abstract = True
            shop = "shop"

            def run(self, order_id: str, amount: int = 0) -> None: ...

        class Method(Charge):
            name = "method"

            def message_id(self, order_id: str, amount: int = 0) -> str:
                return f"{self.shop}:{order_id}"

        class OtherName(Charge):
            name = "other-name"

            def message_id(task, order_id: str, amount: int = 0) -> str:  # noqa: N805 - somebody calls it so
                return f"{task.shop}:{order_id}"

        class AnyArguments(Charge):
            name = "any"

            def message_id(self, *args: Any, **kwargs: Any) -> str:
                return f"{self.shop}:{args[0]}"

        class Inherited(Method):
            name = "inherited"
            shop = "other"

        class Decorated(Charge):
            name = "decorated"

            @cache  # noqa: B019 - as people write it
            def message_id(self, order_id: str, amount: int = 0) -> str:
                return f"{self.shop}:{order_id}"

        class Static(Charge):
            name = "static"

            @staticmethod
            def message_id(order_id: str, amount: int = 0) -> str:
                return f"static:{order_id}"

        class OfClass(Charge):
            name = "of-class"

            @classmethod
            def message_id(cls, order_id: str, amount: int = 0) -> str:
                return f"{cls.shop}:{order_id}"

        class Partial(Charge):
            name = "partial"

            def _made(self, kind: str, order_id: str, amount: int = 0) -> str:
                return f"{self.shop}:{kind}:{order_id}"

            message_id = partialmethod(_made, "order")

        class PlainFunction(Charge):
            name = "plain"

            def message_id(order_id: str, amount: int = 0) -> str:  # noqa: N805 - it takes no task
                return f"plain:{order_id}"

        ids = {}
        for kind in (Method, OtherName, AnyArguments, Inherited, Decorated, Static, OfClass, Partial, PlainFunction):
            task = app.register_task(kind())
            ids[task.name] = [task.idempotency.message_id((order, 5), {}) for order in ("o-1", "o-2")]
        assert ids == {
            **{name: ["shop:o-1", "shop:o-2"] for name in ("method", "other-name", "any", "decorated", "of-class")},
            "inherited": ["other:o-1", "other:o-2"],
            "static": ["static:o-1", "static:o-2"],
            "partial": ["shop:order:o-1", "shop:order:o-2"],
            "plain": ["plain:o-1", "plain:o-2"],
        }

    def test_a_method_that_takes_no_call_of_the_body_is_refused(self, app: Celery) -> None:
        class Charge(IdempotentTask):
            name = "refused"

            def message_id(self) -> str:
                return "id"

            def run(self, order_id: str) -> None: ...

        task = app.register_task(Charge())
        with pytest.raises(ConfigurationError, match=r"task refused: the message_id callable of run takes \(\)"):
            _ = task.idempotency

    def test_a_bound_body_does_not_count_itself(self, app: Celery) -> None:
        @app.task(base=IdempotentTask, bind=True, name="bound", message_id="{order_id}", shared=False)
        def bound(self: Task, order_id: str) -> None: ...

        options = app.tasks["bound"].idempotency
        assert options.signature.parameters == ("order_id",)
        assert options.message_id(("o-1",), {}) == "o-1"

    def test_a_class_based_task(self, app: Celery) -> None:
        class Charge(IdempotentTask):
            name = "class-based"
            message_id = "{order_id}"

            def run(self, order_id: str) -> None: ...

        task = app.register_task(Charge())
        assert task.idempotency.message_id(("o-1",), {}) == "o-1"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("message_id", 5, r"task charge: message_id=5 of charge is not one of: None for the task id, a format string"),
        ("message_id", by_arguments, r"task charge: message_id=<function by_arguments.* is not one of"),
        (
            "on_duplicate",
            "rise",
            r"task charge: on_duplicate must be one of 'skip', 'raise', not 'rise'; did you mean 'raise'\?",
        ),
        ("on_duplicate", True, "on_duplicate must be one of 'skip', 'raise', not True"),
        (
            "on_processing",
            "held",
            r"on_processing must be one of 'hold', 'skip', 'raise', not 'held'; did you mean 'hold'\?",
        ),
        ("on_abandoned", "retry", r"on_abandoned must be one of 'rerun', 'fail', not 'retry'"),
        ("resubmit_failed", "no", "resubmit_failed must be True or False, not 'no'"),
        ("lease", 0, "lease must be a number of seconds or a timedelta, > 0, not 0"),
        ("lease", "60", "lease must be a number of seconds or a timedelta, > 0, not '60'"),
        ("unique_for", -5, "unique_for must be a number of seconds or a timedelta, > 0, not -5"),
        ("fingerprint", 1, "fingerprint must be True or False, not 1"),
        ("keep_result", 0, "keep_result must be True or False, not 0"),
        ("atomic", "yes", "atomic must be True or False, not 'yes'"),
    ],
)
class TestAWrongValue:
    def test_of_an_option_names_the_task_and_the_option(
        self, app: Celery, option: str, value: object, says: str
    ) -> None:
        task = declare(app, **{option: value})
        with pytest.raises(ConfigurationError, match=says):
            _ = task.idempotency
        with pytest.raises(ConfigurationError, match=says):
            task.apply_async(("o-1",))

    def test_of_a_setting_too(self, app: Celery, option: str, value: object, says: str) -> None:
        app.conf[f"idempotent_{option}"] = value
        with pytest.raises(ConfigurationError, match=says):
            _ = declare(app).idempotency


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("order:{order}", r"task charge: message_id='order:\{order\}'.*'order'.*did you mean 'order_id'\?"),
        ("order", r"task charge: message_id='order' names no argument .* \{order_id\}"),
        ("order:{", r"task charge: message_id='order:\{' is not a format string"),
        ("{}", r"task charge: message_id='\{\}' has a positional field.*\{order_id\}"),
        (by_arguments("amout"), r"task charge: by_arguments\('amout'\).*did you mean 'amount'\?"),
        (by_arguments("amout.net"), r"by_arguments\('amout.net'\).*did you mean 'amount'\?"),
        (by_arguments("amount.net"), r"amount is a int, which has no parts"),
        (by_arguments(exclude=("amout",)), r"by_arguments\(exclude=\('amout',\)\).*did you mean 'amount'\?"),
        (by_arguments(exclude=("order_id", "amount")), r"excludes every argument of charge.*exclude='\*'"),
    ],
)
class TestAnArgumentThatIsNotThere:
    def test_is_refused_when_the_task_is_bound(self, app: Celery, value: Any, says: str) -> None:
        with pytest.raises(ConfigurationError, match=says):
            declare(app, message_id=value)

    def test_of_a_setting_too(self, app: Celery, value: Any, says: str) -> None:
        """Which is not read before the options are."""
        app.conf.idempotent_message_id = value
        with pytest.raises(ConfigurationError, match=says):
            _ = declare(app).idempotency

    def test_of_an_abstract_base_is_no_matter(self, app: Celery, value: Any, says: str) -> None:
        class Base(IdempotentTask):
            abstract = True
            message_id = value

        assert declare(app, base=Base, message_id=by_arguments()).idempotency.message_id is not None


class TestWhatDoesNotCount:
    def test_is_not_compared(self, app: Celery) -> None:
        options = options_of(app, message_id=by_arguments("order_id", exclude=("amount",)))
        assert options.signature.digest(("o-1", 5), {}) == options.signature.digest(("o-1", 6), {})
        assert options.signature.digest(("o-1", 5), {}) != options.signature.digest(("o-2", 5), {})
        assert options.signature.difference((("o-1", 5), {}), (("o-1", 6), {})) == []

    def test_is_all_of_a_task_alone(self, app: Celery) -> None:
        options = options_of(app, message_id=by_arguments(exclude="*"))
        assert options.message_id is not None
        assert options.message_id(("o-1", 5), {}) == options.message_id((), {"order_id": "o-2"})
        assert options.signature.digest(("o-1", 5), {}) == options.signature.digest(("o-2",), {})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mesage_id", "message_id"),
        ("messageid", "message_id"),
        ("on_duplicates", "on_duplicate"),
        ("On_Duplicate", "on_duplicate"),
        ("on_abandonned", "on_abandoned"),
        ("resubmit_fail", "resubmit_failed"),
        ("finger_print", "fingerprint"),
        ("uniqe_for", "unique_for"),
        ("keep_results", "keep_result"),
        ("atomics", "atomic"),
    ],
)
class TestAMisspeltOption:
    def test_of_the_decorator_is_refused_when_the_task_is_bound(self, app: Celery, name: str, nearest: str) -> None:
        with pytest.raises(
            ConfigurationError, match=rf"task charge: unknown option '{name}'; did you mean '{nearest}'\?"
        ):
            declare(app, **{name: "x"})

    def test_of_a_class_is_too(self, app: Celery, name: str, nearest: str) -> None:
        base = type("Ours", (IdempotentTask,), {"abstract": True, name: "x"})
        with pytest.raises(
            ConfigurationError, match=rf"task charge: unknown option '{name}'; did you mean '{nearest}'\?"
        ):
            declare(app, base=base)


def test_other_attributes_are_their_owners(app: Celery) -> None:
    task: Any = declare(app, tariff="basic", release="2.0", identity=5, _lease="private")
    assert task.idempotency.lease == 60.0
    assert (task.tariff, task.release, task.identity) == ("basic", "2.0", 5)


class TestAKeywordOfACall:
    """Celery makes an unknown keyword a property of the message, where it would be lost."""

    @pytest.mark.parametrize("name", ["mesage_id", "messageid", "message_ids", "MESSAGE_ID", "massage_id"])
    def test_a_misspelt_message_id_is_refused(self, app: Celery, name: str) -> None:
        with pytest.raises(
            ConfigurationError,
            match=rf"apply_async\(\) of charge: unknown keyword '{name}'; did you mean 'message_id'\?",
        ):
            declare(app).apply_async(("o-1",), **{name: "m"})

    @pytest.mark.parametrize("name", [name for name in OPTION_NAMES if name != "message_id"])
    def test_a_task_option_given_to_a_call_is_refused(self, app: Celery, name: str) -> None:
        given: dict[str, Any] = {name: 1}
        with pytest.raises(
            ConfigurationError, match=rf"'{name}' is not a keyword of a call; '{name}' is an option of the task"
        ):
            declare(app).apply_async(("o-1",), **given)

    @pytest.mark.parametrize("call", [IdempotentTask.apply_async, IdempotentTask.apply], ids=["apply_async", "apply"])
    def test_it_is_refused_wherever_it_is_given(self, app: Celery, call: Callable[..., Any]) -> None:
        task = declare(app)
        with pytest.raises(ConfigurationError, match="'mesage_id'; did you mean 'message_id'"):
            call(task, ("o-1",), mesage_id="m")
        with pytest.raises(ConfigurationError, match="'mesage_id'; did you mean 'message_id'"):
            task.s("o-1").set(mesage_id="m").apply_async()

    def test_a_stamp_may_be_called_like_an_option(self) -> None:
        refuse_misspelt_call("charge", {"stamped_headers": ["leased", "message_ids"], "leased": 1, "message_ids": 2})
        refuse_misspelt_call("charge", {"stamped_headers": "leased", "leased": 1})
        with pytest.raises(ConfigurationError, match="'leased' is not a keyword of a call"):
            refuse_misspelt_call("charge", {"stamped_headers": ["other"], "leased": 1})

    def test_options_of_celery_and_kombu_are_accepted(self) -> None:
        refuse_misspelt_call(
            "charge",
            dict.fromkeys(
                [
                    *(
                        "message_id",
                        "task_id",
                        "countdown",
                        "eta",
                        "expires",
                        "retry",
                        "retry_policy",
                        "queue",
                        "exchange",
                    ),
                    *(
                        "routing_key",
                        "priority",
                        "serializer",
                        "compression",
                        "headers",
                        "ignore_result",
                        "link",
                        "shadow",
                    ),
                    *(
                        "correlation_id",
                        "reply_to",
                        "app_id",
                        "user_id",
                        "delivery_mode",
                        "mandatory",
                        "expiration",
                        "type",
                    ),
                    *(
                        "time_limit",
                        "soft_time_limit",
                        "add_to_parent",
                        "group_id",
                        "group_index",
                        "root_id",
                        "parent_id",
                    ),
                    *("chain", "chord", "stamped_headers", "replaced_task_nesting", "retries", "argsrepr", "tenant"),
                ]
            ),
        )
