"""`retrykit db`: the tables of a SQL store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from retrykit.cli.stores import with_driver
from retrykit.cli.words import safe
from retrykit.errors import RetryError

if TYPE_CHECKING:
    from sqlalchemy import URL

    from retrykit.sql.migrate import Upgrade

_EXTRA: Final = frozenset({"sqlalchemy", "alembic"})

_store = click.option(
    "--store",
    required=True,
    envvar="RETRYKIT_STORE",
    show_envvar=True,
    metavar="URL",
    help="The database: sqlite:///FILE, postgresql://…, mariadb://….",
)


@click.group()
def db() -> None:
    """Make the tables of a SQL store, and bring them to this version.

    On SQLite the tables make themselves. On PostgreSQL and MariaDB a program that finds none, or others than it works
    with, does not start: run `retrykit db upgrade` before the new version of the program does. It keeps every history,
    completion mark and parked item. An application with alembic can run these migrations with its own instead.
    """


@db.command()
@_store
def upgrade(store: str) -> None:
    """Bring the tables to this version, or make them.

    Any number of these may run at once, as in a rolling deployment: one does it, the others find it done. PostgreSQL
    and SQLite have all of it or nothing; on MariaDB, run it again after an interruption. It waits for a minute at most
    for transactions that are using the tables.

    Exit status: 0 when the tables are as they should be, 1 when that could not be done, 2 for a URL of no such store.
    """
    with _told():
        from retrykit.sql.urls import shown_url

        url = _url(store)
        done = _upgraded(url)
        click.echo(f"{shown_url(url)}: {_what_was_done(done.before, done.after)}")


@db.command()
@_store
def current(store: str) -> None:
    """Say which version the tables have.

    Exit status: 0 when it is the one that this retrykit works with; 1 when it is not, when there are no tables, or when
    nobody answers; 2 for a URL of no such store.
    """
    with _told():
        from retrykit.sql.schema import version_at
        from retrykit.sql.urls import shown_url

        url = _url(store)
        click.echo(f"{shown_url(url)}: schema version {version_at(url)}, as it should be")


@db.command()
@_store
@click.option(
    "--from", "start", type=int, default=0, show_default=True, metavar="N", help="The version there; 0: none."
)
@click.option("--to", "end", type=int, metavar="N", help="The version to come to. [default: the newest]")
def sql(store: str, start: int, end: int | None) -> None:
    """Print what `upgrade` would do, as SQL for somebody else to run.

    Nothing is connected to, so --store need not say more than postgresql://, mariadb:// or sqlite://. With --to below
    --from it is the way back, which keeps every row except to version 0, which drops the tables.

    \b
        retrykit db sql --store postgresql:// --from 1 > upgrade.sql
    """  # noqa: D301 - click wants the control character itself: what follows keeps its lines
    with _told():
        from retrykit.sql import SCHEMA_VERSION
        from retrykit.sql.migrate import DIALECTS, upgrade_sql

        scheme = store.partition(":")[0].partition("+")[0]
        dialect = "postgresql" if scheme == "postgres" else scheme
        if dialect not in DIALECTS:
            raise click.BadParameter("give sqlite://, postgresql:// or mariadb://", param_hint="--store")
        try:
            written = upgrade_sql(dialect, start=start, end=SCHEMA_VERSION if end is None else end)
        except ValueError as error:
            raise click.UsageError(f"--from and --to are versions from 0 to {SCHEMA_VERSION}") from error
        click.echo(written.rstrip())


def _what_was_done(before: int, after: int) -> str:
    if before == after:
        return f"schema version {after}, nothing to do"
    return f"schema version {before} is now {after}" if before else f"made the tables, schema version {after}"


@contextmanager
def _told() -> Iterator[None]:
    """What goes wrong, as one line for people."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] in _EXTRA:
            raise click.ClickException(f'this needs {error.name}: pip install "retrykit[cli,sql]"') from error
        # A driver: the words say what to install.
        raise click.ClickException(safe(str(error))) from error
    except RetryError as error:
        raise click.ClickException(safe(str(error))) from error


def _url(store: str) -> URL:
    from retrykit.sql.sqlite import is_in_memory
    from retrykit.sql.urls import database_url

    try:
        url = database_url(with_driver(store))
    except ValueError as error:
        raise click.BadParameter(safe(str(error)), param_hint="--store") from error
    if url.password == "***":  # noqa: S105 - what is shown where a password was
        advice = "put it in place of ***, or let RETRYKIT_STORE have the whole URL"
        raise click.BadParameter(f"this URL was printed without its password: {advice}", param_hint="--store")
    if url.get_backend_name() == "sqlite" and is_in_memory(url):
        raise click.BadParameter("a database in memory ends with the process: give a file", param_hint="--store")
    return url


def _upgraded(url: URL) -> Upgrade:
    from retrykit.sql.engines import engine_of, sync_engine_of
    from retrykit.sql.faults import wording
    from retrykit.sql.migrate import upgrade_tables

    engine = sync_engine_of(engine_of(url))
    try:
        with wording("db upgrade", "", url):
            return upgrade_tables(engine)
    finally:
        engine.dispose()
