"""Readers of files that can begin in the middle: a position is a number of bytes, so going on costs one seek.

Records are separated by newlines, as the file has them; of one that cannot be read the bytes are given as they stand,
and reading goes on behind it.
"""

from __future__ import annotations

import csv
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from retrykit.batch.source import Unreadable
from retrykit.check import is_callable, whole, wrong_type, wrong_value
from retrykit.value import Value


def _as_path(given: Any) -> Any:
    return Path(given) if isinstance(given, str | os.PathLike) else given


def _check_path(_instance: Any, field: Any, path: Any) -> None:
    if not isinstance(path, Path):
        raise wrong_type(field.name, "the path of a file", path)


def _check_encoding(_instance: Any, field: Any, encoding: Any) -> None:
    try:
        newline = "\n".encode(encoding)
    except (LookupError, TypeError) as error:
        raise wrong_value(field.name, f"the name of an encoding ({error})", encoding) from error
    if newline != b"\n":
        raise wrong_value(field.name, "an encoding in which a newline is one byte, such as utf-8 or latin-1", encoding)


_BOM = b"\xef\xbb\xbf"


class _Lines:
    """The lines of a file from a position on, decoded, and where the last one ended.

    One that cannot be decoded is given with surrogates for its bad bytes, and found by `check`.
    """

    def __init__(self, file: BinaryIO, encoding: str, start: int, most: int = 1) -> None:
        self._file = file
        self._encoding = encoding
        self._most = most
        """A record of more lines is none."""
        self.end = start
        self.taken: list[bytes] = []
        """The lines of the present record."""
        self._fault: UnicodeDecodeError | None = None

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self.taken) >= self._most:
            raise csv.Error(f"it does not end within {self._most} lines")
        line = self._file.readline()
        if not line:
            raise StopIteration
        at_the_beginning, self.end = self.end == 0, self.end + len(line)
        self.taken.append(line)
        line = line.removeprefix(_BOM) if at_the_beginning else line
        try:
            return line.decode(self._encoding)
        except UnicodeDecodeError as error:
            # Where the record ends is found all the same.
            self._fault = self._fault or error
            return line.decode(self._encoding, "surrogateescape")

    def check(self) -> None:
        """`UnicodeDecodeError` if a line of the present record could not be decoded."""
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def record(self) -> bytes:
        """The bytes of the record that ends here; the next one begins."""
        taken, self.taken, self._fault = self.taken, [], None
        return b"".join(taken)

    def first_line(self) -> bytes:
        """The bytes of the first line of a record that has no end; what stands behind it is read again."""
        first, *others = self.taken
        self.end -= sum(map(len, others))
        self._file.seek(self.end)
        self.taken, self._fault = [], None
        return first


@attrs.frozen(eq=False, repr=False)
class _FileReader(Value, ABC):
    path: Path = attrs.field(converter=_as_path, validator=_check_path)
    encoding: str = attrs.field(default="utf-8", validator=_check_encoding, kw_only=True)

    def read_from(self, position: int | None) -> Iterator[tuple[Any, int]]:
        """Each record with the number of bytes up to its end. `ValueError` for a position behind the end of the file,
        which then is another one.
        """
        start = 0 if position is None else position
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not 0 <= start <= size:
                raise wrong_value("position", f"from 0 to {size}, the size of {self.path.name}", position)
            yield from self._records(file, start)

    @abstractmethod
    def _records(self, file: BinaryIO, start: int) -> Iterator[tuple[Any, int]]:
        """Each record that begins at `start` or later, with the number of bytes up to its end."""


@attrs.frozen(eq=False, repr=False)
class JsonLinesReader(_FileReader):
    """The values of a file with one JSON document on each line; empty lines are left out.

    A line that is no JSON is an `Unreadable`. `loads`: what makes a value of a line (default: `json.loads`).
    """

    loads: Callable[[str], Any] = attrs.field(default=json.loads, validator=is_callable, kw_only=True)

    def _records(self, file: BinaryIO, start: int) -> Iterator[tuple[Any, int]]:
        file.seek(start)
        lines = _Lines(file, self.encoding, start)
        while True:
            item: Any
            try:
                line = next(lines, None)
                if line is None:
                    return
                lines.check()
                item = self.loads(line) if line.strip() else lines
            except (ValueError, RecursionError) as error:
                item = Unreadable(lines.record().rstrip(b"\r\n"), error)
            lines.taken.clear()
            if item is not lines:
                yield item, lines.end


@attrs.frozen(eq=False, repr=False)
class CsvReader(_FileReader):
    """The rows of a CSV file as dicts, by the names in its first row, or by `fieldnames` if it has no such row.

    Fields in quotes may contain newlines. `dialect`: the name or class of one of the standard library's `csv`. A row
    with more or fewer fields than there are names, or one that `csv` refuses, is an `Unreadable`; empty lines are left
    out.

    A quote that is not closed makes one record of the lines that follow, until `csv` finds a fault in it, at the next
    quote or at the end of the file, or until it has more than `max_lines` lines. Then only its first line is
    `Unreadable`, and the line behind that is the next record: no good row is lost to it.
    """

    fieldnames: Sequence[str] | None = attrs.field(default=None, kw_only=True)
    dialect: Any = attrs.field(default="excel", kw_only=True)
    max_lines: int = attrs.field(default=1_000, validator=whole(1), kw_only=True)

    @fieldnames.validator
    def _check_fieldnames(self, field: Any, names: Any) -> None:
        if names is None:
            return
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(one, str) for one in names):
            raise wrong_type(field.name, "a sequence of names", names)

    @dialect.validator
    def _check_dialect(self, field: Any, dialect: Any) -> None:
        try:
            csv.reader([], dialect)
        except (csv.Error, TypeError) as error:
            raise wrong_value(field.name, f"a dialect of csv ({error})", dialect) from error

    def _records(self, file: BinaryIO, start: int) -> Iterator[tuple[Any, int]]:
        names = self.fieldnames
        if names is None:
            names, first = self._header(file)
            start = max(start, first)
        file.seek(start)
        lines = _Lines(file, self.encoding, start, self.max_lines)
        rows = csv.reader(lines, self.dialect, strict=True)
        while True:
            item: Any
            try:
                row = next(rows, None)
                if row is None:
                    return
                lines.check()
                item = self._named(names, row) if row else lines
            except csv.Error as error:
                # Where it ends nobody knows: what seems to be inside of it may be good records.
                item = Unreadable(lines.first_line().rstrip(b"\r\n"), error)
                rows = csv.reader(lines, self.dialect, strict=True)
            except ValueError as error:
                item = Unreadable(lines.record().rstrip(b"\r\n"), error)
            lines.taken.clear()
            if item is not lines:
                yield item, lines.end

    def _header(self, file: BinaryIO) -> tuple[Sequence[str], int]:
        """The names in the first row, and where it ends. `ValueError` for a file whose first row is none."""
        lines = _Lines(file, self.encoding, 0, self.max_lines)
        file.seek(0)
        try:
            names = next(csv.reader(lines, self.dialect, strict=True), [])
            lines.check()
        except (csv.Error, ValueError) as error:
            raise ValueError(f"{self.path.name}: its first row cannot be read: {error}") from error
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{self.path.name}: its first row has {', '.join(map(repr, twice))} several times")
        return names, lines.end

    @staticmethod
    def _named(names: Sequence[str], row: list[str]) -> dict[str, str]:
        if len(row) != len(names):
            raise ValueError(f"{len(row)} fields, and {len(names)} names")
        return dict(zip(names, row, strict=True))
