"""Who makes an attempt: the name of a call in this process, and whether the call behind a name can still be running.

A name is `host/boot/namespace/pid/start/call`: boot and start time tell a process from a later one that got its number.
"""

from __future__ import annotations

import functools
import itertools
import os
import time

NOWHERE = "?"
"""The machine where the kernel tells nothing of its processes: owners there are known to nobody but themselves."""

_numbers = itertools.count(1)
_running: set[int] = set()


def begin() -> str:
    """The name of a call that begins in this process; `end` must be told when it is over."""
    number = next(_numbers)
    _running.add(number)
    return f"{this_process()}/{number}"


def end(owner: str) -> None:
    """The call is over: what still names it has been forgotten."""
    _running.discard(int(owner.rpartition("/")[2]))


def this_process() -> str:
    """The name of the running process; another one after a fork."""
    return _name_of(os.getpid())


@functools.lru_cache(maxsize=8)
def _name_of(pid: int) -> str:
    return f"{_machine()}/{pid}/{_start_of(pid) or int(time.time())}"


@functools.cache
def _machine() -> str:
    """Host, boot and process-number space: only within one of these can a process number be looked up."""
    try:
        boot = _read("/proc/sys/kernel/random/boot_id").strip()[:8]
        numbers = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - as in `_read`
    except OSError:
        return NOWHERE
    # Where these files are, there is a uname.
    return f"{os.uname().nodename}/{boot}/{numbers}"


def _read(path: str) -> str:
    # The built-in open: `import retrykit` must not cost what pathlib costs.
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read()


def _start_of(pid: int) -> str | None:
    """The kernel's start time of a process, "" if there is no such process, None where it cannot be told."""
    try:
        stat = _read(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError):
        return "" if _machine() != NOWHERE and os.path.isdir("/proc/self") else None  # noqa: PTH112 - pathlib is dear
    except OSError:
        return None
    # The command's name may contain anything, parentheses included; the fields are counted from its last one.
    fields = stat.rpartition(")")[2].split()
    dead = fields[0] in {"Z", "X"}
    return "" if dead else fields[19]


def is_running(owner: str) -> bool | None:
    """Whether the call is running: certainly (True), certainly not (False), or nobody here can know (None)."""
    process, _, number = owner.rpartition("/")
    if process == this_process():
        return number.isdigit() and int(number) in _running
    machine, pid, start = [*process.rsplit("/", 2), "", ""][:3]
    if machine != _machine() or not pid.isdigit() or not start:
        return None
    now = _start_of(int(pid))
    return None if now is None or now == start else False
