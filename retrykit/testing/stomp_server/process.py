"""The embedded server as a child process, which can be killed like the real thing."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from retrykit.testing.stomp_server.controls import Controls

ANSWER_SECONDS = 30.0
PASSWORD_VARIABLE = "RETRYKIT_STOMP_PASSWORD"  # noqa: S105 - the variable's name


class StompServerProcess(Controls):
    """`python -m retrykit.testing.stomp_server` started, waited for, asked and ended.

    Takes the options of `StompServer`. The child's standard input is its control channel: it ends when this process
    does, however that comes about. `port` is known after the start and kept over restarts.
    """

    def __init__(
        self,
        *,
        profile: str = "activemq",
        host: str = "127.0.0.1",
        port: int = 0,
        data: str | Path | None = None,
        user: str | None = None,
        password: str | None = None,
        keep_flags: bool = False,
        scheduler: bool = True,
        redelivery: float | None = None,
    ) -> None:
        """Note the options; the child checks them."""
        self.profile = profile
        self.host = host
        self.port = port
        self._options = ["--profile", profile, "--host", host]
        self._options += ["--data", str(data)] if data else []
        self._options += ["--user", user] if user else []
        self._options += ["--keep-flags"] if keep_flags else []
        self._options += [] if scheduler else ["--no-scheduler"]
        self._options += [] if redelivery is None else ["--redelivery", str(redelivery)]
        self._password = password
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """The child's process id; RuntimeError when it does not run."""
        return self._running().pid

    def start(self) -> None:
        """Start the child and return when it listens.

        Raises RuntimeError when it ends instead; the reason is on standard error.
        """
        if self._child is not None:
            raise RuntimeError("the server runs already")
        environment = dict(os.environ)
        if self._password is not None:
            # Not an argument: those are for everybody to see.
            environment[PASSWORD_VARIABLE] = self._password
        command = [sys.executable, "-m", "retrykit.testing.stomp_server", "--control", "--port", str(self.port)]
        self._child = subprocess.Popen(  # noqa: S603
            command + self._options, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        try:
            self.port = self._read()["port"]
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """End the child with SIGTERM, with SIGKILL if that takes too long. Does nothing when it does not run."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
        self._reap()

    def kill(self) -> None:
        """End the child with SIGKILL. Does nothing when it does not run."""
        if self._child is not None:
            self._child.kill()
            self._reap()

    def restart(self) -> None:
        """Kill the child, if it runs, and start another one on the same port, with the same data file."""
        self.kill()
        self.start()

    def _reap(self) -> None:
        child, self._child = self._running(), None
        child.wait()
        _close_quietly(_pipe(child.stdin))
        _close_quietly(_pipe(child.stdout))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            raise RuntimeError("the server does not run")
        return self._child

    def _read(self) -> Any:
        child = self._running()
        stdout = _pipe(child.stdout)
        ready, _, _ = select.select([stdout], [], [], ANSWER_SECONDS)
        if not ready:
            raise TimeoutError(f"the server's process did not answer within {ANSWER_SECONDS} s")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the server's process ended with status {child.wait()}")
        return json.loads(line)

    def _do(self, verb: str, **arguments: Any) -> Any:
        with self._lock:
            stdin = _pipe(self._running().stdin)
            try:
                stdin.write(json.dumps({"do": verb, **arguments}).encode() + b"\n")
                stdin.flush()
            except BrokenPipeError as error:
                raise RuntimeError("the server's process has ended") from error
            try:
                answer = self._read()
            except TimeoutError:
                # Its answer would be taken for that of the next question.
                self.kill()
                raise
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    """Narrow the type: the child is started with both pipes."""
    return cast("IO[bytes]", stream)


def _close_quietly(stream: IO[bytes]) -> None:
    try:
        stream.close()
    except BrokenPipeError:
        # What could not be flushed was meant for the process that has ended.
        return
