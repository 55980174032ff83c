"""The operators' commands on every store that processes share."""

from __future__ import annotations

import json
import logging
from datetime import timedelta

import attrs
import pytest
from click.testing import CliRunner
from sqlalchemy.orm import Session

from retrykit import ExhaustedRetryError, RetryState, RetryTemplate
from retrykit.cli.commands import retrykit
from retrykit.histories import Histories, Pruned
from retrykit.redis import RedisRetryContextCache
from retrykit.sql import SqlRetryContextCache, park_in, parked_items
from retrykit.testing import StompServer
from tests.servers.databases import SERVERS, empty_database

QUEUE = "/queue/orders"


@pytest.fixture(params=["sqlite", *SERVERS, "redis"])
def store(request):
    """A cache, and the URL by which the commands find it."""
    if request.param == "redis":
        url = request.getfixturevalue("redis_server").fresh_database()
        with RedisRetryContextCache(url, prefix="mine") as cache:
            yield cache, f"{url}?prefix=mine"
        return
    url = empty_database(request, request.param)
    with SqlRetryContextCache(url) as cache:
        yield cache, url


def run(url, *arguments, status=0, **environment):
    found = CliRunner().invoke(retrykit, arguments, env={"RETRYKIT_STORE": url, **environment})
    assert found.exit_code == status, found.output
    return found.stdout


def fail(template, key):
    def callback(context):
        raise ConnectionResetError("hung up")

    with pytest.raises(ConnectionResetError):
        template.execute(callback, state=RetryState(key=key))


def listed(url, *options):
    return [line.split("\t")[0] for line in run(url, "contexts", "list", *options).splitlines()[1:]]


def test_histories_are_listed_vetoed_forgotten_and_pruned(store):
    cache, url = store
    template = RetryTemplate(name="orders", context_cache=cache)
    for key in ("m-1", "m-2", 7):
        fail(template, key)
    fail(attrs.evolve(template, name="orders-2"), "m-1")
    attrs.evolve(template, remember_completed=3_600).execute(lambda _: 1, state=RetryState(key="done"))
    assert listed(url, "--name", "orders") == ["orders#7", "orders/m-1", "orders/m-2"]
    assert listed(url, "--limit", "2", "--after", "orders/m-1") == ["orders/m-2"]
    assert listed(url, "--completed") == ["orders/done"]
    run(url, "contexts", "veto", "orders/m-1", "--reason", "no", "--for", "1h")
    with pytest.raises(ExhaustedRetryError):
        template.execute(lambda _: 1, state=RetryState(key="m-1"))
    assert listed(url, "--vetoed") == ["orders/m-1"]
    run(url, "contexts", "withdraw", "orders/m-1")
    assert template.execute(lambda _: 1, state=RetryState(key="m-1")) == 1
    shown = json.loads(run(url, "contexts", "show", "--name", "orders", "--key-json", "7", "--json"))
    assert (shown["retry_count"], shown["state"]) == (1, "due")
    assert run(url, "contexts", "forget", "orders#7", "--yes") == "orders#7 is forgotten\n"
    assert len(run(url, "contexts", "export").splitlines()) == 2
    assert Histories(cache).prune(older_than=timedelta(hours=1)) == Pruned(looked_at=3)
    assert Histories(cache).prune(older_than=0.000_001, name="orders").older == 1
    assert listed(url) == ["orders-2/m-1"]
    assert listed(url, "--completed") == ["orders/done"]


@pytest.mark.parametrize("store", SERVERS, indirect=True)
def test_parked_items_go_back_and_are_discarded(store):
    cache, url = store
    with Session(cache.engine) as session, session.begin():
        for number in range(3):
            park_in(session, bytes([number]), name="orders", reason="no", attempts=3, destination=QUEUE)
    first, second, _ = (item.id for item in parked_items(cache.engine))
    assert json.loads(run(url, "parked", "show", str(second), "--json"))["body"] == {"text": "\x01"}
    with StompServer() as server:
        assert run(url, "parked", "requeue", str(first), "--yes", RETRYKIT_BROKER=server.url) == "sent back: 1\n"
        assert [message.body for message in server.messages(QUEUE)] == [b"\x00"]
    assert run(url, "parked", "discard", "--all", "--yes").endswith("discarded: 2\n")
    assert list(parked_items(cache.engine)) == []


@pytest.mark.parametrize("store", ["redis"], indirect=True)
def test_advice_to_programs_is_not_given_at_each_command_but_to_programs_still(store, caplog):
    _, url = store
    assert "append-only" not in run(url, "contexts", "list")
    assert "append-only" not in caplog.text
    assert logging.getLogger("retrykit.redis").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize("store", SERVERS, indirect=True)
def test_faults_of_the_store_are_one_line_without_the_password(store):
    _, url = store
    absent = f"{url.partition('://')[0]}://nobody:secret@127.0.0.1:1/histories"
    found = CliRunner().invoke(retrykit, ["contexts", "list", "--store", absent])
    assert found.exit_code == 1
    assert "secret" not in found.output
    assert "Traceback" not in found.output
