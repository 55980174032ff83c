"""A registry of consumers, and the group of containers that it makes, on the in-process broker."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial

import attrs
import pytest

from retrykit.backoff import ExponentialBackOffPolicy
from retrykit.messaging import (
    BrokerUnavailableError,
    Consumers,
    ContainerGroup,
    ListenerContainer,
    NoStableIdError,
    lifetime,
    park,
)
from retrykit.messaging.memory import MemoryBroker
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate
from tests import waiting

ORDERS = "/queue/orders"
BILLS = "/queue/bills"
PATIENCE = 20.0
QUICK = ExponentialBackOffPolicy(initial=0.001, max_interval=0.01)
TEMPLATE = RetryTemplate(name="shop", retry_policy=SimpleRetryPolicy(max_attempts=3))


@pytest.fixture
def broker():
    return MemoryBroker(ORDERS)


@pytest.fixture
def consumers(broker):
    return Consumers(broker, template=TEMPLATE, reconnect=QUICK)


wait_for = partial(waiting.until, seconds=PATIENCE, look=0.002)


def handle(message):
    """A handler that does nothing."""


def anonymous(broker):
    """A broker whose messages have no stable id."""

    class Anonymous(MemoryBroker):
        def connect(self, *, consume=True):
            session = super().connect(consume=consume)
            session.receive = self.refuse
            return session

        def refuse(self, timeout=None):
            raise NoStableIdError(destination=self.destination, broker=self.name, remedy="set one")

    return Anonymous


# -- registering


def test_a_registered_function_stays_what_it_is(consumers):
    @consumers.consumer(ORDERS)
    def double(message):
        return 2 * message

    assert double(21) == 42


def test_each_destination_goes_to_its_own_function(broker, consumers):
    seen = []

    @consumers.consumer(ORDERS)
    def order(message):
        seen.append(("order", message.text))

    @consumers.consumer(BILLS)
    def bill(message, context):
        seen.append(("bill", message.text, context.name))

    broker.publish("1")
    broker.at(BILLS).publish("2")
    with consumers:
        assert broker.wait_until_empty(PATIENCE)
        assert broker.at(BILLS).wait_until_empty(PATIENCE)
    assert sorted(seen) == [("bill", "2", "shop.bills"), ("order", "1")]


def test_each_consumer_has_the_options_of_the_registry_except_for_its_own(broker):
    consumers = Consumers(broker, template=TEMPLATE, recover=park("/queue/all.parked"), journal="always", concurrency=2)
    own = attrs.evolve(TEMPLATE, name="own")
    consumers.add(ORDERS, handle)
    consumers.add(BILLS, handle, template=own, recover=None, concurrency=3, delay="redeliver")
    first, second = consumers.containers()
    assert (first.template.name, first.concurrency, first.recover) == ("shop.orders", 2, park("/queue/all.parked"))
    assert (second.template, second.concurrency, second.recover) == (own, 3, None)
    assert (first.journal, second.journal) == ("always", "always")
    assert (first.delay, second.delay) == ("hold", "redeliver")


def test_poison_of_one_consumer_is_parked_and_counted_under_its_name(broker, consumers):
    names = []

    @consumers.consumer(ORDERS, recover=park("/queue/orders.parked"))
    def fail(message, context):
        names.append((context.name, context.attempt))
        raise ValueError("no")

    broker.publish("bad")
    with consumers as running:
        assert broker.wait_until_empty(PATIENCE)
    assert names == [("shop.orders", attempt) for attempt in (1, 2, 3)]
    assert (running.counters.parked, running.counters.recovered, running.counters.rolled_back) == (1, 1, 2)
    assert len(broker.at("/queue/orders.parked").messages()) == 1


def test_two_registries_know_nothing_of_each_other(broker):
    one, other = Consumers(broker, template=TEMPLATE), Consumers(broker, template=TEMPLATE)
    one.add(ORDERS, handle)
    other.add(ORDERS, handle)
    assert [len(registry.containers()) for registry in (one, other)] == [1, 1]


def test_a_second_consumer_of_a_destination_needs_a_name_of_its_own(consumers):
    consumers.add(ORDERS, handle)
    with pytest.raises(ValueError, match=r"'/queue/orders'.*'shop\.orders'.*another name"):
        consumers.add(ORDERS, handle)
    consumers.add(ORDERS, handle, name="audit")
    assert [one.template.name for one in consumers.containers()] == ["shop.orders", "audit"]


def test_a_registry_runs_as_often_as_it_is_asked_to(broker, consumers):
    consumers.add(ORDERS, handle)
    for _ in range(2):
        broker.publish("x")
        with consumers:
            assert broker.wait_until_empty(PATIENCE)


def test_a_registry_runs_once_at_a_time_in_blocks(broker, consumers):
    consumers.add(ORDERS, handle)
    with consumers, pytest.raises(RuntimeError, match="run already"), consumers:
        pass


def test_a_broker_of_its_own_serves_one_consumer(consumers):
    elsewhere = MemoryBroker("/queue/elsewhere")
    seen = []
    consumers.add(ORDERS, handle)
    consumers.add("/queue/elsewhere", lambda message: seen.append(message.text), broker=elsewhere)
    elsewhere.publish("x")
    with consumers:
        assert elsewhere.wait_until_empty(PATIENCE)
    assert seen == ["x"]


def test_a_function_may_give_each_destination_its_broker():
    consumers = Consumers(MemoryBroker, template=TEMPLATE)
    consumers.add(ORDERS, handle)
    assert [one.broker.destination for one in consumers.containers()] == [ORDERS]


def test_a_url_stands_for_a_stomp_broker_and_its_password_is_not_shown():
    stomp = pytest.importorskip("retrykit.messaging.stomp")
    consumers = Consumers("stomp://user:secret@localhost:61613", template=TEMPLATE)
    consumers.add(ORDERS, handle)
    (container,) = consumers.containers()
    assert container.broker == stomp.StompBroker("stomp://user:secret@localhost:61613", destination=ORDERS)
    assert "secret" not in repr(consumers) + repr(container)
    assert "handle ← /queue/orders" in repr(consumers)


def test_the_number_of_workers_can_be_chosen_when_it_runs(consumers):
    consumers.add(ORDERS, handle)
    consumers.add(BILLS, handle, concurrency=7)
    assert [one.concurrency for one in consumers.containers(concurrency=3)] == [3, 3]
    assert [one.concurrency for one in consumers.containers()] == [1, 7]


async def coroutine(message):
    pass


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"broker": 7}, "broker.*7"),
        ({"broker": "http://localhost"}, "url.*http://localhost"),
        ({"template": "shop"}, "template.*shop"),
        ({"transaction": 7}, "transaction.*7"),
        ({"concurrency": 0}, "concurrency.*0"),
        ({"journal": "sometimes"}, "journal.*sometimes"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_default_is_refused_where_it_is_given(change, names):
    given = {"broker": MemoryBroker(ORDERS), "template": TEMPLATE} | change
    with pytest.raises((TypeError, ValueError), match=names):
        Consumers(given.pop("broker"), **given)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"destination": 7}, "destination.*7"),
        ({"destination": ""}, "destination.*''"),
        ({"handler": 7}, "handler.*7"),
        ({"handler": coroutine}, "handler.*coroutine"),
        ({"recover": "/queue/parked"}, "recover.*/queue/parked"),
        ({"broker": 7}, "broker.*7"),
        ({"name": ""}, "name"),
        ({"name": "other", "template": TEMPLATE}, "name.*other.*template"),
        ({"concurrency": "2"}, "concurrency.*2"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_wrong_argument_of_a_consumer_is_refused_where_it_is_given(consumers, change, names):
    given = {"destination": ORDERS, "handler": handle} | change
    with pytest.raises((TypeError, ValueError), match=names):
        consumers.add(given.pop("destination"), given.pop("handler"), **given)
    assert consumers.containers() == []


def test_a_consumer_without_any_template_is_refused(broker):
    with pytest.raises(TypeError, match=r"template.*neither"):
        Consumers(broker).add(ORDERS, handle)


def test_a_broker_that_cannot_be_moved_is_refused():
    class Fixed:
        name = "fixed"

        def connect(self, *, consume=True):
            raise BrokerUnavailableError(broker=self.name)

    with pytest.raises(ValueError, match="at\\(destination\\)"):
        Consumers(Fixed(), template=TEMPLATE)


def test_nothing_registered_is_nothing_to_run(consumers):
    with pytest.raises(ValueError, match="none is registered"):
        consumers.run()


# -- running


def test_a_signal_drains_every_consumer(broker, consumers):
    bills = broker.at(BILLS)
    handled, both = [], threading.Barrier(2)

    def work(message):
        if both.wait(PATIENCE) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: all(one._stopping.is_set() for one in group.containers))
        handled.append(message.destination)

    for one in (broker, bills):
        one.publish("1")
        one.publish("2")
    consumers.add(ORDERS, work)
    consumers.add(BILLS, work)
    group = consumers.group()
    before = signal.getsignal(signal.SIGTERM)
    assert group.run() is True
    assert sorted(handled) == [BILLS, ORDERS]
    assert [message.text for one in (broker, bills) for message in one.messages()] == ["2", "2"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_stops_every_consumer_at_once(broker, consumers, monkeypatch):
    monkeypatch.setattr(lifetime, "SEPARATE", 0.0)
    go_on = threading.Event()

    def hang(message):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(group.containers[0]._stopping.is_set)
        os.kill(os.getpid(), signal.SIGINT)
        assert go_on.wait(PATIENCE)

    broker.publish("x")
    consumers.add(ORDERS, hang)
    consumers.add(BILLS, handle)
    group = consumers.group()
    assert group.run() is False
    assert [message.text for message in broker.messages()] == ["x"]
    go_on.set()
    assert group.wait(PATIENCE)


def test_grace_bounds_the_wait_for_a_message_in_hand(broker, consumers):
    go_on = threading.Event()

    def hang(message):
        os.kill(os.getpid(), signal.SIGTERM)
        assert go_on.wait(PATIENCE)

    broker.publish("x")
    consumers.add(ORDERS, hang)
    group = consumers.group()
    assert group.run(grace=0.05) is False
    assert [message.text for message in broker.messages()] == ["x"]
    go_on.set()
    assert group.wait(PATIENCE)


def test_one_that_gives_up_stops_all_and_its_error_is_raised(broker, consumers):
    consumers.add(ORDERS, handle, broker=anonymous(broker))
    consumers.add(BILLS, handle)
    group = consumers.group()
    with pytest.raises(NoStableIdError, match="set one"):
        group.run()
    assert group.wait(0)
    assert [one.state for one in group.health().consumers] == ["failed", "finished"]


def test_one_that_gives_up_ends_the_block_with_its_error(broker, consumers):
    consumers.add(ORDERS, handle, broker=anonymous(broker))
    with pytest.raises(NoStableIdError), consumers as running:
        running.wait(PATIENCE)


def test_the_wait_for_a_group_can_be_bounded(consumers):
    consumers.add(ORDERS, handle)
    with consumers as running:
        assert running.wait(0.01) is False
    assert running.wait(0)


def test_a_group_that_cannot_start_leaves_nothing_running(broker):
    used = ListenerContainer(broker, handle, template=TEMPLATE)
    with used:
        pass
    fresh = ListenerContainer(broker, handle, template=TEMPLATE)
    group = ContainerGroup([fresh, used])
    with pytest.raises(RuntimeError, match="used once"):
        group.start()
    assert group.wait(PATIENCE)


def test_a_group_that_never_started_can_be_stopped(consumers):
    consumers.add(ORDERS, handle)
    group = consumers.group()
    group.stop()
    assert group.wait(0)


def test_who_comes_late_is_told_what_is_past(broker, consumers):
    consumers.add(ORDERS, handle, broker=anonymous(broker))
    group = consumers.group()
    with pytest.raises(NoStableIdError):
        group.run()
    heard = []
    group.watch(heard.append)
    group.containers[0].watch(heard.append)
    assert heard == ["failed", "finished"] * 2


@pytest.mark.parametrize(("containers", "names"), [((), "one or more"), ((7,), "7"), (7, "7")])
def test_a_wrong_group_is_refused(containers, names):
    with pytest.raises((TypeError, ValueError), match=f"containers.*{names}"):
        ContainerGroup(containers)


def test_a_consumer_without_parentheses_is_refused_and_told_what_to_write(consumers):
    with pytest.raises(TypeError, match=r'destination: must be a str, not .*book: write @….consumer\("/queue/…"\)'):

        @consumers.consumer
        def book(message):
            """Not registered."""

    with pytest.raises(TypeError, match="destination: must be a str, not int 7"):
        consumers.consumer(7)
    with pytest.raises(ValueError, match="none is registered"):
        consumers.group()


def test_an_option_that_does_not_exist_is_refused_by_whoever_was_given_it(broker, consumers):
    with pytest.raises(TypeError, match=r"^Consumers: there is no option 'recovr'; those that there are: .*recover,"):
        Consumers(broker, template=TEMPLATE, recovr=1)
    with pytest.raises(TypeError, match=r"^the consumer of '/queue/orders': there is no option 'jornal'"):
        consumers.add(ORDERS, handle, jornal="always")
