"""Functions as consumers: a registry of which handler reads which destination.

Nothing here is global: a registry is an object, and what is registered is known to it alone. Registering connects to
nothing; it makes a container ready, so that a mistake is told where it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal, TypedDict, TypeVar, Unpack

import attrs

from retrykit.backoff import BackOffPolicy
from retrykit.check import wrong_type, wrong_value
from retrykit.message import Message
from retrykit.messaging.broker import Broker
from retrykit.messaging.container import ListenerContainer
from retrykit.messaging.delays import Way
from retrykit.messaging.group import ContainerGroup
from retrykit.messaging.handler import Handler
from retrykit.messaging.lifetime import Lifespan
from retrykit.messaging.recoverers import Recoverer
from retrykit.messaging.unit_of_work import Transaction
from retrykit.template import AsyncRetryTemplate, RetryTemplate

H = TypeVar("H", bound=Handler)
BrokerFor = Callable[[str], Broker]


class Options(TypedDict, total=False):
    """What a registry and each of its consumers may say, with the meaning it has for a `ListenerContainer`."""

    template: RetryTemplate | AsyncRetryTemplate
    transaction: Transaction | None
    recover: Recoverer | None
    journal: Literal["redelivered", "always", "never"]
    delay: Way
    concurrency: int
    reconnect: BackOffPolicy
    lifespan: Lifespan | None


class Consumers:
    """Which functions consume which destinations of a broker.

    ```python
    consumers = Consumers("stomp://localhost:61613", template=RetryTemplate(name="shop"))


    @consumers.consumer("/queue/orders", recover=park("/queue/orders.parked"), concurrency=2)
    def handle(message): ...


    consumers.run()
    ```

    `broker` is a URL of a STOMP broker, a broker (which is asked for the destination of each consumer), or a function
    of a destination that gives a broker. The options (`template`, `transaction`, `recover`, `journal`, `delay`,
    `concurrency`, `reconnect`, `lifespan`) are those of `ListenerContainer`, for every consumer that has none of its
    own. A consumer is a coroutine function where its template is an `AsyncRetryTemplate`; all coroutines of a registry
    run on one event loop, and a `lifespan` that they have in common is entered once.

    Each consumer has a template with a name of its own: that of the registry's template, a dot, and what follows the
    last slash of its destination (`shop.orders`). Its histories and marks are kept under that name, and those of
    another consumer never meet them.
    """

    def __init__(self, broker: str | Broker | BrokerFor, **options: Unpack[Options]) -> None:
        _check_options("Consumers", options)
        self._broker_for = _broker_for(broker)
        self._options = options
        self._registered: list[_Registered] = []
        self._running: ContainerGroup | None = None
        # Defaults are checked where they are given, not at the first consumer that takes them.
        checked: dict[str, Any] = _fitting({"template": RetryTemplate(), **options})
        asynchronous = getattr(checked["template"], "asynchronous", False)
        ListenerContainer(_Nowhere(), _async_nothing if asynchronous else _nothing, **checked)

    def __repr__(self) -> str:
        return f"<Consumers {', '.join(map(str, self._registered)) or 'none'}>"

    def consumer(
        self,
        destination: str,
        *,
        broker: Broker | BrokerFor | None = None,
        name: str | None = None,
        **options: Unpack[Options],
    ) -> Callable[[H], H]:
        """A decorator: the function consumes `destination`. It stays what it is, to be called by tests and others.

        `options` take the place of the registry's. A `template` of its own is taken with its name, as it is; `name`
        is for the registry's template, used for this consumer. `broker`: another one for this consumer.

        `ValueError` for a second consumer of a destination under the same name: their histories would be one.
        """
        if not isinstance(destination, str):
            raise _no_destination(destination)

        def decorate(handler: H) -> H:
            self.add(destination, handler, broker=broker, name=name, **options)
            return handler

        return decorate

    def add(
        self,
        destination: str,
        handler: Handler,
        *,
        broker: Broker | BrokerFor | None = None,
        name: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        """As `consumer`, for what is no function of its own, such as a bound method."""
        if not isinstance(destination, str):
            raise _no_destination(destination)
        _check_options(f"the consumer of {destination!r}", options)
        place = self._broker_for if broker is None else _broker_for(broker)
        template = self._template(destination, name, options)
        given: dict[str, Any] = {**_fitting({**self._options, "template": template}), **options, "template": template}
        registered = _Registered(destination, ListenerContainer(place(destination), handler, **given))
        if any(registered.shares_histories_with(other) for other in self._registered):
            raise ValueError(
                f"{destination!r} has a consumer called {given['template'].name!r} already, and two would share their "
                "histories: give one of them another name=…"
            )
        self._registered.append(registered)

    def containers(self, *, concurrency: int | None = None) -> list[ListenerContainer]:
        """A new container for each consumer, in the order of their registration; `concurrency` instead of theirs."""
        changes: dict[str, Any] = {} if concurrency is None else {"concurrency": concurrency}
        return [attrs.evolve(one.container, **changes) for one in self._registered]

    def group(self, *, concurrency: int | None = None) -> ContainerGroup:
        """New containers as one: to be started, stopped, observed. `ValueError` if there is no consumer."""
        if not self._registered:
            raise ValueError("consumers: none is registered, so there is nothing to run")
        return ContainerGroup(self.containers(concurrency=concurrency))

    def run(self, *, grace: float | None = None) -> bool:
        """Consume until stopped, as `ListenerContainer.run` does, with all consumers in this process.

        One that gives up stops them all, and what made it give up is raised.
        """
        return self.group().run(grace=grace)

    def __enter__(self) -> ContainerGroup:
        """Start new containers, as one. `RuntimeError` inside of another such block."""
        if self._running is not None:
            raise RuntimeError("these consumers run already: use group() for a second set of them")
        group = self.group()
        group.start()
        self._running = group
        return group

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop them in good order and wait for it; raises what made one give up."""
        group, self._running = self._running, None
        if group is not None:
            group.__exit__(kind, error, trace)

    def _template(self, destination: str, name: str | None, options: Options) -> RetryTemplate | AsyncRetryTemplate:
        own = options.get("template")
        if own is not None:
            if name is not None:
                raise ValueError(f"name: {name!r}, and a template of its own, which has a name already")
            return own
        shared = self._options.get("template")
        if shared is None:
            raise TypeError(f"template: neither the registry nor the consumer of {destination!r} has one")
        return attrs.evolve(shared, name=f"{shared.name}.{_last_part(destination)}" if name is None else name)


@attrs.frozen(eq=False)
class _Registered:
    """A consumer of a destination; the container is a pattern for those that run."""

    destination: str
    container: ListenerContainer

    def shares_histories_with(self, other: _Registered) -> bool:
        ours, theirs = self.container, other.container
        same_name = (ours.template.name, ours.broker.name) == (theirs.template.name, theirs.broker.name)
        return same_name and self.destination == other.destination

    def __str__(self) -> str:
        handler = self.container.handler
        return f"{getattr(handler, '__qualname__', repr(handler))} ← {self.destination}"


def _fitting(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a registry that go with the template: its plain consumers have no event loop."""
    if getattr(options["template"], "asynchronous", True):
        return options
    return {name: value for name, value in options.items() if name != "lifespan"}


def _no_destination(given: object) -> TypeError:
    if callable(given):
        name = getattr(given, "__qualname__", type(given).__name__)
        return TypeError(f'destination: must be a str, not {name}: write @….consumer("/queue/…") above its def')
    return wrong_type("destination", "a str", given)


def _check_options(whose: str, options: Mapping[str, object]) -> None:
    for name in options.keys() - Options.__annotations__.keys():
        known = ", ".join(Options.__annotations__)
        raise TypeError(f"{whose}: there is no option {name!r}; those that there are: {known}")


def _nothing(_message: Message) -> None:
    """A handler that is never called."""


async def _async_nothing(_message: Message) -> None:
    """Another one."""


class _Nowhere:
    """A broker that is never asked."""

    name = "nowhere"

    def connect(self, *, consume: bool = True) -> Any:
        """Not called."""
        raise NotImplementedError


def _broker_for(broker: object) -> BrokerFor:
    """Brokers by destination: made from a URL, from another broker, or by a function."""
    if isinstance(broker, str):
        from retrykit.messaging.stomp import StompBroker

        broker = StompBroker(broker)
    if isinstance(broker, Broker) and not isinstance(broker, type):
        return _at(broker)
    if callable(broker):
        return broker
    raise wrong_type("broker", "a URL, a broker, or a function that gives one for a destination", broker)


def _at(broker: Any) -> BrokerFor:
    """The same broker with other destinations."""
    at: BrokerFor | None = getattr(broker, "at", None)
    if at is not None:
        return at
    if not (attrs.has(type(broker)) and hasattr(broker, "destination")):
        wanted = "one that has `at(destination)`, or a function that gives one for a destination"
        raise wrong_value("broker", wanted, broker)
    return lambda destination: attrs.evolve(broker, destination=destination)


def _last_part(destination: str) -> str:
    return destination.rstrip("/").rpartition("/")[-1] or destination
