"""Who makes an attempt: the name of a call in this process, and whether the call behind a name can still be running.

A name is `host/boot/namespace/pid/start/call`: boot and start time tell a process from a later one that got its number.
"""

from __future__ import annotations

import functools
import itertools
import os

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
    return f"{_machine()}/{pid}/{_start_of(pid)}"


@functools.cache
def _machine() -> str:
    """Host, boot and process-number space: only within one of these can a process number be looked up."""
    try:
        boot = _read("/proc/sys/kernel/random/boot_id").strip()[:8]
        numbers = os.readlink("/proc/self/ns/pid")  # noqa: PTH115
    except OSError:
        boot = numbers = "-"
    return f"{os.uname().nodename}/{boot}/{numbers}"


def _read(path: str) -> str:
    # The built-in open: `import retrykit` must not cost what pathlib costs.
    with open(path, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
        return file.read()


def _start_of(pid: int) -> str:
    """The kernel's start time of a process, "" where it cannot be told (no /proc) or there is no such process."""
    try:
        stat = _read(f"/proc/{pid}/stat")
    except OSError:
        return ""
    # The command's name may contain anything, parentheses included; the fields are counted from its last one.
    fields = stat.rpartition(")")[2].split()
    dead = fields[0] in {"Z", "X"}
    return "" if dead else fields[19]


def is_gone(owner: str) -> bool:
    """Whether the call is certainly no longer running: False also when nobody here can know."""
    process, _, number = owner.rpartition("/")
    if process == this_process():
        return not number.isdigit() or int(number) not in _running
    machine, pid, start = [*process.rsplit("/", 2), "", ""][:3]
    if machine != _machine() or not pid.isdigit() or not start:
        return False
    return _start_of(int(pid)) != start
