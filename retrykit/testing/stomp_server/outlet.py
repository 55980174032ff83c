"""What a session needs of its connection: `Outlet`."""

from __future__ import annotations

from typing import Protocol

from retrykit.testing.stomp_server.frames import Frame


class Outlet(Protocol):
    """Where frames go, and how a connection ends."""

    def send(self, frame: Frame) -> None:
        """Write a frame, after everything before it is durable."""

    def send_receipt(self, frame: Frame) -> None:
        """Write a receipt, as late as the ordered faults want it."""

    def agreed(self, version: str, send_every: float, expect_every: float) -> None:
        """Learn the protocol version and the heart-beats, in seconds (0: none)."""

    def finish(self) -> None:
        """End the connection after what is written."""

    def abort(self) -> None:
        """End the connection now."""
