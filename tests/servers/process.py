"""What the private servers have in common: own folder, own port, one foreground process, ended by its own id."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

START_SECONDS = 60.0
STOP_SECONDS = 20.0
# Where Debian keeps servers, which is not on everybody's PATH.
PLACES = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"))


def which(*programs: str) -> str | None:
    """The first of these programs that is installed."""
    return next((found for program in programs if (found := shutil.which(program, path=PLACES))), None)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess(ABC):
    """One server; `kill` and `restart` keep its port and its data, `close` removes the data.

    The folder is not one of pytest's: those let only their owner in, and what root starts runs as somebody else.
    """

    host = "127.0.0.1"
    stop_signal: ClassVar[int] = signal.SIGTERM
    # Whom it runs as when root starts it; `nobody` where they are missing.
    account: ClassVar[str]

    def __init__(self, *, durable: bool = False) -> None:
        """Choose a free port and a folder; nothing runs yet.

        `durable`: what is committed survives a power failure too. Else it survives any death of the process.
        """
        self.port = free_port()
        self.durable = durable
        self.password = secrets.token_hex(8)
        self._identity = _unprivileged(self.account)
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0
        self.base = Path(tempfile.mkdtemp(prefix=f"retrykit-{type(self).__name__.lower()}-"))
        if self._identity:
            os.chown(self.base, self._identity["user"], self._identity["group"])

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        assert self._process is not None, "not running"
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it answers a client."""
        assert self._process is None, "already running"
        self._prepare()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command(), **self._surroundings(log))
        self._await_ready()

    def stop(self) -> None:
        """End the server in good order, the hard way if it takes too long."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process = None

    def kill(self) -> None:
        """End the server as a power failure would (SIGKILL)."""
        assert self._process is not None, "not running"
        self._process.kill()
        self._process.wait()
        self._process = None

    def pause(self) -> None:
        """Let the server hang (SIGSTOP) until `resume`."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self) -> None:
        """Stop the server if it runs, then start it with the same port and data."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop the server and remove its data."""
        self.stop()
        shutil.rmtree(self.base, ignore_errors=True)

    @abstractmethod
    def _prepare(self) -> None:
        """What must be there before it starts; called before each start."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The command line."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether a client that asks something gets an answer."""

    @property
    def _log(self) -> Path:
        return self.base / "server.log"

    def _next_database(self) -> int:
        self._databases += 1
        return self._databases

    def _run(self, command: list[str]) -> None:
        # A tool that prepares something, run to its end by the server's own user.
        with self._log.open("ab") as log:
            status = subprocess.run(command, timeout=START_SECONDS, check=False, **self._surroundings(log)).returncode
        if status:
            raise RuntimeError(f"{command[0]} ended with status {status}:\n{self._log_tail()}")

    def _surroundings(self, log: Any) -> dict[str, Any]:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        # No setting of this machine's own servers and clients.
        quiet = {"PATH": PLACES, "HOME": str(self.base), "LC_ALL": "C"}
        return streams | {"cwd": self.base, "env": quiet} | self._identity

    def _await_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            process = self._process
            assert process is not None
            if process.poll() is not None or time.monotonic() > deadline:
                tail = self._log_tail()
                self.stop()
                raise RuntimeError(f"{type(self).__name__} did not start:\n{tail}")
            # The pause is bounded by the process's own end, so that a server that dies is noticed at once.
            _wait_at_most(process, 0.02)

    def _log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def __enter__(self) -> Self:
        """Start."""
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and remove the data."""
        self.close()


def _unprivileged(account: str) -> dict[str, Any]:
    # Servers refuse to be root, or should: what it takes to run as somebody else, or as oneself when that is not root.
    if os.getuid() != 0:
        return {}
    for name in (account, "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    raise RuntimeError(f"neither {account} nor nobody is a user here, and no server should run as root")


def _wait_at_most(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return
