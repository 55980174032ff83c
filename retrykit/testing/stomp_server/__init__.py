"""An embedded STOMP 1.0-1.2 server for tests, demonstrations and tutorials: an honest test double, not a broker.

It behaves as ActiveMQ 5.17 and RabbitMQ 3.10 were measured to behave over STOMP, surprising parts included: ABORT
undoes SEND and ACK but redelivers nothing; what a lost connection had in flight goes to the next consumer in turn,
flagged; ActiveMQ's NACK makes a dead letter, RabbitMQ's an immediate redelivery; a restart of ActiveMQ forgets who has
seen a message, a crash of RabbitMQ forgets what was acknowledged last. Each profile is checked against the real broker
by the same tests.

Where it is stricter than either: only queues and topics (no wildcards, no virtual topics, no exchanges), no second
SUBSCRIBE under an id in use, no selectors, no limits of memory or disk. Of ActiveMQ's scheduler it knows
`AMQ_SCHEDULED_DELAY` (to the millisecond, not rounded to the next second), of RabbitMQ's queue arguments what `rabbit`
says.

Layers, from the bottom: `frames` (bytes), `queues` (who gets what), `topics` (whose copy), `journal` (what survives),
`broker`, `asked` (what headers mean), `session` (the commands), `rabbit` and `rabbit_session` (broker and session as
RabbitMQ has them), `engine` (sockets on an event loop), `server` and `process` (in this process, in a child).
"""

from __future__ import annotations

from retrykit.testing.stomp_server.controls import QueuedMessage
from retrykit.testing.stomp_server.process import StompServerProcess
from retrykit.testing.stomp_server.server import StompServer

__all__ = ["QueuedMessage", "StompServer", "StompServerProcess"]
