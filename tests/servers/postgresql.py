"""A private PostgreSQL: own port, own data, foreground process, ended by its own process id."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

from tests.servers.process import ServerProcess, which

OLDEST = 15
USER = "retrykit"


def programs() -> Path | None:
    """The folder with the programs of the newest PostgreSQL here that is not too old."""
    found = [Path(path).resolve().parent for path in (which("postgres"),) if path]
    found += [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")]
    complete = [folder for folder in found if (folder / "initdb").exists()]
    return max(complete, key=_version, default=None)


def postgresql_missing() -> str | None:
    """Say why PostgreSQL cannot be started here, or None when it can."""
    folder = programs()
    if folder is None:
        return "PostgreSQL is not installed (no postgres and initdb found): apt-get install postgresql"
    if _version(folder) < OLDEST:
        return f"PostgreSQL {OLDEST} or newer is needed; {folder} has {_version(folder)}"
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        return f"PostgreSQL needs psycopg: {error}"
    return None


class PostgreSql(ServerProcess):
    """One PostgreSQL server, in which each test has a database of its own."""

    # Fast: clients are told to go, none is waited for.
    stop_signal = signal.SIGINT
    account = "postgres"

    def url(self, driver: str = "psycopg", database: str = "postgres") -> str:
        """The SQLAlchemy URL of a database, through a driver."""
        return f"postgresql+{driver}://{USER}:{self.password}@{self.host}:{self.port}/{database}"

    def fresh_database(self, driver: str = "psycopg") -> str:
        """The URL of an empty database that nobody else uses."""
        name = f"test_{self._next_database()}"
        self.run(f'CREATE DATABASE "{name}"')
        return self.url(driver, name)

    def drop_database(self, url: str) -> None:
        """Remove a database that `fresh_database` made: each takes 7 MB."""
        self.run(f'DROP DATABASE IF EXISTS "{url.rpartition("/")[2]}" WITH (FORCE)')

    def run(self, statement: str, database: str = "postgres") -> None:
        """Execute a statement outside of any transaction."""
        import psycopg

        with psycopg.connect(self._dsn(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def kill(self) -> None:
        """End the server as a power failure would: no session of it has a last word."""
        # Stopped first, so that it has no more children while they are looked for, and does not see them die.
        self.pause()
        for child in _children(self.pid):
            _end(child)
        super().kill()

    def _prepare(self) -> None:
        if (self.base / "data").exists():
            return
        secret = self.base / "password"
        secret.write_text(self.password)
        secret.chmod(0o644)
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        self._run([self._program("initdb"), "-D", "data", f"--username={USER}", "--pwfile=password", *options])

    def _command(self) -> list[str]:
        settings = {
            "listen_addresses": self.host,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "shared_buffers": "16MB",
            "max_wal_size": "128MB",
            # A commit is in the hands of the system before it is confirmed, always; on the disk only when asked for.
            "fsync": "on" if self.durable else "off",
            "synchronous_commit": "on",
            "autovacuum_naptime": "5s",
            "log_checkpoints": "off",
        }
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        return [self._program("postgres"), "-D", "data", *arguments]

    def _answers(self) -> bool:
        import psycopg

        try:
            self.run("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _dsn(self, database: str) -> str:
        where = f"host={self.host} port={self.port} dbname={database}"
        return f"{where} user={USER} password={self.password} connect_timeout=5"

    def _program(self, name: str) -> str:
        folder = programs()
        assert folder is not None, postgresql_missing()
        return str(folder / name)


def _version(folder: Path) -> int:
    # Debian's folders are named after it.
    return int(folder.parent.name) if folder.parent.name.isdigit() else OLDEST


def _children(pid: int) -> list[int]:
    children = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything; behind it stand the state and the parent.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            children.append(int(status.parent.name))
    return children


def _end(pid: int) -> None:
    # They are no children of this process: only a pidfd tells when one is gone, and is never somebody else.
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], 20)
    except ProcessLookupError:
        return
    finally:
        os.close(handle)
