"""Log records for programs: `JsonLines` writes each as one JSON object, with the facts of a decision as keys."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from retrykit.failure import StoredError, message_of, type_name
from retrykit.key import Key, key_to_json
from retrykit.policy import RetryDecision

if TYPE_CHECKING:
    from retrykit.context import RetryContext

_log: Final = logging.getLogger("retrykit.messaging")

_LINE: Final = 300

ATTRIBUTE: Final = "retrykit"
"""The attribute of a log record that holds the facts, for formatters of your own."""


def decision_facts(
    name: str, key: Key | None, context: RetryContext | None, error: BaseException | None
) -> dict[str, Any]:
    """The facts: `name`, `key` (JSON form), and after an attempt `attempt`, `retry`, `delay`, `reason`, `error`,
    `error_message`.
    """
    facts: dict[str, Any] = {"name": name, "key": key_to_json(key)}
    if context is not None:
        facts["attempt"] = context.attempt
        error = error or context.last_error
    decision = None if context is None else context.decision
    return {**facts, **_verdict(decision), **_failure(error)}


def in_detail(error: BaseException | None) -> BaseException | None:
    """A failure whose traceback is to be in the log: one of this process, while it logs for debugging."""
    return at_hand(error) if _log.isEnabledFor(logging.DEBUG) else None


def at_hand(error: BaseException | None) -> BaseException | None:
    """A failure that has a traceback, since it is one of this process; else None."""
    return error if error is not None and error.__traceback__ is not None else None


def in_a_line(error: BaseException) -> str:
    """Class and first line of an error, at most 300 characters of it."""
    # An error loaded from a history is a stand-in that knows the name of the original's class.
    kind = error.type.rpartition(".")[2] if isinstance(error, StoredError) else type(error).__name__
    words = _first_line(error)
    return f"{kind}: {words}" if words else kind


def _first_line(error: BaseException) -> str:
    lines = message_of(error).strip().splitlines()
    return lines[0][:_LINE] if lines else ""


def not_stored(fault: BaseException, error: BaseException) -> str:
    """Why a failed attempt could not be stored, and what it was; in few words where both have one cause."""
    why = in_a_line(_root(fault))
    return why if in_a_line(_root(error)) == why else f"{why}; it was {in_a_line(error)}"


def _root(error: BaseException) -> BaseException:
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return error


def _verdict(decision: RetryDecision | None) -> dict[str, Any]:
    if decision is None:
        return {}
    return {"retry": decision.retry, "delay": decision.delay, "reason": decision.reason}


def _failure(error: BaseException | None) -> dict[str, str]:
    if error is None:
        return {}
    kind = error.type if isinstance(error, StoredError) else type_name(type(error))
    return {"error": kind, "error_message": _first_line(error)}


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """The facts that a record of this library carries, of the container or of a `LoggingListener`; else nothing."""
    own = getattr(record, ATTRIBUTE, None)
    if isinstance(own, dict):
        return own
    given: Any = record.args
    match given:
        case (str() as name, key, int() as attempt, str(), Exception() as error, RetryDecision() as decision):
            # These are the arguments with which LoggingListener words its line.
            facts = {"name": name, "key": key_to_json(key), "attempt": attempt}
            return {**facts, **_verdict(decision), **_failure(error)}
    return {}


class JsonLines(logging.Formatter):
    """Formats a record as one line with one JSON object.

    Always there: `time` (ISO 8601, UTC), `level`, `logger`, `process`, `thread`, `message`. After a decision: `name`
    (the template's), `key`, `attempt`, `retry` (will it be tried again?), `delay` (seconds until then), `reason`,
    `error`, the class of the failure, and `error_message`, the first line of its text (300 characters at most). Of a
    message that was parked `parked_in`, a destination or table, and `parked_as`, the id that it has there. With an
    exception `traceback`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        facts: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        facts |= facts_of(record)
        if record.exc_info:
            facts["traceback"] = self.formatException(record.exc_info)
        # Escapes beyond ASCII: a terminal's or a collector's encoding must not make a line unreadable.
        return json.dumps(facts, default=repr)
