"""Whether the process behind a name can still be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from retrykit import owner
from retrykit.owner import begin, end, is_gone, this_process


def test_a_call_is_not_gone_until_it_has_ended():
    one, other = begin(), begin()
    assert one != other
    assert one.startswith(this_process() + "/")
    assert not is_gone(one)
    end(one)
    assert is_gone(one)
    assert not is_gone(other)
    end(other)
    end(other)
    assert is_gone(other)


def test_a_process_has_one_name():
    assert this_process() == this_process()


def test_a_process_that_has_ended_is_gone():
    code = "from retrykit.owner import begin; print(begin(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        name = child.stdout.readline().strip()
        assert name.rpartition("/")[0] != this_process()
        assert not is_gone(name)
        child.kill()
        # Not yet waited for: a process that is dead but still has its number is gone, too.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(name)
    assert is_gone(name)


def test_a_later_process_with_the_same_number_is_another_one():
    machine, pid, start = this_process().rsplit("/", 2)
    assert is_gone(f"{machine}/{pid}/{int(start) - 1}/1")


@pytest.mark.parametrize("name", ["", "elsewhere", "host/boot/pid:[1]/17/3/1", "a/b", "a//"])
def test_of_a_process_elsewhere_nobody_here_can_say_that_it_is_gone(name):
    assert not is_gone(name)


def test_without_a_start_time_nothing_is_certain():
    machine, pid, _ = this_process().rsplit("/", 2)
    assert not is_gone(f"{machine}/{pid}//1")
    assert not is_gone(f"{machine}/pid/3/1")


def test_a_number_that_nobody_has_is_gone():
    machine, _, start = this_process().rsplit("/", 2)
    assert is_gone(f"{machine}/4194303999/{start}/1")


def test_where_the_kernel_tells_nothing_the_machine_still_has_a_name(monkeypatch):
    def unreadable(path):
        raise OSError(path)

    monkeypatch.setattr(owner, "_read", unreadable)
    assert owner._machine.__wrapped__() == f"{os.uname().nodename}/-/-"
    assert owner._start_of(os.getpid()) == ""
