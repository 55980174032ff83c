"""Refusing bad values in one wording."""

from __future__ import annotations

from datetime import timedelta

import attrs
import pytest

from retrykit.check import (
    as_seconds,
    as_seconds_or_none,
    at_least,
    error_types,
    has,
    is_callable,
    is_callable_or_none,
    more_than,
    one_of,
    seconds,
    shown,
    whole,
    wrong_type,
    wrong_value,
)

NOT_NUMBERS = [True, "1", None, [1], ..., int]
NOT_FINITE = [float("inf"), float("-inf"), float("nan"), 10**400]


def refusal(validator, value, *, default=attrs.NOTHING, converter=None):
    """What a validator says of a value: the error, or None."""
    field = attrs.fields(attrs.make_class("C", {"size": attrs.field(default=default, converter=converter)})).size
    try:
        validator(None, field, value)
    except (TypeError, ValueError) as error:
        return type(error) if str(error).startswith("size: must be ") else error
    return None


def test_an_error_names_argument_wish_kind_and_value():
    assert str(wrong_type("size", "an int", "3")) == "size: must be an int, not str '3'"
    assert str(wrong_value("size", "at least 1", 0)) == "size: must be at least 1, not 0"


def test_a_long_value_is_cut_and_one_without_repr_is_described():
    class Shy:
        def __repr__(self):
            raise RuntimeError("no")

    assert shown("x" * 200) == "'" + "x" * 78 + "…"
    assert shown(Shy()) == "<Shy whose repr() raised RuntimeError>"
    assert shown(10**5000).startswith("<int whose repr() raised")


def test_a_duration_is_seconds_or_a_timedelta():
    assert seconds("wait", 2) == 2.0
    assert seconds("wait", timedelta(minutes=1)) == 60.0
    assert as_seconds(timedelta(milliseconds=5)) == 0.005
    assert type(as_seconds(2)) is float
    assert as_seconds_or_none(None) is None
    assert as_seconds_or_none(timedelta(seconds=1)) == 1.0


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=shown)
def test_no_duration_is_made_of_what_is_no_number(value):
    with pytest.raises(TypeError, match="wait: must be seconds"):
        seconds("wait", value)
    assert as_seconds(value) is value


@pytest.mark.parametrize("value", NOT_FINITE, ids=["inf", "-inf", "nan", "huge"])
def test_a_duration_is_finite(value):
    with pytest.raises(ValueError, match="wait: must be finite"):
        seconds("wait", value)
    assert as_seconds(value) is value


@pytest.mark.parametrize("validator", [at_least(1), more_than(1)], ids=["at_least", "more_than"])
def test_a_bound_refuses_what_is_no_finite_number_and_what_is_below_it(validator):
    assert {refusal(validator, value) for value in NOT_NUMBERS} == {TypeError}
    assert {refusal(validator, value) for value in [*NOT_FINITE, 0, -1, 0.999]} == {ValueError}
    assert refusal(validator, 2) is refusal(validator, 1.5) is None


def test_at_least_includes_its_bound_and_more_than_does_not():
    assert refusal(at_least(1), 1) is None
    assert refusal(more_than(1), 1) is ValueError


@pytest.mark.parametrize("validator", [at_least(1), more_than(1)], ids=["at_least", "more_than"])
def test_a_bound_lets_none_through_where_none_is_the_default(validator):
    assert refusal(validator, None, default=None) is None
    assert refusal(validator, None, default=3) is TypeError


def test_a_duration_that_is_none_of_seconds_says_so():
    with pytest.raises(TypeError, match=r"wait: must be seconds \(int, float\) or a timedelta, not str '3'"):
        attrs.make_class("C", {"wait": attrs.field(converter=as_seconds, validator=at_least(0))})("3")


def test_a_whole_number_is_an_int_and_no_bool():
    assert {refusal(whole(1), value) for value in [True, 1.0, "1", None]} == {TypeError}
    assert {refusal(whole(1), value) for value in [0, -5]} == {ValueError}
    assert refusal(whole(1), 10**400) is None
    assert refusal(whole(1, optional=True), None) is None
    assert refusal(whole(1, optional=True), "x") is TypeError


def test_one_of_tells_1_from_true():
    validator = one_of(True, False)
    assert refusal(validator, True) is refusal(validator, False) is None
    assert {refusal(validator, value) for value in [1, 0, None, "True"]} == {TypeError}
    assert refusal(one_of("a", "b"), "c") is ValueError
    assert refusal(one_of("a", "b"), 3) is TypeError


def test_callables_are_told_from_the_rest():
    assert refusal(is_callable, print) is None
    assert refusal(is_callable, 3) is TypeError
    assert refusal(is_callable_or_none, None) is None
    assert refusal(is_callable_or_none, 3) is TypeError


def test_an_object_is_known_by_its_methods_and_a_class_is_no_object():
    validator = has("append", "pop")
    assert refusal(validator, []) is None
    assert {refusal(validator, value) for value in [list, (), None, {1}]} == {TypeError}
    assert refusal(has("append", optional=True), None) is None
    with pytest.raises(TypeError, match=r"must be an object with append\(\), not set {1}"):
        validator(None, attrs.fields(attrs.make_class("C", ["x"])).x, {1})
    with pytest.raises(TypeError, match=r"must be an object with append\(\), pop\(\), not type"):
        validator(None, attrs.fields(attrs.make_class("C", ["x"])).x, list)


def test_exception_classes_come_as_one_or_as_several():
    assert error_types("retry_for", OSError) == (OSError,)
    assert error_types("retry_for", [OSError, KeyError]) == (OSError, KeyError)
    assert error_types("retry_for", (one for one in [OSError])) == (OSError,)
    assert error_types("retry_for", ()) == ()


@pytest.mark.parametrize("value", ["OSError", b"x", 3, None, int, OSError(), [OSError, 3], [OSError("x")]], ids=repr)
def test_what_is_no_exception_class_is_refused(value):
    with pytest.raises(TypeError, match="retry_for: must be an exception class"):
        error_types("retry_for", value)


@pytest.mark.parametrize("value", [KeyboardInterrupt, (OSError, SystemExit), BaseException], ids=repr)
def test_what_is_never_retried_is_refused(value):
    with pytest.raises(ValueError, match="retry_for: must be exception classes under Exception"):
        error_types("retry_for", value)
