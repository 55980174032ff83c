from __future__ import annotations

import json

import pytest

from retrykit.context import RetryContext
from retrykit.message import Discard, Message, Park, Republish
from retrykit.messaging import discard, park, republish
from retrykit.messaging.recoverers import fitting, left_out, original_headers

HEADERS = {
    "content-type": "application/json",
    "correlation-id": "c-1",
    "x-tenant": "blue",
    "receipt": "r",
    "transaction": "t",
    "message-id": "ID:1",
    "redelivered": "true",
    "expires": "17",
    "timestamp": "18",
    "AMQ_SCHEDULED_DELAY": "5000",
    "user-id": "somebody",
    "expiration": "60000",
    "x-queue-type": "quorum",
}
MUST_NOT_TRAVEL = {
    "receipt",
    "transaction",
    "message-id",
    "redelivered",
    "expires",
    "timestamp",
    "AMQ_SCHEDULED_DELAY",
    "user-id",
    "expiration",
    "x-queue-type",
}


def message(**options):
    given = {"destination": "/queue/a", "body": b"{}", "headers": HEADERS, "id": "ID:1", "key": ("/queue/a", "ID:1")}
    return Message(**given | options)


def context(**facts):
    known = {
        "format": 1,
        "name": "orders",
        "key": ["/queue/a", "ID:1"],
        "retry_count": 3,
        "first_failed_at": 1_700_000_000.25,
        "last_failed_at": 1_700_000_060.5,
        "last_error": {"type": "sqlalchemy.exc.IntegrityError", "message": "no such customer"},
    }
    return RetryContext.from_snapshot(known | facts)


def test_a_parked_message_tells_its_history():
    settlement = park("/queue/a.parked")(message(), context())
    assert isinstance(settlement, Park)
    assert settlement.destination == "/queue/a.parked"
    ours = {name: value for name, value in settlement.headers.items() if name.startswith("retrykit-")}
    del ours["retrykit-other-headers"], ours["retrykit-reason"]
    assert ours == {
        "retrykit-id": "ID:1",
        "retrykit-destination": "/queue/a",
        "retrykit-name": "orders",
        "retrykit-key": '["/queue/a", "ID:1"]',
        "retrykit-attempts": "3",
        "retrykit-first-failed-at": "2023-11-14T22:13:20.250+00:00",
        "retrykit-last-failed-at": "2023-11-14T22:14:20.500+00:00",
        "retrykit-error-type": "sqlalchemy.exc.IntegrityError",
        "retrykit-error": "no such customer",
    }


def test_only_listed_headers_travel():
    headers = park("/queue/p")(message(), context()).headers
    assert headers["content-type"] == "application/json"
    assert headers["correlation-id"] == "c-1"
    assert not MUST_NOT_TRAVEL & set(headers)
    assert "x-tenant" not in headers


def test_patterns_let_an_applications_own_headers_travel():
    headers = park("/queue/p", headers=("x-*",))(message(), context()).headers
    assert headers["x-tenant"] == "blue"
    assert "correlation-id" not in headers


def test_a_header_that_only_begins_like_a_command_travels():
    own = {"exclusiveOffer": "yes", "durable-goods": "1", "x-max-retries": "7"}
    assert park("/queue/p", headers=tuple(own))(message(headers=own), context()).headers.items() >= own.items()


def test_headers_that_do_not_travel_are_kept_as_text():
    kept = json.loads(park("/queue/p")(message(), context()).headers["retrykit-other-headers"])
    assert kept["x-tenant"] == "blue"
    assert kept["AMQ_SCHEDULED_DELAY"] == "5000"
    assert "receipt" not in kept


@pytest.mark.parametrize("recoverer", [park, republish])
@pytest.mark.parametrize("patterns", [("*",), tuple(MUST_NOT_TRAVEL)])
def test_no_pattern_lets_facts_of_the_original_travel(recoverer, patterns):
    original = HEADERS | {"subscription": "s", "ack": "a", "destination": "/queue/a", "original-destination": "/q"}
    headers = recoverer("/queue/p", headers=patterns)(message(headers=original), context()).headers
    assert not set(headers) & (MUST_NOT_TRAVEL | {"subscription", "ack", "destination", "original-destination"})


def test_what_may_not_travel_is_kept_as_text_whatever_the_patterns():
    settlement = park("/queue/p", headers=("*",))(message(), context())
    kept = json.loads(settlement.headers["retrykit-other-headers"])
    of_the_frame = {"receipt", "transaction", "redelivered"}
    assert kept == {name: HEADERS[name] for name in MUST_NOT_TRAVEL - of_the_frame}


def escaped_size(text):
    for mark in "\\:\r\n":
        text = text.replace(mark, "\\" + ("c" if mark == ":" else mark))
    return len(text.encode())


def kept_in(headers):
    """As `park`, a broker whose lines have at most 10,240 bytes, and whoever looks at the copy leave them."""
    copy, long = fitting(park("/queue/p")(message(headers=headers), context()).headers, 10_240)
    assert not long
    assert all(len(name) + 1 + escaped_size(text) <= 10_240 for name, text in copy.items())
    return original_headers(copy)


@pytest.mark.parametrize("value", [":" * 20, "\n" * 20, "\\" * 20, "é" * 5, '"' * 20, "\0", ""])
def test_however_many_other_headers_there_are_they_are_kept_in_lines_that_fit(value):
    many = {f"h{number}": value for number in range(900)}
    assert kept_in(many) == many


@pytest.mark.parametrize("letter", ["x", '"', ":", "é", "😀", "\n", "\x01"])
def test_a_header_that_the_broker_takes_is_kept_however_long_it_is_as_text(letter):
    long = {name: letter * (10_230 // escaped_size(letter)) for name in ("a", "b", "c")} | {"short": "s"}
    assert kept_in(long) == long


def test_headers_that_fit_into_one_are_not_parted_and_those_that_do_not_are_only_where_they_must_be():
    parked = park("/queue/p")(message(headers={name: name * 5_000 for name in "abc"}), context()).headers
    assert json.loads(parked["retrykit-other-headers"]) == {name: name * 5_000 for name in "abc"}
    assert fitting(parked, None) == (parked, ())
    copy, _ = fitting(parked, 10_240)
    numbered = [copy[f"retrykit-other-headers{number}"] for number in ("", "-2")]
    assert [sorted(json.loads(text)) for text in numbered] == [["a", "b"], ["c"]]
    assert "retrykit-other-headers-3" not in copy


def test_half_a_character_is_kept_in_escapes():
    assert kept_in({"half": "\ud800"}) == {"half": "\ud800"}


def test_what_is_kept_of_an_original_is_kept_when_its_copy_is_parked_again():
    long = {"a": "x" * 9_000, "b": "y" * 9_000}
    copy, _ = fitting(park("/queue/p")(message(headers=long), context()).headers, 10_240)
    for patterns in (("*",), ()):
        again = park("/queue/p", headers=patterns)(message(headers=copy | {"own": "1"}), context()).headers
        assert original_headers(fitting(again, 10_240)[0]).items() >= (long | {"own": "1"}).items()


def test_a_key_that_no_header_can_carry_is_left_out():
    assert "retrykit-key" not in park("/queue/p")(message(), context(key=["/queue/a", ":" * 8000])).headers


@pytest.mark.parametrize("text", ["[" * 100_000, "no JSON", "[]", "7"])
def test_other_headers_that_are_none_of_ours_are_passed_over(text):
    assert original_headers({"retrykit-other-headers": text, "x-tenant": "blue"}) == {"x-tenant": "blue"}


def test_a_header_whose_name_no_line_can_carry_is_left_out_and_said():
    parked = park("/queue/p")(message(headers=HEADERS | {"n" * 10_220: "x", "m": "y" * 11_000}), context()).headers
    copy, names = fitting(parked, 10_240)
    assert names == ("n" * 10_220,)
    assert left_out(copy) == {"n" * 40: 10_222}
    assert original_headers(copy).items() >= {"x-tenant": "blue", "m": "y" * 11_000}.items()


def test_a_header_that_no_line_can_carry_does_not_travel_and_the_others_do():
    long = HEADERS | {"x-long": ":" * 6_000, "n" * 200: "x" * 20_000, "x-fits": "x" * 10_233}
    headers = park("/queue/p", headers=("x-*", "n*"))(message(headers=long), context()).headers
    fit, names = fitting(headers, 10_240)
    assert names == ("n" * 200, "x-long")
    assert left_out(fit) == {"x-long": 12_007, "n" * 40: 20_201}
    assert fit == {name: value for name, value in headers.items() if name not in names} | {
        "retrykit-left-out": fit["retrykit-left-out"]
    }
    assert fitting(headers, None) == (headers, ())
    assert "retrykit-left-out" not in original_headers(fit)


@pytest.mark.parametrize("text", ["[" * 100_000, "no JSON", "[]", '{"a": "b"}', "{}"])
def test_what_was_left_out_is_read_as_far_as_it_can_be(text):
    assert left_out({"retrykit-left-out": text}) == {}
    headers, _ = fitting({"retrykit-left-out": text, "long": "x" * 200_000}, 150_000)
    assert headers == {"retrykit-left-out": '{"long": 200005}'}


@pytest.mark.parametrize("told", [{"é" * 3_000: 1}, {"a": 10**4_000}, {str(number): 10**300 for number in range(30)}])
def test_what_somebody_else_says_was_left_out_makes_no_header_that_is_too_long(told):
    theirs = {"retrykit-left-out": json.dumps(told, ensure_ascii=False)}
    assert escaped_size(theirs["retrykit-left-out"]) < 10_000
    headers, _ = fitting(theirs | {"long": "x" * 20_000}, 10_240)
    assert escaped_size(headers["retrykit-left-out"]) < 10_000
    assert left_out(headers)["long"] == 20_005


def test_the_mark_of_one_that_was_sent_back_is_bounded():
    marked = message(headers=HEADERS | {"retrykit-sent-back": "x" * 20_000})
    assert len(park("/queue/p")(marked, context()).headers["retrykit-sent-back"]) < 100


def test_the_stable_id_of_the_original_goes_through_every_copy():
    copy = message(headers=HEADERS | {"retrykit-id": "first"}, id="ID:2")
    assert park("/queue/p")(copy, context()).headers["retrykit-id"] == "first"
    assert republish("/queue/p")(copy, context()).headers["retrykit-id"] == "first"


def test_error_texts_are_bounded_to_one_line():
    error = {"type": "E", "message": "first\nsecond\x00" + "x" * 5000}
    text = park("/queue/p")(message(), context(last_error=error)).headers["retrykit-error"]
    assert text.startswith("first second x")
    assert len(text) == 1000


def test_a_veto_is_the_reason():
    settlement = park("/queue/p")(message(), context(veto="wrong tenant"))
    assert settlement.reason == "vetoed: wrong tenant"
    assert settlement.headers["retrykit-reason"] == "vetoed: wrong tenant"


def test_an_item_that_never_failed_can_be_parked():
    headers = park("/queue/p")(message(), context(retry_count=0, last_error=None, first_failed_at=None)).headers
    assert headers["retrykit-attempts"] == "0"
    assert "retrykit-error" not in headers


def test_republishing_keeps_no_history():
    settlement = republish("/queue/b")(message(), context())
    assert isinstance(settlement, Republish)
    assert settlement.headers == {
        "content-type": "application/json",
        "correlation-id": "c-1",
        "retrykit-id": "ID:1",
        "retrykit-destination": "/queue/a",
    }


def test_discarding_gives_the_reason():
    assert discard("stale")(message(), context()) == Discard("stale")


def test_recoverers_are_values():
    assert park("/queue/p") == park("/queue/p")
    assert repr(discard("stale")) == "discard(reason='stale')"


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda: park(""), "destination.*''"),
        (lambda: park(7), "destination.*7"),
        (lambda: park("/queue/p", headers="x-*"), r"headers.*x-\*"),
        (lambda: park("/queue/p", headers=(1,)), "headers.*1"),
        (lambda: republish(None), "destination.*None"),
        (lambda: discard(""), "reason.*''"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(wrong, names):
    with pytest.raises((ValueError, TypeError), match=names):
        wrong()
