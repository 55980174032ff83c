from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.message import Ack, Discard, Message, Park, Redeliver, Republish, with_sender


def message(body=b"", **options):
    return Message(destination="/queue/a", body=body, **options)


@pytest.mark.parametrize(
    ("content_type", "charset"),
    [
        (None, "utf-8"),
        ("text/plain", "utf-8"),
        ("text/plain; charset=ISO-8859-1", "iso8859-1"),
        ('text/plain;format=flowed; CHARSET="utf-16"', "utf-16"),
        ("text/plain;charset=", "utf-8"),
        ('text/plain;charset=""', "utf-8"),
    ],
)
def test_the_charset_is_the_content_types_or_utf_8(content_type, charset):
    headers = {} if content_type is None else {"content-type": content_type}
    assert message(headers=headers).charset == charset


@given(st.text(st.characters(codec="utf-8")), st.sampled_from(["utf-8", "utf-16", "utf-32"]))
def test_text_is_read_in_the_charset_that_it_was_written_in(text, charset):
    written = message(text.encode(charset), headers={"content-type": f"text/plain; charset={charset}"})
    assert written.text == text


def test_an_unknown_charset_is_named():
    with pytest.raises(ValueError, match="klingon"):
        _ = message(headers={"content-type": "text/plain; charset=klingon"}).text


def test_a_body_that_is_not_text_says_so():
    with pytest.raises(UnicodeDecodeError):
        _ = message(b"\xff").text


def test_json_is_read_whatever_the_content_type():
    assert message(b'{"a": [1, null]}', headers={"content-type": "text/plain"}).json() == {"a": [1, None]}


def test_a_body_that_is_not_json_says_so():
    with pytest.raises(ValueError, match="Expecting"):
        message(b"nope").json()


def test_the_media_type_comes_without_its_parameters():
    assert message(headers={"content-type": "Text/Plain; charset=utf-8"}).content_type == "text/plain"
    assert message().content_type == ""


def test_equal_deliveries_are_equal_whoever_handles_them():
    one, other = message(handle=object()), message(handle=object())
    assert one == other
    assert hash(one) == hash(other)
    assert "handle" not in repr(one)


def test_a_message_does_not_change_with_the_headers_it_was_made_from():
    headers = {"a": "1"}
    made = message(headers=headers)
    headers["a"] = "2"
    assert made.headers == {"a": "1"}


def test_nothing_about_a_message_can_be_set():
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        message().body = b"x"


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda: Message(destination=""), "destination.*''"),
        (lambda: Message(destination=7), "destination.*7"),
        (lambda: message("text"), "body.*'text'"),
        (lambda: message(headers={"a": 1}), "headers.*'a': 1"),
        (lambda: message(headers="a"), "headers.*'a'"),
        (lambda: Redeliver(-1), "delay.*-1"),
        (lambda: Redeliver(float("nan")), "delay.*nan"),
        (lambda: Redeliver("soon"), "delay.*'soon'"),
        (lambda: Park(""), "destination.*non-empty.*''"),
        (lambda: Republish(None), "destination.*None"),
        (lambda: Discard(""), "reason.*''"),
    ],
)
def test_a_wrong_value_is_refused_by_name(wrong, names):
    with pytest.raises((ValueError, TypeError), match=names):
        wrong()


def test_settlements_are_matched_on_their_type():
    match Park("/queue/p", headers={"a": "b"}, reason="why"):
        case Park(destination, headers=headers, reason=reason):
            assert (destination, headers, reason) == ("/queue/p", {"a": "b"}, "why")
    match Redeliver(2):
        case Redeliver(delay):
            assert delay == 2.0
    assert Ack() == Ack()


def test_a_message_that_can_send_is_the_same_message():
    plain = message(b"x", headers={"a": "1"}, id="ID:1", key=("/queue/a", "ID:1"), redelivered=True, delivery_count=2)
    able = with_sender(plain, lambda *_: None)
    assert able == plain
    assert able.sender is not None
    assert plain.sender is None
    unequal = [field.name for field in attrs.fields(Message) if getattr(able, field.name) != getattr(plain, field.name)]
    assert unequal == ["sender"]
