"""By what a message is known again."""

from __future__ import annotations

import pytest

from retrykit.messaging import by_content, by_header
from retrykit.messaging.identity import bounded


def test_the_first_header_that_is_there_and_not_empty_is_the_id():
    identify = by_header("order", "purchase")
    assert identify({"order": "o", "purchase": "p"}, b"") == "o"
    assert identify({"order": "", "purchase": "p"}, b"") == "p"
    assert identify({}, b"o") is None
    assert str(identify) == "'order' or 'purchase'"


def test_an_id_that_no_header_could_carry_is_a_digest_which_is_always_the_same():
    assert bounded("x" * 512) == "x" * 512
    assert bounded("x" * 513) == "digest:e64ea951fdbf53a4e7a3b86e75dfd29b75ea1c26"
    assert len({bounded(f"{number}" * 9_000) for number in range(10)}) == 10
    assert bounded("\ud800" * 600).startswith("digest:")


CONTENTS = [
    ({}, b""),
    ({}, b"a"),
    ({"content-type": ""}, b"a"),
    ({"content-type": "text/plain"}, b"a"),
    ({"content-type": "text/plaina"}, b""),
    ({"sent": "1"}, b"a"),
    ({"sent": ""}, b"a"),
    ({"sent": "1", "by": "2"}, b"a"),
    ({"sent": "12"}, b"a"),
    ({"by": "1"}, b"a"),
]


def test_contents_that_differ_have_ids_that_differ():
    identify = by_content("sent", "by")
    assert len({identify(*content) for content in CONTENTS}) == len(CONTENTS)


def test_headers_that_are_not_named_are_no_part_of_the_content():
    assert by_content()({"message-id": "1", "redelivered": "false"}, b"a") == by_content()({"message-id": "2"}, b"a")


def test_the_id_by_content_is_the_same_for_ever():
    # Histories are kept under it: a change would forget them all.
    expected = "content:e06d4257138fa6eefb08e510787d4ce9218f97f1"
    assert by_content("sent")({"content-type": "text/plain", "sent": "1"}, b"a") == expected


@pytest.mark.parametrize(("make", "names"), [(by_header, (7,)), (by_header, ("",)), (by_content, (None,))])
def test_names_of_headers_are_checked(make, names):
    with pytest.raises((TypeError, ValueError), match="headers"):
        make(*names)


def test_they_are_values():
    assert by_header("a", "b") == by_header("a", "b") != by_header("b", "a")
    assert by_content() == by_content()
    assert repr(by_content("sent")) == "by_content(headers=('sent',))"
