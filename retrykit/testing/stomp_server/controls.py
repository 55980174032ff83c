"""What a test or demo can ask of an embedded server, in this process or in a child."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class QueuedMessage:
    """A message as it lies in the server.

    `state` is `ready`, `in_flight` (with a consumer, not settled) or `scheduled`; `deliveries` counts since the server
    started; `redelivered` is the flag that the next delivery would carry.
    """

    message_id: str
    destination: str
    headers: dict[str, str]
    body: bytes
    persistent: bool
    redelivered: bool
    deliveries: int
    state: Literal["ready", "in_flight", "scheduled"]


class Controls(ABC):
    """Introspection and faults, the same for `StompServer` and `StompServerProcess`.

    Where a fault is about COMMITs, an ACK with a receipt and without a transaction is one on the `rabbitmq` profile.

    Every method raises RuntimeError when the server does not run, TimeoutError when it does not answer within 30 s.
    """

    host: str
    port: int
    tls: bool = False
    _user: str | None

    @abstractmethod
    def _do(self, verb: str, **arguments: Any) -> Any:
        """Ask the running server."""

    @property
    def url(self) -> str:
        """The address without credentials: `stomp://127.0.0.1:61613`, or `stomp+ssl://…`."""
        return f"{'stomp+ssl' if self.tls else 'stomp'}://{self.host}:{self.port}"

    def depths(self) -> dict[str, int]:
        """Count per destination the messages that are ready or in flight; scheduled ones are not in it."""
        return dict(self._do("depths"))

    def depth(self, destination: str) -> int:
        """Count the messages of one destination that are ready or in flight."""
        return self.depths().get(destination, 0)

    def messages(self, destination: str) -> list[QueuedMessage]:
        """List a queue's messages: those in flight, then those that are ready in their order, then scheduled ones."""
        return [_message(found) for found in self._do("messages", destination=destination)]

    def dead_letters(self) -> list[QueuedMessage]:
        """List the broker's own dead letters (`ActiveMQ.DLQ`); empty where the profile has no such queue."""
        return [_message(found) for found in self._do("dead_letters")]

    def counters(self) -> dict[str, int]:
        """Count what happened since the start, and `open_connections` now.

        Names: `connections`, `sends`, `deliveries`, `redeliveries`, `acks`, `nacks`, `commits`, `aborts`,
        `dead_letters`, `errors`. What never happened may be missing.
        """
        return dict(self._do("counters"))

    def publish(self, destination: str, body: bytes, headers: Mapping[str, str] | None = None) -> str:
        """Put a persistent message into a queue without a connection; its message id. It is durable on return."""
        given = {"persistent": "true"} | dict(headers or {})
        return str(self._do("publish", destination=destination, body=body.decode("latin-1"), headers=given))

    def drop_connections(self) -> int:
        """Cut every connection without a word; how many there were."""
        return int(self._do("drop_connections"))

    def drop_before_commit(self, times: int = 1) -> None:
        """Cut the connection when its COMMIT arrives, before anything of it is done, for the next `times` COMMITs."""
        self._order("before_commit", times)

    def drop_before_receipt(self, times: int = 1) -> None:
        """Cut the connection when its COMMIT is done and durable but not confirmed, for the next `times` COMMITs."""
        self._order("before_receipt", times)

    def drop_after_receipt(self, times: int = 1) -> None:
        """Cut the connection right after the COMMIT's receipt, for the next `times` COMMITs."""
        self._order("after_receipt", times)

    def _order(self, moment: str, times: int) -> None:
        if isinstance(times, bool) or not isinstance(times, int) or times < 1:
            raise ValueError(f"times must be a positive number, not {times!r}")
        self._do("order_fault", moment=moment, times=times)

    def delay_receipts(self, seconds: float) -> None:
        """Hold back every receipt for so long from now on; what it confirms is done at once. 0 ends it."""
        if not 0 <= seconds < float("inf"):
            raise ValueError(f"seconds must be finite and not negative, not {seconds!r}")
        self._do("delay_receipts", seconds=seconds)

    def clear_faults(self) -> None:
        """Take back every ordered fault."""
        self._do("clear_faults")

    def forget_flags(self) -> None:
        """Forget which waiting messages were delivered before, as ActiveMQ does when it restarts."""
        self._do("forget_flags")


def _message(found: dict[str, Any]) -> QueuedMessage:
    return QueuedMessage(**(found | {"body": found["body"].encode("latin-1")}))
