"""The headers of an original that do not travel as headers of its copy: kept as JSON text, in as many as it takes.

The first of those headers is `retrykit-other-headers`, the next ones are numbered from 2. Each is a JSON object. A
value that is too long for one goes on in the next, under the same name.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Final

from retrykit.messaging.headers import escaped_size, line_size

OTHER_HEADERS: Final = "retrykit-other-headers"
"""JSON objects of the original's headers that do not travel as headers: this one, `retrykit-other-headers-2`, …"""

# So many more bytes a number takes, with its hyphen.
_NUMBER: Final = 6


def as_json(headers: Mapping[str, str]) -> str:
    """Headers as the text of one."""
    text = json.dumps(headers, sort_keys=True, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a character can only be said in escapes.
        return json.dumps(headers, sort_keys=True)
    return text


def split(headers: Mapping[str, str], longest: int) -> tuple[dict[str, str], dict[str, int]]:
    """The headers of a copy, with more of ours where one line would be longer than so many bytes; and which of the
    original's none can carry, since their names alone are too long, with the size of their lines.
    """
    text = headers.get(OTHER_HEADERS)
    if text is None or line_size(OTHER_HEADERS, text) <= longest:
        return dict(headers), {}
    others = _objects({OTHER_HEADERS: text})
    short = {name: value for name, value in headers.items() if name != OTHER_HEADERS}
    packing = _Packing(longest)
    unfit = {name: line_size(name, others[name]) for name in sorted(others) if not packing.takes(name, others[name])}
    return short | packing.headers(), unfit


def whole(headers: Mapping[str, str]) -> dict[str, str]:
    """What the JSON text says of the original's headers; what is no such text is passed over."""
    return _objects(headers)


class _Packing:
    """Headers of ours, each filled before the next one is begun."""

    def __init__(self, longest: int) -> None:
        self._empty = longest - line_size(OTHER_HEADERS, "") - _NUMBER
        self._filled: list[dict[str, str]] = [{}]
        self._room = self._empty

    def takes(self, name: str, value: str) -> bool:
        """Add a header, if its name leaves room for anything in an empty one."""
        if self._size(name, value) > self._room:
            self._begin()
        if self._size(name, value[:1]) > self._room:
            return False
        while True:
            # The size grows with each character, by a byte at least.
            ends = range(1, min(len(value), self._room) + 1)
            much = bisect_left(ends, True, key=lambda end: self._size(name, value[:end]) > self._room)
            self._put(name, value[:much])
            value = value[much:]
            if not value:
                return True
            self._begin()

    def _put(self, name: str, value: str) -> None:
        self._filled[-1][name] = value
        self._room -= self._size(name, value)

    def headers(self) -> dict[str, str]:
        return {_numbered(number): as_json(facts) for number, facts in enumerate(self._filled, 1) if facts}

    def _begin(self) -> None:
        if self._filled[-1]:
            self._filled.append({})
        self._room = self._empty

    @staticmethod
    def _size(name: str, value: str) -> int:
        # In one object with others it takes as much as by itself: two braces less, a comma and a space more.
        return escaped_size(as_json({name: value}))


def _objects(headers: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in _texts(headers):
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError):
            continue
        for name, value in facts.items() if isinstance(facts, dict) else ():
            found[name] = found.get(name, "") + str(value)
    return found


def _texts(headers: Mapping[str, str]) -> Iterator[str]:
    for number in count(1):
        text = headers.get(_numbered(number))
        if text is None:
            return
        yield text


def _numbered(number: int) -> str:
    return OTHER_HEADERS if number == 1 else f"{OTHER_HEADERS}-{number}"
