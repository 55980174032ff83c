"""A step divided into partitions: each runs once, whoever runs it; the database says who."""

from __future__ import annotations

import threading
from contextlib import suppress

import attrs
import pytest
from sqlalchemy import Column, Integer, MetaData, Table, create_engine, event, insert, select, update
from sqlalchemy.orm import sessionmaker

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.batch import ChunkStep, run_partitions, stop
from retrykit.errors import JobError, JobLostError
from retrykit.sql import SqlJobStore, create_tables, restart_job, rk_job, sqlite_engine, stop_job, stored_jobs
from tests.doubles import ManualClock

metadata = MetaData()
# Nothing is unique: what is written twice shows.
work = Table("work", metadata, Column("item", Integer, nullable=False), Column("part", Integer, nullable=False))
ITEMS = range(60)


@pytest.fixture
def engine(url):
    engine = engine_of(url)
    create_tables(engine)
    metadata.create_all(engine)
    yield engine
    engine.dispose()


def engine_of(url):
    return sqlite_engine(url) if url.startswith("sqlite") else create_engine(url)


def steps(engine, *, process=lambda item: item):
    """What makes the steps: each has the items that leave the same rest."""

    def make(part, parts):
        def write(session, items):
            session.execute(insert(work), [{"item": item, "part": part} for item in items])

        return ChunkStep(
            name="load",
            reader=[item for item in ITEMS if item % parts == part - 1],
            processor=process,
            writer=write,
            transaction=sessionmaker(engine).begin,
            chunk_size=4,
            template=RetryTemplate(name="load", retry_policy=SimpleRetryPolicy(1)),
            jobs=SqlJobStore(engine),
        )

    return make


def written(engine):
    with engine.connect() as connection:
        return sorted(connection.scalars(select(work.c.item)))


def states(engine):
    return {job.parameters["partition"]: (job.status, job.reason) for job in stored_jobs(engine)}


def test_one_worker_runs_all_partitions(engine):
    division = run_partitions(steps(engine), 3, {"day": 1})
    assert written(engine) == list(ITEMS)
    assert division.finished
    assert sorted(division.reports) == [1, 2, 3]
    assert states(engine) == dict.fromkeys(("1/3", "2/3", "3/3"), ("finished", None))
    assert [job.parameters["day"] for job in stored_jobs(engine)] == [1, 1, 1]
    # All is done: there is nothing for a second one.
    again = run_partitions(steps(engine), 3, {"day": 1})
    assert (again.finished, again.reports) == (True, {})
    assert written(engine) == list(ITEMS)


def test_workers_share_the_partitions_and_each_runs_once(url, engine):
    start, found = threading.Barrier(3), []

    def run():
        own = engine_of(url)
        start.wait(30)
        found.append(run_partitions(steps(own), 6, poll=0.01))
        own.dispose()

    workers = [threading.Thread(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert written(engine) == list(ITEMS)
    assert sorted(part for division in found for part in division.reports) == [1, 2, 3, 4, 5, 6]
    assert all(division.finished for division in found)


@pytest.mark.parametrize(
    "parameters", [{}, {"day": "50%_\\ é", "a": [1]}, {"day": "2026/11/12", "a": {"partition": "1/1"}}]
)
def test_another_number_of_partitions_is_refused_before_anything_is_written_again(engine, parameters):
    run_partitions(steps(engine), 3, parameters)
    run_partitions(steps(engine), 2, parameters | {"of": "another input"})
    for run in (
        lambda: run_partitions(steps(engine), 2, parameters),
        lambda: steps(engine)(1, 1).run(parameters),
    ):
        with pytest.raises(JobError, match=r"load was begun in 3 partitions \(number \d+\)"):
            run()
    assert written(engine) == sorted([*ITEMS, *ITEMS])
    for job in stored_jobs(engine):
        restart_job(engine, job.id)
    assert run_partitions(steps(engine), 2, parameters).finished
    with pytest.raises(JobError, match=r"in 2 partitions .*is not run in 3"):
        run_partitions(steps(engine), 3, parameters)


def test_of_two_numbers_of_partitions_that_begin_at_the_same_moment_one_runs(url, engine):
    both, found = threading.Barrier(2), []

    def begin(parameters):
        own = engine_of(url)
        jobs = SqlJobStore(own)
        jobs.now()

        @event.listens_for(own, "commit")
        def wait_for_the_other(_):
            # In vain, if that one may not look before this one has committed.
            with suppress(threading.BrokenBarrierError):
                both.wait(0.3)

        try:
            found.append(jobs.claim("load", parameters))
        except JobError as error:
            found.append(str(error))
        own.dispose()

    threads = [threading.Thread(target=begin, args=({"partition": f"1/{parts}"},)) for parts in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (refused,) = [one for one in found if isinstance(one, str)]
    assert "the job load was begun in" in refused
    (claim,) = [one for one in found if not isinstance(one, str)]
    assert [job.id for job in stored_jobs(engine)] == [claim.id]
    SqlJobStore(engine).abandon(claim)
    # Nothing stands in the way of the one that has begun.
    assert run_partitions(steps(engine), int(claim.parameters["partition"][2:])).finished
    assert written(engine) == list(ITEMS)


def test_a_job_that_was_begun_undivided_is_not_divided_later(engine):
    steps(engine)(1, 1).run({"day": 1})
    with pytest.raises(JobError, match="without partitions"):
        run_partitions(steps(engine), 2, {"day": 1})
    assert steps(engine)(1, 1).run({"day": 2}).status == "finished"


def test_a_partition_that_fails_leaves_the_others_alone_and_is_not_started_again(engine):
    def process(item):
        if item == 4:
            raise OSError("no line")
        return item

    division = run_partitions(steps(engine, process=process), 3)
    assert division.failures == {2: states(engine)["2/3"][1]}
    assert division.failures[2].endswith("OSError: no line")
    assert sorted(division.reports) == [1, 3]
    # Another worker of the same campaign does not try it again; a later one does.
    begun = min(job.started_at.timestamp() for job in stored_jobs(engine))
    other = run_partitions(steps(engine), 3, since=begun)
    assert (other.failures, other.reports) == (division.failures, {})
    later = run_partitions(steps(engine), 3)
    assert (later.finished, sorted(later.reports)) == (True, [2])
    assert written(engine) == list(ITEMS)


def test_a_partition_whose_step_cannot_be_made_leaves_the_others_alone(engine, caplog):
    def make(part, parts):
        if part == 2:
            raise FileNotFoundError("part-2.csv")
        return steps(engine)(part, parts)

    division = run_partitions(make, 3)
    assert division.failures == {2: "FileNotFoundError: part-2.csv"}
    assert sorted(division.reports) == [1, 3]
    assert "the step of partition 2 of 3 of load cannot be made" in caplog.messages
    assert run_partitions(steps(engine), 3).finished


def test_what_forbids_one_partition_to_go_on_leaves_the_others_alone(engine):
    def process(item):
        if item == 4:
            raise JobError("this is none of its items' fault")
        return item

    division = run_partitions(steps(engine, process=process), 3)
    assert list(division.failures) == [2]
    assert division.failures[2].endswith("JobError: this is none of its items' fault")
    assert sorted(division.reports) == [1, 3]


def test_a_partition_of_a_dead_process_is_taken_over(engine):
    jobs = SqlJobStore(engine)
    jobs.abandon(jobs.claim("load", {"partition": "2/3"}))
    assert run_partitions(steps(engine), 3).finished
    assert written(engine) == list(ITEMS)


def test_a_partition_of_a_host_that_has_fallen_silent_is_taken_over_when_its_lease_is_over(engine):
    jobs = SqlJobStore(engine)
    jobs.abandon(jobs.claim("load", {"partition": "2/2"}))

    def believed_for(seconds):
        facts = {"owner": "elsewhere/boot/pid:[1]/7/7/1", "lease_until": jobs.now() + seconds}
        with engine.begin() as connection:
            connection.execute(update(rk_job).where(rk_job.c.parameters.contains("2/2")).values(facts))

    class Clock(ManualClock):
        def sleep(self, seconds):
            super().sleep(seconds)
            believed_for(60 if len(self.slept) < 3 else -1)

    believed_for(60)
    clock = Clock()
    division = run_partitions(steps(engine), 2, clock=clock)
    assert (division.finished, sorted(division.reports), len(clock.slept)) == (True, [1, 2], 3)
    assert written(engine) == list(ITEMS)


def test_what_runs_elsewhere_is_waited_for(engine, caplog):
    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {"partition": "2/2"})

    class Clock(ManualClock):
        def sleep(self, seconds):
            super().sleep(seconds)
            jobs.abandon(claim)

    clock = Clock()
    with caplog.at_level("INFO", "retrykit.batch"):
        assert run_partitions(steps(engine), 2, clock=clock, poll=3).finished
    assert clock.slept == [3]
    assert written(engine) == list(ITEMS)
    assert caplog.messages == ["waiting for partitions of load that others run, or that pause: 2 of 2"]


def test_what_was_run_elsewhere_meanwhile_is_not_waited_for(engine):
    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {"partition": "1/2"})

    def process(item):
        if item == 1:
            jobs.abandon(claim)
        return item

    clock = ManualClock()
    assert run_partitions(steps(engine, process=process), 2, clock=clock).finished
    assert clock.slept == []
    assert written(engine) == list(ITEMS)


def test_a_step_is_made_once_for_a_partition_that_others_run(engine):
    jobs, made = SqlJobStore(engine), []
    claim = jobs.claim("load", {"partition": "2/2"})

    class Clock(ManualClock):
        def sleep(self, seconds):
            super().sleep(seconds)
            if len(self.slept) == 3:
                jobs.abandon(claim)

    def make(part, parts):
        made.append(part)
        return steps(engine)(part, parts)

    assert run_partitions(make, 2, clock=Clock()).finished
    assert made == [1, 2]


def test_steps_are_made_for_what_is_run_here_and_for_the_first_one_before(engine):
    made = []

    def make(part, parts):
        made.append(part)
        return steps(engine)(part, parts)

    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {"partition": "2/4"})
    jobs.release(claim, status="finished", counts={})
    assert run_partitions(make, 4).finished
    assert made == [1, 3, 4]
    # Nothing is left to be run.
    made.clear()
    assert run_partitions(make, 4).finished
    assert made == [1]


def test_a_step_that_can_be_begun_only_once_is_made_anew_when_somebody_else_was_faster(engine):
    others, made = SqlJobStore(engine), []

    def make(part, parts):
        made.append(part)
        items = (item for item in ITEMS if item % parts == part - 1)
        step = attrs.evolve(steps(engine)(part, parts), reader=items)
        if made == [1, 2]:
            # Between the look at the partition and its claim.
            claims.append(others.claim("load", {"partition": "2/2"}))
        return step

    class Clock(ManualClock):
        def sleep(self, seconds):
            super().sleep(seconds)
            others.abandon(claims.pop())

    claims = []
    assert run_partitions(make, 2, clock=Clock()).finished
    assert made == [1, 2, 2]
    assert written(engine) == list(ITEMS)


def test_a_partition_is_stopped_for_a_reason_and_goes_on_from_there(engine):
    def process(item):
        if item == 40:
            stop("the customer has cancelled")
        return item

    division = run_partitions(steps(engine, process=process), 3)
    assert division.failures == {2: "stopped: the customer has cancelled"}
    assert states(engine)["2/3"] == ("stopped", "the customer has cancelled")
    assert division.reports[2].status == "stopped"
    assert [item for item in written(engine) if item % 3 == 1] == [item for item in range(1, 36) if item % 3 == 1]
    assert run_partitions(steps(engine), 3).finished
    assert written(engine) == list(ITEMS)


def test_the_whole_job_is_stopped_for_a_reason_also_what_was_not_begun(engine):
    def process(item):
        if item == 1:
            stop("wrong file", job=True)
        return item

    division = run_partitions(steps(engine, process=process), 4)
    assert sorted(division.reports) == [1, 2]
    assert division.failures == dict.fromkeys((2, 3, 4), "stopped: wrong file")
    assert states(engine) == {"1/4": ("finished", None)} | dict.fromkeys(
        ("2/4", "3/4", "4/4"), ("stopped", "wrong file")
    )
    assert run_partitions(steps(engine), 4).finished
    assert written(engine) == list(ITEMS)


def test_stopping_the_whole_job_leaves_the_reasons_of_those_that_have_ended(engine):
    def process(item):
        if item % 4 == 1:
            raise OSError("no line")
        if item == 2:
            stop("wrong file", job=True)
        return item

    reason = run_partitions(steps(engine, process=process), 4).failures[2]
    assert reason.endswith("OSError: no line")
    assert states(engine)["2/4"] == ("failed", reason)
    assert states(engine)["4/4"] == ("stopped", "wrong file")
    # Nor is one that has failed before started again by those who run the others.
    begun = SqlJobStore(engine).now()
    jobs = SqlJobStore(engine)
    claim = jobs.claim("load", {"partition": "3/4"})
    assert jobs.stop_others(claim, "another file") == 0
    jobs.release(claim, status="stopped", reason="another file", counts={})
    assert run_partitions(steps(engine), 4, since=begun).failures == {
        2: reason,
        3: "stopped: another file",
        4: "stopped: wrong file",
    }


def test_a_running_partition_of_a_stopped_job_commits_nothing_more_and_says_why(engine, caplog):
    jobs = SqlJobStore(engine)
    other = jobs.claim("load", {"partition": "1/2"})

    def hear(report):
        # Between two chunks: SQLite lets one write at a time.
        if report.counts.written == 8:
            SqlJobStore(engine).stop_others(other, "wrong file")

    second = attrs.evolve(steps(engine)(2, 2), on_progress=hear)
    with caplog.at_level("INFO"), pytest.raises(JobLostError, match="was stopped: wrong file: what was claimed"):
        second.run({"partition": "2/2"})
    assert [record.levelname for record in caplog.records if "was stopped: wrong file" in record.message] == ["INFO"]
    assert len(written(engine)) == 8
    assert states(engine)["2/2"] == ("stopped", "wrong file")
    jobs.abandon(other)
    assert run_partitions(steps(engine), 2).finished
    assert written(engine) == list(ITEMS)


def test_a_worker_whose_partition_is_stopped_or_taken_says_so(engine, caplog):
    jobs = SqlJobStore(engine)
    other = jobs.claim("load", {"partition": "1/2"})

    def make(part, parts):
        def hear(report):
            if part == 2 and report.counts.written == 8:
                SqlJobStore(engine).stop_others(other, "wrong file")
                jobs.abandon(other)

        return attrs.evolve(steps(engine)(part, parts), on_progress=hear)

    with caplog.at_level("INFO", "retrykit.batch"):
        division = run_partitions(make, 2, clock=ManualClock())
    assert division.failures == {2: "stopped: wrong file"}
    assert "partition 2 of 2 of load is stopped: wrong file" in caplog.messages
    assert not [message for message in caplog.messages if "claimed by somebody else" in message]


@pytest.mark.parametrize("partitions", [True, False])
def test_who_looks_on_can_stop_a_partition_that_somebody_runs_or_all_of_them(engine, partitions):
    stopped = []

    def make(part, parts):
        def hear(report):
            # Between two chunks: SQLite lets one write at a time.
            if part == 1 and report.counts.written == 8:
                (job,) = stored_jobs(engine)
                stopped.extend(stop_job(engine, job.id, "the customer has cancelled", partitions=partitions))

        return attrs.evolve(steps(engine)(part, parts), on_progress=hear)

    division = run_partitions(make, 3)
    which = (1, 2, 3) if partitions else (1,)
    assert division.failures == dict.fromkeys(which, "stopped: the customer has cancelled")
    assert [job.parameters["partition"] for job in stopped] == [f"{part}/3" for part in which]
    assert len([item for item in written(engine) if item % 3 == 0]) == 8
    assert stop_job(engine, stopped[0].id, "again", partitions=partitions) == []
    assert run_partitions(steps(engine), 3).finished
    assert written(engine) == list(ITEMS)
    # What has ended stays as it is.
    assert stop_job(engine, stopped[0].id, "too late", partitions=partitions) == []
    assert set(states(engine).values()) == {("finished", None)}


def test_a_partition_that_is_begun_in_the_moment_in_which_all_are_stopped_is_stopped_too(url, engine):
    own, jobs = engine_of(url), SqlJobStore(engine)
    runs, stopped = jobs.claim("load", {"partition": "1/2"}), []
    stops = threading.Thread(target=lambda: stopped.append(jobs.stop_others(runs, "enough")))
    others = SqlJobStore(own)
    others.now()

    @event.listens_for(own, "commit", once=True)
    def let_them_stop(_):
        stops.start()
        # In vain, if they have to wait until this is committed.
        stops.join(0.2)

    begun = others.claim("load", {"partition": "2/2"})
    stops.join(30)
    assert stopped == [1]
    assert states(engine)["2/2"] == ("stopped", "enough")
    jobs.abandon(runs)
    others.abandon(begun)
    own.dispose()


def test_a_partition_that_is_stopped_while_its_step_is_made_is_not_begun(engine):
    def make(part, parts):
        if part == 2:
            stop_job(engine, next(stored_jobs(engine)).id, "the customer has cancelled", partitions=True)
        return steps(engine)(part, parts)

    division = run_partitions(make, 3)
    assert division.failures == dict.fromkeys((2, 3), "stopped: the customer has cancelled")
    assert written(engine) == [item for item in ITEMS if item % 3 == 0]
    # Whoever starts it later goes on.
    assert run_partitions(steps(engine), 3).finished
    assert written(engine) == list(ITEMS)


@pytest.mark.parametrize("parts", [0, -1, 1.5, True, "3"])
def test_a_bad_number_of_parts_is_refused(parts):
    with pytest.raises(ValueError, match=r"^parts: "):
        run_partitions(lambda *_: None, parts)


@pytest.mark.parametrize("poll", [0, -1.0, "1", None])
def test_a_pause_that_is_none_is_refused(poll):
    with pytest.raises((TypeError, ValueError), match=r"^poll: "):
        run_partitions(lambda *_: None, 2, poll=poll)


def test_steps_of_different_names_are_refused(engine):
    with pytest.raises(ValueError, match=r"^make: .*steps of one name \('part-1'\)"):
        run_partitions(lambda part, parts: attrs.evolve(steps(engine)(part, parts), name=f"part-{part}"), 2)


def test_an_iterator_that_all_steps_share_is_refused_when_it_was_read(engine):
    step = attrs.evolve(steps(engine)(1, 2), reader=iter(ITEMS))
    with pytest.raises(ValueError, match=r"^reader: .*for each run another iterator"):
        run_partitions(lambda *_: step, 2)


def test_a_parameter_that_would_be_overwritten_is_refused():
    with pytest.raises(ValueError, match=r'^parameters: must be without "partition", .* not'):
        run_partitions(lambda *_: None, 2, {"partition": "north"})


def test_what_makes_no_step_with_a_store_is_refused():
    with pytest.raises(TypeError, match=r"^make: "):
        run_partitions(None, 2)
    with pytest.raises(TypeError, match=r"^make: "):
        run_partitions(lambda *_: None, 2)
    step = ChunkStep(name="load", reader=[], writer=print)
    with pytest.raises(JobError, match="give the step `jobs`"):
        run_partitions(lambda *_: step, 2)


@pytest.mark.parametrize("reason", ["", 1, None])
def test_stopping_needs_a_reason(reason):
    with pytest.raises((TypeError, ValueError), match=r"^reason: "):
        stop(reason)
