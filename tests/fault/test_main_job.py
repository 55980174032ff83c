"""The main job, for real: messages through a broker into a database, while consumers and the broker are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import uuid
from collections import Counter
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import attrs
import pytest

from retrykit.cli.demo.display import Silence
from retrykit.cli.demo.job import Job
from retrykit.cli.demo.ledger import Ledger
from retrykit.cli.demo.plan import make_plan, read_messages
from retrykit.cli.demo.run import Queue, Settings, Watch, carry_out
from retrykit.cli.demo.supervisor import WORKER, Supervisor
from retrykit.errors import CommitInDoubtError
from retrykit.messaging import BrokerError
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import ParkedItem
from tests.servers import RabbitMq

ROOT = Path(__file__).parents[2]
MESSAGES = 200
WORKERS = 3
KILLS = 12
WORDS = (
    "naïve",
    "Grüße",
    "Ελλάδα",
    "Москва",
    "日本語",
    "العربية",
    "עברית",
    "हिन्दी",
    "👩‍👩‍👧",
    "tab\tand\nline",
    '"quoted"',
    "\\",
    "plain",
)


def write_messages(path: Path, seed: int) -> None:
    """Events as web hooks send them: nested, in many scripts, from some hundred bytes to tens of kilobytes."""
    chance = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(MESSAGES):
            words = int(10 ** chance.uniform(1, 3.6))
            payload = {
                "action": chance.choice(("opened", "closed", "labeled")),
                "text": " ".join(chance.choices(WORDS, k=words)),
                "numbers": [chance.uniform(-1e6, 1e6) for _ in range(chance.randint(0, 40))],
                "nothing": None,
            }
            file.write(json.dumps({"id": f"{number}-ü", "payload": payload}, ensure_ascii=chance.random() < 0.3) + "\n")


class Havoc:
    """Kills consumers at random moments of their work, and once, in the middle, the broker."""

    def __init__(self, broker, seed):
        self.broker = broker
        self.chance = random.Random(seed)
        self.next_kill = 5.0
        self.broker_deaths = 0

    def __call__(self, watch, supervisor):
        finished = len(watch.progress.finished)
        if self.broker_deaths == 0 and finished >= MESSAGES // 2:
            self.broker_deaths += 1
            self.broker.kill()
            self.broker.start()
        elif watch.kills < KILLS and finished >= self.next_kill:
            self.kill_one(watch, [pid for pid in supervisor.pids if pid in watch.progress.in_hand])

    def kill_one(self, watch, working):
        if working:
            self.next_kill += self.chance.uniform(1, 1.5 * MESSAGES / KILLS)
            watch.kills += 1
            # What it had in hand lasts for some 20 ms: handler, commit, acknowledgement.
            time.sleep(self.chance.uniform(0, 0.02))
            os.kill(self.chance.choice(working), signal.SIGKILL)


def left_in(url):
    """Whether a message waits in the queue; it goes back."""
    with closing(StompBroker(url).connect()) as session:
        return int(session.receive(timeout=0.5) is not None)


@attrs.frozen
class LedgerWithParkedQueue(Ledger):
    """What is parked is found in a queue of the broker, looked at and left there.

    A copy is known by its message id. On ActiveMQ each has its own: a second one is a second item. On RabbitMQ both
    have the id of the original: they are one item, and `copies` says how many there are.
    """

    queue: str = attrs.field(kw_only=True)
    found: dict = attrs.field(factory=dict, kw_only=True)

    def parked(self, name):
        for message in self.look():
            self.found.setdefault(message.id, item_of(name, len(self.found), message))
        return list(self.found.values())

    def copies(self):
        """How often each of them lies in the queue."""
        deadline = time.monotonic() + 30
        while set(lying := Counter(message.id for message in self.look())) != set(self.found):
            assert time.monotonic() < deadline, f"{lying} in the queue, {set(self.found)} were seen"
        return lying

    def look(self):
        try:
            with closing(StompBroker(self.queue, prefetch=2 * MESSAGES).connect()) as session:
                return list(iter(lambda: session.receive(timeout=0.3), None))
        except (BrokerError, CommitInDoubtError):
            return []  # the broker is being killed


def item_of(name, number, message):
    headers = message.headers
    attempts = int(headers["retrykit-attempts"])
    last = {"type": headers["retrykit-error-type"], "message": headers["retrykit-error"]}
    return ParkedItem(
        id=number,
        name=name,
        key=headers["retrykit-key"],
        message_id=message.id,
        destination=headers["retrykit-destination"],
        payload=message.body,
        content_type=headers["content-type"],
        headers=headers,
        reason=headers["retrykit-reason"],
        attempts=attempts,
        errors=(last,) * attempts,  # headers carry the last one only
        first_failed_at=datetime.fromisoformat(headers["retrykit-first-failed-at"]),
        last_failed_at=datetime.fromisoformat(headers["retrykit-last-failed-at"]),
        parked_at=datetime.now(UTC),
    )


@pytest.fixture(autouse=True)
def _workers_find_this_package(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(params=["activemq", "rabbitmq"])
def broker(request):
    return request.getfixturevalue(request.param)


def make_queues(broker, *urls):
    """Queues that survive a crash: on RabbitMQ those that were just made may not."""
    for url in urls:
        StompBroker(url).connect().close()
    if isinstance(broker, RabbitMq):
        broker.keep_queues()


@pytest.mark.parametrize("where", ["database", "broker"])
def test_nothing_is_lost_or_done_twice_while_consumers_and_the_broker_are_killed(broker, tmp_path, where):
    seed = random.randrange(1_000_000)  # another one in each run of the suite; printed when the test fails
    print(f"{seed=}")
    write_messages(tmp_path / "messages.jsonl", seed)
    run = uuid.uuid4().hex[:12]
    url = f"{broker.url}/queue/main-job.{run}"
    make_queues(broker, url, f"{url}.parked")
    database = f"sqlite:///{tmp_path}/job.db"
    job = Job(broker=url, database=database, events=str(tmp_path / "events.jsonl"), run=run)
    ledger = Ledger.at(database)
    command = WORKER
    if where == "broker":
        ledger = LedgerWithParkedQueue(ledger.engine, queue=f"{url}.parked")
        command = ("-m", "tests.fault.parking_worker")
    settings = Settings(
        plan=make_plan(read_messages(tmp_path / "messages.jsonl"), seed), workers=WORKERS, patience=90.0
    )
    havoc = Havoc(broker, seed)
    with closing(ledger):
        assert ledger.create() is None
        watch = Watch(job, settings, ledger, Queue(url, lambda: left_in(url)), Silence(), meddle=havoc)
        report = carry_out(watch, Supervisor(job, WORKERS, tmp_path, command))
    print(report.to_json())
    assert report.to_json()["broken"] == {}
    assert havoc.broker_deaths == 1
    assert report.process_deaths >= watch.kills >= 3
    assert report.effects + report.parked == MESSAGES
    if where == "broker":
        copies = ledger.copies()
        print(f"{copies=}")
        # Only who was interrupted between the copy and the acknowledgement had it sent again: one message a worker.
        interrupted = report.process_deaths + WORKERS * havoc.broker_deaths
        assert copies.total() - len(copies) <= (interrupted if isinstance(broker, RabbitMq) else 0)
