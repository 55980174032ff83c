"""MODULE:NAME: what it may be, and what is said when it is not."""

from __future__ import annotations

import sys
import uuid

import pytest

from retrykit.cli.target import LoadingError, TargetError, check, load
from retrykit.messaging import ContainerGroup, ListenerContainer

SOURCE = """
from retrykit import RetryTemplate
from retrykit.messaging import Consumers, ContainerGroup, ListenerContainer
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.stomp import StompBroker

broker = MemoryBroker("/queue/orders")
template = RetryTemplate(name="shop")


def handle(message):
    pass


container = ListenerContainer(broker, handle, template=template)
group = ContainerGroup([ListenerContainer(broker, handle, template=template)])
consumers = Consumers(broker, template=template)
consumers.add("/queue/orders", handle, concurrency=2)
consumers.add("/queue/bills", handle)
empty = Consumers(broker)
topic = ListenerContainer(StompBroker("stomp://localhost/topic/news"), handle, template=template)
news = Consumers("stomp://localhost", template=template)
news.add("/topic/news", handle)
url = "stomp://user:secret@localhost"


class Factory:
    made = container

    @staticmethod
    def make():
        return consumers


def make():
    return container


def make_nothing():
    return url


async def make_later():
    return container


def leave():
    raise SystemExit(2)


def fail():
    raise RuntimeError("no database")


def import_more():
    import a_module_that_nobody_has
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """An application's module in the current directory; its name."""
    name = f"app_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def names_of(loaded):
    containers = getattr(loaded, "containers", (loaded,))
    return [(one.template.name, one.concurrency) for one in containers]


@pytest.mark.parametrize(
    ("name", "kind", "consumers"),
    [
        ("container", ListenerContainer, [("shop", 1)]),
        ("make", ListenerContainer, [("shop", 1)]),
        ("Factory.made", ListenerContainer, [("shop", 1)]),
        ("group", ContainerGroup, [("shop", 1)]),
        ("consumers", ContainerGroup, [("shop.orders", 2), ("shop.bills", 1)]),
        ("Factory.make", ContainerGroup, [("shop.orders", 2), ("shop.bills", 1)]),
    ],
)
def test_what_can_consume_is_loaded(module, name, kind, consumers):
    loaded = load(f"{module}:{name}")
    assert type(loaded) is kind
    assert names_of(loaded) == consumers


@pytest.mark.parametrize("name", ["container", "group", "consumers"])
def test_every_consumer_gets_the_workers_that_were_asked_for(module, name):
    assert {workers for _, workers in names_of(load(f"{module}:{name}", concurrency=5))} == {5}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "has no 'nothing'; it has container (ListenerContainer), group (ContainerGroup), consumers"),
        ("url", "a str: wanted is a ListenerContainer"),
        ("handle", "missing a required argument: 'message'"),
        ("make_nothing", "gave a str: wanted"),
        ("make_later", "gave a coroutine: wanted"),
        ("empty", "none is registered"),
    ],
)
def test_what_cannot_consume_is_told_with_what_is_there(module, name, words):
    with pytest.raises(TargetError) as caught:
        load(f"{module}:{name}")
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["topic", "news"])
def test_workers_that_would_each_get_every_message_are_refused(module, name):
    with pytest.raises(TargetError, match=r"concurrency: must be at most 1 .*/topic/news"):
        load(f"{module}:{name}", concurrency=2)


@pytest.mark.parametrize(
    "target", ["", ":", "orders", "orders:", ":container", "a b:c", ".orders:c", "x/orders:c", "o:c."]
)
def test_what_is_not_written_as_a_module_and_a_name_is_refused(target):
    with pytest.raises(TargetError, match="MODULE:NAME"):
        check(target)


@pytest.mark.parametrize("module", ["a_module_that_nobody_has", "a_module_that_nobody_has.part"])
def test_a_module_that_is_not_there_is_told_without_running_anything(tmp_path, monkeypatch, module):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(TargetError, match=f"no module 'a_module_that_nobody_has'.*{tmp_path}"):
        check(f"{module}:container")


def test_a_module_without_anything_to_run_is_told(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(TargetError, match="'json' has no 'container'; there is no container"):
        load("json:container")


def test_the_name_of_a_file_is_no_name_of_a_module(module):
    with pytest.raises(TargetError, match=r"leave out the \.py"):
        load(f"{module}.py:container")


@pytest.mark.parametrize(
    ("name", "cause"), [("fail", RuntimeError), ("import_more", ModuleNotFoundError), ("leave", SystemExit)]
)
def test_an_error_of_the_users_code_is_kept_as_the_cause(module, name, cause):
    with pytest.raises(LoadingError, match=f"{name}.*could not be loaded") as caught:
        load(f"{module}:{name}")
    assert isinstance(caught.value.__cause__, cause)


def test_a_module_that_fails_is_an_error_of_the_users_code(tmp_path, monkeypatch):
    name = f"app_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text("import a_module_that_nobody_has")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(LoadingError, match="a_module_that_nobody_has"):
        load(f"{name}:container")
