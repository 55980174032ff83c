from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.messaging.stomp.java_text import from_java, to_java

# As DataOutputStream.writeUTF has it.
WRITTEN_BY_JAVA = b"caf\xc3\xa9 \xed\xa0\xbd\xed\xb8\x80 \xc0\x80 end"
TEXT = "caf\xe9 \N{GRINNING FACE} \0 end"


def test_text_is_written_and_read_as_java_does():
    assert to_java(TEXT.encode()) == WRITTEN_BY_JAVA
    assert from_java(WRITTEN_BY_JAVA) == TEXT.encode()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_all_text_comes_back(text):
    written = to_java(text.encode())
    assert from_java(written) == text.encode()
    assert b"\0" not in written
    assert not any(byte >= 0xF0 for byte in written)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_that_is_utf_8_already_stays_as_it_is(text):
    assert from_java(text.encode()) == text.encode()


@pytest.mark.parametrize(
    "body", [b"\xff\0\xf0", b"gr\xfcn", b"\xed\xa0\xbd", b"\xc0\x80\xff", "gr\xfcn".encode("utf-16")]
)
def test_what_is_no_text_stays_as_it_is(body):
    assert to_java(body) == body
    assert from_java(body) == body
