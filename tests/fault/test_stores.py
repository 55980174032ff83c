"""Processes that share a store, and what befalls them: nothing is lost, counts are exact, effects happen as promised.

What happened is read from the ledger that the processes wrote, and from the tables of the work; the store's own word is
held against them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from contextlib import ExitStack

import pytest

from retrykit.cache import canonical_key
from tests.fault.store_consumer import MANY, effects, fate, parked
from tests.fault.stores import SCALE, SEED, SERVERS, STORES, Fleet, Nursery, Place, dealt, victim

MAX_ATTEMPTS = 4
CROWD = range(round(1_000 * SCALE))
SOME = range(round(80 * SCALE))
FEW = range(len(SOME) // 2)
# Of the packets of an exchange, one in so many is lost in turn.
STEP = max(1, round(3 / SCALE))
# What most tests do: work in a transaction, marks that answer duplicates.
FULL = {"max_attempts": MAX_ATTEMPTS, "remember": 3600}
# What is done where every failure is to be counted: no work, no limit, no end.
COUNTED = {"work": None, "fails": MANY, "max_attempts": MANY, "recovers": False, "deliveries": 2}


@pytest.fixture(scope="module")
def nurseries():
    pair = [Nursery(), Nursery()]
    yield pair
    for nursery in pair:
        nursery.close()


@pytest.fixture(scope="module")
def servers():
    """Servers of this module, one of each kind: its tests kill them, and start what they killed."""
    with ExitStack() as stack:
        started = {}

        def get(kind):
            if kind not in started:
                started[kind] = victim(kind)
                if started[kind] is not None:
                    stack.callback(started[kind].close)
            return started[kind]

        yield get


@pytest.fixture(params=STORES)
def place(request, servers, tmp_path):
    place = Place(request.param, servers(request.param), tmp_path)
    yield place
    place.close()


@pytest.fixture
def fleet(nurseries, place):
    fleet = Fleet(nurseries, place)
    yield fleet
    fleet.close()


# -- all at once, and nothing befalls them


def test_every_failure_of_four_processes_of_eight_threads_at_one_key_is_counted(place, fleet):
    for _ in range(4):
        fleet.start([[7]] * 8, **COUNTED)
    ledger = fleet.finish()
    assert ledger.violations([], limit_of=lambda _: MANY) == []
    assert ledger.count("attempt") == ledger.count("fail") == 4 * 8 * 2
    assert {delivery.outcome for delivery in ledger.deliveries} == {"Trouble"}
    assert place.failures() == {7: ledger.count("attempt")}
    assert ledger.faults() == []


def test_every_failure_of_four_processes_of_eight_threads_at_many_keys_is_counted(place, fleet):
    for hands in dealt(CROWD, copies=2):
        fleet.start(hands, **COUNTED | {"deliveries": 1})
    ledger = fleet.finish()
    assert ledger.violations([], limit_of=lambda _: MANY) == []
    assert ledger.faults() == []
    assert place.failures() == dict.fromkeys(CROWD, 2)


def test_no_failure_is_forgotten_while_four_processes_push_each_others_histories_out(place, fleet):
    few = CROWD[:120]
    options = {"capacity": 20, "on_full": "evict_oldest", "tombstones": 2 * len(few)}
    for hands in dealt(few, copies=2):
        fleet.start(hands, **COUNTED | {"deliveries": 1, "options": options})
    ledger = fleet.finish()
    assert ledger.violations([], limit_of=lambda _: MANY) == []
    assert ledger.faults() == []
    with contextlib.closing(place.cache()) as cache:
        found = {key: cache.load(canonical_key("orders", key)).snapshot for key in few}
        histories = len(list(cache.items()))
    assert {key: facts["retry_count"] for key, facts in found.items()} == dict.fromkeys(few, 2)
    assert sum("evicted" in facts for facts in found.values()) >= len(few) - histories
    # A process beyond the first may have some more (a hundredth, and never less than one).
    assert histories <= 20 + 4


def test_the_limit_holds_and_recovery_happens_once_while_all_are_at_one_key(place, fleet):
    for _ in range(4):
        fleet.start([[4]] * 8, fails=MANY, **FULL)
    ledger = fleet.finish()
    assert ledger.violations([4], limit_of=lambda _: MAX_ATTEMPTS) == []
    assert ledger.count("attempt") == MAX_ATTEMPTS
    assert (place.count(effects), place.count(parked)) == ({}, {4: 1})
    assert ledger.faults() == []


def test_the_work_is_done_once_while_all_are_at_one_key(place, fleet):
    for _ in range(4):
        fleet.start([[0]] * 8, fails=0, **FULL)
    ledger = fleet.finish()
    assert ledger.violations([0], limit_of=lambda _: MAX_ATTEMPTS) == []
    assert place.effects_violations([0], exactly=place.together) == []
    assert place.count(parked) == {}
    assert ledger.faults() == []


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("place", ["postgresql", "mariadb"], indirect=True)
def test_the_work_is_done_once_at_every_isolation_level(place, fleet, level):
    fleet.options = {**FULL, "max_attempts": 100, "fails": 1, "engine": {"isolation_level": level}}
    for _ in range(4):
        fleet.start([[0], [1], [2], [3]] * 2)
    ledger = fleet.finish()
    assert ledger.violations(range(4), limit_of=lambda _: 100) == []
    assert place.effects_violations(range(4), exactly=True) == []
    assert place.count(parked) == {}


# -- processes die and hang


@pytest.mark.parametrize("again", ["delivered to two at once", "delivered to one"])
def test_processes_may_be_killed_at_any_moment(place, fleet, again):
    two = again == "delivered to two at once"
    fleet.options = {**FULL, "lease": 1.0, "redelivered": [None, None] if two else [False, True]}
    keys = range(2 * len(SOME))
    place.guard_keys(keys)
    workers = [fleet.start(hand, resource=place.resource) for hand in dealt(keys, copies=2 if two else 1)]
    killed = 0
    for moment in moments(fleet, keys, 5):
        if fleet.reach("attempt", moment):
            number = fleet.chance.randrange(4)
            workers[number] = fleet.replace(workers[number])
            killed += 1
    ledger = fleet.finish()
    assert killed >= 3
    deaths = {} if two else unjournaled(ledger)
    assert ledger.violations(keys, limit_of=lambda key: MAX_ATTEMPTS + deaths.get(key, 0)) == []
    assert ledger.faults() == []
    assert place.effects_violations(keys, exactly=place.together) == []


def moments(fleet, keys, number):
    """So many random numbers of attempts, in order, at which something is to happen."""
    expected = sum(min(fate(key) + 1, MAX_ATTEMPTS) for key in keys)
    return sorted(round(expected * fleet.chance.uniform(0.05, 0.7)) for _ in range(number))


def unjournaled(ledger):
    """For each key whether its first delivery died: the source said that it was the first, so nobody journaled it."""
    return {key: deliveries[0].end is None for key, deliveries in ledger.by_key.items()}


def test_processes_may_hang_past_their_lease_at_any_moment(place, fleet):
    if place.kind == "sqlite":
        pytest.skip("who hangs with SQLite's write lock stops all others for as long as their busy timeouts last")
    lease = 0.3
    fleet.options = {**FULL, "lease": lease, "takes": 0.01}
    place.guard_keys(SOME)
    workers = [fleet.start(hand, resource=place.resource) for hand in dealt(SOME, copies=2)]
    hung = 0
    for moment in moments(fleet, SOME, 3):
        if fleet.reach("attempt", moment):
            hang(fleet.chance.choice(workers), 2 * lease)
            hung += 1
    ledger = fleet.finish()
    assert hung >= 2
    assert ledger.violations(SOME, limit_of=lambda _: MAX_ATTEMPTS) == []
    assert ledger.faults() == []
    assert place.effects_violations(SOME, exactly=place.together) == []


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_no_failure_is_lost_or_counted_twice_while_processes_die_and_hang(place, fleet, how):
    lease = 0.3
    fleet.options = {**COUNTED, "deliveries": 6, "lease": lease, "takes": 0.03}
    workers = [fleet.start(hand) for hand in dealt(FEW, copies=2)]
    for turn in range(3):
        assert fleet.reach("attempt", len(FEW) * (2 * turn + 1))
        number = fleet.chance.randrange(4)
        if how == "killed":
            workers[number] = fleet.replace(workers[number])
        else:
            hang(workers[number], 2 * lease)
    ledger = fleet.finish()
    assert place.crashes() > 0, "none was within an attempt"
    assert ledger.violations([], limit_of=lambda _: MANY) == []
    assert miscounted(place, ledger, FEW) == []
    assert ledger.faults() == []


def hang(worker, seconds):
    """Let a process hang for so long; whether the others go on meanwhile depends on what it holds."""
    worker.signal(signal.SIGSTOP)
    threading.Event().wait(seconds)
    worker.signal(signal.SIGCONT)


def test_a_process_that_ends_in_good_order_withdraws_its_attempt(place, fleet):
    gate = place.folder / "gate"
    fleet.options = {**FULL, "max_attempts": 1, "fails": 0}
    leaving = fleet.start([[0]], gate=str(gate))
    fleet.wait("attempt", 1)
    leaving.signal(signal.SIGTERM)
    assert leaving.wait() == 0
    fleet.start([[0]])
    ledger = fleet.finish()
    assert [(delivery.worker, delivery.outcome) for delivery in ledger.deliveries] == [(0, None), (1, "work")]
    assert [each["n"] for each in ledger.events if each["e"] == "attempt"] == [1, 1]
    assert (place.count(effects), place.count(parked)) == ({0: 1}, {})


def test_a_handler_that_takes_longer_than_its_lease_keeps_it(place, fleet):
    lease = 0.5
    gate = place.folder / "gate"
    fleet.options = {**FULL, "max_attempts": 1, "lease": lease}
    fleet.start([[0]], gate=str(gate))
    fleet.wait("attempt", 1)
    began = fleet.ledger.events[-1]["at"]
    other = fleet.start([[0]])
    fleet.ledger.wait_until(began + 3 * lease, unless=lambda: other.ended)
    gate.touch()
    ledger = fleet.finish()
    assert ledger.violations([0], limit_of=lambda _: 1) == []
    first, *others = ledger.deliveries
    assert (first.outcome, others[-1].outcome) == ("work", "duplicate")
    assert {other.outcome for other in others[:-1]} == {"AttemptsInFlightError"}
    assert (place.count(effects), place.count(parked)) == ({0: 1}, {})


def test_a_handler_that_hangs_past_its_lease_is_overtaken_and_its_guarded_write_refused(place, fleet):
    gate = place.folder / "gate"
    fleet.options = {**FULL, "max_attempts": 1, "lease": 0.5}
    place.guard_keys(range(1))
    hanging = fleet.start([[0]], gate=str(gate), resource=place.resource)
    fleet.wait("attempt", 1)
    hanging.signal(signal.SIGSTOP)
    other = fleet.start([[0]], resource=place.resource)
    assert other.wait() == 0
    gate.touch()
    hanging.signal(signal.SIGCONT)
    ledger = fleet.finish()
    assert ledger.violations([0], limit_of=lambda _: 1) == []
    writes = [(delivery.worker, write["accepted"]) for delivery in ledger.deliveries for write in delivery.of("fenced")]
    assert writes == [(0, False), (1, True)], "its number was not the lower one"
    assert (place.count(effects), place.count(parked)) == ({} if place.together else {0: 1}, {0: 1})


@pytest.mark.parametrize("place", ["postgresql", "mariadb"], indirect=True)
def test_a_process_that_hangs_within_its_commit_holds_up_its_own_item_only(place, fleet):
    fleet.options = {**FULL, "fails": 0, "lease": 0.3}
    hanging = fleet.start([[0]], dies_at={"event": "commit", "number": 1, "of": signal.SIGSTOP})
    fleet.wait("commit", 1)
    fleet.start([[0], [1], [2], [3]])
    fleet.wait("committed", 3)
    # Nobody can know whether it is going to commit, until its connection is gone.
    assert fleet.ledger.count("committed") == 3
    hanging.kill()
    ledger = fleet.finish()
    assert ledger.violations(range(4), limit_of=lambda _: MAX_ATTEMPTS) == []
    assert place.effects_violations(range(4), exactly=True) == []


# -- Spring Batch's criterion


@pytest.mark.parametrize("dies", ["after its attempt", "within its attempt"])
def test_another_process_goes_on_counting_where_the_first_was_killed(place, fleet, dies):
    fleet.options = {"fails": MANY, "max_attempts": 3, "remember": 3600, "redelivered": [False, True]}
    event = "end" if dies == "after its attempt" else "attempt"
    first = fleet.start([[4]], dies_at={"event": event, "number": 2})
    assert first.wait() == -signal.SIGKILL
    fleet.start([[4]], known=[4])
    ledger = fleet.finish()
    attempts = [(each["w"], each["n"]) for each in ledger.events if each["e"] == "attempt"]
    assert attempts == [(0, 1), (0, 2), (1, 3)]
    assert [delivery.outcome for delivery in ledger.deliveries][-1] == "substitute"
    assert (place.count(effects), place.count(parked)) == ({}, {4: 1})
    assert ledger.violations([4], limit_of=lambda _: 3) == []


# -- the server goes away


@pytest.mark.parametrize("how", ["stopped", "killed"])
@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_the_server_may_be_restarted_at_any_moment(place, fleet, how):
    place.options = {"patience": 60}
    fleet.options = {**FULL, "lease": 2.0}
    for hand in dealt(SOME, copies=2):
        fleet.start(hand)
    restarted = 0
    for moment in moments(fleet, SOME, 2):
        if fleet.reach("attempt", moment):
            (place.server.stop if how == "stopped" else place.server.kill)()
            place.server.start()
            restarted += 1
    ledger = fleet.finish()
    assert restarted
    assert ledger.violations(SOME, limit_of=lambda _: MAX_ATTEMPTS) == []
    assert all(delivery.reached_the_store for delivery in ledger.deliveries)
    assert place.effects_violations(SOME, exactly=place.together) == []


@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_a_store_that_is_away_hides_no_business_error_and_counts_again_when_it_is_back(place, fleet):
    place.options = {"patience": 0.1}
    for hand in dealt(SOME):
        fleet.start(hand, **COUNTED | {"deliveries": 6})
    # All are connected: a cache that cannot be opened is an error of its own.
    fleet.wait("began", 4)
    fleet.wait("attempt", len(SOME))
    place.server.kill()
    away = fleet.ledger.count("end")
    fleet.wait("end", away + 60)
    place.server.start()
    ledger = fleet.finish()
    assert ledger.violations([], limit_of=lambda _: MANY) == []
    assert {delivery.outcome for delivery in ledger.deliveries} == {"Trouble"}
    assert sum(not delivery.reached_the_store for delivery in ledger.deliveries) >= 30
    assert miscounted(place, ledger, SOME) == []


def miscounted(place, ledger, keys):
    """The keys of which the store knows fewer failures than were stored, or more than there were."""
    stored = place.failures()
    bounds = {key: (*ledger.counted(key), stored.get(key, 0)) for key in keys}
    return [
        f"{key}: {least} to {most} failures, {known} known"
        for key, (least, most, known) in bounds.items()
        if not least <= known <= most
    ]


# -- the network fails


# Within a statement that begins a transaction there may be the word COMMITTED.
COMMIT = {"postgresql": b"COMMIT\0", "mariadb": b"\x03COMMIT"}
FAULTS = ("cut", "delay", "half-close", "lost answers", "lost requests", "broken answers", "stall", "refused")


def disturb(proxy, fault, chance):
    """Let the network fail in one way, for a moment."""
    after = chance.randrange(20)
    match fault:
        case "cut":
            proxy.cut()
        case "delay":
            proxy.delay(0.02)
        case "half-close":
            proxy.half_close()
        case "lost answers":
            proxy.lose_answers(after=after, times=3)
        case "lost requests":
            proxy.lose_requests(after=after, times=3)
        case "broken answers":
            proxy.drop_after(chance.randrange(2_000))
        case "stall":
            proxy.stall()
        case "refused":
            proxy.refuse()
            proxy.cut()


@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_the_network_may_fail_in_every_way_at_any_moment(place, fleet):
    place.options = {"patience": 60}
    fleet.options = {**FULL, "lease": 2.0}
    with place.behind_a_proxy() as proxy:
        for hand in dealt(SOME, copies=2):
            fleet.start(hand)
        faults = fleet.chance.sample(FAULTS, len(FAULTS))
        for fault, moment in zip(faults, moments(fleet, SOME, len(faults)), strict=True):
            if fleet.reach("attempt", moment):
                disturb(proxy, fault, fleet.chance)
                # As long as the fault lasts: whether anything goes on meanwhile depends on the fault.
                threading.Event().wait(0.1)
                proxy.heal()
        ledger = fleet.finish()
        assert proxy.lost
    assert ledger.violations(SOME, limit_of=lambda _: MAX_ATTEMPTS) == []
    assert all(delivery.reached_the_store for delivery in ledger.deliveries)
    assert place.effects_violations(SOME, exactly=place.together) == []


@pytest.mark.parametrize("again", ["delivered to two at once", "delivered to one"])
@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_every_failure_is_counted_once_while_the_network_fails(place, fleet, again):
    two = again == "delivered to two at once"
    place.options = {"patience": 60}
    fleet.options = {**COUNTED, "deliveries": 3, "redelivered": [None, None] if two else [False, True]}
    keys = FEW if two else SOME
    with place.behind_a_proxy() as proxy:
        for hand in dealt(keys, copies=2 if two else 1):
            fleet.start(hand)
        faults = fleet.chance.sample(FAULTS, len(FAULTS))
        for turn, fault in enumerate(faults):
            if fleet.reach("attempt", len(SOME) * (turn + 1) // 4):
                disturb(proxy, fault, fleet.chance)
                threading.Event().wait(0.1)
                proxy.heal()
        ledger = fleet.finish()
        assert proxy.lost
    assert ledger.violations([], limit_of=lambda _: MANY) == []
    assert all(delivery.reached_the_store for delivery in ledger.deliveries)
    assert place.failures() == {key: ledger.counted(key)[1] for key in keys}
    assert ledger.faults() == []


@pytest.mark.parametrize("lost", ["answer", "request"])
@pytest.mark.parametrize("place", SERVERS, indirect=True)
def test_any_one_packet_may_be_lost(place, fleet, lost):
    place.options = {"patience": 60}
    fleet.options = {**FULL, "redelivered": [False, True]}
    # Redis has so few that each can be lost.
    step = 1 if place.kind == "redis" else STEP
    # The number of the packet that is lost; there are not so many when none was.
    key = SEED % step
    while True:
        proxy = place.behind_a_proxy()
        with proxy:
            (proxy.lose_answers if lost == "answer" else proxy.lose_requests)(after=key)
            assert fleet.start([[key]], fails=1).wait() == 0
            if not proxy.lost:
                break
        key += step
    ledger = fleet.finish()
    keys = range(SEED % step, key + 1, step)
    assert key > 6
    assert ledger.violations(keys, limit_of=lambda _: MAX_ATTEMPTS) == []
    assert all(delivery.reached_the_store for delivery in ledger.deliveries)
    assert place.effects_violations(keys, exactly=place.together) == []


@pytest.mark.parametrize("place", [kind for kind in SERVERS if kind != "redis"], indirect=True)
def test_the_work_whose_commit_was_confirmed_to_nobody_is_not_done_again(place, fleet):
    gate = place.folder / "gate"
    with place.behind_a_proxy() as proxy:
        worker = fleet.start([[0]], gate=str(gate), **FULL)
        fleet.wait("attempt", 1)
        proxy.lose_answers(COMMIT[place.kind])
        gate.touch()
        assert worker.wait() == 0
        assert proxy.lost == 1
    ledger = fleet.finish()
    assert [event["e"] for event in ledger.events if event["e"] in ("attempt", "not committed")] == [
        "attempt",
        "not committed",
    ]
    assert [delivery.outcome for delivery in ledger.deliveries] == ["OperationalError", "duplicate"]
    assert ledger.violations([0], limit_of=lambda _: 1) == []
    assert place.count(effects) == {0: 1}


# -- the disk is full


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 megabytes: a write-ahead log takes four."""
    if os.getuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("transactional", [True, False])
def test_a_full_disk_hides_no_business_error_and_loses_nothing(nurseries, small_disk, tmp_path, transactional):
    with ExitStack() as stack:
        place = Place("sqlite", None, small_disk)
        stack.callback(place.close)
        fleet = Fleet(nurseries, place, tmp_path / "ledger")
        stack.callback(fleet.close)
        if transactional:
            fleet.options = FULL
        else:
            fleet.options = COUNTED | {"deliveries": 10}
        for hand in dealt(SOME):
            fleet.start(hand)
        fleet.wait("attempt", len(SOME) // 4)
        filler = small_disk / "filler"
        fill(filler)
        since = fleet.ledger.count("end")
        fleet.wait("end", since + 100)
        filler.unlink()
        ledger = fleet.finish()
        assert (
            ledger.violations(SOME if transactional else [], limit_of=lambda _: MAX_ATTEMPTS if transactional else MANY)
            == []
        )
        assert not all(delivery.reached_the_store for delivery in ledger.deliveries), "the disk was not full"
        if transactional:
            assert place.effects_violations(SOME, exactly=True) == []
        else:
            assert miscounted(place, ledger, SOME) == []


def fill(path):
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


# -- the checks themselves: what would a store have to do for nobody to notice?

LIES = {
    "SavesNothing": COUNTED,
    "SavesOverOthers": COUNTED,
    "ForgetsFlights": {**FULL, "fails": MANY},
    "RepeatsFences": COUNTED,
    "ForgetsMarks": {**FULL, "fails": 0},
    "ForgetsItems": {**FULL, "fails": 1},
    "HidesErrors": COUNTED,
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_the_checks_notice_a_store_that_lies(place, fleet, lie):
    options = LIES[lie]
    # The first item has an honest store, the second one that lies (which may never settle it).
    for sabotage in (None, lie):
        for _ in range(2):
            key = int(sabotage is not None)
            fleet.start([[key]] * 8, **options, sabotage=sabotage, patience=3, fronted=False, asynchronous=False)
    ledger = fleet.finish()

    def findings(key):
        if options is COUNTED:
            return ledger.violations([], limit_of=lambda _: MANY) + miscounted(place, ledger, [key])
        limit = options["max_attempts"]
        return ledger.violations([key], limit_of=lambda _: limit) + place.effects_violations([key], exactly=True)

    assert [finding for finding in findings(0) if finding.startswith("0:")] == []
    assert [finding for finding in findings(1) if finding.startswith("1:")], "nobody noticed"
