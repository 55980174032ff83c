"""A delivery whose handler is a coroutine: what `retrykit.messaging.delivery` decides, on an event loop.

The template runs on the loop, with the handler and its transaction. What it asks of the broker are errands of the
worker, who waits at its desk. Everything before and after (pauses that were due, giving back) the worker does itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from retrykit.message import Message
from retrykit.messaging.broker import Session
from retrykit.messaging.coroutines.desk import Desk, finished
from retrykit.messaging.delivery import Delivery
from retrykit.messaging.handler import exited
from retrykit.messaging.outbox import Outgoing

if TYPE_CHECKING:
    from retrykit.context import RetryContext
    from retrykit.messaging.work import Work


class AsyncDelivery(Delivery):
    """One delivery, to a coroutine.

    What is sent is kept until the handler has returned: putting it into the connection may block, when the broker
    takes nothing at the moment. So it is put, in order, when the broker is to say that it has taken it.
    """

    def __init__(self, work: Work, session: Session, message: Message) -> None:
        super().__init__(work, session, message)
        assert work.desk is not None  # noqa: S101 - where there is a loop there is a desk
        self._desk: Desk = work.desk
        self._outgoing: list[Outgoing] = []

    def complete(self, verb: Callable[[], Any]) -> Any:
        """Do something with the template, on the loop."""
        return self._desk.run(verb)

    async def attempt(self, context: RetryContext) -> Any:
        """As `Delivery.attempt`, awaited."""
        return self._obey(await self._heard(self.work.call, context, "handler"), context, "handler")

    async def recovery(self, context: RetryContext) -> Any:
        """As `Delivery.recovery`, awaited."""
        return self._obey(await self._heard(self._recoverer(), context, "recover"), context, "recover")

    async def _heard(self, function: Callable[[Message, RetryContext], Any], context: RetryContext, whose: str) -> Any:
        """As `_called`, awaited. It is the desk that cuts it off."""
        try:
            message = self._opened(context)
            with self._desk.hearing():
                try:
                    return await finished(function(message, context))
                except SystemExit as leaving:
                    # Else asyncio would end the loop with it.
                    raise exited(leaving, whose) from leaving
        finally:
            self._close()

    def put(self, outgoing: Outgoing) -> None:
        """Keep it, until `flush`."""
        self._outgoing.append(outgoing)

    def flush(self) -> None:
        """Send what was kept, in order, and wait for it."""
        kept, self._outgoing = self._outgoing, []
        for outgoing in kept:
            super().put(outgoing)
        super().flush()

    def undo(self) -> None:
        """What was kept goes too."""
        self._outgoing.clear()
        super().undo()
