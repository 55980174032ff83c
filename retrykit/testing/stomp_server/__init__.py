"""An embedded STOMP 1.0-1.2 server for tests, demonstrations and tutorials: an honest test double, not a broker.

It behaves as ActiveMQ 5.17 and, in a first version, RabbitMQ 3.10 were measured to behave over STOMP, surprising
parts included: ABORT undoes SEND and ACK but redelivers nothing; what an ended subscription or a lost connection had
in flight goes to the next consumer in turn, flagged; ActiveMQ's NACK makes a dead letter, RabbitMQ's an immediate
redelivery; a restart keeps persistent messages and forgets who has seen them. The ActiveMQ profile is checked against
the real broker by the same tests; the RabbitMQ profile is not yet.

Where it is stricter than ActiveMQ: only `/queue/NAME` destinations (no topics), no second SUBSCRIBE under an id in
use, of the scheduler's headers only `AMQ_SCHEDULED_DELAY` (to the millisecond, not rounded to the next second), no
selectors, no TLS. It has no limits of memory or disk.

Layers, from the bottom: `frames` (bytes), `queues` (who gets what), `journal` (what survives), `broker`, `session` (the
commands), `engine` (sockets on an event loop), `server` and `process` (in this process, in a child).
"""

from __future__ import annotations

from retrykit.testing.stomp_server.controls import QueuedMessage
from retrykit.testing.stomp_server.process import StompServerProcess
from retrykit.testing.stomp_server.server import StompServer

__all__ = ["QueuedMessage", "StompServer", "StompServerProcess"]
