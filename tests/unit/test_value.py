"""What the public values have in common."""

from __future__ import annotations

import attrs

from retrykit import FixedBackOffPolicy, MapRetryContextCache, MaxAttemptsRetryPolicy, NoBackOffPolicy, RetryTemplate
from retrykit.value import Value
from tests.doubles import pickled


def test_a_value_is_equal_to_one_of_the_same_class_with_equal_fields():
    policy = MaxAttemptsRetryPolicy(2)
    assert policy == policy == MaxAttemptsRetryPolicy(2)  # noqa: PLR0124 - identity is a case of its own
    assert policy != MaxAttemptsRetryPolicy(3)
    assert policy != 2
    assert NoBackOffPolicy() != FixedBackOffPolicy(0)
    assert hash(policy) == hash(MaxAttemptsRetryPolicy(2))


def test_a_field_may_be_compared_by_a_key_hashed_or_shown_otherwise_or_left_out():
    @attrs.frozen(eq=False, repr=False)
    class Sample(Value):
        name: str = attrs.field(eq=str.lower)
        facts: dict = attrs.field(hash=False, repr=len)
        secret: str = attrs.field(default="", eq=False, repr=False)
        _hidden: int = 3

    one, other = Sample("a", {1: 2}, "x"), Sample("A", {1: 2}, "y")
    assert one == other
    assert one != Sample("b", {1: 2})
    assert repr(one).endswith("Sample(name='a', facts=1, hidden=3)")
    assert hash(one) == hash(other)


def test_equal_templates_have_equal_hashes():
    one, other = RetryTemplate(name="n"), RetryTemplate(name="n")
    assert one == other
    assert hash(one) == hash(other) == hash(pickled(one))
    assert hash(one) != hash(RetryTemplate(name="n", context_cache=MapRetryContextCache(5)))
