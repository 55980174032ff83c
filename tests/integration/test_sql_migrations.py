"""The migrations end in the very tables that `create_tables` makes, and keep every row, wherever they start."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import textwrap
import threading
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, inspect, make_url, select, text
from sqlalchemy.pool import NullPool

from retrykit.errors import ContextCacheError
from retrykit.sql import (
    SCHEMA_VERSION,
    SqlRetryContextCache,
    check_version,
    create_tables,
    metadata,
    migrations_path,
    rk_context,
    rk_job,
    rk_parked,
)
from retrykit.sql import schema as schema_module
from retrykit.sql.migrate import Upgrade, upgrade_sql, upgrade_tables
from retrykit.sql.schema import exclusive, open_tables, read_schema

DATA = Path(__file__).parent / "data"
DIALECTS = ("sqlite", "postgresql", "mariadb")
# Alembic works in one transaction of ours where DDL is part of one.
TRANSACTIONAL = ("sqlite", "postgresql")


@pytest.fixture(params=DIALECTS)
def url(request, tmp_path):
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/retrykit.db"
        return
    server = request.getfixturevalue(request.param)
    place = server.fresh_database()
    yield place
    server.drop_database(place)


@pytest.fixture
def engine(url):
    with opened(url) as engine:
        yield engine


@pytest.fixture
def version_1(engine):
    """The database with the tables that version 0.1.0 made, and rows in them."""
    run_script(engine, (DATA / f"version_1.{engine.dialect.name}.sql").read_text())
    with engine.begin() as connection:
        for table, rows in ROWS.items():
            columns = list(dict.fromkeys(itertools.chain(*rows)))
            values = ", ".join(f":{column}" for column in columns)
            statement = text(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values})")  # noqa: S608
            connection.execute(statement, [dict.fromkeys(columns) | row for row in rows])
    return engine


def history(number, **more):
    return {
        "context_key": f"orders/{number}",
        "revision": number,
        "name": "orders",
        "retry_count": number,
        "last_failed_at": 1.7e9 + number,
        "updated_at": 1.7e9 + 61.5 * number,
        "snapshot": '{"name":"orders"}' + " " * 1_000,
        **more,
    }


ROWS = {
    "rk_context": [
        *(history(number) for number in range(1, 40)),
        history(40, veto="é" * 500, exhausted=True, not_before=1.8e9, expires_at=1.9e9),
        *(history(number, completed_at=1.7e9, expires_at=1.9e9) for number in range(41, 60)),
    ],
    "rk_parked": [
        {"name": "orders", "payload": b"\0\xff" * 50, "headers": "{}", "reason": "no", "attempts": 3, "errors": "[]"}
        | {"parked_at": 1.7e9 + number, "context_key": f"orders/{number}"}
        for number in range(5)
    ],
}


def run_script(engine, script):
    if engine.dialect.name == "sqlite":
        connection = engine.raw_connection()
        with closing(connection):
            connection.driver_connection.executescript(script)
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in re.split(r";\n", script):
            lines = [line for line in statement.splitlines() if not line.startswith("--")]
            if "".join(lines).strip() not in ("", "BEGIN", "COMMIT"):
                connection.exec_driver_sql("\n".join(lines))


def content(engine):
    """Every row, as version 1 knows it."""
    with engine.connect() as connection:
        return {
            table: connection.execute(text(f"SELECT {', '.join(rows[-1])} FROM {table} ORDER BY id")).all()  # noqa: S608
            for table, rows in ROWS.items()
        }


def schema(engine):
    """What the database itself says that it has: tables, columns in their order, indexes, constraints, triggers."""
    asked = {"sqlite": of_sqlite, "postgresql": of_postgresql, "mariadb": of_mariadb}[engine.dialect.name]
    with engine.connect() as connection:
        found = asked(connection)
    return {name: kept for name, kept in found.items() if "rk_" in name and "rk_alembic_version" not in name}


def of_sqlite(connection):
    found = {}
    for kind, name, table, sql in connection.execute(text("SELECT type, name, tbl_name, sql FROM sqlite_master")):
        if kind == "table":
            # ALTER TABLE writes the text of the table in its own way, so it is asked what it means.
            columns = connection.execute(text("SELECT * FROM pragma_table_xinfo(:name)"), {"name": name}).all()
            wanted = text("SELECT name, [unique], origin, partial FROM pragma_index_list(:name)")
            indexes = connection.execute(wanted, {"name": name})
            found[name] = (columns, sorted(tuple(row) for row in indexes), "AUTOINCREMENT" in sql)
        else:
            found[name] = (kind, table, sql and " ".join(sql.replace("IF NOT EXISTS ", "").split()))
    return found


def of_postgresql(connection):
    found = {}
    columns = """
        SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, l.collname,
               pg_get_expr(d.adbin, d.adrelid), col_description(c.oid, a.attnum), c.reloptions::text, a.attidentity
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        LEFT JOIN pg_collation l ON l.oid = a.attcollation
        WHERE c.relkind = 'r' AND c.relname LIKE 'rk%' ORDER BY a.attnum"""
    for row in connection.execute(text(columns)):
        found.setdefault(row.relname, []).append(tuple(row))
    for name, definition in connection.execute(text("SELECT indexname, indexdef FROM pg_indexes")):
        found[name] = definition
    constraints = "SELECT conrelid::regclass || ' ' || conname, pg_get_constraintdef(oid) FROM pg_constraint"
    return found | {row[0]: row[1] for row in connection.execute(text(constraints))}


def of_mariadb(connection):
    found = {}
    for name in inspect(connection).get_table_names():
        shown = connection.exec_driver_sql(f"SHOW CREATE TABLE {name}").one()[1]
        first, *lines = re.sub(r" AUTO_INCREMENT=\d+", "", shown).replace(",\n", "\n").splitlines()
        # Columns have an order, keys have none.
        found[name] = (first, *sorted(lines, key=lambda line: line if "KEY" in line else ""))
    return found


@pytest.fixture
def wanted(request, engine, tmp_path):
    """The schema that `create_tables` makes, in another database of the same kind."""
    if engine.dialect.name == "sqlite":
        other, server = f"sqlite:///{tmp_path}/wanted.db", None
    else:
        server = request.getfixturevalue(engine.dialect.name)
        other = server.fresh_database()
    with opened(other) as fresh:
        create_tables(fresh)
        yield schema(fresh)
    if server is not None:
        server.drop_database(other)


@contextmanager
def opened(url):
    # Patient, however busy the machine is.
    options = {"connect_args": {"timeout": 60}} if make_url(url).get_backend_name() == "sqlite" else {}
    engine = create_engine(url, poolclass=NullPool, **options)
    try:
        yield engine
    finally:
        engine.dispose()


def differences(engine):
    """What autogenerate would change."""
    with engine.connect() as connection:
        options = {"compare_server_default": True, "include_name": lambda name, *_: name != "rk_alembic_version"}
        return compare_metadata(MigrationContext.configure(connection, opts=options), metadata)


def stamped(engine):
    with engine.connect() as connection:
        return connection.scalars(text("SELECT version_num FROM rk_alembic_version")).all()


# -- where migrations start and end


def test_tables_that_migrations_make_are_the_tables_that_create_tables_makes(engine, wanted):
    assert upgrade_tables(engine) == Upgrade(0, SCHEMA_VERSION)
    assert schema(engine) == wanted
    assert differences(engine) == []
    rows = check_version(engine)
    assert rows.keys() == {"version", "contexts", "identity"}
    assert 0 <= rows["identity"] < 2**63


def test_tables_of_version_1_get_every_row_and_the_very_schema_of_today(version_1, wanted):
    before = content(version_1)
    assert len(before["rk_context"]) == 59
    assert upgrade_tables(version_1) == Upgrade(1, SCHEMA_VERSION)
    assert content(version_1) == before
    assert schema(version_1) == wanted
    assert differences(version_1) == []
    with version_1.connect() as connection:
        rows = connection.execute(
            select(rk_context.c.updated_at, rk_context.c.updated_minute, rk_context.c.token)
        ).all()
    assert all(row.updated_minute == int(row.updated_at // 60) and row.token == 0 for row in rows)
    assert read_schema(version_1)["version"] == SCHEMA_VERSION


def test_first_migration_makes_what_version_1_made(request, engine, tmp_path):
    run_script(engine, upgrade_sql(engine.dialect.name, end=1))
    made = schema(engine)
    run_script(engine, "DROP TABLE rk_context;\nDROP TABLE rk_parked;\nDROP TABLE rk_schema;\n")
    run_script(engine, (DATA / f"version_1.{engine.dialect.name}.sql").read_text())
    assert made == schema(engine)


def test_number_of_histories_is_kept_by_the_triggers_of_sqlite_after_a_migration(tmp_path):
    with opened(f"sqlite:///{tmp_path}/retrykit.db") as engine:
        run_script(engine, upgrade_sql("sqlite", end=1))
        run_script(
            engine, "INSERT INTO rk_context (context_key, revision, updated_at, snapshot) VALUES ('a/1', 0, 0, '{}')"
        )
        upgrade_tables(engine)
        run_script(
            engine, "INSERT INTO rk_context (context_key, revision, updated_at, snapshot) VALUES ('a/2', 0, 0, '{}')"
        )
        assert read_schema(engine)["contexts"] == 2


def test_second_upgrade_changes_nothing(engine):
    upgrade_tables(engine)
    before = schema(engine), read_schema(engine)
    assert upgrade_tables(engine) == Upgrade(SCHEMA_VERSION, SCHEMA_VERSION)
    assert (schema(engine), read_schema(engine)) == before


def test_tables_that_create_tables_made_are_recognized_and_stamped(engine):
    create_tables(engine)
    identity = read_schema(engine)["identity"]
    assert upgrade_tables(engine) == Upgrade(SCHEMA_VERSION, SCHEMA_VERSION)
    assert stamped(engine) == [f"rk_{SCHEMA_VERSION:04}"]
    assert read_schema(engine)["identity"] == identity


def test_what_alembic_s_own_table_says_does_not_count(version_1, wanted):
    run_script(version_1, "CREATE TABLE rk_alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY);\n")
    run_script(version_1, "INSERT INTO rk_alembic_version VALUES ('rk_0002');\n")
    assert upgrade_tables(version_1) == Upgrade(1, SCHEMA_VERSION)
    assert schema(version_1) == wanted
    assert stamped(version_1) == [f"rk_{SCHEMA_VERSION:04}"]


def test_tables_newer_than_this_retrykit_are_left_alone(engine):
    create_tables(engine)
    run_script(engine, "UPDATE rk_schema SET value = 99 WHERE name = 'version';\n")
    with pytest.raises(ContextCacheError, match="schema version 99; this retrykit knows 4: upgrade retrykit"):
        upgrade_tables(engine)
    assert read_schema(engine)["version"] == 99
    assert "rk_alembic_version" not in inspect(engine).get_table_names()


def test_identities_of_databases_differ(tmp_path):
    found = set()
    for number in range(3):
        with opened(f"sqlite:///{tmp_path}/{number}.db") as engine:
            upgrade_tables(engine)
            found.add(read_schema(engine)["identity"])
    assert len(found) == 3


def test_upgrade_on_a_connection_commits_with_its_transaction(tmp_path):
    with opened(f"sqlite:///{tmp_path}/retrykit.db") as engine:
        with engine.connect() as connection:
            upgrade_tables(connection)
            connection.rollback()
        assert read_schema(engine) == {}
        with engine.begin() as connection:
            upgrade_tables(connection)
        assert check_version(engine)


# -- SQL for others to run


def test_written_sql_does_what_the_upgrade_does(engine, wanted):
    run_script(engine, upgrade_sql(engine.dialect.name))
    assert schema(engine) == wanted
    assert check_version(engine)
    assert stamped(engine) == [f"rk_{SCHEMA_VERSION:04}"]


def test_written_sql_leads_from_version_to_version_and_back_with_every_row(version_1, wanted):
    dialect = version_1.dialect.name
    before, old = content(version_1), schema(version_1)
    run_script(version_1, upgrade_sql(dialect, start=1))
    assert (content(version_1), schema(version_1)) == (before, wanted)
    run_script(version_1, upgrade_sql(dialect, start=SCHEMA_VERSION, end=1))
    assert (content(version_1), schema(version_1)) == (before, old)
    assert read_schema(version_1).keys() == {"version", "contexts"}
    assert upgrade_tables(version_1) == Upgrade(1, SCHEMA_VERSION)
    assert (content(version_1), schema(version_1)) == (before, wanted)


@pytest.mark.parametrize("options", [{"dialect": "oracle"}, {"start": -1}, {"end": SCHEMA_VERSION + 1}])
def test_sql_of_unknown_versions_or_databases_is_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        upgrade_sql(**{"dialect": "sqlite", **options})


# -- several at once, and interruptions


WORKER = """
import sys
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool
from retrykit.sql import schema as schema_module
from retrykit.sql.migrate import upgrade_tables
options = {"connect_args": {"timeout": 60}} if sys.argv[1].startswith("sqlite") else {}
engine = create_engine(sys.argv[1], poolclass=NullPool, **options)
print("ready", flush=True)
print(upgrade_tables(engine).before, flush=True)
"""


def test_of_upgrades_at_once_one_does_it_and_the_others_find_it_done(url, version_1, wanted):
    before = content(version_1)
    with exclusive(version_1):
        workers = [
            subprocess.Popen([sys.executable, "-W", "error", "-c", WORKER, url], stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    found = sorted(worker.communicate(timeout=60)[0].strip() for worker in workers)
    assert found == ["1", *[str(SCHEMA_VERSION)] * 2]
    assert (content(version_1), schema(version_1)) == (before, wanted)


def test_threads_that_create_tables_at_once_find_them_whole(engine, wanted):
    start, found = threading.Barrier(4), []

    def create():
        start.wait(30)
        found.append(create_tables(engine)["identity"])

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert len(set(found)) == 1
    assert schema(engine) == wanted


def test_upgrade_that_is_interrupted_at_any_statement_is_taken_up_by_the_next(version_1, wanted):
    old, before = schema(version_1), content(version_1)
    for number in itertools.count():
        try:
            with failing_at(version_1, number):
                upgrade_tables(version_1)
            break
        except ZeroDivisionError:
            assert content(version_1) == before
            if version_1.dialect.name in TRANSACTIONAL:
                assert schema(version_1) == old
        assert number < 100
    assert number > 10
    assert (content(version_1), schema(version_1)) == (before, wanted)
    assert check_version(version_1)


def test_creation_that_is_interrupted_at_any_statement_is_taken_up_by_the_next(engine, wanted):
    for number in itertools.count():
        try:
            with failing_at(engine, number):
                upgrade_tables(engine)
            break
        except ZeroDivisionError:
            assert number < 100
    assert number > 10
    assert schema(engine) == wanted
    assert check_version(engine)["contexts"] == 0


def test_upgrade_does_not_wait_forever_for_a_transaction_that_uses_the_tables(version_1, monkeypatch):
    if version_1.dialect.name == "sqlite":
        pytest.skip("SQLite's own busy timeout says how long")
    monkeypatch.setattr(schema_module, "LOCK_SECONDS", 1)
    before = content(version_1), schema(version_1)
    with version_1.begin() as reader:
        reader.execute(text("SELECT count(*) FROM rk_context"))
        with pytest.raises(ContextCacheError, match="others have been using the tables"):
            upgrade_tables(version_1)
    assert (content(version_1), schema(version_1)) == before
    assert upgrade_tables(version_1) == Upgrade(1, SCHEMA_VERSION)


@contextmanager
def failing_at(engine, number):
    """Let the statement of this number, of those that change something, fail before it is sent."""
    left = itertools.count(-number)

    def fail(connection, cursor, statement, *others):
        if re.match(r"\s*(CREATE|ALTER|DROP|INSERT|UPDATE|DELETE|COMMENT)", statement) and next(left) == 0:
            raise ZeroDivisionError(statement)

    event.listen(engine, "before_cursor_execute", fail)
    try:
        yield
    finally:
        event.remove(engine, "before_cursor_execute", fail)


# -- what a cache finds at its start


def test_absent_tables_on_a_server_are_an_error_with_the_command_and_no_secret(url, engine):
    if engine.dialect.name == "sqlite":
        assert open_tables(engine)["version"] == SCHEMA_VERSION
        return
    options = {"application_name": "s3cret"} if engine.dialect.name == "postgresql" else {}
    place = make_url(url)
    absent = pytest.raises(ContextCacheError, match="the tables are not there")
    with opened(place.update_query_dict(options)) as other, absent as caught:
        open_tables(other)
    told = str(caught.value)
    shown = f"{place.drivername}://{place.username}:***@{place.host}:{place.port}/{place.database}"
    # A command with a URL without its password would be refused.
    assert told.endswith(f"run: retrykit db upgrade, with the URL of {shown} in RETRYKIT_STORE")
    assert place.password not in told
    assert inspect(engine).get_table_names() == []


def test_tables_of_version_1_are_an_error_with_the_command(version_1):
    with pytest.raises(ContextCacheError, match=r"schema version 1; .*: run: retrykit db upgrade"):
        open_tables(version_1)


# -- in an application's own alembic

ENV = """
from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool
from retrykit.sql import metadata

engine = create_engine(context.config.attributes["url"], poolclass=NullPool)
with engine.connect() as connection:
    context.configure(connection=connection, target_metadata=metadata)
    with context.begin_transaction():
        context.run_migrations()
"""
INI = """
[alembic]
script_location = %(here)s
version_locations = %(here)s/versions
    retrykit.sql.migrations:versions
path_separator = newline
"""
OWN = """
from alembic import op
import sqlalchemy as sa
revision = "a1"
down_revision = None
def upgrade():
    op.create_table("orders", sa.Column("id", sa.Integer, primary_key=True))
def downgrade():
    op.drop_table("orders")
"""


@pytest.fixture
def application(url, tmp_path):
    """A project with migrations of its own, whose alembic.ini names those of retrykit too."""
    folder = tmp_path / "alembic"
    (folder / "versions").mkdir(parents=True)
    (folder / "env.py").write_text(ENV)
    (folder / "versions" / "a1_orders.py").write_text(OWN)
    (folder / "alembic.ini").write_text(textwrap.dedent(INI))
    return Config(folder / "alembic.ini", attributes={"url": url})


def test_application_runs_the_migrations_with_its_own(application, engine, wanted):
    command.upgrade(application, "heads")
    assert schema(engine) == wanted
    assert check_version(engine)
    assert "orders" in inspect(engine).get_table_names()
    # The command finds it done, and the application's alembic finds done what the command did.
    assert upgrade_tables(engine) == Upgrade(SCHEMA_VERSION, SCHEMA_VERSION)
    command.downgrade(application, "retrykit@rk_0001")
    assert read_schema(engine)["version"] == 1
    assert upgrade_tables(engine) == Upgrade(1, SCHEMA_VERSION)
    command.upgrade(application, "heads")
    assert schema(engine) == wanted


def test_application_takes_over_tables_that_are_there(application, version_1, wanted):
    before = content(version_1)
    command.upgrade(application, "heads")
    assert (content(version_1), schema(version_1)) == (before, wanted)


def test_tables_with_rows_are_not_dropped_by_a_downgrade(application, version_1):
    command.upgrade(application, "heads")
    before = content(version_1)
    with pytest.raises(ContextCacheError, match="rk_context is not empty, and its rows would be gone with it"):
        command.downgrade(application, "retrykit@base")
    assert content(version_1) == before
    with version_1.begin() as connection:
        connection.execute(rk_context.delete())
    with pytest.raises(ContextCacheError, match="rk_parked is not empty"):
        command.downgrade(application, "retrykit@base")
    with version_1.begin() as connection:
        connection.execute(rk_parked.delete())
    command.downgrade(application, "retrykit@base")
    assert not any(name.startswith("rk_") for name in inspect(version_1).get_table_names())
    assert upgrade_tables(version_1) == Upgrade(0, SCHEMA_VERSION)


def test_jobs_are_not_dropped_by_a_downgrade(application, engine):
    command.upgrade(application, "heads")
    new = {"instance": "0" * 64, "name": "load", "parameters": "{}", "status": "new", "counts": "{}"}
    numbers = dict.fromkeys(("runs", "revision", "fence", "started_at", "updated_at"), 0)
    with engine.begin() as connection:
        connection.execute(rk_job.insert(), new | numbers)
    with pytest.raises(ContextCacheError, match="rk_job is not empty, and its rows would be gone with it"):
        command.downgrade(application, "retrykit@rk_0002")
    # Only PostgreSQL takes back, with what was refused, what went before it.
    assert read_schema(engine)["version"] == (SCHEMA_VERSION if engine.dialect.name == "postgresql" else 3)
    with engine.begin() as connection:
        connection.execute(rk_job.delete())
    command.downgrade(application, "retrykit@rk_0002")
    assert read_schema(engine)["version"] == 2
    assert "rk_job" not in inspect(engine).get_table_names()


def test_downgrade_leaves_every_history_and_no_tombstone(application, engine):
    command.upgrade(application, "heads")
    cache = SqlRetryContextCache(engine, capacity=1, on_full="evict_oldest")
    for key in ("a/1", "a/2"):
        cache.save(key, {"retry_count": 1}, None)
    assert "evicted" in cache.load("a/1").snapshot
    command.downgrade(application, "retrykit@rk_0003")
    with engine.connect() as connection:
        assert connection.execute(text("SELECT context_key FROM rk_context")).scalars().all() == ["a/2"]
    assert upgrade_tables(engine) == Upgrade(3, SCHEMA_VERSION)
    assert [key for key, _ in SqlRetryContextCache(engine).items()] == ["a/2"]


def test_migrations_path_is_the_folder_of_the_scripts_and_each_has_a_label_or_a_parent():
    names = sorted(path.name for path in migrations_path().glob("rk_*.py"))
    assert len(names) == SCHEMA_VERSION
    config = Config()
    config.set_main_option("script_location", str(migrations_path().parent))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_current_head() == f"rk_{SCHEMA_VERSION:04}"
    assert scripts.get_revision("retrykit@head").revision == f"rk_{SCHEMA_VERSION:04}"


def test_importing_retrykit_sql_does_not_import_alembic():
    code = "import sys, retrykit.sql; sys.exit('alembic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
