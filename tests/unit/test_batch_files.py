"""Files as input: what is read, where it goes on, and what cannot be read."""

from __future__ import annotations

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.batch import ChunkStep, CsvReader, JsonLinesReader, SkipPolicy, Unreadable

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=12)
names = st.lists(texts.filter(str.strip), min_size=1, max_size=4, unique=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("files") / "input"


def shown(item):
    return ("unreadable", item.raw, type(item.error).__name__) if isinstance(item, Unreadable) else item


def everything(reader, position=None):
    return [(shown(item), position) for item, position in reader.read_from(position)]


def check_positions(reader, path):
    """From behind each record the others follow, and the last position is the end of the file."""
    found = everything(reader)
    for number, (_, position) in enumerate(found, 1):
        assert everything(reader, position) == found[number:]
    assert all(position <= path.stat().st_size for _, position in found)
    return [item for item, _ in found]


@given(
    names=names,
    rows=st.lists(st.lists(texts, min_size=4, max_size=4), max_size=6),
    ending=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_rows_are_read_from_wherever_one_of_them_ends(path, names, rows, ending):
    written = io.StringIO()
    writer = csv.writer(written, lineterminator=ending)
    rows = [row[: len(names)] for row in rows]
    writer.writerow(names)
    writer.writerows(rows)
    path.write_bytes(written.getvalue().encode())
    assert check_positions(CsvReader(path), path) == [dict(zip(names, row, strict=True)) for row in rows]


words = st.text("ab", min_size=1, max_size=3)
prose = st.one_of(words, st.builds("{}{}{}".format, words, st.text('a",\n', max_size=6), words), st.just(""))
"""What begins and ends with a letter: nobody can tell a quote before a comma from one that closes a field."""


def csv_line(number, text, *, quoting, ending):
    written = io.StringIO()
    csv.writer(written, quoting=quoting, lineterminator=ending).writerow([number, text])
    return written.getvalue()


@given(
    records=st.lists(st.tuples(st.booleans(), prose), max_size=12),
    manner=st.tuples(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.sampled_from(["\n", "\r\n"])),
    most=st.sampled_from([8, 1_000]),
)
def test_no_good_row_is_lost_to_quotes_that_are_not_closed_and_none_is_invented(path, records, manner, most):
    quoting, ending = manner
    lines, wanted = ["id,text" + ending], []
    for number, (good, text) in enumerate(records):
        if good:
            lines.append(csv_line(number, text, quoting=quoting, ending=ending))
            wanted.append({"id": str(number), "text": text})
        else:
            # In one of its fields somebody has forgotten to close the quote.
            broken = f'{number},"{text.replace(chr(34), "").replace(chr(10), "") or "a"}'
            lines.append(broken + ending)
            wanted.append(("unreadable", broken.encode(), "Error"))
    path.write_bytes("".join(lines).encode())
    assert check_positions(CsvReader(path, max_lines=most), path) == wanted


def test_a_quote_without_an_end_is_looked_for_no_further_than_it_may_be(path):
    rows = [f"{number},good\n" for number in range(2, 5_000)]
    path.write_text('id,text\n1,"open\n' + "".join(rows))
    for most in (1, 100, 10_000):
        first, *others = [item for item, _ in CsvReader(path, max_lines=most).read_from(None)]
        assert first.raw == b'1,"open'
        assert [row["id"] for row in others] == [str(number) for number in range(2, 5_000)]
        fault = "unexpected end of data" if most > len(rows) else f"it does not end within {most} lines"
        assert str(first.error) == fault
    path.write_text('id,text\n1,"open\n2,"two\nlines"\n3,good\n')
    found = [shown(item) for item, _ in CsvReader(path, max_lines=1).read_from(None)]
    assert [item[1] for item in found[:3]] == [b'1,"open', b'2,"two', b'lines"']
    assert found[3:] == [{"id": "3", "text": "good"}]
    with pytest.raises(ValueError, match=r"^max_lines: "):
        CsvReader(path, max_lines=0)


@given(
    st.lists(
        st.one_of(st.dictionaries(texts, st.integers()), st.sampled_from([b"{", b"\xff", b'"a', b"]"])), max_size=8
    )
)
def test_json_lines_are_read_from_wherever_one_of_them_ends_and_bad_ones_are_given_as_they_stand(path, records):
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n\n".join([*lines, b""]))
    wanted = {b"\xff": "UnicodeDecodeError"}
    assert check_positions(JsonLinesReader(path), path) == [
        ("unreadable", record, wanted.get(record, "JSONDecodeError")) if isinstance(record, bytes) else record
        for record in records
    ]


def test_csv_rows_that_make_no_item_are_given_as_they_stand_and_reading_goes_on(path):
    path.write_bytes(b'a,b\n1,2\n3\n4,"5\n\n6"\n\n7,8,9\n\xff,1\n"1"2,3\n10,11')
    items = check_positions(CsvReader(path), path)
    assert items == [
        {"a": "1", "b": "2"},
        ("unreadable", b"3", "ValueError"),
        {"a": "4", "b": "5\n\n6"},
        ("unreadable", b"7,8,9", "ValueError"),
        ("unreadable", b"\xff,1", "UnicodeDecodeError"),
        ("unreadable", b'"1"2,3', "Error"),
        {"a": "10", "b": "11"},
    ]


def test_a_bad_byte_in_a_field_of_several_lines_makes_no_row_of_the_rest(path):
    text = b'id,text\n1,"first\n\xff second\n2,third"\n3,ok\n4,"\xff\n5,no end'
    path.write_bytes(text)
    records = list(CsvReader(path).read_from(None))
    assert [item.raw if isinstance(item, Unreadable) else item for item, _ in records] == [
        b'1,"first\n\xff second\n2,third"',
        {"id": "3", "text": "ok"},
        b'4,"\xff',
        {"id": "5", "text": "no end"},
    ]
    assert isinstance(records[0][0].error, UnicodeDecodeError)
    assert text[records[0][1] :].startswith(b"3,ok")


def test_a_first_row_that_has_a_name_twice_is_an_error(path):
    path.write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match="its first row has 'a' several times"):
        list(CsvReader(path).read_from(None))


def test_a_line_that_is_nested_too_deeply_is_unreadable(path):
    path.write_text("[" * 100_000 + "\n1\n")
    (deep, _), (item, _) = JsonLinesReader(path).read_from(None)
    assert isinstance(deep, Unreadable)
    assert isinstance(deep.error, RecursionError)
    assert item == 1


def test_a_byte_order_mark_is_not_part_of_the_first_name(path):
    path.write_bytes(b"\xef\xbb\xbfa\n1\n")
    assert [item for item, _ in CsvReader(path).read_from(None)] == [{"a": "1"}]
    path.write_bytes(b"\xef\xbb\xbf1\n2\n")
    assert [item for item, _ in JsonLinesReader(path).read_from(None)] == [1, 2]


def test_csv_without_a_first_row_of_names_in_another_dialect_and_encoding(path):
    path.write_bytes("é;1\nü;2\n".encode("latin-1"))
    semicolons = type("Semicolons", (csv.excel,), {"delimiter": ";"})
    reader = CsvReader(path, fieldnames=("letter", "number"), dialect=semicolons, encoding="latin-1")
    assert check_positions(reader, path) == [{"letter": "é", "number": "1"}, {"letter": "ü", "number": "2"}]


def test_an_empty_file_has_no_records(path):
    path.write_bytes(b"")
    assert everything(CsvReader(path)) == everything(JsonLinesReader(path)) == []


def test_lines_may_have_a_decoder_of_their_own(path):
    path.write_bytes(b"1.10\n")
    assert everything(JsonLinesReader(path, loads=str.strip)) == [("1.10", 5)]


def test_a_position_behind_the_end_is_of_another_file(path):
    path.write_bytes(b"1\n")
    with pytest.raises(ValueError, match="position: must be from 0 to 2, the size of input, not 3"):
        everything(JsonLinesReader(path), 3)


def test_a_header_that_cannot_be_read_is_an_error(path):
    path.write_bytes(b'"a"b\n')
    with pytest.raises(ValueError, match="input: its first row cannot be read"):
        everything(CsvReader(path))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (CsvReader, {"path": 1}),
        (JsonLinesReader, {"path": None}),
        (CsvReader, {"encoding": "utf-16"}),
        (JsonLinesReader, {"encoding": "klingon"}),
        (CsvReader, {"fieldnames": "ab"}),
        (CsvReader, {"fieldnames": [1]}),
        (CsvReader, {"dialect": "klingon"}),
        (JsonLinesReader, {"loads": 1}),
    ],
)
def test_bad_arguments_are_refused(kind, options):
    (name,) = options
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
        kind(**({"path": "a"} | options))


def test_a_step_skips_what_cannot_be_read(path):
    path.write_bytes(b"a,b\n1,2\n3\n5,6\n")
    written = []
    report = ChunkStep(
        name="load",
        reader=CsvReader(path),
        writer=lambda _, items: written.extend(items),
        skip=SkipPolicy(skip_for=ValueError),
    ).run()
    assert written == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    (skipped,) = report.skipped
    assert (skipped.number, skipped.item, str(skipped.error)) == (2, b"3", "1 fields, and 2 names")
