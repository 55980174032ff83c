"""The name of an item, in stores and in JSON."""

from __future__ import annotations

import enum
import json
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.key import MAX_SPACE, canonical_key, check_key, in_namespace, key_from_json, key_to_json, namespace

PLAIN = st.text() | st.integers() | st.binary()
KEYS = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("m-1", "orders/m-1"),
        (7, "orders#7"),
        (b"m-1", "orders=6d2d31"),
        (("a", 7, b"x", ("b",)), "orders(/1:a,#7,=78,(/1:b))"),
        ("a\nb%", "orders!/a%0Ab%25"),
        ("ä", "orders/ä"),
    ],
)
def test_a_key_has_one_canonical_text(key, text):
    assert canonical_key("orders", key) == text


@given(KEYS, KEYS)
def test_different_keys_have_different_texts(one, other):
    assert (canonical_key("n", one) == canonical_key("n", other)) == (one == other and type(one) is type(other))


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80), KEYS, KEYS)
def test_p12_texts_of_different_names_never_meet(one, other, key, other_key):
    if one != other:
        assert canonical_key(one, key) != canonical_key(other, other_key)


@given(KEYS)
def test_a_canonical_text_is_printable_and_bounded(key):
    text = canonical_key("x" * 80, key)
    assert text.isprintable()
    assert len(text) <= 600


def test_a_long_key_begins_with_a_digest_of_the_whole():
    one, other = "x" * 600, "x" * 599 + "y"
    assert canonical_key("n", one) != canonical_key("n", other)
    assert len(canonical_key("n", one)) <= 600
    assert canonical_key("n", one).startswith("n~")
    assert "/xxx" in canonical_key("n", one)


def test_no_short_key_looks_like_a_digested_one():
    digested = canonical_key("n", "a" * 600)
    assert canonical_key("n", digested.removeprefix("n/")) != digested
    assert canonical_key("n", digested.removeprefix("n~")) != digested


@given(KEYS)
def test_a_key_comes_back_from_json(key):
    assert key_from_json(json.loads(json.dumps(key_to_json(key)))) == key


def test_no_key_is_null_in_json():
    assert key_to_json(None) is None
    assert key_from_json(None) is None


@pytest.mark.parametrize(
    "key", [True, 1.5, None, ["a"], {"a"}, object, ("a", 1.5), ("a", None), (("a", False),)], ids=repr
)
def test_what_cannot_name_an_item_everywhere_is_refused_by_name(key):
    with pytest.raises(TypeError, match=r"key: must be a str, int, bytes or a tuple of these, not \w+"):
        check_key(key)


@pytest.mark.parametrize("key", ["", "a", 0, -7, b"", (), ("a", (1, b"x"))], ids=repr)
def test_text_numbers_bytes_and_tuples_of_them_are_keys(key):
    check_key(key)


def test_a_name_is_escaped_where_it_is_not_plain():
    assert namespace("my orders/é") == "my%20orders%2F%C3%A9"
    assert in_namespace("my%20orders", "k") == canonical_key("my orders", "k")


@pytest.mark.parametrize("name", ["", "x" * 81])
def test_a_name_has_1_to_80_characters(name):
    with pytest.raises(ValueError, match="name: must be 1 to 80 characters"):
        namespace(name)


@pytest.mark.parametrize("name", [None, 3, b"orders", str])
def test_a_name_is_text(name):
    with pytest.raises(TypeError, match="name: must be a str"):
        namespace(name)


class Identity(str):
    """A text that hides itself."""

    __slots__ = ()

    def __str__(self):
        return "***"

    __repr__ = __str__

    def __format__(self, spec):
        return "***"

    def __len__(self):
        return 3


class Number(int):
    """An int that hides itself."""

    def __str__(self):
        return "***"

    __repr__ = __str__

    def __format__(self, spec):
        raise ValueError(spec)


class Digest(bytes):
    """Bytes that hide themselves."""

    __slots__ = ()

    def hex(self):
        return "***"


class Letter(str, enum.Enum):  # noqa: UP042 - this kind shows its name, not its text
    """An enumeration of texts."""

    A = "a"


class Digit(int, enum.Enum):
    """An enumeration of ints."""

    ONE = 1


class Place(typing.NamedTuple):
    """A tuple with names."""

    topic: str
    offset: int


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (Identity("m-1"), "m-1"),
        (Number(7), 7),
        (Digest(b"m"), b"m"),
        (Letter.A, "a"),
        (Digit.ONE, 1),
        (Place("t", 7), ("t", 7)),
        ((Identity("m-1"), Letter.A, (Number(7), Digest(b"m"))), ("m-1", "a", (7, b"m"))),
    ],
    ids=["text", "number", "bytes", "text enum", "int enum", "named tuple", "parts"],
)
def test_a_kind_of_text_number_bytes_or_tuple_names_what_its_content_names(kind, plain):
    check_key(kind)
    assert canonical_key("orders", kind) == canonical_key("orders", plain)
    assert json.dumps(key_to_json(kind)) == json.dumps(key_to_json(plain))


def test_no_two_texts_that_hide_themselves_share_a_history():
    assert canonical_key("orders", Identity("m-1")) != canonical_key("orders", Identity("m-2"))


@pytest.mark.parametrize(
    "names", [("注" * 60 + "甲", "注" * 60 + "乙"), ("🙂" * 79 + "a", "🙂" * 79 + "b")], ids=["cjk", "emoji"]
)
def test_p12_long_names_beyond_ascii_neither_lose_the_key_nor_meet(names):
    one, other = names
    texts = {canonical_key(name, key) for name in names for key in ("k1", "k2", "x" * 600, "x" * 599 + "y")}
    assert len(texts) == 8
    assert all(len(text) <= 512 for text in texts)
    assert len(namespace(one)) <= MAX_SPACE
    assert not canonical_key(one, "k").startswith(namespace(other))
