"""`ChunkStep` and `AsyncChunkStep`: items in chunks, each chunk in a transaction; the thin drivers of the course."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import attrs

from retrykit.batch.arguments import begins, called_with, check_together, is_for_its_kind, is_skip_policy
from retrykit.batch.course import Course
from retrykit.batch.errors import is_veto
from retrykit.batch.report import Report, SkippedItem, kind_of
from retrykit.batch.skipping import SkipPolicy
from retrykit.batch.source import check_reader
from retrykit.batch.work import async_drive, drive
from retrykit.check import (
    are_error_types,
    as_types,
    has,
    one_of,
    whole,
    wrong_type,
    wrong_value,
)
from retrykit.key import canonical_key, is_name
from retrykit.message import Message
from retrykit.policy import CompositeRetryPolicy, PredicateRetryPolicy
from retrykit.template import AsyncRetryTemplate, RetryTemplate
from retrykit.value import Value

_log = logging.getLogger("retrykit.batch")


def payload_of(item: Any) -> tuple[bytes, str]:
    """An item as it is recorded when it is skipped, and the type of that.

    Bytes as they are, texts in UTF-8 (what that cannot say is escaped), what JSON can say as JSON, anything else as its
    `repr`. A row of a database is taken as its columns, by name.
    """
    columns = getattr(item, "_mapping", None)
    if isinstance(columns, Mapping):
        item = dict(columns)
    if isinstance(item, bytes):
        return item, "application/octet-stream"
    if isinstance(item, str):
        return item.encode("utf-8", "backslashreplace"), "text/plain; charset=utf-8"
    try:
        return json.dumps(item, allow_nan=False).encode(), "application/json"
    except (TypeError, ValueError):
        return repr(item).encode("utf-8", "backslashreplace"), "text/plain; charset=utf-8"


@attrs.frozen(slots=False)
class Templates:
    """How the step's template is used: for a whole chunk, for groups of suspects, for a single item."""

    whole: Any
    _skip: SkipPolicy
    _remembers: bool

    @cached_property
    def group(self) -> Any:
        """A group that fails by an item's fault is not tried again but halved, and what is no item's fault is: both are
        the policy's to say.
        """
        may_skip = self._skip.may_skip
        policy = CompositeRetryPolicy(
            (self.whole.retry_policy, PredicateRetryPolicy(lambda error: not may_skip(error)))
        )
        return attrs.evolve(self.whole, retry_policy=policy)

    @cached_property
    def alone(self) -> Any:
        """A single item's completion is remembered only if its source has no positions that are."""
        remembers = self.whole.remember_completed if self._remembers else None
        return attrs.evolve(self.whole, throw_last=True, remember_completed=remembers)


def _default_template(step: Any) -> Any:
    return step._kind(name=step.name)  # noqa: SLF001 - the step's own


@attrs.frozen(kw_only=True, eq=False, repr=False)
class _Step(Value):
    """What both kinds of steps are made of."""

    name: str = attrs.field(validator=is_name)
    reader: Any = attrs.field()
    writer: Callable[[Any, list[Any]], Any] = attrs.field(validator=called_with("transaction", "items", optional=False))
    processor: Callable[[Any], Any] | None = attrs.field(default=None, validator=called_with("item", gives=True))
    transaction: Callable[[], Any] | None = attrs.field(default=None, validator=begins)
    chunk_size: int = attrs.field(default=100, validator=whole(1))
    template: Any = attrs.field(default=attrs.Factory(_default_template, takes_self=True))
    skip: SkipPolicy = attrs.field(factory=SkipPolicy, validator=is_skip_policy)
    no_rollback_for: tuple[type[Exception], ...] = attrs.field(
        default=(), converter=as_types, validator=are_error_types
    )
    key: Callable[[Any], Any] | None = attrs.field(default=None, validator=called_with("item", plain=True))
    jobs: Any = attrs.field(
        default=None,
        validator=[has("claim", "joined", "book", "moved", "release", "abandon", optional=True), is_for_its_kind],
    )
    on_skip: Callable[[Any, SkippedItem], Any] | None = attrs.field(
        default=None, validator=called_with("transaction", "skipped")
    )
    none_closes_chunk: bool = attrs.field(default=False, validator=one_of(True, False))
    on_progress: Callable[[Report], Any] | None = attrs.field(default=None, validator=called_with("report"))
    payload: Callable[[Any], tuple[bytes, str]] = attrs.field(
        default=payload_of, validator=called_with("item", optional=False, plain=True)
    )
    templates: Templates = attrs.field(init=False, eq=False, repr=False)
    settles_once: bool = attrs.field(init=False, eq=False, repr=False)
    """Whether marks in the context cache answer for single items that the source gives again."""
    in_place: tuple[type[Exception], ...] = attrs.field(init=False, eq=False, repr=False)
    """The failures after which a transaction goes on."""
    _begun: list[bool] = attrs.field(init=False, factory=list, eq=False, repr=False)

    asynchronous: ClassVar[bool]
    _kind: ClassVar[type[Any]]

    @template.validator
    def _check_template(self, field: Any, template: Any) -> None:
        if not isinstance(template, self._kind):
            raise wrong_type(field.name, f"of class {self._kind.__name__}", template)

    @reader.validator
    def _check_reader(self, field: Any, reader: Any) -> None:
        check_reader(field.name, reader, asynchronous=self.asynchronous)

    def __attrs_post_init__(self) -> None:
        check_together(self)
        acknowledges = callable(getattr(self.reader, "settled", None)) and self.key is not None
        object.__setattr__(self, "settles_once", acknowledges and self.template.remember_completed is not None)
        # What is skipped in an open transaction leaves no mark.
        object.__setattr__(self, "in_place", () if self.settles_once else self.no_rollback_for)
        object.__setattr__(self, "templates", Templates(self.template, self.skip, self.settles_once))

    def course(self, parameters: Mapping[str, Any] | None, perform: Callable[[Any], Any]) -> Course:
        """One run. `ValueError` for a second one with a reader that is an iterator: what it gave is gone."""
        course = Course(self, _parameters(parameters), perform)
        if self._begun and isinstance(self.reader, Iterator | AsyncIterator):
            raise wrong_value(
                "reader", "an iterable, or for each run another iterator (this one was read)", self.reader
            )
        self._begun.append(True)
        return course

    def key_of(self, item: Any) -> Any:
        """The key of an item that is put aside; None if it has none, or is so wrong that none can be made."""
        try:
            return None if self.key is None else self.key(item)
        except Exception as fault:  # noqa: BLE001 - the user's function, given an item that is at fault itself
            _log.warning("step %s: an item that is skipped has no key: %r", self.name, fault)
            return None

    def savepoint(self, transaction: Any) -> Any:
        """A savepoint in the open transaction, or an awaitable of it."""
        from retrykit.sql.savepoints import AsyncSavepoint, Savepoint

        sync = not self.asynchronous or not hasattr(transaction, "__aenter__")
        return Savepoint(transaction) if sync else AsyncSavepoint.begin(transaction)

    def parked(self, skipped: Iterable[SkippedItem]) -> Sequence[dict[str, Any]]:
        """Skipped items as the job store records them: the arguments of `park_in`."""
        return [self._parked(one) for one in skipped]

    def _parked(self, skipped: SkippedItem) -> dict[str, Any]:
        key = None if skipped.key is None else canonical_key(self.template.name, skipped.key)
        errors = [error.to_json() for error in skipped.errors]
        return self._shown(skipped) | {
            "name": self.name,
            "reason": skipped.reason if is_veto(skipped.error) else _reason(skipped),
            "attempts": skipped.attempts,
            "key": key,
            "errors": errors,
            "first_failed_at": errors[0]["at"] if errors else None,
            "last_failed_at": errors[-1]["at"] if errors else None,
        }

    def _shown(self, skipped: SkippedItem) -> dict[str, Any]:
        """The item itself. A message as it was delivered, so that it can be sent back."""
        item, headers = skipped.item, {"retrykit-item": str(skipped.number), "retrykit-phase": skipped.phase}
        if isinstance(item, Message) and self.payload is payload_of:
            facts = {"message_id": item.id, "destination": item.destination, "payload": item.body}
            return facts | {"content_type": item.headers.get("content-type"), "headers": {**item.headers, **headers}}
        payload, content_type = self.payload(item)
        return {"payload": payload, "content_type": content_type, "headers": headers}


def _reason(skipped: SkippedItem) -> str:
    return f"skipped in {skipped.phase}: {kind_of(skipped.error)}; {skipped.reason}"


def _parameters(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of a job: what JSON can say."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise wrong_type("parameters", "a mapping of names to values", given)
    try:
        return dict(json.loads(json.dumps(dict(given), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise wrong_value("parameters", f"JSON-able ({error})", given) from error


class ChunkStep(_Step):
    """Reads items, processes them, and writes them in chunks, each chunk in a transaction of its own.

    `reader`: any iterable, or an object with `read_from(position)` (see `Reader`). `processor(item)`: what is to be
    written, None to leave the item out; without one items are written as they are. `writer(transaction, items)` gets
    what `transaction` gave, and a list that is never empty. `transaction`: any callable that gives a context manager,
    such as `sessionmaker.begin`; None: there is none. Processor and writer are called in it, again for each attempt.

    `template`: whether a failed chunk is tried again, and when (default: 3 attempts at once). `skip`: which failures
    are an item's own, so that the item is found, recorded and skipped (default: none; then they stop the step).
    `no_rollback_for`: those of them after which the transaction goes on: they are not tried again, and the culprits are
    found between savepoints, in the same transaction, which must be SQLAlchemy's. What a processor did in the
    transaction before it raised one of them stays. `key`: what names an item; then its attempts have a history, which
    with `jobs` survives a crash in a shared context cache.

    `jobs`: where position and counts are stored, and skipped items recorded: a `retrykit.sql.SqlJobStore`. Without one
    a run always begins at the beginning. `on_skip(transaction, skipped)` is called in the transaction that records a
    skipped item: its recovery. `none_closes_chunk`: where that gives None (or there is none) the item is the last of
    its chunk, and what stands behind it is written in another transaction, when this one has committed.
    `on_progress(report)` is called after each transaction. `payload(item)`: bytes and content type under which a
    skipped item is recorded.

    Immutable and thread-safe if its parts are.
    """

    __slots__ = ()
    asynchronous = False
    _kind = RetryTemplate

    def run(self, parameters: Mapping[str, Any] | None = None, *, again: bool = False) -> Report:
        """Run the step to the end of its input: the report.

        With a job store name and `parameters` (JSON-able) identify the job: one that was interrupted goes on where it
        was, one that is finished is `JobFinishedError` unless it is to run `again` from the beginning, one that is
        running is `JobRunningError`.

        Raises the failure that stopped the step, as it is; `SkipLimitError` when too many items would be skipped. What
        was committed stays, and the next run goes on behind it.
        """
        return drive(self.course(parameters, drive).run(again=again))


class AsyncChunkStep(_Step):
    """`ChunkStep` for coroutines: reader, processor, writer, transaction and hooks may be asynchronous or plain."""

    __slots__ = ()
    asynchronous = True
    _kind = AsyncRetryTemplate

    async def run(self, parameters: Mapping[str, Any] | None = None, *, again: bool = False) -> Report:
        """As `ChunkStep.run`, awaited."""
        return await async_drive(self.course(parameters, async_drive).run(again=again))
