"""Whether the process behind a name can still be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from retrykit import owner
from retrykit.owner import begin, end, is_running, this_process


def test_a_call_is_not_gone_until_it_has_ended():
    one, other = begin(), begin()
    assert one != other
    assert one.startswith(this_process() + "/")
    assert is_running(one) is not False
    end(one)
    assert is_running(one) is False
    assert is_running(other) is not False
    end(other)
    end(other)
    assert is_running(other) is False


def test_a_process_has_one_name():
    assert this_process() == this_process()


def test_a_process_that_has_ended_is_gone():
    code = "from retrykit.owner import begin; print(begin(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        name = child.stdout.readline().strip()
        assert name.rpartition("/")[0] != this_process()
        assert is_running(name) is not False
        child.kill()
        # Not yet waited for: a process that is dead but still has its number is gone, too.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert is_running(name) is False
    assert is_running(name) is False


def test_a_later_process_with_the_same_number_is_another_one():
    machine, pid, start = this_process().rsplit("/", 2)
    assert is_running(f"{machine}/{pid}/{int(start) - 1}/1") is False


@pytest.mark.parametrize("name", ["", "elsewhere", "host/boot/pid:[1]/17/3/1", "a/b", "a//"])
def test_of_a_process_elsewhere_nobody_here_can_say_that_it_is_gone(name):
    assert is_running(name) is not False


def test_without_a_start_time_nothing_is_certain():
    machine, pid, _ = this_process().rsplit("/", 2)
    assert is_running(f"{machine}/{pid}//1") is not False
    assert is_running(f"{machine}/pid/3/1") is not False


def test_a_number_that_nobody_has_is_gone():
    machine, _, start = this_process().rsplit("/", 2)
    assert is_running(f"{machine}/4194303999/{start}/1") is False


def test_a_call_of_this_process_is_known_for_certain():
    one = begin()
    assert is_running(one) is True
    end(one)
    assert is_running(one) is False


def test_a_process_that_may_not_be_looked_at_is_not_gone(monkeypatch):
    machine, _, start = this_process().rsplit("/", 2)

    def forbidden(path):
        raise PermissionError(path)

    monkeypatch.setattr(owner, "_read", forbidden)
    assert is_running(f"{machine}/1/{start}/1") is None


def test_where_the_kernel_tells_nothing_owners_elsewhere_are_unknown(monkeypatch):
    def unreadable(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(owner, "_read", unreadable)
    assert owner._machine.__wrapped__() == owner.NOWHERE
    monkeypatch.setattr(owner, "_machine", lambda: owner.NOWHERE)
    assert owner._start_of(os.getpid()) is None
    assert owner._name_of.__wrapped__(os.getpid()).startswith(f"{owner.NOWHERE}/{os.getpid()}/")
