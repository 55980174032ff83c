"""Partitions with items that are being tried elsewhere: they are looked at again later, and have not failed."""

from __future__ import annotations

import threading
import time

import pytest
from sqlalchemy import create_engine, text

from retrykit import RetryState, RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, run_partitions, stop
from retrykit.batch.postponing import LONGEST, Pauses, Withholding
from retrykit.errors import AttemptsInFlightError
from retrykit.sql import SqlJobStore, SqlRetryContextCache, create_tables, stored_jobs
from tests.doubles import ManualClock

PATIENCE = 30.0


@pytest.fixture
def engine(url):
    engine = create_engine(url)
    create_tables(engine)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE work (item INTEGER)"))
    yield engine
    engine.dispose()


class Source:
    """Gives each item until it is told that it is settled, as a queue does."""

    def __init__(self, items):
        self.items = list(items)

    def read_from(self, position):
        yield from [(item, None) for item in self.items]

    def settled(self, items):
        for item in items:
            self.items.remove(item)


def template_on(engine):
    return RetryTemplate(
        name="load",
        retry_policy=SimpleRetryPolicy(1),
        context_cache=SqlRetryContextCache(engine),
        remember_completed=3600,
    )


def steps(engine, process=lambda item: item, **options):
    """What makes the steps of two partitions, the items 1 to 3 and 11 to 13."""
    sources = {part: Source(range(10 * part - 9, 10 * part - 6)) for part in (1, 2)}
    options = {"template": template_on(engine), "key": lambda item: item} | options

    def write(connection, items):
        connection.execute(text("INSERT INTO work VALUES (:item)"), [{"item": item} for item in items])

    def make(part, _):
        return ChunkStep(
            name="load",
            reader=sources[part],
            processor=process,
            writer=write,
            transaction=engine.begin,
            chunk_size=1,
            jobs=SqlJobStore(engine),
            **options,
        )

    return make


def forgetful(engine, *errors):
    """Steps whose processor fails at the item 2 in these ways, one after the other."""
    left = list(errors)

    def process(item):
        if item == 2 and left:
            raise left.pop(0)
        return item

    return steps(engine, process, template=RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)), key=None)


def written(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(text("SELECT item FROM work")))


def states(engine):
    return {job.parameters["partition"]: (job.status, job.reason) for job in stored_jobs(engine)}


class Elsewhere(ManualClock):
    """Something happens while this host waits for the first time."""

    def __init__(self, happens):
        super().__init__()
        self.happens = happens

    def sleep(self, seconds):
        if not self.slept:
            self.happens()
        super().sleep(seconds)


def test_a_partition_waits_for_an_attempt_that_another_one_makes_and_goes_on_behind_it(engine):
    trying, done = threading.Event(), threading.Event()

    def work(_):
        trying.set()
        assert done.wait(PATIENCE)

    other = template_on(engine)
    thread = threading.Thread(target=other.execute, args=(work,), kwargs={"state": RetryState(key=2, journal="always")})
    thread.start()
    assert trying.wait(PATIENCE)
    seen = []

    def finish():
        # The other partition was run meanwhile, and nobody may take this one for failed.
        (job, _) = stored_jobs(engine)
        seen.append((states(engine)["2/2"], job.status, job.lease_until is None, written(engine)))
        done.set()
        thread.join(PATIENCE)

    clock = Elsewhere(finish)
    try:
        division = run_partitions(steps(engine), 2, clock=clock, poll=0.05)
    finally:
        done.set()
    assert seen == [(("finished", None), "stopped", False, [1, 11, 12, 13])]
    assert (division.finished, sorted(division.reports)) == (True, [1, 2])
    # What the other one has done is not done again.
    assert written(engine) == [1, 3, 11, 12, 13]
    assert set(clock.slept) == {0.05}


def test_an_attempt_of_a_host_that_has_died_is_waited_for_until_its_lease_is_over(engine):
    lease = 0.4
    flight = {"fence": 7, "owner": "elsewhere/boot/pid:[1]/7/7/1", "since": 0.0, "until": time.time() + lease}
    known = {"format": 1, "name": "load", "key": 2, "retry_count": 0, "fence": 7, "in_flight": [flight]}
    template = template_on(engine)
    template.context_cache.save(template.key_of(2), known, None)
    began = time.monotonic()
    assert run_partitions(steps(engine), 2, poll=0.05).finished
    assert lease / 2 < time.monotonic() - began < PATIENCE
    assert written(engine) == [1, 2, 3, 11, 12, 13]
    # Not each time that it was looked at.
    assert next(job.runs for job in stored_jobs(engine)) < lease / 0.05


def test_who_shares_the_partitions_waits_for_one_that_pauses_and_runs_it_then(engine):
    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {"partition": "2/2"})
    jobs.release(claim, status="stopped", reason="running elsewhere", counts={}, pause=60)
    (stored,) = stored_jobs(engine)
    assert 50 < stored.lease_until.timestamp() - jobs.now() < 60
    assert jobs.is_taken(stored)

    def end_the_pause():
        assert (written(engine), states(engine)["2/2"]) == ([1, 2, 3], ("stopped", "running elsewhere"))
        jobs.release(jobs.claim("load", {"partition": "2/2"}), status="stopped", counts={}, pause=0.01)

    division = run_partitions(steps(engine), 2, clock=Elsewhere(end_the_pause))
    assert (division.finished, sorted(division.reports)) == (True, [1, 2])
    assert written(engine) == [1, 2, 3, 11, 12, 13]


def test_a_partition_that_pauses_is_stopped_with_the_whole_job(engine):
    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {"partition": "2/2"})
    jobs.release(claim, status="stopped", reason="running elsewhere", counts={}, pause=60)

    def process(_):
        stop("wrong file", job=True)

    def wait():
        pytest.fail("there is nothing to wait for")

    division = run_partitions(steps(engine, process), 2, clock=Elsewhere(wait))
    assert division.failures == {1: "stopped: wrong file", 2: "stopped: wrong file"}
    assert states(engine)["2/2"] == ("stopped", "wrong file")


def test_a_partition_that_waited_can_fail_as_any_other(engine):
    make = forgetful(engine, AttemptsInFlightError(name="load", key=2, running=1), OSError("no line"))
    division = run_partitions(make, 2, poll=0.01)
    assert list(division.failures) == [1]
    assert division.failures[1].endswith("OSError: no line")
    assert states(engine)["1/2"] == ("failed", division.failures[1])
    assert run_partitions(make, 2).finished


def test_the_wait_can_be_interrupted_and_the_next_run_begins_at_once(engine):
    make = forgetful(engine, AttemptsInFlightError(name="load", key=2, running=1))

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_partitions(make, 2, clock=Elsewhere(interrupt), poll=20)
    (waits, other) = stored_jobs(engine)
    assert (waits.status, other.status) == ("stopped", "finished")
    assert waits.reason.startswith("item 2 (process): AttemptsInFlightError: Attempts of load 2 are running elsewhere")
    assert make(1, 2).run({"partition": "1/2"}).status == "finished"


def test_a_failure_of_which_nobody_has_said_what_follows_leaves_the_job_free(engine):
    jobs = SqlJobStore(engine)
    held = Withholding(jobs)
    claim = held.claim("load", {})
    held.release(claim, status="failed", reason="no line", counts={})
    assert jobs.is_taken(jobs.state("load", {}))
    held.close()
    assert not jobs.is_taken(jobs.state("load", {}))


def test_pauses_grow_and_end_with_the_lease_that_is_waited_for():
    pauses, unknown = Pauses(1.0), AttemptsInFlightError()
    assert [pauses.next(1, unknown, 1000.0) for _ in range(7)] == [1, 2, 4, 8, 16, LONGEST, LONGEST]
    assert pauses.next(1, AttemptsInFlightError(until=1007.0), 1000.0) == 7
    # It is over, but whoever makes it is known to live.
    assert pauses.next(1, AttemptsInFlightError(until=900.0), 1000.0) == 1
    assert pauses.next(2, AttemptsInFlightError(until=9000.0), 1000.0) == 1


def test_until_when_an_attempt_elsewhere_is_believed_in_is_told(engine):
    template = template_on(engine)
    with pytest.raises(AttemptsInFlightError) as found:
        template.execute(
            lambda _: template.execute(lambda _: None, state=RetryState(key=7, redelivered=True)),
            state=RetryState(key=7, journal="always"),
        )
    assert 0 < found.value.until - template.time() <= template.lease
