"""Starts worker processes, replaces those that die, and ends those that are left."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import attrs

from retrykit.cli.demo.job import Job
from retrykit.cli.interrupts import held_back

WORKER: Final = ("-m", "retrykit.cli.demo.worker")
_PATIENCE: Final = 10.0
_TAIL: Final = 2_000


class WorkerFailedError(Exception):
    """A worker process ended by itself, which no message makes it do: the text is the end of what it wrote."""


@attrs.frozen
class Death:
    """The end of the process `pid`, by the signal `signal`."""

    pid: int
    signal: str


@attrs.frozen(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    output: Path


class Supervisor:
    """`count` workers on one job while the `with` lasts. `command` is what to run instead of the demo's own worker."""

    def __init__(self, job: Job, count: int, folder: Path, command: Sequence[str] = WORKER) -> None:
        self._job = job
        self._count = count
        self._folder = folder
        self._command = command
        self._workers: list[_Worker] = []
        self._started = 0

    @property
    def pids(self) -> list[int]:
        """The processes that run, as far as is known."""
        return [worker.process.pid for worker in self._workers if worker.process.poll() is None]

    def __enter__(self) -> Self:
        try:
            for _ in range(self._count):
                with held_back():
                    self._workers.append(self._start())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def replace_dead(self) -> Iterator[Death]:
        """Start a worker in the place of each that was killed. `WorkerFailedError` if one gave up by itself."""
        for place, worker in enumerate(self._workers):
            status = worker.process.poll()
            if status is None:
                continue
            self._put_away(worker)
            if status >= 0:
                raise WorkerFailedError(f"a worker ended with status {status}:\n{_tail(worker.output)}")
            with held_back():
                self._workers[place] = self._start()
            yield Death(worker.process.pid, signal.Signals(-status).name)

    def stop(self) -> None:
        """Let the workers finish what they have in hand; kill those that take too long."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            try:
                worker.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                worker.process.kill()
            self._put_away(worker)
        self._workers.clear()

    def _start(self) -> _Worker:
        self._started += 1
        output = self._folder / f"worker-{self._started}.log"
        with output.open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
                [sys.executable, *self._command], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        _tell(process, self._job.to_json())
        return _Worker(process, output)

    def _put_away(self, worker: _Worker) -> None:
        worker.process.wait()
        if worker.process.stdin is not None:
            worker.process.stdin.close()


def _tell(process: subprocess.Popen[bytes], line: str) -> None:
    try:
        assert process.stdin is not None  # noqa: S101 - it was started with a pipe
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        # It died at once: `replace_dead` tells of it.
        return


def _tail(output: Path) -> str:
    return output.read_text(errors="replace")[-_TAIL:].strip() or "(it wrote nothing)"
