"""Sending outside of handlers: `Publisher` returns when the broker has confirmed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakSet

import attrs

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.check import Seconds, one_of, wrong_type
from retrykit.errors import CommitInDoubtError
from retrykit.lock import lock_of
from retrykit.message import as_sent, is_nonempty_text
from retrykit.messaging.broker import Broker, Session, is_broker
from retrykit.messaging.errors import BrokerError, BrokerUnavailableError, ConnectionLostError, SendInDoubtError
from retrykit.messaging.outbox import Outgoing
from retrykit.messaging.recoverers import ID
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate

_TRIES: Final = 3
# What is said otherwise, or by nobody but the session.
_NOT_HEADERS: Final = {
    "destination": "it is an argument of its own",
    "persistent": "it is an argument of its own",
    "receipt": "it belongs to the frame",
    "transaction": "it belongs to the frame",
    "content-length": "it belongs to the frame",
    "message-id": "brokers give it; an id of yours is `id`",
}


def _publishing() -> RetryTemplate:
    lost = (BrokerUnavailableError, ConnectionLostError, SendInDoubtError)
    return RetryTemplate(
        name="publisher",
        retry_policy=SimpleRetryPolicy(max_attempts=_TRIES, retry_for=lost),
        back_off_policy=ExponentialBackOffPolicy(initial=0.2, multiplier=5.0, max_interval=1.0, jitter="full"),
    )


def _is_template(_instance: Any, field: Any, value: Any) -> None:
    if not isinstance(value, RetryTemplate):
        raise wrong_type(field.name, "a RetryTemplate", value)


def _is_id(instance: Any, field: Any, value: Any) -> None:
    if value is not None:
        is_nonempty_text(instance, field, value)


@attrs.frozen
class OutgoingMessage:
    """A message for `Publisher.send_many`; the arguments are those of `Publisher.send`."""

    destination: str = attrs.field(validator=is_nonempty_text)
    body: bytes | str = b""
    headers: Mapping[str, str] = attrs.field(factory=dict, hash=False)
    id: str | None = attrs.field(default=None, kw_only=True, validator=_is_id)
    priority: int | None = attrs.field(default=None, kw_only=True)
    expires_in: Seconds | None = attrs.field(default=None, kw_only=True)
    persistent: bool = attrs.field(default=True, kw_only=True, validator=one_of(True, False))
    _encoded: tuple[bytes, Mapping[str, str]] = attrs.field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        encoded, headers = as_sent(self.body, self.headers, priority=self.priority, expires_in=self.expires_in)
        for name in headers:
            if name in _NOT_HEADERS:
                raise ValueError(f"headers: {name!r} cannot be given: {_NOT_HEADERS[name]}")
        object.__setattr__(self, "_encoded", (encoded, headers))

    def to_send(self) -> Outgoing:
        """The message as it is sent now: what is sent again has the same id, and ends at the same instant."""
        # The time that it has begins now.
        body, headers = as_sent(*self._encoded, expires_in=self.expires_in)
        headers[ID] = self.id or headers.get(ID) or uuid.uuid4().hex
        headers["persistent"] = "true" if self.persistent else "false"
        return Outgoing(self.destination, body, headers)


@attrs.define(eq=False)
class Publisher:
    """Sends messages, and returns when the broker has them.

    ```python
    with Publisher(StompBroker("stomp://localhost:61613")) as publisher:
        message_id = publisher.send("/queue/orders", '{"id": 7}', {"content-type": "application/json"})
    ```

    It connects at the first message, and again when the connection was lost. Threads may share it: one sends after the
    other. Nothing goes on in the background but the heart-beats of its connection. A forked child that uses it connects
    for itself.

    `template` says what is tried again; without one, a lost connection is made again up to twice, after pauses of at
    most 0.2 and 1 s. What was not confirmed is sent again under the same id (`retrykit-id`), so it may arrive twice;
    a receiver that knows its messages by that id, and has marks, handles it once
    (`StompBroker(identify=by_header("retrykit-id"))`).
    """

    broker: Broker = attrs.field(validator=is_broker)
    template: RetryTemplate = attrs.field(factory=_publishing, kw_only=True, validator=_is_template)
    _lock: Any = attrs.field(default=attrs.Factory(lock_of, takes_self=True), init=False, repr=False)
    _session: Session | None = attrs.field(default=None, init=False, repr=False)
    _closed: bool = attrs.field(default=False, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _known.add(self)

    def send(
        self,
        destination: str,
        body: bytes | str,
        headers: Mapping[str, str] | None = None,
        *,
        id: str | None = None,  # noqa: A002 - the header's own word
        priority: int | None = None,
        expires_in: Seconds | None = None,
        persistent: bool = True,
    ) -> str:
        """Send one message and wait until it is confirmed; gives its id: `id`, or one of its own making.

        A str is sent as UTF-8, and called text/plain unless the headers say what it is. `priority`: from 0 to 9.
        `expires_in`: after so many seconds nobody gets it any more. A message that is not `persistent` does not survive
        its broker.

        `BrokerUnavailableError` and `ConnectionLostError`: it was not sent. `BrokerRefusedError`: the broker would not
        have it. `SendInDoubtError`: nobody knows.
        """
        message = OutgoingMessage(
            destination, body, headers or {}, id=id, priority=priority, expires_in=expires_in, persistent=persistent
        )
        return self.send_many([message])[0]

    def send_many(self, messages: Iterable[OutgoingMessage]) -> list[str]:
        """Send several messages in one transaction of the broker, confirmed as a whole; gives their ids, in order.

        All or none arrive, where the broker's transactions are such (ActiveMQ's; not RabbitMQ's, which may have taken a
        part of them when the connection is lost or one is refused). Errors as of `send`.
        """
        given = list(messages)
        for message in given:
            if not isinstance(message, OutgoingMessage):
                raise wrong_type("messages", "OutgoingMessage objects", message)
        sent = [message.to_send() for message in given]
        if sent:
            with self._lock:
                self._publish(sent)
        return [outgoing.headers[ID] for outgoing in sent]

    def close(self) -> None:
        """Disconnect; it sends no more."""
        with self._lock:
            self._closed = True
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def __enter__(self) -> Self:
        """As it is."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    # -- inside

    def _publish(self, messages: list[Outgoing]) -> None:
        doubts: list[SendInDoubtError] = []

        def attempt(_context: object) -> None:
            try:
                self._send_once(messages)
            except CommitInDoubtError as error:
                doubts.append(self._in_doubt(messages, error.__cause__ or error))
                raise doubts[-1] from error

        if self._closed:
            raise RuntimeError("this publisher is closed")
        try:
            self.template.execute(attempt)
        except Exception as error:
            # What a later try came to says nothing about an earlier one.
            if doubts and not isinstance(error, SendInDoubtError):
                raise self._in_doubt(messages, error) from error
            raise

    def _in_doubt(self, messages: list[Outgoing], error: BaseException) -> SendInDoubtError:
        ids = tuple(outgoing.headers[ID] for outgoing in messages)
        return SendInDoubtError(broker=self.broker.name, ids=ids, reason=str(error))

    def _send_once(self, messages: list[Outgoing]) -> None:
        session = self._connected()
        try:
            for outgoing in messages:
                session.send(outgoing.destination, outgoing.body, outgoing.headers)
            # What is refused is told before the commit: afterwards it could be in doubt.
            session.flush()
            session.commit()
        except BaseException:
            self._drop()
            raise

    def _connected(self) -> Session:
        if self._session is not None:
            try:
                # Nothing is open, so this tells no more than whether the connection is lost.
                self._session.flush()
            except BrokerError:
                self._drop()
        if self._session is None:
            self._session = self.broker.connect(consume=False)
        return self._session

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close(wait=False)


_known: WeakSet[Publisher] = WeakSet()
_inherited: list[Session] = []


def _leave_to_the_parent() -> None:
    for publisher in list(_known):
        session, publisher._session = publisher._session, None  # noqa: SLF001 - it is this module's
        if session is not None:
            # Kept, not closed: a goodbye would be the parent's, whose connection it is.
            _inherited.append(session)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
