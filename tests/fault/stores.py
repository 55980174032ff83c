"""The stores of the fault tests, and the processes that share one: what a test does to them, and what it asks them."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from retrykit.sql import SqlRetryContextCache, create_tables
from tests.fault.ledger import PATIENCE, Ledger
from tests.fault.store_consumer import effects, engine_for, guarded, metadata, parked
from tests.servers import MariaDb, PostgreSql, RedisServer, mariadb_missing, postgresql_missing, redis_missing
from tests.servers.process import ServerProcess
from tests.servers.proxy import TcpProxy

ROOT = Path(__file__).parents[2]
# RETRYKIT_FAULT_SCALE=10 makes the crowds ten times as large; RETRYKIT_FAULT_SEED chooses other moments.
SCALE = float(os.environ.get("RETRYKIT_FAULT_SCALE", "1"))
SEED = int(os.environ.get("RETRYKIT_FAULT_SEED", "1"))
SERVERS = {
    "postgresql": (PostgreSql, postgresql_missing),
    "mariadb": (MariaDb, mariadb_missing),
    "redis": (RedisServer, redis_missing),
}
STORES = ("sqlite", *SERVERS)


class Nursery:
    """The process that forks consumers."""

    def __init__(self, module: str = "tests.fault.store_consumer") -> None:
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, **order: Any) -> int:
        """Have an order carried out."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        return int(json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Worker:
    """One consumer process."""

    def __init__(self, nursery: Nursery, order: dict[str, Any]) -> None:
        self.order = order
        self.number: int = order["worker"]
        self._nursery = nursery
        self.pid = nursery.ask(fork=order)
        # While nobody reaps it the number stays its own, so a signal reaches nobody else.
        self._handle = os.pidfd_open(self.pid)
        self.status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended, of itself or not."""
        return self.status is not None or bool(select.select([self._handle], [], [], 0)[0])

    def signal(self, number: int) -> None:
        """Send it a signal."""
        if self.status is None:
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """SIGKILL, and wait for its end."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end: how it ended."""
        if self.status is None:
            assert select.select([self._handle], [], [], timeout)[0], f"worker {self.number} has not ended"
            self.status = self._nursery.ask(reap=self.pid)
            os.close(self._handle)
        return self.status

    def close(self) -> None:
        """End it, whatever it does."""
        with suppress(ProcessLookupError):
            self.kill()


class Place:
    """The databases of one test."""

    def __init__(self, kind: str, server: ServerProcess | None, folder: Path) -> None:
        self.kind = kind
        self.server = server
        self.folder = folder
        self.history = self._fresh()
        # Work and histories share a database where they can.
        self.together = kind != "redis"
        self.work = self.history if self.together else f"sqlite:///{folder}/work.db"
        self.resource = self.work if kind in ("postgresql", "mariadb") else f"sqlite:///{folder}/resource.db"
        # The test asks between restarts: no connection outlives its question.
        self.engine = engine_for(self.work, poolclass=sa.NullPool)
        self.guard = engine_for(self.resource, poolclass=sa.NullPool)
        self.proxy: TcpProxy | None = None
        self.options: dict[str, Any] = {}
        metadata.create_all(self.engine)
        metadata.create_all(self.guard)
        if self.together:
            create_tables(self.engine)

    def _fresh(self) -> str:
        if self.server is None:
            return f"sqlite:///{self.folder}/work.db"
        return self.server.fresh_database()

    def behind_a_proxy(self) -> TcpProxy:
        """From now on workers reach the server through a proxy."""
        assert self.server is not None
        self.proxy = TcpProxy(self.server.port)
        return self.proxy

    def urls(self) -> dict[str, str]:
        """Where workers find what they need."""
        history = self.history if self.proxy is None else self.proxy.via(self.history)
        return {"history": history, "work": history if self.together else self.work}

    def guard_keys(self, keys: range) -> None:
        """A guarded row for each key."""
        with self.guard.begin() as connection:
            connection.execute(sa.insert(guarded), [{"key": key, "fence": 0} for key in keys])

    def count(self, table: sa.Table) -> dict[int, int]:
        """How many rows each key has."""
        with self.engine.connect() as connection:
            rows = connection.execute(sa.select(table.c.key, sa.func.count()).group_by(table.c.key))
            return dict(rows.all())

    def cache(self) -> Any:
        """The store, as somebody sees it who had no part in what happened."""
        if self.kind == "redis":
            from retrykit.redis import RedisRetryContextCache

            return RedisRetryContextCache(self.history)
        return SqlRetryContextCache(self.history)

    def stored(self) -> list[dict[str, Any]]:
        """The histories in the store."""
        with closing(self.cache()) as cache:
            return [context.snapshot for _, context in cache.items() if "completed_at" not in context.snapshot]

    def failures(self) -> dict[int, int]:
        """How many failures of each key the store knows of, attempts included that never ended."""
        return {facts["key"]: facts["retry_count"] + len(facts.get("in_flight", ())) for facts in self.stored()}

    def crashes(self) -> int:
        """How many attempts were counted because they never ended, as the store has it."""
        return sum(facts.get("crashes", 0) for facts in self.stored())

    def effects_violations(self, keys: range, *, exactly: bool) -> list[str]:
        """Whether each key had its effect, or was parked, once; else at least once."""
        worked, aside = self.count(effects), self.count(parked)
        found = []
        for key in keys:
            total = worked.get(key, 0) + aside.get(key, 0)
            if total < 1 or (exactly and total > 1):
                found.append(f"{key}: {worked.get(key, 0)} effects, parked {aside.get(key, 0)} times")
        return found

    def close(self) -> None:
        """Leave nothing open."""
        self.engine.dispose()
        self.guard.dispose()
        if self.proxy is not None:
            self.proxy.close()
        if self.server is not None:
            self.server.drop_database(self.history)  # type: ignore[attr-defined]


class Fleet:
    """The consumer processes of one test, on machines that cannot see each other's processes where the store allows it.

    SQLite is a file of one machine.
    """

    def __init__(self, nurseries: list[Nursery], place: Place, ledger: Path | None = None) -> None:
        self.place = place
        self.ledger = Ledger(ledger or place.folder / "ledger")
        self.workers: list[Worker] = []
        self.chance = random.Random(SEED)
        self._nurseries = nurseries
        self.machines = place.kind != "sqlite"
        self.options: dict[str, Any] = {}

    def start(self, threads: list[list[int]], **options: Any) -> Worker:
        """Start a consumer process, with so many threads as there are lists of keys."""
        number = len(self.workers)
        order = {
            "worker": number,
            "ledger": str(self.ledger.path),
            "threads": threads,
            "seed": SEED,
            "options": self.place.options,
            **self.place.urls(),
            # What each stored last the half of them remember; and one in four has tasks, no threads.
            "fronted": number % 2 == 1,
            "asynchronous": number % 4 == 2,
            **({"host": f"host{number % 4}", "skew": (number % 4 - 1.5) * 3_000} if self.machines else {}),
            **self.options,
            **options,
        }
        worker = Worker(self._nurseries[number % len(self._nurseries)], order)
        self.workers.append(worker)
        return worker

    def replace(self, worker: Worker) -> Worker:
        """Kill a process and start another in its place, to which everything is delivered that it had."""
        worker.kill()
        known = sorted({key for keys in worker.order["threads"] for key in keys})
        return self.start(worker.order["threads"], **{**_kept(worker.order), "known": known})

    @property
    def idle(self) -> bool:
        """Whether all have ended."""
        return all(worker.ended for worker in self.workers)

    def reach(self, event: str, number: int) -> bool:
        """Wait until they have written so many events of this kind; False when they have all ended before."""
        return self.ledger.wait(event, number, unless=lambda: self.idle)

    def wait(self, event: str, number: int) -> None:
        """Wait until they have written so many events of this kind, as they must."""
        assert self.reach(event, number), f"ended after {self.ledger.count(event)} × {event}, not {number}"

    def finish(self) -> Ledger:
        """Wait until all have done what they were to do: what they wrote."""
        deadline = time.monotonic() + PATIENCE
        killed = 0
        for worker in self.workers:
            status = worker.wait(max(deadline - time.monotonic(), 0))
            killed += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), f"worker {worker.number} ended with {status}"
        self.ledger.close()
        assert len(self.ledger.torn) <= killed, self.ledger.torn
        return self.ledger

    def close(self) -> None:
        """End what still runs."""
        for worker in self.workers:
            worker.close()


def _kept(order: dict[str, Any]) -> dict[str, Any]:
    return {name: order[name] for name in ("host", "skew", "fronted", "asynchronous") if name in order}


def dealt(keys: range, *, processes: int = 4, threads: int = 8, copies: int = 1) -> list[list[list[int]]]:
    """For each process for each thread its keys; `copies` threads of different processes get the same ones."""
    hands: list[list[list[int]]] = [[[] for _ in range(threads)] for _ in range(processes)]
    for key in keys:
        for copy in range(copies):
            hands[(key + copy) % processes][(key // processes + copy) % threads].append(key)
    return hands


def victim(kind: str) -> ServerProcess | None:
    """A running server that a test may kill."""
    if kind not in SERVERS:
        return None
    make, missing = SERVERS[kind]
    if (reason := missing()) is not None:
        pytest.skip(reason)
    server = make()
    try:
        server.start()
    except BaseException:
        server.close()
        raise
    return server
