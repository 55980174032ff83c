"""Wrappers that have the parameters of what they wrap."""

from __future__ import annotations

import asyncio
import functools
import inspect
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

import retrykit
from retrykit import retryable
from tests.doubles import pickled

CALLS = []


def plain(a, b):
    return (a, b)


def defaults(a, b=2, c="x"):
    return (a, b, c)


def keyword_only(a, *, b, c=3):
    return (a, b, c)


def positional_only(a, b=2, /, c=3):
    return (a, b, c)


def everything(a, /, b, c=3, *, d, e=5):
    return (a, b, c, d, e)


def variadic(a, *rest, b=1, **named):
    return (a, rest, b, named)


def nothing():
    return ()


def own_names(_rk_frame, _rk_token=1):
    return (_rk_frame, _rk_token)


FUNCTIONS = [plain, defaults, keyword_only, positional_only, everything, variadic, nothing, own_names]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
ways = pytest.mark.parametrize("options", [{}, {"key": lambda *_, **_kwargs: None}], ids=["called directly", "driven"])
VALUES = st.integers(0, 9)


@functions
@ways
@given(args=st.lists(VALUES, max_size=6), kwargs=st.dictionaries(st.sampled_from("abcdez"), VALUES, max_size=5))
def test_a_decorated_function_takes_what_the_function_takes(function, options, args, kwargs):
    decorated = retryable(**options)(function)
    try:
        expected = function(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError):
            decorated(*args, **kwargs)
    else:
        assert decorated(*args, **kwargs) == expected


@functions
@ways
def test_its_signature_and_its_names_are_kept(function, options):
    decorated = retryable(**options)(function)
    assert inspect.signature(decorated) == inspect.signature(function)
    assert (decorated.__name__, decorated.__doc__, decorated.__module__) == (
        function.__name__,
        function.__doc__,
        function.__module__,
    )
    assert decorated.__wrapped__ is function


@ways
def test_a_wrong_call_raises_type_error_without_an_attempt(options):
    calls = []

    def fetch(url, *, size=1):
        calls.append(url)

    decorated = retryable(**options)(fetch)
    for args, kwargs in [((), {}), ((1, 2), {}), (("u",), {"sise": 2}), (("u",), {"url": "u"})]:
        with pytest.raises(TypeError):
            decorated(*args, **kwargs)
    assert calls == []


def test_a_parameter_may_have_the_name_of_a_builtin():
    @retryable
    def convert(Exception, int, dict=None):  # noqa: A002, N803 - that is the point
        raise OSError(Exception)

    with pytest.raises(OSError, match="x"):
        convert("x", 1)


def test_tracebacks_show_the_line_of_the_wrapper_that_was_called():
    def fetch(url):
        raise OSError(url)

    called = {}
    for options in [{}, {"key": lambda *_, **_kwargs: None}]:
        called[bool(options)] = retryable(max_attempts=1, **options)(fetch)
    for decorated in called.values():
        with pytest.raises(OSError, match="u") as caught:
            decorated("u")
        wrapper = next(frame for frame in traceback.extract_tb(caught.tb) if "wrapper" in frame.filename)
        assert "_rk_drive" in wrapper.line


def test_the_defaults_are_the_functions_own_objects():
    sentinel = object()

    def fetch(a=sentinel, *, b=sentinel):
        return a, b

    assert retryable(fetch)() == (sentinel, sentinel)


def test_a_mutable_default_stays_the_functions_own():
    def collect(value, seen=[]):  # noqa: B006 - that is the point
        seen.append(value)
        return seen

    decorated = retryable(collect)
    assert decorated(1) is decorated(2) is collect.__defaults__[0]


def test_functions_that_are_no_plain_functions_are_wrapped_too():
    class Adder:
        def __call__(self, a, b=2):
            return a + b

    assert retryable(functools.partial(defaults, 1))(c=5) == (1, 2, 5)
    assert retryable(Adder())(1) == 3
    assert retryable(len)([1, 2]) == 2
    assert retryable("text".upper)() == "TEXT"
    assert retryable(int)("7") == 7


def test_a_lambda_and_a_closure():
    factor = 3
    assert retryable(lambda a, b=2: a * b * factor)(5) == 30


def test_a_coroutine_function_stays_one():
    async def fetch(url, *, size=1):
        await asyncio.sleep(0)
        return url * size

    decorated = retryable(fetch)
    assert inspect.iscoroutinefunction(decorated)
    assert inspect.signature(decorated) == inspect.signature(fetch)
    assert asyncio.run(decorated("u", size=2)) == "uu"


@retryable
def picklable(a, b=2):
    return (a, b)


def test_a_decorated_function_of_a_module_is_pickled_by_its_name():
    assert pickled(picklable) is picklable


def test_p8_a_traceback_has_at_most_two_frames_of_the_library():
    @retryable(max_attempts=2)
    def fetch():
        raise OSError("down")

    with pytest.raises(OSError, match="down") as caught:
        fetch()
    frames = [frame for frame in traceback.extract_tb(caught.value.__traceback__) if "retrykit" in frame.filename]
    own = [frame for frame in frames if "tests" not in frame.filename]
    assert len(own) <= 2
    assert [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)][-1] == "fetch"


def test_a_traceback_through_the_wrapper_shows_its_line():
    @retryable(max_attempts=1)
    def fetch(url):
        raise OSError("down")

    with pytest.raises(OSError, match="down") as caught:
        fetch("u")
    shown = "".join(traceback.format_exception(caught.value))
    assert "<retrykit direct wrapper (url)>" in shown


def test_the_package_lists_its_names_and_has_no_others():
    assert set(retrykit.__all__) <= set(dir(retrykit))
    with pytest.raises(AttributeError, match="has no attribute 'retryabel'"):
        _ = retrykit.retryabel
