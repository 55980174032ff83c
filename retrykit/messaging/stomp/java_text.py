"""Text as ActiveMQ keeps it: in Java's own kind of UTF-8, with NUL as two bytes, and each letter beyond the first
65,536 (an emoji, say) as two surrogates of three bytes.

The broker hands the bytes of a TextMessage on as they are: to JMS, which reads no others, and to everybody else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_TEXTUAL: Final = ("text/", "application/json", "application/xml")
_WRITTEN_OTHERWISE: Final = re.compile(rb"[\0\xf0-\xf4]")
_BEYOND: Final = re.compile("[\U00010000-\U0010ffff]")
_NUL: Final = b"\xc0\x80"


def is_text(headers: Mapping[str, str], body: bytes) -> bool:
    """Whether the body can be called text, which peers are given decoded, as UTF-8."""
    kind = headers.get("content-type", "").lower()
    if not kind.startswith(_TEXTUAL):
        return False
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    _, named, charset = kind.replace(" ", "").partition("charset=")
    return not named or charset.strip('"').startswith(("utf-8", "utf8", "us-ascii"))


def to_java(body: bytes) -> bytes:
    """UTF-8 as Java reads it; what is no UTF-8 stays as it is."""
    if _WRITTEN_OTHERWISE.search(body) is None:
        return body
    try:
        text = body.decode()
    except UnicodeDecodeError:
        return body
    return _BEYOND.sub(_surrogates, text).encode("utf-8", "surrogatepass").replace(b"\0", _NUL)


def _surrogates(letter: re.Match[str]) -> str:
    place = ord(letter[0]) - 0x10000
    return chr(0xD800 + (place >> 10)) + chr(0xDC00 + (place & 0x3FF))


def from_java(body: bytes) -> bytes:
    """UTF-8, of what Java may have written; what is neither stays as it is."""
    try:
        body.decode()
    except UnicodeDecodeError:
        pass
    else:
        return body
    try:
        text = body.replace(_NUL, b"\0").decode("utf-8", "surrogatepass")
        # In UTF-16 two surrogates are the letter that they stand for.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le").encode()
    except UnicodeError:
        return body
