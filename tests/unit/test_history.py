"""What is remembered of a key, and its JSON form."""

from __future__ import annotations

import json
import operator
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit import CodecError
from retrykit.failure import (
    MAX_CAUSES,
    MAX_MESSAGE,
    MAX_TRACEBACK,
    ErrorSummary,
    StoredError,
    error_from_json,
    error_to_json,
    message_of,
    render,
)
from retrykit.history import Attributes, Flight, History, Tally
from tests.doubles import pickled


class Shy(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raised(error, cause=None):
    try:
        raise error from cause
    except Exception as caught:
        return caught


# -- stored errors


def test_a_stored_error_has_the_type_message_and_bases_of_the_live_one():
    stored = StoredError.of(ConnectionResetError("peer"))
    assert (stored.type, stored.message, str(stored)) == ("builtins.ConnectionResetError", "peer", "peer")
    assert stored.classes[:3] == ("builtins.ConnectionResetError", "builtins.ConnectionError", "builtins.OSError")
    assert repr(stored) == "StoredError('builtins.ConnectionResetError', 'peer')"
    assert not stored.crash


def test_a_stored_error_has_causes_but_no_frames():
    stored = StoredError.of(raised(ValueError("outer"), OSError("inner")))
    assert stored.__cause__ == StoredError.of(OSError("inner"))
    assert stored.__traceback__ is None
    assert stored.traceback == ""


def test_a_cause_is_what_an_error_was_explicitly_raised_from():
    inner, context = OSError("inner"), KeyError("handled meanwhile")
    error = ValueError("outer")
    error.__context__ = context
    assert StoredError.of(error).__cause__ is None
    error.__cause__ = inner
    assert StoredError.of(error).__cause__.message == "inner"


def test_a_chain_of_causes_is_bounded_and_may_bite_its_tail():
    first = error = ValueError("0")
    for number in range(1, 2 * MAX_CAUSES):
        error.__cause__ = ValueError(str(number))
        error = error.__cause__
    length, link = 0, StoredError.of(first)
    while link is not None:
        length, link = length + 1, link.__cause__
    assert length == MAX_CAUSES
    one, other = ValueError("one"), ValueError("other")
    one.__cause__, other.__cause__ = other, one
    assert StoredError.of(one).__cause__.__cause__ is None
    one.__cause__ = other.__cause__ = None


def test_a_rendered_error_ends_where_it_happened():
    stored = StoredError.of(raised(ValueError("x" * 2 * MAX_TRACEBACK), OSError("inner")), rendered=True)
    assert len(stored.traceback) == MAX_TRACEBACK
    assert stored.traceback.startswith("…")
    assert "in raised" in StoredError.of(raised(ValueError("short")), rendered=True).traceback


def recursing(depth):
    return recursing(depth - 1) if depth else 1 / 0


@pytest.mark.parametrize("depth", [0, 1, 30])
def test_plain_error_is_rendered_as_the_standard_library_words_it_but_for_its_marks(depth):
    with pytest.raises(ZeroDivisionError) as caught:
        recursing(depth)
    theirs = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=False).format())
    ours = render(caught.value).splitlines()
    if depth < 3:
        assert ours == [line for line in theirs.splitlines() if not line.strip() or set(line.strip()) - {"^", "~"}]
    assert ours[-1] == "ZeroDivisionError: division by zero"
    assert ours.count("    return recursing(depth - 1) if depth else 1 / 0") == depth + 1


def test_endless_recursion_is_rendered_with_its_beginning_and_its_end():
    with pytest.raises(RecursionError) as caught:
        recursing(100_000)
    text = render(caught.value)
    assert len(text) <= MAX_TRACEBACK
    assert text.splitlines()[-1].startswith("RecursionError: maximum recursion")


@pytest.mark.parametrize("kind", ["cause", "context", "group", "notes"])
def test_what_belongs_to_an_error_is_rendered_too(kind):
    error = ExceptionGroup("several", [OSError("inner")]) if kind == "group" else ValueError("outer")
    if kind == "cause":
        error.__cause__ = OSError("inner")
    elif kind == "context":
        error.__context__ = OSError("inner")
    elif kind == "notes":
        error.add_note("inner")
    assert "inner" in render(error)


def test_an_error_without_words_hides_nothing():
    assert message_of(Shy()) == "<no message: str() raised RuntimeError>"
    assert len(message_of(ValueError("x" * 3 * MAX_MESSAGE))) == MAX_MESSAGE
    assert StoredError.of(Shy(), rendered=True).type.endswith("Shy")


def test_rendering_that_fails_hides_nothing(monkeypatch):
    def broken(error):
        raise RuntimeError("no")

    monkeypatch.setattr("traceback.format_exception", broken)
    error = ValueError()
    error.add_note("so that the standard library renders it")
    assert render(error) == "<no traceback: rendering it raised RuntimeError>"


def test_a_stored_error_of_a_stored_error_is_itself():
    stored = StoredError.of(OSError("x"))
    assert StoredError.of(stored) is stored


def test_a_crash_says_whose_it_was():
    crash = StoredError.of_crash(7, "host/1")
    assert crash.crash
    assert str(crash) == "attempt with fence 7 never ended; it was made by host/1"


def test_stored_errors_are_values():
    one, other = StoredError.of(OSError("x")), StoredError.of(OSError("x"))
    assert one == other
    assert hash(one) == hash(other)
    assert one != StoredError.of(OSError("y"))
    assert one != OSError("x")
    stored = StoredError.of(raised(ValueError("outer"), OSError("inner")), rendered=True)
    copy = pickled(stored)
    assert copy == stored
    assert (copy.traceback, copy.classes) == (stored.traceback, stored.classes)


STORED = st.recursive(
    st.builds(StoredError, st.text(min_size=1), st.text(), crash=st.booleans(), traceback=st.text()),
    lambda inner: st.builds(StoredError, st.text(min_size=1), st.text(), cause=inner),
    max_leaves=4,
)


@given(STORED)
def test_a_stored_error_comes_back_from_json(stored):
    back = error_from_json(json.loads(json.dumps(error_to_json(stored))))
    assert back == stored
    assert (back.classes, back.traceback, back.crash) == (stored.classes, stored.traceback, stored.crash)


def test_a_summary_is_one_line():
    assert str(ErrorSummary(1, "builtins.OSError", "broken", None)) == "OSError: broken"


# -- attributes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.text(), JSON)
def test_attributes_keep_what_json_carries(name, value):
    attributes = Attributes()
    attributes[name] = value
    assert attributes == {name: value}


LOOP = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value",
    [object(), {1, 2}, b"x", (1, 2), {1: 2}, float("nan"), float("inf"), LOOP],
    ids=lambda v: type(v).__name__ + str(v)[:3],
)
@pytest.mark.parametrize(
    "keep",
    [
        lambda attributes, value: operator.setitem(attributes, "seen", value),
        lambda attributes, value: attributes.update(good=1, seen=value),
        lambda attributes, value: attributes.setdefault("seen", value),
        lambda attributes, value: operator.ior(attributes, {"good": 1, "seen": value}),
    ],
    ids=["[]", "update", "setdefault", "|="],
)
def test_what_json_cannot_carry_is_refused_by_name_when_it_is_set(value, keep):
    attributes = Attributes()
    with pytest.raises(CodecError, match="attribute 'seen': JSON"):
        keep(attributes, value)
    assert attributes == {}


def test_the_name_of_an_attribute_is_text():
    with pytest.raises(CodecError, match="attribute 1: the name must be a str, not int"):
        Attributes()[1] = "x"


def test_attributes_are_a_dict_otherwise():
    attributes = Attributes()
    attributes |= {"a": 1}
    attributes.update({"b": 2}, c=3)
    assert attributes.setdefault("a", 7) == 1
    assert attributes.setdefault("d", 4) == 4
    assert attributes == {"a": 1, "b": 2, "c": 3, "d": 4}


# -- histories


def full():
    return History(
        failures=3,
        crashes=1,
        fence=4,
        started_at=1.0,
        first_failed_at=2.0,
        last_failed_at=3.0,
        not_before=4.0,
        last_delay=1.0,
        last_error=StoredError.of(OSError("x")),
        errors=(ErrorSummary(1, "builtins.OSError", "x", 2.0),),
        in_flight=(Flight(4, "host/1", 1.0, 301.0), Flight(5, "host/1", 1.0, 301.0, recovery=True)),
        veto="poison",
        exhausted=True,
        recovered=True,
        recovery_failures=2,
        reason="because",
        completed_at=5.0,
        expires_at=6.0,
        _tallies={"/OSError": Tally(2, 0.5)},
        _attributes=Attributes(seen=1),
    )


def test_a_history_comes_back_from_json_whole():
    facts = json.loads(json.dumps(full().to_json("orders", "m-1")))
    assert facts["format"] == 1
    assert (facts["name"], facts["key"], facts["retry_count"]) == ("orders", "m-1", 3)
    back = History.from_json(facts)
    assert back.to_json("orders", "m-1") == facts
    assert back.tallies == {"/OSError": Tally(2, 0.5)}
    assert back.in_flight[1].recovery
    assert back.attributes == {"seen": 1}


def test_what_is_not_known_is_left_out_of_the_json():
    assert History().to_json("orders", None) == {"format": 1, "name": "orders", "key": None, "retry_count": 0}


def test_a_flight_lands_by_its_fence():
    history = full()
    assert history.flight(4).owner == "host/1"
    history.land(4)
    assert history.flight(4) is None
    assert len(history.in_flight) == 1


@pytest.mark.parametrize("facts", [None, [], {}, {"format": "1"}, {"format": 0}, "x"], ids=repr)
def test_what_is_no_snapshot_is_refused(facts):
    with pytest.raises(CodecError, match="no snapshot of a history"):
        History.from_json(facts)


def test_a_later_format_is_refused_with_what_to_do():
    with pytest.raises(CodecError, match="the snapshot has format 2; this retrykit reads up to 1: upgrade it"):
        History.from_json({"format": 2})


@pytest.mark.parametrize(
    "damage",
    [
        {"retry_count": None},
        {"errors": [{"attempt": 1}]},
        {"errors": 3},
        {"in_flight": [{"fence": 1}]},
        {"tallies": {"a": [1, 2, 3]}},
        {"attributes": 3},
        {"last_error": "x"},
    ],
    ids=str,
)
def test_a_damaged_snapshot_is_refused(damage):
    facts = {"format": 1, "retry_count": 1} | damage
    if damage == {"retry_count": None}:
        del facts["retry_count"]
    with pytest.raises(CodecError, match="the snapshot is damaged"):
        History.from_json(facts)


@pytest.mark.parametrize(
    "damage",
    [
        {"veto": 5},
        {"reason": ["x"]},
        {"exhausted": 1},
        {"fence": "x"},
        {"fence": True},
        {"not_before": "x"},
        {"expires_at": [1]},
        {"last_delay": {}},
    ],
    ids=str,
)
def test_a_fact_of_the_wrong_kind_is_refused_by_name(damage):
    (fact,) = damage
    with pytest.raises(CodecError, match=f"the snapshot is damaged.*{fact} is"):
        History.from_json({"format": 1, "retry_count": 1} | damage)


def test_attributes_that_a_call_did_not_touch_are_left_to_others():
    mine, theirs = Attributes(), Attributes()
    for attributes in (mine, theirs):
        attributes.update(kept=1, set=1, deleted=1, popped=1, last=1)
        attributes.changed.clear()
    theirs["kept"] = 2
    mine["set"] = 3
    del mine["deleted"]
    assert mine.pop("popped") == 1
    assert mine.popitem() == ("last", 1)
    mine.say_to(theirs)
    assert theirs == {"kept": 2, "set": 3}
    mine.clear()
    mine.say_to(theirs)
    assert theirs == {}
