"""What the imitated brokers do differently, as measured on the real ones."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    longest_header: int | None = None
    """Bytes in the line of a header, without its end; a longer one is answered with ERROR, and the connection ends."""
    browses: bool = False
    """SUBSCRIBE with `browser:true` shows a queue and takes nothing."""
    scheduler: bool = True
    """ActiveMQ's: without it AMQ_SCHEDULED_DELAY is a header like others."""
    redelivery: float | None = None
    """ActiveMQ's redelivery plug-in: a NACKed message comes again after so many seconds, in place of its death."""


PROFILES = {
    "activemq": Profile(
        name="activemq",
        server="ActiveMQ/5.17.2 (embedded test double)",
        prefetch_header="activemq.prefetchSize",
        default_prefetch=1000,
        dead_letters="/queue/ActiveMQ.DLQ",
        longest_header=10_241,
        browses=True,
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


def equipped(name: str, *, scheduler: bool = True, redelivery: float | None = None) -> Profile:
    """A profile with what its broker can be run with or without; ValueError for what is not of that kind."""
    profile = profile_named(name)
    if (scheduler, redelivery) == (True, None):
        return profile
    if name != "activemq":
        raise ValueError(f"scheduler and redelivery are ActiveMQ's, not {name}'s")
    if redelivery is not None and not (scheduler and redelivery > 0):
        raise ValueError(f"redelivery must be a positive number of seconds, with the scheduler, not {redelivery!r}")
    return replace(profile, scheduler=scheduler, redelivery=redelivery)
