"""A private Redis or Valkey: own port, own data, foreground process, ended by its own process id."""

from __future__ import annotations

import socket

from tests.servers.process import ServerProcess, which

DATABASES = 4096


def redis_missing() -> str | None:
    """Say why neither Redis nor Valkey can be started here, or None when one can."""
    if which("redis-server", "valkey-server") is None:
        return "neither redis-server nor valkey-server is installed: apt-get install redis-server"
    try:
        import redis  # noqa: F401
    except ImportError as error:
        return f"Redis needs redis-py: {error}"
    return None


class RedisServer(ServerProcess):
    """One Redis server (or Valkey, where only that is), in which each test has a numbered database of its own."""

    account = "redis"

    def url(self, database: int = 0) -> str:
        """The address that redis-py takes."""
        return f"redis://:{self.password}@{self.host}:{self.port}/{database}"

    def fresh_database(self) -> str:
        """The address of an empty database that nobody else uses."""
        number = self._next_database()
        assert number < DATABASES, "more databases than the server was given"
        return self.url(number)

    def drop_database(self, url: str) -> None:
        """Empty a database."""
        import redis

        with redis.Redis.from_url(url) as client:
            client.flushdb()

    def _prepare(self) -> None:
        """Nothing: it makes its files when it starts."""

    def _command(self) -> list[str]:
        program = which("redis-server", "valkey-server")
        assert program is not None, redis_missing()
        settings = {
            "bind": self.host,
            "port": self.port,
            "dir": self.base,
            "requirepass": self.password,
            "databases": DATABASES,
            "daemonize": "no",
            "save": "",
            # Written before it is answered, always; on the disk only when asked for ("everysec" may be late with both).
            "appendonly": "yes",
            "appendfsync": "always" if self.durable else "no",
        }
        return [program, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]

    def _answers(self) -> bool:
        # An open port is not enough: it listens while it still reads its data, and says so.
        try:
            with socket.create_connection((self.host, self.port), timeout=5) as probe:
                probe.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with probe.makefile("rb") as answers:
                    return [answers.readline(), answers.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:
            return False
