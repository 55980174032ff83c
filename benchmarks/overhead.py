"""What does a call through retrykit cost, next to a plain call, hand-written code and the other retry libraries?"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import peers
import work
from peers import ATTEMPTS, RETRIED, Function
from report import Options, Report, Target, parse_options, publish, table, version
from sampling import Call, Samples, paired_ratio, sample
from work import ANSWER, EXHAUSTED, FLAKY, SUCCESS

try:
    import counted
    import own
except ModuleNotFoundError as missing:
    if missing.name != "retrykit":
        raise
    own = counted = None  # type: ignore[assignment]

OURS = "retrykit, decorated"
EXECUTE = "retrykit, execute(callback)"
BLOCK = "retrykit, attempts() block"
STATE_PER_CALL = "retrykit, execute(state=RetryState(…, redelivered=False))"
STATE_PREBUILT = "retrykit, execute(state=prebuilt)"
STATE_UNKNOWN = "retrykit, execute(state=RetryState(…, redelivered=None))"
DELIVERIES = "retrykit, three deliveries"
FORWARDING, LOOP, FASTEST = peers.FORWARDING, peers.LOOP, "nopanic"


# ---- what is called


@attrs.frozen
class Subject:
    """`build` makes the call around a body; `only` names the one scenario that it can do, if it cannot do all."""

    name: str
    package: str | None
    build: Callable[[Function], Call]
    only: str | None = None


def decorated_by(peer: peers.Peer, *, awaited: bool) -> Callable[[Function], Call]:
    return lambda body: Call(expression="call(None)", names={"call": peer.decorator()(body)}, awaited=awaited)


def subjects(*, awaited: bool) -> list[Subject]:
    """The floor, the references and the peers first, ours last."""
    floors = peers.ASYNC_FLOORS if awaited else peers.FLOORS
    loop = peers.ASYNC_HAND_WRITTEN_LOOP if awaited else peers.HAND_WRITTEN_LOOP
    return [
        *(Subject(floor.name, None, decorated_by(floor, awaited=awaited), only=SUCCESS) for floor in floors),
        Subject(loop.name, None, decorated_by(loop, awaited=awaited)),
        *(Subject(peer.name, peer.name, decorated_by(peer, awaited=awaited)) for peer in peers.LIBRARIES),
        *_ours(awaited=awaited),
    ]


def _ours(*, awaited: bool) -> list[Subject]:
    names = (OURS, EXECUTE, BLOCK, STATE_PER_CALL, STATE_PREBUILT, STATE_UNKNOWN, DELIVERIES)
    stateful = dict.fromkeys((STATE_PER_CALL, STATE_PREBUILT, STATE_UNKNOWN), SUCCESS) | {DELIVERIES: FLAKY}
    return [
        Subject(name, "retrykit", build, only=stateful.get(name))
        for name, build in zip(names, _own_builders(awaited=awaited), strict=True)
    ]


def _own_builders(*, awaited: bool) -> list[Callable[[Function], Call]]:
    if own is None:
        return [_without_retrykit] * 7
    if awaited:
        per_call = own.async_state_per_call
        stateless = [own.async_decorated, own.async_executed, own.async_block]
        return [
            *stateless,
            per_call(redelivered=False),
            own.async_state_prebuilt,
            per_call(redelivered=None),
            own.async_three_deliveries,
        ]
    per_call = own.state_per_call
    stateless = [own.decorated, own.executed, own.block]
    return [
        *stateless,
        per_call(redelivered=False),
        own.state_prebuilt,
        per_call(redelivered=None),
        own.three_deliveries,
    ]


def _without_retrykit(_body: Function) -> Call:
    raise ModuleNotFoundError(name="retrykit")


# ---- equal work


class UnequalWorkError(Exception):
    """A subject did not do what the others do, so its time would mean nothing."""


async def check_equal_work(subject: Subject, scenario: str, *, awaited: bool) -> None:
    """Call it twice around a counting body: the outcome and the number of calls must be what the scenario says."""
    calls: list[None] = []
    function = work.watched(work.body(scenario, awaited=awaited), lambda: calls.append(None), awaited=awaited)
    once = subject.build(function).once()
    for _ in range(2):
        calls.clear()
        found = (await work.outcome(once, awaited=awaited), len(calls))
        expected = (RETRIED.__name__ if scenario == EXHAUSTED else ANSWER, 1 if scenario == SUCCESS else ATTEMPTS)
        if found != expected:
            message = f"{subject.name}, {scenario}: outcome and calls are {found}, not {expected}"
            raise UnequalWorkError(message)


# ---- measuring


@attrs.frozen
class Group:
    """One scenario in one mode: everything in it is timed interleaved. `missing` names what could not be imported."""

    scenario: str
    awaited: bool
    samples: Mapping[str, Samples]
    missing: Mapping[str, str | None]
    versions: Mapping[str, str | None]

    @property
    def mode(self) -> str:
        return "async" if self.awaited else "sync"

    def ratio(self, ours: str, reference: str | None) -> float | None:
        if reference is None or ours not in self.samples or reference not in self.samples:
            return None
        return paired_ratio(self.samples[ours].seconds, self.samples[reference].seconds)

    @property
    def fastest_other_peer(self) -> str | None:
        """The quickest library but nopanic, by its median."""
        others = [peer.name for peer in peers.LIBRARIES if peer.name in self.samples and peer.name != FASTEST]
        return min(others, key=lambda name: self.samples[name].median, default=None)


async def measure(scenario: str, *, awaited: bool, options: Options) -> Group:
    calls: dict[str, Call] = {}
    missing: dict[str, str | None] = {}
    able = [subject for subject in subjects(awaited=awaited) if subject.only in (None, scenario)]
    for subject in able:
        try:
            await check_equal_work(subject, scenario, awaited=awaited)
        except ImportError as error:
            missing[subject.name] = error.name
        else:
            call = subject.build(work.body(scenario, awaited=awaited))
            calls[subject.name] = attrs.evolve(call, ends_with=RETRIED if scenario == EXHAUSTED else None)
    rounds, seconds = (11, 0.004) if options.quick else (41, 0.015)
    timed = await sample(list(calls.values()), rounds=rounds, seconds=seconds)
    versions = {subject.name: version(subject.package) if subject.package else None for subject in able}
    return Group(scenario, awaited, dict(zip(calls, timed, strict=True)), missing, versions)


def measure_all(options: Options) -> list[Group]:
    """All groups: the sync ones outside of any event loop, the async ones inside one loop."""
    return [*_driven(_measure_mode(options, awaited=False)), *asyncio.run(_measure_mode(options, awaited=True))]


async def _measure_mode(options: Options, *, awaited: bool) -> list[Group]:
    return [await measure(scenario, awaited=awaited, options=options) for scenario in work.FAILURES]


def _driven(coroutine: Any) -> list[Group]:
    """Run a coroutine that never waits for anything, without a loop that the sync subjects would find running."""
    try:
        coroutine.send(None)
    except StopIteration as finished:
        groups: list[Group] = finished.value
        return groups
    raise AssertionError


# ---- reporting


def rows(groups: list[Group]) -> Iterator[dict[str, Any]]:
    """One flat object per subject and group; seconds per call, None where a subject is missing."""
    for group in groups:
        for name, package_version in group.versions.items():
            samples = group.samples.get(name)
            yield {
                "scenario": group.scenario,
                "mode": group.mode,
                "name": name,
                "version": package_version,
                "missing": name in group.missing,
                "min": samples and samples.minimum,
                "median": samples and samples.median,
                "max": samples and samples.maximum,
                "rounds": len(samples.seconds) if samples else 0,
                "times_forwarding_closure": group.ratio(name, FORWARDING),
                "times_hand_written_loop": group.ratio(name, LOOP),
            }


def tables(groups: list[Group]) -> Iterator[str]:
    heads = ("", "version", "min ns", "median ns", "max ns", "× closure", "× loop")
    for group in groups:
        lines = [_line(row) for row in rows([group])]
        yield table(f"{group.mode}, {group.scenario}", heads, lines)


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    if row["missing"]:
        return (row["name"], "missing", "–", "–", "–", "–", "–")
    times = [f"{row[column] * 1e9:,.0f}" for column in ("min", "median", "max")]
    ratios = [row["times_forwarding_closure"], row["times_hand_written_loop"]]
    return (row["name"], row["version"] or "", *times, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios))


def targets(groups: list[Group]) -> Iterator[Target]:
    """The ratios that were promised, then the counted facts."""
    for group in groups:
        for name, ours, reference, bound in _promises(group):
            yield Target(f"{group.mode}, {group.scenario}: {name}", group.ratio(ours, reference), bound)
    if counted is not None:
        yield from counted.targets()


def _promises(group: Group) -> Iterator[tuple[str, str, str | None, float]]:
    if group.scenario == SUCCESS:
        bound = 2.0 if group.awaited else 2.5
        yield "decorated / forwarding closure", OURS, FORWARDING, bound
        yield "execute(callback) / forwarding closure", EXECUTE, FORWARDING, 4.0
        yield "first delivery, state made per call / stateless execute", STATE_PER_CALL, EXECUTE, 2.0
        yield "first delivery, state prebuilt / stateless execute", STATE_PREBUILT, EXECUTE, 2.0
    if group.scenario == FLAKY:
        yield "decorated / hand-written loop", OURS, LOOP, 5.0
    if group.scenario == SUCCESS:
        # What nearly every call costs. After failures the rows show everybody, and where we stand.
        other = group.fastest_other_peer
        yield f"decorated / fastest peer but {FASTEST} ({other})", OURS, other, 1.0


def main() -> int:
    options = parse_options(__doc__ or "")
    logging.getLogger().addHandler(logging.NullHandler())
    with peers.without_waiting():
        groups = measure_all(options)
        report = Report(list(rows(groups)), list(targets(groups)))
    return publish(report, options, tables(groups))


if __name__ == "__main__":
    raise SystemExit(main())
