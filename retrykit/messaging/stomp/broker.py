"""STOMP brokers, on stomp.py 9: `StompBroker`."""

from __future__ import annotations

import inspect
import logging
import ssl
from typing import Any, Final

import attrs

from retrykit.check import wrong_value
from retrykit.failure import type_name
from retrykit.messaging.errors import BrokerUnavailableError, CredentialsError
from retrykit.messaging.stomp.address import Address, can_be_sent, located
from retrykit.messaging.stomp.session import StompSession
from retrykit.messaging.stomp.settings import StompSettings
from retrykit.messaging.stomp.sockets import unverified
from retrykit.messaging.stomp.subscription import check_durable, is_shared_out
from retrykit.messaging.stomp.transport import Call
from retrykit.messaging.stomp.wire import Wire

_log: Final = logging.getLogger("retrykit.messaging")


@attrs.frozen
class StompBroker(StompSettings):
    """A STOMP broker (`stomp://user:password@host:port`), and the destination to consume from, such as "/queue/orders".

    The destination may be the path of the URL. It begins with "/queue/" or "/topic/", or in another way that the broker
    knows (`Profile.places`); what cannot be meant ("/quene/orders") is refused. `prefetch`
    bounds how many deliveries are on their way: 1 is the fastest for transactional sessions on ActiveMQ. `profile`
    ("activemq", "rabbitmq", "generic") is what the broker calls itself, unless given. `identify` says by what a message
    is known again at its next delivery, where the profile's own rule does not do: `by_header("order-id")`,
    `by_content()`, or a callable of headers and body.

    `stomp+ssl://` (or `stomps://`; port 61614 unless named) is encrypted: the server's certificate and the name in it
    are checked, by `ssl.create_default_context()` or by the `ssl_context` that is given. Of several servers
    (`failover:(stomp://a,stomp://b)`) each is tried for each connection, in any order, or with `?randomize=false` in
    theirs, beginning after the one that was lost.

    `credentials()` gives `(login, passcode)` and is asked at each connection, for secrets that change; what it raises
    is a `BrokerUnavailableError`, and what it gives besides two texts a `CredentialsError`.

    `host` is the virtual host; RabbitMQ's own default one where none is given. `declare` are headers that RabbitMQ
    makes a queue by (`{"x-queue-type": "quorum"}`): they go with the subscription and with each message sent to a
    `/queue/…`, since both make it, and have to agree. To a queue that somebody else made as `/amq/queue/…` they do not
    matter.

    `selector` asks for some messages only (ActiveMQ: SQL's words over headers). `durable` is the name under which a
    subscription to a topic goes on while nobody is connected; on ActiveMQ it belongs to a `client_id`, with which only
    one session at a time can be open, and a name is for one topic and selector: with others, what it kept is deleted.
    `subscribe` are further headers of the SUBSCRIBE frame.

    Times are in seconds. `heart_beat` is how often either side says that it is there; a server that is silent for two
    and a half of them is given up, and another connection is made. `connect_timeout` bounds connecting, TLS and login,
    each; `send_timeout` a write that the server does not take; `receipt_timeout` the wait for a confirmation, after
    which the connection is given up and what it was to confirm is in doubt.
    """

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        check_durable(self)

    @property
    def sessions_at_most(self) -> int | None:
        """How many sessions may consume at once, each its own share of the messages; None: as many as you like."""
        return None if is_shared_out(self) else 1

    def connect(self, *, consume: bool = True) -> StompSession:
        """Open a session, on the first server that has one.

        `BrokerUnavailableError` when no broker is there, lets us in, and answers in time; it names each that was tried.
        `LoginRefusedError`, which is one, when it refuses the login. `CredentialsError` when `credentials` gives none,
        ever. `NotSupportedError` when the broker cannot do what
        was asked for (`selector`, `durable`), `SubscriptionRefusedError` when it will never accept the subscription.
        """
        if consume and not self.destination:
            raise wrong_value("destination", "given, to consume from it", self.destination)
        failures: list[tuple[Address, BrokerUnavailableError]] = []
        for address in self.rota.order():
            try:
                session = self._connect_to(address, consume=consume)
            except BrokerUnavailableError as error:
                failures.append((address, error))
            else:
                self.rota.used(address)
                _log.info("%s: connected to %s (%s)", self.name, address.name, session.profile.name)
                return session
        raise self._unavailable(failures)

    def _unavailable(self, failures: list[tuple[Address, BrokerUnavailableError]]) -> BrokerUnavailableError:
        if len(failures) == 1:
            return failures[0][1]
        reasons = "; ".join(f"{address.name}: {error.__dict__['reason']}" for address, error in failures)
        kinds = {type(error) for _, error in failures}
        kind = kinds.pop() if len(kinds) == 1 else BrokerUnavailableError
        error = kind(broker=self.name, reason=reasons)
        error.__cause__ = failures[-1][1].__cause__
        return error

    def _connect_to(self, address: Address, *, consume: bool) -> StompSession:
        call = self._call(address, consume=consume)
        profile = self.profile
        if self.host is not None or (profile is not None and profile.names_virtual_hosts):
            return self._session(attrs.evolve(call, virtual_host=self.host), consume=consume)
        try:
            return self._session(attrs.evolve(call, virtual_host=address.host), consume=consume)
        except BrokerUnavailableError as error:
            if "virtual host" not in error.__dict__["reason"].lower():
                raise
        # STOMP asks for the name of the machine, which this broker took for a virtual host of its own.
        return self._session(call, consume=consume)

    def _call(self, address: Address, *, consume: bool) -> Call:
        login, passcode = self._login(address)
        context = self._context() if address.tls else None
        # An id is one connection's at a time: the one that consumes.
        return Call(address, login, passcode, client_id=self.client_id if consume else None, context=context)

    def _login(self, address: Address) -> tuple[str | None, str | None]:
        if self.credentials is None:
            return address.login, address.passcode
        try:
            given: Any = self.credentials()
        except Exception as error:
            reason = f"credentials() raised {type_name(type(error))}"
            raise BrokerUnavailableError(broker=located(address.name, self.destination), reason=reason) from error
        match given:
            case (str(login), str(passcode)) if can_be_sent(login, passcode):
                return login, passcode
        raise CredentialsError(broker=self.name, reason=_no_login(given))

    def _context(self) -> ssl.SSLContext:
        context = self.ssl_context or ssl.create_default_context()
        if unchecked := unverified(context):
            _log.warning("%s: ssl_context does not have %s of the server checked", self.name, unchecked)
        return context

    def _session(self, call: Call, *, consume: bool) -> StompSession:
        session = StompSession(self, Wire(self, call))
        try:
            session.open(consume=consume)
        except BaseException:
            session.close(wait=False)
            raise
        return session


def _no_login(given: Any) -> str:
    """Why it is none, without showing it: half of it may be a password."""
    if inspect.iscoroutine(given):
        given.close()
        return "a coroutine, and credentials= must be a plain function that gives (login, passcode)"
    match given:
        case (str(), str()):
            return "there is a line break or NUL in it, which cannot be sent"
        case tuple():
            kinds = ", ".join(type(part).__name__ for part in given)
            return f"a tuple of ({kinds}), and not of two texts, (login, passcode)"
    return f"a {type(given).__name__}, and not two texts, (login, passcode)"
