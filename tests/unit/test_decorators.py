"""`@retryable`, `.recover`, `.with_options` and `.template`."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import functools
import inspect
import threading

import pytest
import trio

from retrykit import (
    AsyncRetryTemplate,
    CompositeRetryPolicy,
    ExhaustedRetryError,
    FixedBackOffPolicy,
    MapRetryContextCache,
    MaxAttemptsRetryPolicy,
    NeverRetryPolicy,
    RecoveryFailedError,
    RetryTemplate,
    SimpleRetryPolicy,
    TimeoutRetryPolicy,
    current_context,
    retryable,
    veto,
)
from retrykit.decorators import AsyncRetryable, Retryable, RetryableOfClass
from retrykit.failure import StoredError
from retrykit.template import short_cut
from tests.doubles import Ears, ManualClock, Transaction


class Flaky:
    """Raises the given errors in turn when it is called, then does nothing."""

    def __init__(self, *errors):
        self.errors = list(errors)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)


def down(count):
    return Flaky(*[ConnectionError(str(n)) for n in range(count)])


# -- functions of every kind


@pytest.mark.parametrize("decorate", [retryable, retryable()], ids=["bare", "called"])
def test_a_function_is_called_again_until_it_succeeds(decorate):
    flaky = down(2)

    @decorate
    def fetch(url, *, size=1):
        flaky()
        return url * size

    assert fetch("u", size=2) == "uu"
    assert flaky.calls == 3


def test_after_three_attempts_the_last_exception_itself_is_raised():
    errors = [OSError(str(n)) for n in range(3)]
    flaky = Flaky(*errors)

    @retryable
    def fetch():
        flaky()

    with pytest.raises(OSError, match="2") as caught:
        fetch()
    assert caught.value is errors[2]


def test_a_coroutine_function_is_awaited_again_on_asyncio_and_trio():
    for run in (asyncio.run, lambda coroutine: trio.run(lambda: coroutine)):
        flaky = down(2)

        @retryable
        async def fetch(url, flaky=flaky):
            flaky()
            return url

        assert run(fetch("u")) == "u"
        assert flaky.calls == 3


class Client:
    def __init__(self, failures=0):
        self.flaky = down(failures)

    @retryable
    def get(self, url, *, size=1):
        self.flaky()
        return (self, url * size)

    @retryable(max_attempts=2)
    async def get_later(self, url):
        self.flaky()
        return (self, url)

    @classmethod
    @retryable
    def connect(cls, host, port=80):
        return (cls, host, port)

    @staticmethod
    @retryable
    def normal(url):
        return url.lower()

    @property
    @retryable
    def size(self):
        self.flaky()
        return 7

    @get.recover(TimeoutError)
    def fall_back(self, error, url, *, size=1):
        raise NotImplementedError


def test_methods_of_every_kind():
    client = Client(2)
    assert client.get("u", size=2) == (client, "uu")
    client = Client(1)
    assert asyncio.run(client.get_later("u")) == (client, "u")
    assert Client.connect("h") == client.connect("h", port=80) == (Client, "h", 80)
    assert Client.normal("U") == client.normal("U") == "u"
    assert Client(2).size == 7
    assert Client.get(client, "u") == (client, "u")


def test_a_subclass_gets_itself_as_the_class():
    class Child(Client):
        pass

    assert Child.connect("h") == (Child, "h", 80)


def test_a_recovery_of_a_method_is_given_the_error_and_then_the_instance():
    class Service:
        @retryable(max_attempts=1)
        def get(self, url):
            raise ConnectionError(url)

        @get.recover(ConnectionError)
        def cached(error, self, url):  # noqa: N805 - the error comes first, as for functions
            return (self, url, str(error))

    service = Service()
    assert service.get("u") == (service, "u", "u")


def test_partials_and_callable_objects():
    class Adder:
        def __init__(self):
            self.flaky = down(1)

        def __call__(self, a, b=2):
            self.flaky()
            return a + b

    assert retryable(Adder())(1) == 3
    flaky = down(2)

    def fetch(url, size):
        flaky()
        return url * size

    partial = retryable(functools.partial(fetch, size=2))
    assert partial("u") == "uu"
    assert partial.template.name == "retry"


def test_generator_functions_are_refused_with_the_reason():
    def numbers():
        yield 1

    async def numbers_later():
        yield 1

    for function in (numbers, numbers_later):
        with pytest.raises(TypeError, match="is a generator function: calling it runs nothing"):
            retryable(function)
        with pytest.raises(TypeError, match="is a generator function"):
            retryable(max_attempts=2)(function)


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_on_methods_it_belongs_below(kind):
    with pytest.raises(TypeError, match=rf"put @retryable below @{kind.__name__}"):
        retryable(kind(print))


@pytest.mark.parametrize("function", [3, "fetch", None])
def test_what_cannot_be_called_is_refused(function):
    with pytest.raises(TypeError, match="function: must be callable"):
        retryable()(function)


def test_decorated_twice_attempts_multiply():
    flaky = down(9)

    @retryable(max_attempts=2, name="outer")
    @retryable(max_attempts=3, name="inner")
    def fetch():
        flaky()

    with pytest.raises(ConnectionError, match="5"):
        fetch()
    assert flaky.calls == 6
    assert fetch.template.name == "outer"


def test_a_decorated_function_may_call_itself():
    @retryable
    def count(n):
        context = current_context()
        return [] if n == 0 else [context, *count(n - 1)]

    contexts = count(3)
    assert len(set(map(id, contexts))) == 3


def test_threads_share_a_decorated_function():
    failed = threading.local()

    @retryable(max_attempts=2)
    def fetch(n):
        if not getattr(failed, "once", False):
            failed.once = True
            raise OSError
        return (n, current_context().attempt)

    results = []
    threads = [threading.Thread(target=lambda n=n: results.append(fetch(n))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [(n, 2) for n in range(8)]


def test_an_interpreter_exit_passes_at_once():
    flaky = Flaky(KeyboardInterrupt())

    @retryable
    def fetch():
        flaky()

    with pytest.raises(KeyboardInterrupt):
        fetch()
    assert flaky.calls == 1
    assert current_context() is None


# -- options


def test_options_make_the_template():
    @retryable(retry_for=ConnectionError, no_retry_for=ConnectionResetError, max_attempts=5, timeout=3, name="peer")
    def fetch():
        pass

    assert fetch.template.retry_policy == CompositeRetryPolicy(
        (SimpleRetryPolicy(5, ConnectionError, no_retry_for=ConnectionResetError), TimeoutRetryPolicy(3))
    )
    assert fetch.template.name == "peer"


def test_a_function_is_named_after_itself():
    @retryable
    def fetch():
        pass

    assert fetch.template.name.endswith("test_a_function_is_named_after_itself.<locals>.fetch")
    assert len(fetch.template.name) <= 80


def test_a_policy_a_back_off_listeners_a_clock_and_a_cache_can_be_given():
    clock, ears, cache = ManualClock(), Ears(), MapRetryContextCache(5)

    @retryable(
        retry_policy=MaxAttemptsRetryPolicy(2),
        back_off=FixedBackOffPolicy(3),
        listeners=[ears],
        clock=clock,
        context_cache=cache,
    )
    def fetch():
        flaky()

    flaky = down(1)
    fetch()
    assert clock.slept == [3]
    assert [event[0] for event in ears.log] == ["open", "on_error", "on_success", "close"]
    assert fetch.template.context_cache is cache


def test_a_template_can_be_given():
    template = RetryTemplate(retry_policy=MaxAttemptsRetryPolicy(2))

    @retryable(template=template)
    def fetch():
        flaky()

    flaky = down(5)
    with pytest.raises(ConnectionError, match="1"):
        fetch()
    assert fetch.template is template


def test_a_sync_template_serves_coroutine_functions_as_its_async_sibling():
    template = RetryTemplate(name="orders")

    @retryable(template=template)
    async def fetch():
        return current_context().name

    assert asyncio.run(fetch()) == "orders"
    assert type(fetch.template) is AsyncRetryTemplate
    assert fetch.template.context_cache is template.context_cache
    sibling = AsyncRetryTemplate()

    @retryable(template=sibling)
    async def other():
        pass

    assert other.template is sibling


def test_an_async_template_cannot_serve_a_function():
    with pytest.raises(TypeError, match=r"template: must be a RetryTemplate, because .* is not a coroutine function"):
        retryable(template=AsyncRetryTemplate())(print)


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"max_attempts": 0}, ValueError, "max_attempts"),
        ({"max_attempts": True}, TypeError, "max_attempts"),
        ({"retry_for": 3}, TypeError, "retry_for"),
        ({"timeout": 0}, ValueError, "timeout"),
        ({"back_off": 3}, TypeError, "back_off"),
        ({"retry_policy": 3}, TypeError, "retry_policy"),
        ({"template": SimpleRetryPolicy()}, TypeError, "template"),
        ({"template": RetryTemplate}, TypeError, "template"),
        ({"name": ""}, ValueError, "name"),
        ({"context_cache": {}}, TypeError, "context_cache"),
        ({"listeners": 3}, TypeError, "listeners"),
        ({"clock": 3}, TypeError, "clock"),
        ({"key": 3}, TypeError, "key"),
        ({"redelivered": True}, TypeError, "redelivered"),
        ({"recover_on_redelivery": 1}, TypeError, "recover_on_redelivery"),
        ({"transaction": 3}, TypeError, "transaction"),
        ({"max_tries": 3}, TypeError, "max_tries"),
        ({"retry_policy": NeverRetryPolicy(), "max_attempts": 3}, ValueError, "max_attempts"),
        ({"template": RetryTemplate(), "name": "x"}, ValueError, "name"),
        ({"template": RetryTemplate(), "back_off": FixedBackOffPolicy()}, ValueError, "back_off"),
    ],
    ids=str,
)
def test_a_bad_option_is_refused_by_name_before_anything_runs(options, error, argument):
    calls = []
    with pytest.raises(error, match=rf"^{argument}\b"):
        retryable(**options)(calls.append)
    assert calls == []


def test_an_iterator_of_classes_serves_every_function_and_variant():
    decorate = retryable(retry_for=(one for one in [OSError]))
    for function in (decorate(print), decorate(len), decorate(len).with_options(max_attempts=7)):
        assert function.template.retry_policy.retry_for == (OSError,)


# -- recoveries


def test_the_recovery_of_the_nearest_class_wins():
    @retryable(max_attempts=1)
    def fetch(error):
        raise error

    @fetch.recover(OSError)
    def from_os_error(error, given):
        return "os"

    @fetch.recover(ConnectionError, KeyError)
    def from_connection_error(error, given):
        return "connection"

    assert fetch(ConnectionResetError()) == "connection"
    assert fetch(FileNotFoundError()) == "os"
    assert fetch(KeyError()) == "connection"
    with pytest.raises(ValueError, match="nobody"):
        fetch(ValueError("nobody"))

    @fetch.recover
    def from_any(error, given):
        return "any"

    assert fetch(ValueError()) == "any"
    assert fetch(ConnectionResetError()) == "connection"


def test_a_recovery_is_given_the_error_and_the_arguments_of_the_call():
    @retryable(max_attempts=2)
    def fetch(url, *, size=1):
        raise OSError("down")

    @fetch.recover()
    def cached(error, url, *, size=1):
        return (type(error), url, size)

    assert fetch("u", size=2) == (OSError, "u", 2)
    assert fetch(url="u") == (OSError, "u", 1)
    assert cached(None, "u") == (type(None), "u", 1)


def test_recoveries_of_coroutine_functions_may_be_plain():
    @retryable(max_attempts=1)
    async def fetch(error):
        raise error

    @fetch.recover(OSError)
    async def later(error, given):
        await asyncio.sleep(0)
        return "later"

    @fetch.recover(KeyError)
    def now(error, given):
        return "now"

    assert asyncio.run(fetch(OSError())) == "later"
    assert asyncio.run(fetch(KeyError())) == "now"


def test_a_recovery_that_fails_says_so():
    @retryable(max_attempts=1)
    def fetch():
        raise OSError("down")

    @fetch.recover
    def cached(error):
        raise KeyError("not cached either")

    with pytest.raises(RecoveryFailedError) as caught:
        fetch()
    assert type(caught.value.__cause__) is KeyError
    assert type(caught.value.failure) is OSError


@pytest.mark.parametrize(
    ("types", "error"),
    [((3,), TypeError), (("OSError",), TypeError), ((KeyboardInterrupt,), ValueError), ((int,), TypeError)],
)
def test_what_is_no_exception_class_is_refused(types, error):
    fetch = retryable(lambda: None)
    with pytest.raises(error, match=r"^error_types: must be"):
        fetch.recover(*types)(lambda _: None)


def test_a_recovery_that_is_a_generator_function_is_refused():
    fetch = retryable(lambda: None)

    def cached(error):
        yield

    with pytest.raises(TypeError, match="generator function"):
        fetch.recover(cached)


# -- variants


def test_a_variant_has_other_options_and_the_function_keeps_its_own():
    flaky = down(9)

    @retryable(max_attempts=3)
    def fetch(url):
        """Fetch."""
        flaky()

    once = fetch.with_options(max_attempts=1)
    with pytest.raises(ConnectionError, match="0"):
        once("u")
    assert flaky.calls == 1
    with pytest.raises(ConnectionError, match="3"):
        fetch("u")
    assert (once.__name__, once.__doc__) == ("fetch", "Fetch.")
    assert inspect.signature(once) == inspect.signature(fetch)
    assert once.template.name == fetch.template.name


def test_a_variant_of_a_variant():
    @retryable(max_attempts=3, retry_for=OSError)
    def fetch():
        pass

    variant = fetch.with_options(timeout=3).with_options(max_attempts=7)
    assert variant.template.retry_policy == CompositeRetryPolicy((SimpleRetryPolicy(7, OSError), TimeoutRetryPolicy(3)))


def test_a_variant_recovers_as_the_function_does():
    @retryable
    def fetch():
        raise OSError

    @fetch.recover
    def cached(error):
        return "cached"

    assert fetch.with_options(max_attempts=1)() == "cached"


def test_a_variant_of_a_given_template_is_a_variant_of_the_template():
    template = RetryTemplate(name="orders", retry_policy=SimpleRetryPolicy(5, OSError))
    fetch = retryable(template=template)(lambda: None)
    variant = fetch.with_options(max_attempts=1, back_off=FixedBackOffPolicy(2), name="other", listeners=[Ears()])
    assert variant.template.retry_policy == SimpleRetryPolicy(1, OSError)
    assert variant.template.back_off_policy == FixedBackOffPolicy(2)
    assert variant.template.name == "other"
    assert variant.template.context_cache is template.context_cache
    assert fetch.template is template
    assert fetch.with_options(retry_policy=NeverRetryPolicy()).template.retry_policy == NeverRetryPolicy()


def test_a_policy_without_such_a_field_says_so():
    fetch = retryable(template=RetryTemplate(retry_policy=NeverRetryPolicy()))(lambda: None)
    with pytest.raises(ValueError, match="max_attempts: NeverRetryPolicy has no such field"):
        fetch.with_options(max_attempts=1)

    class Own:
        def decide(self, context):
            raise NotImplementedError

    fetch = retryable(template=RetryTemplate(retry_policy=Own()))(lambda: None)
    with pytest.raises(ValueError, match="max_attempts: Own has no such field"):
        fetch.with_options(max_attempts=1)


def test_a_variant_can_take_another_template():
    other = RetryTemplate(name="other")
    fetch = retryable(max_attempts=2, name="own", key=lambda: "k")(lambda: current_context().name)
    assert fetch.with_options(template=other)() == "other"
    assert fetch.with_options(template=other).template is other


def test_a_bad_option_of_a_variant_is_refused():
    fetch = retryable(lambda: None)
    with pytest.raises(TypeError, match=r"^max_tries: no option of a retryable function"):
        fetch.with_options(max_tries=3)
    with pytest.raises(ValueError, match=r"^max_attempts: must be"):
        fetch.with_options(max_attempts=0)


# -- stateful


class Message:
    def __init__(self, identity, redelivered=None):
        self.identity = identity
        self.redelivered = redelivered


def stateful(flaky, **options):
    @retryable(**({"key": lambda message: message.identity, "max_attempts": 3} | options))
    def handle(message):
        flaky()
        return current_context().attempt

    return handle


def test_with_a_key_each_failure_is_rethrown_and_the_next_delivery_goes_on():
    handle = stateful(down(2))
    for n in range(2):
        with pytest.raises(ConnectionError, match=str(n)):
            handle(Message("m-1"))
    assert handle(Message("m-2")) == 1
    assert handle(Message("m-1")) == 3


def test_an_exhausted_item_goes_to_its_recovery_at_the_next_delivery():
    handle = stateful(down(1), max_attempts=1)
    parked = []

    @handle.recover(ConnectionError)
    def park(error, message):
        parked.append((type(error), message.identity))

    with pytest.raises(ConnectionError):
        handle(Message("m-1"))
    handle(Message("m-1"))
    assert parked == [(StoredError, "m-1")]


def test_a_session_of_our_own_recovers_at_once():
    log = []
    handle = stateful(down(1), max_attempts=1, recover_on_redelivery=False, transaction=Transaction(log))

    @handle.recover
    def park(error, message):
        return "parked"

    assert handle(Message("m-1")) == "parked"
    assert log == ["begin", "roll back", "begin", "commit"]


def test_without_a_recovery_an_exhausted_item_is_an_error():
    handle = stateful(down(1), max_attempts=1)
    with pytest.raises(ConnectionError):
        handle(Message("m-1"))
    with pytest.raises(ExhaustedRetryError):
        handle(Message("m-1"))


def test_what_the_source_says_is_asked_of_the_arguments():
    class Silent(MapRetryContextCache):
        def load(self, key):
            raise AssertionError("asked")

    handle = stateful(down(0), redelivered=lambda message: message.redelivered, context_cache=Silent())
    assert handle(Message("m-1", redelivered=False)) == 1


def test_a_key_function_that_gives_no_key_raises_before_the_attempt():
    flaky = down(0)
    handle = stateful(flaky, key=lambda message: message)
    with pytest.raises(TypeError, match=r"^key: must be a str"):
        handle(Message("m-1"))
    assert flaky.calls == 0


def test_a_key_of_none_remembers_nothing():
    handle = stateful(down(2), key=lambda _: None)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            handle(Message("m-1"))
    assert len(handle.template.context_cache) == 0


def test_a_stateful_coroutine_function():
    flaky = down(1)

    @retryable(key=lambda message: message.identity)
    async def handle(message):
        flaky()
        return current_context().attempt

    with pytest.raises(ConnectionError):
        asyncio.run(handle(Message("m-1")))
    assert asyncio.run(handle(Message("m-1"))) == 2


def test_a_transaction_without_a_key():
    log = []
    flaky = down(1)

    @retryable(transaction=Transaction(log))
    def handle():
        flaky()
        return current_context().transaction

    assert handle() == "session"
    assert log == ["begin", "roll back", "begin", "commit"]


def test_a_listener_and_a_given_clock_take_the_whole_flow_with_the_same_outcome():
    for options in ({}, {"listeners": [Ears()]}, {"clock": ManualClock()}):
        for shortened in (True, False):
            with short_cut(shortened):
                flaky = down(2)

                @retryable(**options)
                def fetch(url, flaky=flaky):
                    flaky()
                    return (url, current_context().attempt, current_context().retry_count)

                assert fetch("u") == ("u", 3, 2)


@pytest.mark.parametrize("kind", [Retryable, AsyncRetryable, RetryableOfClass], ids=lambda kind: kind.__name__)
def test_what_type_checkers_see_of_a_decorated_function_does_not_run(kind):
    seen = kind()
    for use in (seen, seen.recover, seen.with_options, lambda: seen.__get__(None, object)):
        with pytest.raises(NotImplementedError):
            use()


# -- threads and tasks of the first attempt


def test_a_veto_from_a_thread_of_the_first_attempt_ends_the_attempts():
    failed, vetoed, calls, seen = threading.Event(), threading.Event(), [], []

    def late():
        assert failed.wait(30)
        veto("late")
        seen.append(current_context())
        vetoed.set()

    @retryable(max_attempts=6)
    def fetch():
        calls.append(1)
        if len(calls) == 1:
            thread = threading.Thread(target=contextvars.copy_context().run, args=(late,))
            thread.start()
            threads.append(thread)
        else:
            failed.set()
            assert vetoed.wait(30)
            seen.append(current_context())
        raise ConnectionError

    threads = []
    with pytest.raises(ConnectionError):
        fetch()
    threads[0].join(30)
    assert len(calls) == 2
    assert seen[0] is seen[1]
    assert seen[0].veto_reason == "late"


def test_a_veto_from_a_task_of_the_first_attempt_ends_the_attempts():
    calls, tasks = [], []

    @retryable(max_attempts=6)
    async def fetch(failed, vetoed):
        async def late():
            await failed.wait()
            veto("late")
            vetoed.set()

        calls.append(1)
        if len(calls) == 1:
            tasks.append(asyncio.create_task(late()))
        else:
            failed.set()
            await vetoed.wait()
        raise ConnectionError

    async def main():
        try:
            await fetch(asyncio.Event(), asyncio.Event())
        finally:
            await tasks[0]

    with pytest.raises(ConnectionError):
        asyncio.run(main())
    assert len(calls) == 2


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@pytest.mark.parametrize("shortened", [True, False], ids=["short cut", "whole flow"])
def test_p8_an_exception_that_is_frozen_is_retried_and_raised_itself(shortened):
    flaky = Flaky(*[FrozenError(n) for n in range(3)])
    last = flaky.errors[-1]

    @retryable
    def fetch():
        flaky()

    with short_cut(shortened), pytest.raises(FrozenError) as caught:
        fetch()
    assert caught.value is last
    assert flaky.calls == 3
