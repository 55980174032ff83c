"""A private MariaDB: own port, own data, foreground process, ended by its own process id."""

from __future__ import annotations

from typing import Any

from tests.servers.process import ServerProcess, which

USER = "retrykit"


def mariadb_missing() -> str | None:
    """Say why MariaDB cannot be started here, or None when it can."""
    for program in ("mariadbd", "mariadb-install-db"):
        if which(program) is None:
            return f"MariaDB is not installed ({program} is absent): apt-get install mariadb-server"
    try:
        import pymysql  # noqa: F401
    except ImportError as error:
        return f"MariaDB needs pymysql: {error}"
    return None


class MariaDb(ServerProcess):
    """One MariaDB server, in which each test has a database of its own."""

    account = "mysql"

    def url(self, driver: str = "pymysql", database: str = "mysql") -> str:
        """The SQLAlchemy URL of a database, through a driver."""
        return f"mariadb+{driver}://{USER}:{self.password}@{self.host}:{self.port}/{database}?charset=utf8mb4"

    def fresh_database(self, driver: str = "pymysql") -> str:
        """The URL of an empty database that nobody else uses."""
        name = f"test_{self._next_database()}"
        self.run(f"CREATE DATABASE `{name}` CHARACTER SET utf8mb4")
        return self.url(driver, name)

    def drop_database(self, url: str) -> None:
        """Remove a database that `fresh_database` made."""
        name = url.rpartition("/")[2].partition("?")[0]
        self.run(f"DROP DATABASE IF EXISTS `{name}`")

    def run(self, statement: str, database: str = "mysql") -> None:
        """Execute a statement."""
        with self._connected(database) as connection, connection.cursor() as cursor:
            cursor.execute(statement)

    def _prepare(self) -> None:
        if (self.base / "data").exists():
            return
        program = which("mariadb-install-db")
        assert program is not None, mariadb_missing()
        options = ["--auth-root-authentication-method=normal", "--skip-test-db", "--skip-name-resolve"]
        small = ["--innodb-log-file-size=16M", "--innodb-buffer-pool-size=8M"]
        # Not the shared /tmp: a server that starts there removes the temporary tables of the others.
        folders = [f"--datadir={self.base}/data", f"--tmpdir={self.base}"]
        self._run([program, "--no-defaults", *folders, *options, *small])
        # The passwords are set by the first start, before anybody can connect.
        self._init_file.write_text(
            f"CREATE USER IF NOT EXISTS {USER}@'%' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO {USER}@'%' WITH GRANT OPTION;\n"
            f"ALTER USER root@localhost IDENTIFIED BY '{self.password}';\n"
        )
        self._init_file.chmod(0o644)

    def _command(self) -> list[str]:
        program = which("mariadbd")
        assert program is not None, mariadb_missing()
        settings = {
            "datadir": self.base / "data",
            "init-file": self._init_file,
            "socket": self.base / "socket",
            "pid-file": self.base / "pid",
            "tmpdir": self.base,
            "bind-address": self.host,
            "port": self.port,
            "max-connections": 200,
            "innodb-log-file-size": "16M",
            "innodb-buffer-pool-size": "16M",
            "key-buffer-size": "1M",
            "aria-pagecache-buffer-size": "1M",
            # 2: a commit is in the hands of the system before it is confirmed; 1: on the disk.
            "innodb-flush-log-at-trx-commit": 1 if self.durable else 2,
        }
        options = ["--no-defaults", "--skip-name-resolve", "--skip-slave-start", "--skip-log-bin"]
        return [program, *options, *(f"--{name}={value}" for name, value in settings.items())]

    def _answers(self) -> bool:
        import pymysql

        try:
            self.run("SELECT 1")
        except pymysql.err.OperationalError:
            return False
        return True

    def _connected(self, database: str) -> Any:
        import pymysql

        where = {"host": self.host, "port": self.port, "database": database}
        return pymysql.connect(user=USER, password=self.password, autocommit=True, connect_timeout=5, **where)

    @property
    def _init_file(self) -> Any:
        return self.base / "init.sql"
