"""`retrykit consume` as a service manager runs it: real processes, signals, and the embedded server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("click")

from retrykit.messaging.lifetime import SEPARATE
from retrykit.sql import SqlRetryContextCache
from retrykit.testing import StompServer
from tests import waiting

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
ORDERS = "/queue/orders"
PARKED = "/queue/orders.parked"
APPLICATION = """
import os
import threading

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.messaging import Consumers, park
from retrykit.sql import SqlRetryContextCache

template = RetryTemplate(
    name="shop",
    retry_policy=SimpleRetryPolicy(max_attempts=2),
    context_cache=SqlRetryContextCache("sqlite:///shop.db"),
)
consumers = Consumers(os.environ["SHOP_BROKER"], template=template)


@consumers.consumer("/queue/orders", recover=park("/queue/orders.parked"))
def handle(message):
    # One write, which processes do not mix up.
    with open("handled", "ab", 0) as file:
        file.write(f"{os.getpid()} {message.text}\\n".encode())
    if message.text == "bad":
        raise ValueError("no")
    if message.text == "hang":
        threading.Event().wait(60)
    if message.text == "exit":
        os._exit(3)
    threading.Event().wait(0.01)
"""

LATER = """
import asyncio
import os

from retrykit import AsyncRetryTemplate, SimpleRetryPolicy
from retrykit.messaging import Consumers, park
from retrykit.sql import AsyncSqlRetryContextCache
from tests import waiting

cache = AsyncSqlRetryContextCache("sqlite+aiosqlite:///later.db")
template = AsyncRetryTemplate(name="later", retry_policy=SimpleRetryPolicy(max_attempts=2), context_cache=cache)
consumers = Consumers(
    os.environ["SHOP_BROKER"], template=template, journal="always", concurrency=2, lifespan=lambda: cache
)


@consumers.consumer("/queue/orders", recover=park("/queue/orders.parked"))
async def handle(message):
    with open("handled", "ab", 0) as file:
        file.write(f"{os.getpid()} {message.text}\\n".encode())
    if message.text == "bad":
        raise ValueError("no")
    await asyncio.sleep(60 if message.text == "hang" else 0.01)
"""


@pytest.fixture
def server():
    with StompServer() as server:
        yield server


@pytest.fixture
def service(tmp_path, server):
    """Start the command in the application's folder; whatever is left of it is killed."""
    (tmp_path / "shop.py").write_text(APPLICATION)
    (tmp_path / "later.py").write_text(LATER)
    services = []

    def start(*options, target="shop:consumers", broker=None):
        made = Service(tmp_path, broker or server.url, target, options)
        services.append(made)
        return made

    yield start
    for one in services:
        one.end()


class Service:
    """One run of the command; what it logs is read as JSON lines."""

    def __init__(self, folder, broker, target, options):
        self.folder = folder
        self.lines = []
        self.output = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "retrykit.cli", "consume", target, "--log-format", "json", *options],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "SHOP_BROKER": broker},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        # Its processes have the same standard error: this ends with the last of them.
        with self.process.stderr as errors:
            for line in errors:
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
                else:
                    self.output.append(line)

    def logged(self, words):
        return [line for line in list(self.lines) if words in line["message"]]

    def wait_for_log(self, words, times=1):
        wait_for(lambda: len(self.logged(words)) >= times or self.process.poll() is not None)
        assert len(self.logged(words)) >= times, self.lines + self.output
        return self.logged(words)

    def pids(self):
        """The processes that the supervisor has started, by number, the last one of each."""
        words = [line["message"].split() for line in self.logged("has started (pid")]
        return {int(number): int(pid.rstrip(")")) for _, number, _, _, _, pid in words}

    def ask(self, page):
        """Status and JSON of a page of its health."""
        (line,) = self.wait_for_log("health is at")
        port = int(line["message"].split("/health")[0].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        try:
            connection.request("GET", f"/health/{page}")
            answer = connection.getresponse()
            return answer.status, json.load(answer)
        finally:
            connection.close()

    def stop(self):
        """SIGTERM; its exit status, when every process of it is gone."""
        self.process.terminate()
        return self.wait()

    def wait(self):
        status = self.process.wait(PATIENCE)
        self.reader.join(PATIENCE)
        assert not self.reader.is_alive(), "a process of it is left"
        return status

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        # Processes end with their supervisor.
        self.reader.join(PATIENCE)


wait_for = partial(waiting.until, seconds=PATIENCE, look=0.02)


def handled(folder):
    """How often each message was handled."""
    file = folder / "handled"
    return Counter(line.split()[1] for line in file.read_text().splitlines()) if file.exists() else Counter()


def publish(server, *texts):
    for text in texts:
        server.publish(ORDERS, text.encode())


def test_a_drain_loses_nothing_and_repeats_nothing(tmp_path, server, service):
    numbers = [str(number) for number in range(300)]
    publish(server, *numbers)
    for options, some in (("--concurrency", "2"), 10), (("--processes", "2", "--concurrency", "2"), 40):
        running = service(*options)
        before = len(handled(tmp_path))
        wait_for(lambda enough=before + some: len(handled(tmp_path)) >= enough)
        assert running.stop() == 0
        done, left = handled(tmp_path), [message.body.decode() for message in server.messages(ORDERS)]
        assert set(done.values()) == {1}
        assert left
        assert sorted([*done, *left]) == sorted(numbers)


def test_health_and_the_log_tell_what_happens(server, service):
    publish(server, "bad", "good")
    running = service("--health", "0")
    wait_for(lambda: running.ask("ready") == (200, {"ready": True, "reasons": []}))
    wait_for(lambda: running.ask("counters")[1]["total"]["acknowledged"] == 1 and server.depth(PARKED) == 1)
    status, told = running.ask("counters")
    assert status == 200
    assert (told["total"]["parked"], told["total"]["recovered"], told["total"]["rolled_back"]) == (1, 1, 1)
    server.stop()
    wait_for(lambda: running.ask("ready") == (503, {"ready": False, "reasons": [NOT_CONNECTED]}))
    assert running.ask("live") == (200, {"live": True})
    server.start()
    wait_for(lambda: running.ask("ready")[0] == 200)
    assert running.stop() == 0
    (failed,) = running.logged("an attempt has failed: ValueError('no') (SimpleRetryPolicy: attempt 1 of 2 failed)")
    (parked,) = running.logged("was parked in /queue/orders.parked")
    assert (failed["name"], failed["attempt"], failed["retry"]) == ("shop.orders", 1, True)
    assert (parked["attempt"], parked["retry"], parked["error"]) == (2, False, "builtins.ValueError")
    assert parked["key"] == failed["key"]
    (ended,) = running.logged("ended: ")
    assert "connections 2, received 3" in ended["message"]
    assert "recovered 1, acknowledged 1, parked 1, rolled back 1" in ended["message"]
    assert (parked["parked_in"], parked["parked_as"]) == (PARKED, parked["key"][1])
    assert running.output == []


NOT_CONNECTED = "shop.orders has 0 of 1 workers connected (ConnectionRefusedError)"


def test_a_process_that_is_killed_is_replaced_and_one_that_lives_goes_on(tmp_path, server, service):
    running = service("--processes", "2", "--health", "0")
    wait_for(lambda: running.ask("ready")[0] == 200)
    before = running.pids()
    publish(server, "hang", "1", "2", "3")
    wait_for(lambda: {"hang", "1", "2", "3"} <= set(handled(tmp_path)))
    lines = (tmp_path / "handled").read_text().splitlines()
    (hanging,) = {int(line.split()[0]) for line in lines if line.endswith(" hang")}
    os.kill(hanging, signal.SIGKILL)
    (ended,) = running.wait_for_log("was ended by SIGKILL")
    assert f"(pid {hanging})" in ended["message"]
    assert "another one follows" in ended["message"]
    wait_for(lambda: running.pids() != before and handled(tmp_path)["hang"] == 2)
    assert [number for number, pid in running.pids().items() if pid != before[number]] == [
        number for number, pid in before.items() if pid == hanging
    ]
    wait_for(lambda: running.ask("ready")[0] == 200)
    assert {one["process"] for one in running.ask("counters")[1]["consumers"]} == {1, 2}
    # Somebody hangs: it is not waited for, and the message is not lost.
    running.process.terminate()
    running.wait_for_log("stopping when the messages in hand", times=3)
    # The same signal once more at once is no other one.
    running.process.terminate()
    running.wait_for_log("is that one again")
    assert running.process.poll() is None
    told = time.monotonic()
    wait_for(lambda: time.monotonic() - told > SEPARATE)
    running.process.terminate()
    assert running.wait() == 1
    wait_for(lambda: server.depth(ORDERS) == 1)


def test_a_process_that_its_handler_ends_is_replaced_whatever_its_status(tmp_path, server, service):
    publish(server, "exit")
    running = service("--processes", "1")
    wait_for(lambda: handled(tmp_path)["exit"] == 2)
    assert running.logged("ended with status 3")
    assert not running.logged("no other follows")


def test_processes_end_with_a_supervisor_that_is_killed(server, service):
    running = service("--processes", "2", "--health", "0")
    wait_for(lambda: running.ask("ready")[0] == 200)
    running.process.kill()
    assert running.wait() == -signal.SIGKILL
    assert len(running.logged("the supervisor is gone")) == 2


def test_what_hangs_is_given_back_when_the_grace_is_over_and_counts_nothing(tmp_path, server, service):
    publish(server, "hang")
    # The second time it is known to have been delivered before: its attempt is in the history while it runs.
    for times, options in (1, ()), (2, ("--processes", "1")):
        running = service("--grace", "0.2s", *options)
        wait_for(lambda often=times: handled(tmp_path)["hang"] == often)
        cache = SqlRetryContextCache(f"sqlite:///{tmp_path}/shop.db")
        assert len(list(cache.items())) == times - 1
        assert running.stop() == 1
        assert running.logged("stopping at once")
        (told,) = running.logged("stopped at once; given back without a failed attempt: ('/queue/orders', ")
        assert told["level"] == "WARNING"
        wait_for(lambda: server.depth(ORDERS) == 1)
        assert list(cache.items()) == []


@pytest.mark.parametrize("options", [(), ("--processes", "1")])
def test_coroutines_that_hang_are_cancelled_and_put_everything_straight(tmp_path, server, service, options):
    publish(server, "bad", "hang", "good")
    running = service("--grace", "0.2s", "--health", "0", *options, target="later:consumers")
    wait_for(lambda: running.ask("counters")[1]["total"]["acknowledged"] == 1 and server.depth(PARKED) == 1)
    wait_for(lambda: handled(tmp_path) == {"bad": 2, "hang": 1, "good": 1})
    assert running.stop() == 1
    assert running.logged("goes back without a new attempt: it was cancelled")
    assert [message.body for message in server.messages(ORDERS)] == [b"hang"]
    # Before its attempt "it is running" was stored: with a clean end that is withdrawn, and counts as no crash.
    with SqlRetryContextCache(f"sqlite:///{tmp_path}/later.db") as cache:
        assert list(cache.items()) == []
    assert running.output == []


@pytest.mark.parametrize("options", [(), ("--processes", "2")], ids=["alone", "supervised"])
def test_what_every_process_would_give_up_for_is_told_in_a_sentence_and_ends_them_all(service, options):
    with StompServer(profile="rabbitmq") as rabbitmq:
        rabbitmq.publish(ORDERS, b"x")
        running = service(*options, broker=rabbitmq.url)
        assert running.wait() == 1
    line, *_ = running.logged("shop.orders: the container gives up: A message from /queue/orders at the broker")
    assert line["error"] == "retrykit.messaging.errors.NoStableIdError"
    assert "traceback" not in line
    assert len(running.logged("no other follows")) <= len(options)
    assert len(running.logged("has started (pid")) == (2 if options else 0)
    assert running.output == []


@pytest.mark.parametrize(
    ("options", "target", "words"),
    [
        ((), "shpo:consumers", "there is no module 'shpo'"),
        (("--processes", "2"), "shpo:consumers", "there is no module 'shpo'"),
        (("--health-host", "::1"), "shop:consumers", "--health-host needs a --health PORT"),
        ((), "shop:handle", "missing a required argument: 'message'"),
        (("--concurrency", "0"), "shop:consumers", "'--concurrency'"),
    ],
)
def test_what_cannot_be_understood_is_a_usage_error(service, options, target, words):
    running = service(*options, target=target)
    assert running.wait() == 2
    assert words in " ".join(running.output)
    assert running.lines == []


def test_a_name_that_no_process_finds_ends_them_all(service):
    running = service("--processes", "2", target="shop:consumer")
    assert running.wait() == 2
    assert "it has consumers (Consumers)" in " ".join(running.output)
    assert running.logged("no other follows")


TOPIC = """
import os

from retrykit import RetryTemplate
from retrykit.messaging import ListenerContainer
from retrykit.messaging.stomp import StompBroker

broker = StompBroker(os.environ["SHOP_BROKER"], destination="/topic/prices")
container = ListenerContainer(broker, print, template=RetryTemplate(name="prices"))
"""


def test_several_processes_that_would_each_be_given_all_messages_are_refused(tmp_path, service):
    (tmp_path / "prices.py").write_text(TOPIC)
    running = service("--processes", "2", target="prices:container")
    assert running.wait() == 2
    assert "'--processes': must be at most 1" in " ".join(running.output).replace("--processes:", "'--processes':")
    one = service("--processes", "1", target="prices:container")
    one.wait_for_log("prices consumes")
    one.wait_for_log("prices has no recover=")
    assert one.stop() == 0


@pytest.mark.parametrize("options", [(), ("--processes", "1")], ids=["alone", "supervised"])
def test_an_error_of_the_application_is_logged(tmp_path, service, options):
    (tmp_path / "broken.py").write_text("import shop\nraise RuntimeError('no configuration')\n")
    running = service(*options, target="broken:consumers")
    assert running.wait() == 1
    (line,) = running.logged("module 'broken' could not be loaded")
    assert "no configuration" in line["traceback"]


def test_of_a_value_that_is_refused_the_users_own_lines_are_shown(tmp_path, service):
    (tmp_path / "wrong.py").write_text("from settings import consumers\n")
    (tmp_path / "settings.py").write_text(
        APPLICATION.replace("template=template)", "template=template, delay='bogus')")
    )
    running = service(target="wrong:consumers")
    assert running.wait() == 1
    (line,) = running.logged("module 'wrong' could not be loaded: ValueError(\"delay: must be one of")
    frames = [row.split('"')[1] for row in line["traceback"].splitlines() if row.lstrip().startswith("File ")]
    assert [Path(name).name for name in frames] == ["wrong.py", "settings.py"]


def test_what_this_library_says_of_a_store_is_logged_in_a_sentence(tmp_path, service):
    (tmp_path / "late.py").write_text("import shop\nshop.SqlRetryContextCache('sqlite:///no/such/folder.db')\n")
    running = service(target="late:consumers")
    assert running.wait() == 1
    (line,) = running.logged("module 'late' could not be loaded: ")
    assert "unable to open" in line["message"]
    assert "traceback" not in line


def test_a_port_that_is_taken_is_told_before_anything_starts(server, service):
    running = service("--health", str(server.port), "--processes", "2")
    assert running.wait() == 1
    assert f"127.0.0.1 port {server.port}" in " ".join(running.output)
    assert running.lines == []
