"""The supervisor of processes, on processes that do next to nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from retrykit.backoff import FixedBackOffPolicy
from retrykit.cli import processes as module
from retrykit.cli.channel import LastWord
from retrykit.cli.processes import ProcessEndedError, Processes
from retrykit.messaging.logs import facts_of
from tests import waiting

ROOT = Path(__file__).parents[2]
PATIENCE = 30.0
AT_ONCE = FixedBackOffPolicy(0.01)
# Each says that it is there by a file with its number and pid, when it is ready for signals.
IMPORTS = "import os, signal, sys, threading;"
HERE = "open(f'{sys.argv[-1]}-{os.getpid()}', 'w').close();"
WAIT = "threading.Event().wait(60)"


def saying(word):
    """Say what the end means, as `Answers` does it."""
    line = word.line + b"\n"
    return f"os.write(0, {line!r})"


def ending(word, status=1):
    return f"{IMPORTS} {saying(word)}; sys.exit({status})"


ANSWER = f"""
sys.path.insert(0, {str(ROOT)!r})
from retrykit.cli.channel import Answers
from retrykit.messaging import Health

class Idle:
    def health(self):
        return Health((), ("is idle",))

Answers(Idle(), lambda: os._exit(7)).start()
"""
ANSWERING = f"{IMPORTS}{ANSWER}{HERE}{WAIT}"


DRAINED = f"lambda *_: ({saying(LastWord.DRAINED)}, sys.exit(0))"


def obeying(action=DRAINED):
    return f"{IMPORTS} signal.signal(signal.SIGTERM, {action}); {HERE} {WAIT}"


OBEDIENT = obeying()


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


wait_for = partial(waiting.until, seconds=PATIENCE)


def started(number=None):
    """The pids of the processes that have said that they are there."""
    names = [path.name.split("-") for path in Path().iterdir()]
    return {int(pid) for place, pid in names if number is None or place == str(number)}


def processes(script, count=1, **options):
    return Processes(("-c", script), count, **{"restart": AT_ONCE} | options)


def test_all_are_started_and_end_in_good_order():
    made = processes(OBEDIENT, 3)
    with made:
        wait_for(lambda: len(started()) == 3)
    assert made.wait(0)
    assert not made.disorderly
    assert {len(started(number)) for number in (1, 2, 3)} == {1}


def test_one_that_dies_is_replaced_and_it_is_said_why(caplog):
    made = processes(OBEDIENT, 2)
    with made:
        wait_for(lambda: len(started()) == 2)
        (victim,) = started(1)
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: len(started(1)) == 2)
    assert len(started(2)) == 1
    assert f"process 1 (pid {victim}) was ended by SIGKILL" in caplog.text
    (line,) = [record for record in caplog.records if "another one follows in 0.01 s" in record.getMessage()]
    # No message, and so no facts of a decision about one.
    assert facts_of(line) == {"name": "process 1", "error": "retrykit.cli.processes.ProcessEndedError"}


def test_one_that_keeps_dying_is_replaced_with_growing_pauses(caplog):
    class Growing:
        def delay(self, context):
            return 0.001 * context.retry_count

    with processes("raise SystemExit(1)", restart=Growing()):
        wait_for(lambda: caplog.text.count("ended with status 1") >= 4)
    assert [f"in {pause} s" in caplog.text for pause in ("0.001", "0.002", "0.003", "0.004")] == [True] * 4


@pytest.mark.parametrize("status", [0, 2, 3, 4])
def test_one_that_ends_without_a_word_has_died_whatever_its_status(caplog, status):
    script = f"{IMPORTS} {HERE} os._exit({status})"
    with processes(script) as made:
        wait_for(lambda: len(started()) >= 2)
    assert made.error is None
    assert f"ended with status {status}" in caplog.text
    assert "no other follows" not in caplog.text


def test_what_a_process_has_said_of_its_end_is_heard_behind_answers_that_nobody_waited_for(monkeypatch):
    monkeypatch.setattr(module, "_ANSWER", 0.0)
    monkeypatch.setattr(module, "_FRESH", 0.0)
    script = f"""
{IMPORTS}
{ANSWER.replace("Answers(Idle", "answers = Answers(Idle").replace(".start()", "; answers.start()")}
from retrykit.cli.channel import LastWord
{HERE}
signal.signal(signal.SIGTERM, lambda *_: (answers.say(LastWord.DRAINED), os._exit(1)))
{WAIT}
"""
    made = processes(script)
    with made:
        wait_for(started)
        made.health()
    assert not made.disorderly


def test_one_that_is_ended_by_what_it_had_in_hand_has_not_finished_it():
    made = processes(obeying("lambda *_: os._exit(0)"))
    with made:
        wait_for(started)
    assert made.disorderly


def test_one_that_lived_for_long_is_replaced_at_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "STEADY", 0.0)
    with processes("raise SystemExit(1)", restart=FixedBackOffPolicy(3600)):
        wait_for(lambda: caplog.text.count("another one follows") >= 2)


def test_the_pause_before_a_replacement_ends_when_it_is_to_stop(caplog):
    with processes("raise SystemExit(1)", restart=FixedBackOffPolicy(3600)):
        wait_for(lambda: "another one follows" in caplog.text)


def test_a_command_that_nobody_understands_is_given_up(caplog):
    gone = f"({saying(LastWord.NOT_UNDERSTOOD)}, sys.exit(2))"
    script = OBEDIENT.replace(HERE, f"{HERE} sys.argv[-1] == '2' and {gone};")
    made = processes(script, 2)
    with pytest.raises(ProcessEndedError, match=r"process 2 .* ended with status 2") as caught:
        made.run()
    assert caught.value.word is LastWord.NOT_UNDERSTOOD
    assert len(started(2)) == 1
    assert "no other follows" in caplog.text


def test_one_that_gave_up_for_all_is_not_replaced_however_long_it_lived(caplog, monkeypatch):
    monkeypatch.setattr(module, "STEADY", 0.0)
    made = processes(ending(LastWord.GAVE_UP))
    with pytest.raises(ProcessEndedError, match="has given up, for a reason that each would have"):
        made.run()
    assert "no other follows" in caplog.text


def test_an_application_that_no_process_can_load_at_the_start_ends_them_all(caplog):
    made = processes(ending(LastWord.NOT_LOADED), 2)
    with pytest.raises(ProcessEndedError, match=r"process \d .* could not load the application, and ended after"):
        made.run()
    assert caplog.text.count("no other follows") == 1
    # The first one did not know yet.
    assert re.search(r"another one follows in \S+ s, unless no process can", caplog.text)


@pytest.mark.parametrize("first", ["1", "-9"])
def test_one_that_cannot_load_the_application_later_is_replaced(caplog, first):
    dies = "sys.exit(1)" if first == "1" else "os.kill(os.getpid(), 9)"
    script = f"{IMPORTS} known = os.path.exists('x'); open('x', 'w').close(); known or {dies};"
    script += f"{saying(LastWord.NOT_LOADED)}; sys.exit(1)"
    with processes(script):
        wait_for(lambda: caplog.text.count("could not load the application") >= 2)
    assert "no other follows" not in caplog.text


def test_one_that_cannot_load_what_another_one_could_is_replaced(caplog):
    gone = f"({saying(LastWord.NOT_LOADED)}, sys.exit(1))"
    script = OBEDIENT.replace(HERE, f"sys.argv[-1] == '1' and {gone}; {HERE}")
    with processes(script, 2):
        wait_for(lambda: started(2) and caplog.text.count("could not load the application") >= 2)
    assert "no other follows" not in caplog.text


def test_one_that_does_not_obey_is_killed_when_the_grace_is_over():
    made = processes(obeying("signal.SIG_IGN"))
    killer = threading.Thread(target=lambda: (wait_for(started), os.kill(os.getpid(), signal.SIGTERM)))
    killer.start()
    assert made.run(grace=0.1) is False
    killer.join()
    assert made.wait(PATIENCE)
    assert made.disorderly


def test_one_that_did_not_finish_its_work_is_remembered():
    made = processes(obeying("lambda *_: sys.exit(1)"))
    with made:
        wait_for(started)
    assert made.disorderly


def test_what_never_started_can_be_stopped():
    made = processes(OBEDIENT)
    made.stop()
    assert made.wait(0)


def test_processes_are_used_once():
    made = processes(OBEDIENT)
    with made, pytest.raises(RuntimeError, match="started before"):
        made.start()


def test_each_is_asked_for_its_health():
    made = processes(ANSWERING, 2)
    assert made.health().reasons == ("process 1 is not running", "process 2 is not running")
    with made:
        wait_for(lambda: made.health().reasons == ("process 1 is idle", "process 2 is idle"))
        made.stop(now=True)


def test_one_that_does_not_answer_is_said_not_to(monkeypatch):
    monkeypatch.setattr(module, "_ANSWER", 0.05)
    monkeypatch.setattr(module, "_FRESH", 0.0)
    made = processes(OBEDIENT)
    with made:
        wait_for(started)
        for _ in range(3):
            assert made.health().reasons == ("process 1 does not answer",)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_process_ends_with_its_supervisor():
    script = f"""
import sys, threading
sys.path.insert(0, {str(ROOT)!r})
from retrykit.cli.processes import Processes
with Processes(("-c", {ANSWERING!r}), 1):
    threading.Event().wait(60)
"""
    supervisor = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_for(started)
        (child,) = started()
    finally:
        supervisor.kill()
        supervisor.wait()

    def gone():
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    wait_for(gone)


def test_numbers_of_signals_without_a_name_are_shown():
    assert "by signal 200" in str(ProcessEndedError("process 1", -200, 3.0))
