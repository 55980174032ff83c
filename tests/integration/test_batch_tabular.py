"""Rows as input and output of batch jobs."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    case,
    create_engine,
    delete,
    event,
    insert,
    literal,
    select,
)
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from retrykit.batch import AsyncChunkStep, ChunkStep, SkipPolicy, SqlCursorReader, SqlWriter
from retrykit.sql import SqlJobStore, create_tables, parked_items, sqlite_engine
from tests.servers.databases import DATABASES, empty_database

metadata = MetaData()
source = Table(
    "customer", metadata, Column("id", Integer, primary_key=True, autoincrement=False), Column("name", String(20))
)
target = Table("work", metadata, Column("id", Integer, primary_key=True, autoincrement=False))


@pytest.fixture(params=[*DATABASES, "an engine of ours"])
def engine(request):
    if request.param in DATABASES:
        engine = create_engine(empty_database(request, request.param))
    else:
        engine = sqlite_engine(f"sqlite:///{request.getfixturevalue('tmp_path')}/histories.db")
    create_tables(engine)
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(source), [{"id": number, "name": f"n{number}"} for number in range(0, 50, 2)])
    yield engine
    engine.dispose()


@pytest.mark.parametrize("page", [1, 7, 25, 1_000])
def test_rows_are_read_in_the_order_of_their_key_from_wherever_one_of_them_ends(engine, page):
    reader = SqlCursorReader(
        engine, select(source).where(source.c.id != 6).order_by(source.c.name), key="id", page=page
    )
    wanted = [number for number in range(0, 50, 2) if number != 6]
    assert [(row.id, row.name, position) for row, position in reader.read_from(None)] == [
        (number, f"n{number}", number) for number in wanted
    ]
    assert [row.id for row, _ in reader.read_from(20)] == [number for number in wanted if number > 20]


@pytest.mark.parametrize("change", ["limit", "offset", "fetch"])
def test_a_query_with_a_part_of_its_own_is_refused(engine, change):
    with pytest.raises(ValueError, match=r"^select: must be without LIMIT"):
        SqlCursorReader(engine, getattr(select(source), change)(3), key="id")


@pytest.mark.parametrize("page", [1, 5])
@pytest.mark.parametrize("position", [None, 0])
def test_a_key_that_is_not_unique_or_null_is_an_error_and_no_loss(engine, position, page):
    twice = select((source.c.id / 4 * 0 + 1).label("key"), source.c.name)
    null = select(literal(None, Integer).label("key"), source.c.name)
    for query in (twice, null) if position is None else (twice,):
        with pytest.raises(ValueError, match="key 'key': must be unique and not null"):
            list(SqlCursorReader(engine, query, key="key", page=page).read_from(position))


@pytest.mark.parametrize("position", [None, 3])
@pytest.mark.parametrize("page", [1, 5, 24])
def test_a_null_among_the_keys_is_an_error_before_the_first_row_wherever_the_database_sorts_it(engine, page, position):
    last = select(case((source.c.id != 48, source.c.id)).label("key"), source.c.name)
    with pytest.raises(ValueError, match="key 'key': must be unique and not null, not None"):
        next(SqlCursorReader(engine, last, key="key", page=page).read_from(position))


def test_rows_that_fit_into_a_page_are_not_asked_for_nulls(engine):
    asked = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    list(SqlCursorReader(engine, select(source), key="id", page=25).read_from(None))
    assert len(asked) == 1
    list(SqlCursorReader(engine, select(source), key="id", page=10).read_from(None))
    assert len(asked) == 1 + 3 + 1


def test_a_step_may_delete_what_it_reads_and_write_elsewhere_in_one_transaction(engine):
    def move(session, rows):
        session.execute(insert(target), [{"id": row.id} for row in rows])
        session.execute(delete(source).where(source.c.id.in_([row.id for row in rows])))

    step = ChunkStep(
        name="move",
        reader=SqlCursorReader(engine, select(source.c.id), key="id", page=4),
        writer=move,
        transaction=sessionmaker(engine).begin,
        chunk_size=6,
        jobs=SqlJobStore(engine),
    )
    assert step.run().counts.written == 25
    with engine.connect() as connection:
        assert connection.scalars(select(target.c.id)).all() == list(range(0, 50, 2))
        assert connection.scalars(select(source.c.id)).all() == []


def test_a_row_that_is_skipped_is_recorded_with_the_names_of_its_columns(engine):
    def refuse(row):
        if row.id == 6:
            raise ValueError(row.id)

    ChunkStep(
        name="move",
        reader=SqlCursorReader(engine, select(source), key="id"),
        processor=refuse,
        writer=SqlWriter(target),
        transaction=engine.begin,
        skip=SkipPolicy(skip_for=ValueError),
        jobs=SqlJobStore(engine),
    ).run()
    (parked,) = parked_items(engine)
    assert (json.loads(parked.payload), parked.content_type) == ({"id": 6, "name": "n6"}, "application/json")


def test_no_reader_holds_a_connection_between_its_pages(engine):
    rows = SqlCursorReader(engine, select(source.c.id), key="id", page=2).read_from(None)
    next(rows)
    assert engine.pool.checkedout() == 0


@pytest.mark.parametrize("begin", ["session", "connection"])
def test_the_writer_inserts_mappings(engine, begin):
    transaction = sessionmaker(engine).begin if begin == "session" else engine.begin
    ChunkStep(
        name="copy",
        reader=SqlCursorReader(engine, select(source), key="id"),
        processor=lambda row: {"id": row.id},
        writer=SqlWriter(target),
        transaction=transaction,
    ).run()
    with engine.connect() as connection:
        assert connection.scalars(select(target.c.id)).all() == list(range(0, 50, 2))


@pytest.mark.parametrize(
    "options", [{"engine": "sqlite://"}, {"select": "SELECT 1"}, {"key": "nobody"}, {"key": 1}, {"page": 0}]
)
def test_bad_arguments_are_refused(tmp_path, options):
    (name,) = options
    engine = sqlite_engine(f"sqlite:///{tmp_path}/a.db")
    given = {"engine": engine, "select": select(source), "key": "id"} | options
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: "):
        SqlCursorReader(**given)


def test_items_with_different_columns_lose_nothing_and_absent_ones_have_their_default(engine):
    metadata = MetaData()
    table = Table(
        "optional",
        metadata,
        Column("number", Integer, primary_key=True),
        Column("id", Integer),
        Column("name", String(20), server_default="nobody"),
    )
    metadata.create_all(engine)
    items = [{"id": 1}, {"name": "b", "id": 2}, {"id": 3, "name": "c"}, {"id": 4, "name": None}, {"id": 5}]
    ChunkStep(name="optional", reader=items, writer=SqlWriter(table), transaction=engine.begin).run()
    with engine.connect() as connection:
        found = connection.execute(select(table.c.id, table.c.name).order_by(table.c.number)).all()
    assert found == [(1, "nobody"), (2, "b"), (3, "c"), (4, None), (5, "nobody")]


@pytest.mark.parametrize("begin", [Engine.begin, lambda engine: sessionmaker(engine).begin()])
def test_as_many_columns_with_other_names_lose_nothing_and_keep_their_order(engine, begin):
    table = Table(
        "named",
        MetaData(),
        Column("number", Integer, primary_key=True),
        Column("id", Integer),
        Column("name", String(20), server_default="nobody"),
        Column("size", Integer, server_default="7"),
    )
    table.metadata.drop_all(engine)
    table.metadata.create_all(engine)
    items = [{"id": 1, "name": "a"}, {"id": 2, "size": 3}, {"size": 4}, {"id": 5, "name": "e"}]
    with begin(engine) as transaction:
        SqlWriter(table)(transaction, items)
    with engine.connect() as connection:
        found = connection.execute(select(table.c.id, table.c.name, table.c.size).order_by(table.c.number)).all()
    assert found == [(1, "a", 7), (2, "nobody", 3), (None, "nobody", 4), (5, "e", 7)]


@pytest.mark.parametrize("later", ["id", {"id"}, ("id",), 5])
def test_a_later_item_that_is_no_mapping_is_named_and_nothing_is_inserted(engine, later):
    with engine.begin() as connection:
        with pytest.raises(TypeError, match=r"^items: must be mappings of column names to values, not "):
            SqlWriter(target)(connection, [{"id": 1}, later])
        assert connection.scalars(select(target.c.id)).all() == []


def test_items_that_the_database_refuses_are_sent_to_it_once(engine):
    sent = []
    event.listen(engine, "before_cursor_execute", lambda *facts: sent.append(facts[2]))
    with pytest.raises(IntegrityError), engine.begin() as connection:
        SqlWriter(target)(connection, [{"id": 1}, {"id": 1}])
    assert len([text for text in sent if text.startswith("INSERT")]) == 1


def test_an_asynchronous_writer_inserts_items_with_different_columns(tmp_path):
    async def run():
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db")
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        items = [{"id": 1}, {"id": 2, "name": "b"}]
        step = AsyncChunkStep(
            name="optional", reader=items, writer=SqlWriter(source), transaction=async_sessionmaker(engine).begin
        )
        await step.run()
        async with engine.connect() as connection:
            found = (await connection.execute(select(source).order_by(source.c.id))).all()
        await engine.dispose()
        return found

    assert asyncio.run(run()) == [(1, None), (2, "b")]


def test_an_item_that_is_no_mapping_is_at_fault(engine):
    report = ChunkStep(
        name="copy",
        reader=[{"id": 1}, 5, {"id": 2}],
        writer=SqlWriter(target),
        transaction=engine.begin,
        skip=SkipPolicy(skip_for=TypeError),
    ).run()
    (skipped,) = report.skipped
    assert (report.counts.written, skipped.item) == (2, 5)
    assert str(skipped.error).startswith("items: ")


@pytest.mark.parametrize("items", [[{"ID": 0}], [{"id": 1}, {"id": 2, "zz": 3}], [{"zz": 1, "id": 2}, {"id": 3}]])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_name_that_is_no_column_is_refused_and_nothing_is_inserted(engine, asynchronous, items):
    (unknown,) = {name for item in items for name in item} - {"id"}
    message = (
        rf"^items: must be mappings of columns of 'work' \(\['id'\]\), which has no \['{unknown}'\], not {{.*{unknown}"
    )
    with engine.begin() as connection:
        given = SimpleNamespace(sync_connection=connection, execute=connection.execute) if asynchronous else connection
        with pytest.raises(ValueError, match=message):
            SqlWriter(target)(given, items)
        assert connection.scalars(select(target.c.id)).all() == []


def test_an_item_with_a_name_that_is_no_column_is_found_and_skipped_as_any_other(engine):
    items = [{"id": number} | ({"Id": number} if number == 7 else {}) for number in range(20)]
    report = ChunkStep(
        name="copy",
        reader=items,
        writer=SqlWriter(target),
        transaction=engine.begin,
        skip=SkipPolicy(skip_for=ValueError),
    ).run()
    assert [skipped.number for skipped in report.skipped] == [8]
    with engine.connect() as connection:
        assert connection.scalars(select(target.c.id)).all() == [number for number in range(20) if number != 7]


def test_columns_are_named_by_their_keys_and_rows_as_mappings_will_do(engine):
    table = Table("work", MetaData(), Column("id", Integer, primary_key=True, autoincrement=False, key="number"))
    with engine.begin() as connection:
        numbers = connection.execute(select(source.c.id.label("number"))).mappings().all()
        SqlWriter(table)(connection, numbers)
        assert connection.scalars(select(target.c.id)).all() == list(range(0, 50, 2))
        with pytest.raises(ValueError, match=r"has no \['id'\]"):
            SqlWriter(table)(connection, [{"id": 1}])


def test_a_writer_without_a_transaction_is_refused_when_the_step_is_made():
    with pytest.raises(
        ValueError, match=r"^transaction: must be such as engine.begin, for SqlWriter\('work'\), not None"
    ):
        ChunkStep(name="copy", reader=[], writer=SqlWriter(target))
    with pytest.raises(TypeError, match=r"^transaction: must be a Session or a Connection, not NoneType"):
        SqlWriter(target)(None, [{"id": 1}])


def test_the_writer_wants_a_table():
    with pytest.raises(TypeError, match=r"^table: "):
        SqlWriter("work")
