"""Reads recorded scenarios: a list of `{"scenario": …, "trace": …}`, as JSON or compressed (by suffix .xz, .gz)."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from .schema import MALFORMED, check

Json = Mapping[str, Any]
RECORDED = Path(__file__).parent / "data" / "spring-retry.json.xz"


@attrs.frozen(eq=False)
class Execution:
    """One `execute()` as recorded: its call, its own events (without those of nested ones), and what came of it.

    `raised` is the exception value that left it, None if it returned.
    """

    call: Json
    template: int
    ancestors: tuple[Execution, ...]
    events: list[list[Any]]
    children: list[Execution]
    raised: list[Any] | None

    def all(self) -> Iterator[Execution]:
        """This execution and those inside it, outer first."""
        yield self
        for child in self.children:
            yield from child.all()

    @property
    def state(self) -> Json | None:
        return self.call.get("state")

    def named(self, kind: str) -> list[list[Any]]:
        return [event for event in self.events if event[0] == kind]


@attrs.frozen(eq=False)
class Case:
    """A scenario with its trace; `executions[i]` is None where call i is an external act.

    Nothing else can be said of one that is not `known`.
    """

    scenario: Json
    trace: Json
    executions: tuple[Execution | None, ...]
    known: bool = True

    def call_executions(self, index: int) -> Iterator[Execution]:
        root = self.executions[index]
        return iter(()) if root is None else root.all()


def read(path: Path) -> list[Case]:
    """The cases of a file, in its order."""
    unpack = {".xz": lzma.decompress, ".gz": gzip.decompress}.get(path.suffix, bytes)
    return [case(entry["scenario"], entry["trace"]) for entry in json.loads(unpack(path.read_bytes()))]


def case(scenario: Json, trace: Json) -> Case:
    """A scenario with its trace, taken apart."""
    try:
        check(scenario, trace)
        executions = tuple(map(_top_level, scenario["calls"], trace.get("calls", ())))
    except MALFORMED:
        return Case(scenario, trace, (), known=False)
    return Case(scenario, trace, executions)


def _top_level(call: Json, record: Json) -> Execution | None:
    if "external" in call:
        return None
    return _execution(call, iter(record["events"]), (), record.get("raised"))[0]


def _execution(
    call: Json, events: Iterator[list[Any]], ancestors: tuple[Execution, ...], raised: list[Any] | None
) -> tuple[Execution, list[Any] | None]:
    """Takes the events of one execution off `events`, and the `ret` event behind it, if it is a nested one."""
    template = call.get("t", 0)
    own: list[list[Any]] = []
    children: list[Execution] = []
    execution = Execution(call, template, ancestors, own, children, raised)
    actions = iter(call["outcomes"])
    for event in events:
        if event[0] == "ret":
            outcome = event[3] if event[2] == "raised" else None
            return attrs.evolve(execution, raised=outcome), event
        own.append(event)
        action = _action(call, event, actions)
        if "call" in action:
            child, ret = _execution(action["call"], events, (*ancestors, execution), None)
            children.append(child)
            own.extend([ret] if ret else [])
    return execution, None


def _action(call: Json, event: list[Any], actions: Iterator[Json]) -> Json:
    """What the callback or recovery does at this event; nothing for the other events."""
    if event[0] == "attempt":
        return next(actions, {})
    return call.get("recovery", {}) if event[0] == "recover" else {}
