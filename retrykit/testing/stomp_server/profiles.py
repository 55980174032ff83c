"""What the imitated brokers do differently, as measured on the real ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """The behavior of one broker.

    `dead_letters` is the queue that takes a NACKed persistent message; None: NACK hands the message back at once.
    What is more than a name or a number is code: `broker` and `session` for ActiveMQ, `rabbit` and `rabbit_session` for
    RabbitMQ.
    """

    name: str
    server: str
    prefetch_header: str
    default_prefetch: int
    dead_letters: str | None


PROFILES = {
    "activemq": Profile(
        name="activemq",
        server="ActiveMQ/5.17.2 (embedded test double)",
        prefetch_header="activemq.prefetchSize",
        default_prefetch=1000,
        dead_letters="/queue/ActiveMQ.DLQ",
    ),
    "rabbitmq": Profile(
        name="rabbitmq",
        server="RabbitMQ/3.10.8 (embedded test double)",
        prefetch_header="prefetch-count",
        # RabbitMQ itself has no limit; a number that nobody reaches says the same.
        default_prefetch=1 << 30,
        dead_letters=None,
    ),
}


def profile_named(name: str) -> Profile:
    """Find a profile; ValueError names the known ones."""
    profile = PROFILES.get(name)
    if profile is None:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, not {name!r}")
    return profile
