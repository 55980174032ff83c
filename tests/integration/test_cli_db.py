"""`retrykit db …`: tables are made, brought to this version, asked for theirs; what goes wrong says what to do."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.pool import NullPool

from retrykit.cli.commands import retrykit
from retrykit.sql import SCHEMA_VERSION, SqlRetryContextCache, check_version
from retrykit.sql.migrate import upgrade_sql
from retrykit.sql.urls import shown_url

ROOT = Path(__file__).parents[2]
SERVERS = {"postgresql": "asyncpg", "mariadb": "asyncmy"}


@pytest.fixture(params=["sqlite", *SERVERS])
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
def file(tmp_path):
    return tmp_path / "retrykit.db"


def run(*arguments, status=0, **environment):
    found = CliRunner().invoke(retrykit, ["db", *arguments], env={"RETRYKIT_STORE": None, **environment})
    assert found.exit_code == status, found.output
    return found.output


def version(url):
    engine = create_engine(url, poolclass=NullPool)
    return check_version(engine)["version"]


def make_version_1(url):
    engine = create_engine(url, poolclass=NullPool)
    script = upgrade_sql(engine.dialect.name, end=1)
    lines = [line for line in script.splitlines() if not line.startswith("--") and line not in ("BEGIN;", "COMMIT;")]
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            connection.connection.dbapi_connection.executescript("\n".join(lines))
            return
        for statement in "\n".join(lines).split(";\n"):
            if statement.strip():
                connection.exec_driver_sql(statement)


def test_tables_are_made_once_and_then_there_is_nothing_to_do(url):
    shown = shown_url(make_url(url))
    assert run("upgrade", "--store", url) == f"{shown}: made the tables, schema version {SCHEMA_VERSION}\n"
    assert version(url) == SCHEMA_VERSION
    assert run("upgrade", "--store", url) == f"{shown}: schema version {SCHEMA_VERSION}, nothing to do\n"
    assert run("current", "--store", url) == f"{shown}: schema version {SCHEMA_VERSION}, as it should be\n"


def test_store_is_named_by_the_environment_too(url):
    run("upgrade", RETRYKIT_STORE=url)
    assert "as it should be" in run("current", RETRYKIT_STORE=url)


def test_tables_of_version_1_are_reported_and_upgraded(url):
    make_version_1(url)
    told = run("current", "--store", url, status=1)
    assert "the tables have schema version 1" in told
    assert "run: retrykit db upgrade" in told
    assert shown_url(make_url(url)) in told
    assert f"schema version 1 is now {SCHEMA_VERSION}" in run("upgrade", "--store", url)
    assert version(url) == SCHEMA_VERSION


def test_tables_that_are_absent_are_reported_with_the_command(url):
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(make_url(url).database)) as connection:
            connection.execute("CREATE TABLE own (id INTEGER)")
    told = run("current", "--store", url, status=1)
    assert "the tables are not there" in told
    assert "run: retrykit db upgrade" in told


def test_tables_newer_than_this_retrykit_are_left_alone(url):
    run("upgrade", "--store", url)
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text("UPDATE rk_schema SET value = 99 WHERE name = 'version'"))
    for command in ("current", "upgrade"):
        told = run(command, "--store", url, status=1)
        assert "schema version 99" in told
        assert "upgrade retrykit" in told


@pytest.mark.parametrize("server", SERVERS)
def test_url_of_the_application_does_whatever_its_driver_is(request, server):
    started = request.getfixturevalue(server)
    place = make_url(started.fresh_database())
    bare, other = (
        place.set(drivername=name, query={}).render_as_string(hide_password=False)
        for name in (server, f"{server}+{SERVERS[server]}")
    )
    assert "made the tables" in run("upgrade", "--store", other)
    assert "as it should be" in run("current", "--store", bare)
    started.drop_database(place.set(query={}).render_as_string(hide_password=False))


def test_cache_starts_on_the_tables_that_the_command_made(url):
    run("upgrade", "--store", url)
    with SqlRetryContextCache(url) as cache:
        version = cache.save("a/1", {"retry_count": 1}, None)
        assert cache.load("a/1").version == version


# -- SQL for others to run


def test_sql_that_is_printed_makes_the_tables(file):
    script = run("sql", "--store", "sqlite://")
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(script)
    assert "as it should be" in run("current", "--store", f"sqlite:///{file}")


def test_sql_is_written_for_the_database_of_the_url_without_a_word_to_it():
    # Nobody listens there, and nobody is asked.
    assert "BIGSERIAL" in run("sql", "--store", "postgresql+asyncpg://user:secret@127.0.0.1:1/db")
    assert "AUTO_INCREMENT" in run("sql", "--store", "mariadb://")
    only = run("sql", "--store", "postgres://", "--from", "1")
    assert "CREATE TABLE rk_context" not in only
    assert "ADD COLUMN token" in only
    assert "DROP COLUMN token" in run("sql", "--store", "mariadb://", "--from", "2", "--to", "1")


def test_sql_from_or_to_a_version_that_is_not_there_is_refused():
    told = run("sql", "--store", "sqlite://", "--to", str(SCHEMA_VERSION + 1), status=2)
    assert f"--from and --to are versions from 0 to {SCHEMA_VERSION}" in told


@pytest.mark.parametrize("place", ["oracle://", "redis://host", "orders.db"])
def test_sql_for_other_stores_is_refused(place):
    assert "give sqlite://, postgresql:// or mariadb://" in run("sql", "--store", place, status=2)


@pytest.mark.parametrize("command", [[], ["upgrade"], ["current"], ["sql"]])
def test_page_of_the_command_line_shows_what_the_command_says(monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "110")
    arguments = ["db", *command, "--help"]
    said = CliRunner().invoke(retrykit, arguments, prog_name="retrykit", terminal_width=110).output
    assert said.rstrip() in (ROOT / "docs" / "reference" / "cli.md").read_text(encoding="utf-8")


# -- what goes wrong


def test_store_has_to_be_named():
    assert "RETRYKIT_STORE" in run("upgrade", status=2)


@pytest.mark.parametrize(
    ("place", "status", "words"),
    [
        ("redis://:s3cret@host/0", 2, "of a database supported here"),
        ("mssql://u:s3cret@host/db", 2, "of a database supported here"),
        ("u:s3cret@host", 2, "must be a database URL"),
        ("sqlite://", 2, "a database in memory ends with the process"),
        ("sqlite:///file:x?mode=memory&uri=true", 2, "a database in memory ends with the process"),
        ("postgresql://u:***@127.0.0.1:1/db", 2, "printed without its password: put it in place of ***"),
        ("postgresql://u:s3cret@127.0.0.1:1/db?password=s3cret", 1, "OperationalError: "),
        ("mariadb://u:s3cret@127.0.0.1:1/db", 1, "OperationalError: "),
        ("postgresql+pg8000://u:s3cret@127.0.0.1:1/db", 1, 'pip install "pg8000"'),
    ],
)
@pytest.mark.parametrize("command", ["upgrade", "current"])
def test_url_of_no_store_and_servers_that_do_not_answer_are_one_line_without_secrets(command, place, status, words):
    told = run(command, "--store", place, status=status)
    assert words in told
    assert "s3cret" not in told
    assert "Traceback" not in told


def test_wrong_password_is_not_repeated(mariadb, postgresql):
    for server in (mariadb, postgresql):
        place = server.url().replace(server.password, "wr0ng")
        told = run("upgrade", "--store", place, status=1)
        assert "wr0ng" not in told
        assert "OperationalError" in told


def test_asking_for_the_version_makes_no_file_and_changes_none(file):
    assert "there is no file" in run("current", "--store", f"sqlite:///{file}", status=1)
    assert not file.exists()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE own (id INTEGER)")
    before = file.read_bytes()
    run("current", "--store", f"sqlite:///{file}", status=1)
    assert file.read_bytes() == before


def test_file_that_is_no_database_is_left_alone(file):
    file.write_bytes(b"no database, " * 100)
    for command in ("current", "upgrade"):
        assert "file is not a database" in run(command, "--store", f"sqlite:///{file}", status=1)
    assert file.read_bytes() == b"no database, " * 100


@pytest.mark.parametrize("package", ["alembic", "sqlalchemy"])
def test_missing_package_of_the_extra_is_named(package):
    code = f"""if True:
        import sys
        sys.modules["{package}"] = None
        from retrykit.cli.commands import retrykit
        retrykit(["db", "sql", "--store", "sqlite://"])"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 1
    assert package in found.stderr
    assert 'pip install "retrykit[cli,sql]"' in found.stderr
    assert "Traceback" not in found.stderr


def test_missing_driver_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymysql", None)
    assert 'pip install "retrykit[mariadb]"' in run("upgrade", "--store", "mariadb://u@127.0.0.1:1/db", status=1)


def test_command_is_there_without_importing_sqlalchemy():
    code = """if True:
        import sys
        from retrykit.cli.commands import retrykit
        try:
            retrykit(["db", "--help"])
        finally:
            print("sqlalchemy" in sys.modules)"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "upgrade" in found.stdout
    assert found.stdout.endswith("False\n")
