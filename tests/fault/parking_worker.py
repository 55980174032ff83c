"""A worker of the demo that parks in a queue of the broker instead of the database."""

from __future__ import annotations

from retrykit.cli.demo.worker import main
from retrykit.messaging import park

if __name__ == "__main__":
    main(recover=lambda message, context: park(f"{message.destination}.parked")(message, context))
