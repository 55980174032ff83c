"""`retrykit parked …`: what was parked by a consumer goes back to its broker, once, or at least once after a crash."""

from __future__ import annotations

import base64
import errno
import json
import os
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from click.testing import CliRunner
from sqlalchemy.orm import Session, sessionmaker

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.cli.commands import retrykit
from retrykit.histories import Histories
from retrykit.messaging import ListenerContainer
from retrykit.messaging.requeue import Requeuer, headers_of
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import (
    SqlRetryContextCache,
    park_in,
    park_in_transaction,
    parked_item,
    parked_items,
    remove_parked_in,
)
from retrykit.testing import StompServer

QUEUE = "/queue/orders"
PATIENCE = 30.0


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/orders.db"


@pytest.fixture
def cache(url):
    with SqlRetryContextCache(url) as cache:
        yield cache


@pytest.fixture
def server():
    with StompServer() as server:
        yield server


@pytest.fixture
def run(url, cache, server):
    def run(*arguments, status=0):
        environment = {"RETRYKIT_STORE": url, "RETRYKIT_BROKER": server.url}
        found = CliRunner().invoke(retrykit, ["parked", *arguments], env=environment)
        assert found.exit_code == status, found.output
        return found

    return run


def park(cache, payload=b'{"id": 7}', **facts):
    given = {
        "name": "orders",
        "reason": "SimpleRetryPolicy: attempt 3 of 3",
        "attempts": 3,
        "key": "orders/m-1",
        "message_id": "ID:1",
        "destination": QUEUE,
        "content_type": "application/json",
        "headers": {"content-type": "application/json", "x-tenant": "7"},
        "errors": [{"attempt": 3, "type": "builtins.ValueError", "message": "bad \x1b[2J", "at": 1.5}],
        "last_failed_at": 1.5,
    }
    with Session(cache.engine) as session, session.begin():
        return park_in(session, payload, **given | facts)


def numbers(cache):
    return [item.id for item in parked_items(cache.engine)]


def rows(found):
    return [line.split("\t") for line in found.stdout.splitlines()]


# -- list and show


def test_list_shows_where_it_came_from_and_why_it_is_here(run, cache):
    park(cache)
    titles, row = rows(run("list"))
    assert titles[:5] == ["id", "name", "parked", "attempts", "destination"]
    assert titles[5:] == ["message id", "bytes", "last error", "reason"]
    assert [row[0], row[1], *row[3:]] == [
        "1",
        "orders",
        "3",
        QUEUE,
        "ID:1",
        "9",
        "ValueError: bad \\x1b[2J",
        "SimpleRetryPolicy: attempt 3 of 3",
    ]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], ["1", "2", "3"]),
        (["--name", "orders"], ["1", "3"]),
        (["--reason", "vetoed"], ["2"]),
        (["--since", "2026-11-22T12:00Z"], ["2", "3"]),
        (["--until", "2026-11-22T12:00Z"], ["1"]),
        (["--since", "2026-11-22T12:00Z", "--name", "orders"], ["3"]),
        (["--after", "1"], ["2", "3"]),
    ],
)
def test_list_shows_those_for_which_every_filter_holds(run, cache, options, found):
    park(cache, parked_at=datetime(2026, 11, 21, tzinfo=UTC))
    park(cache, parked_at=datetime(2026, 11, 22, 12, tzinfo=UTC), name="mail", reason="vetoed: no", errors=[])
    park(cache, parked_at=datetime(2026, 11, 23, tzinfo=UTC))
    assert [row[0] for row in rows(run("list", *options))[1:]] == found


def test_list_is_shown_in_pages(run, cache):
    for _ in range(3):
        park(cache)
    assert "there may be more: --after 2" in run("list", "--limit", "2").stderr
    page = json.loads(run("list", "--limit", "2", "--after", "2", "--json").stdout)
    assert ([item["id"] for item in page["parked"]], page["next"]) == ([3], None)
    assert "body" not in page["parked"][0]
    assert "'x' is no ID" in run("list", "--after", "x", status=2).stderr


def test_show_tells_everything_and_lets_nothing_command_the_terminal(run, cache, tmp_path):
    body = b'{"id": "\x1b]0;owned\x07"}'
    number = park(cache, body, headers={"x": "\x1b[2J\n", "y": "1"})
    shown = run("show", str(number), "--body", str(tmp_path / "body"))
    assert "\x1b" not in shown.output
    assert "    x: \\x1b[2J\\n\n    y: 1\n" in shown.stdout
    assert "error 3:         builtins.ValueError: bad \\x1b[2J\n" in shown.stdout
    assert f"body:            {body.hex(' ')}\n" in shown.stdout
    assert (tmp_path / "body").read_bytes() == body


def test_json_form_has_the_body_as_text_or_in_base64(run, cache):
    text, binary = park(cache), park(cache, b"\xff\x00", headers={})
    fields = json.loads(run("show", str(text), "--json").stdout)
    assert (fields["format"], fields["bytes"], fields["body"]) == (1, 9, {"text": '{"id": 7}'})
    assert fields["errors"][0]["at"] == fields["last_failed_at"] == "1970-01-01T00:00:01.500000+00:00"
    body = json.loads(run("show", str(binary), "--json").stdout)["body"]
    assert base64.b64decode(body["base64"]) == b"\xff\x00"


def test_item_that_is_not_there_is_said_to_be_not_there(run):
    assert "no item 7 is parked" in run("show", "7", status=1).stderr
    assert "no item 7 is parked" in run("requeue", "7", status=1).stderr


def test_all_of_nothing_is_sent_back_and_discarded_without_a_question(run, server):
    assert run("discard", "--all").stdout == "discarded: 0\n"
    assert run("discard", "--name", "orders").stdout == "discarded: 0\n"
    assert run("requeue", "--all", "--broker", server.url).stdout == "sent back: 0\n"


# -- requeue


def test_item_goes_back_as_it_came_and_is_no_longer_parked(run, cache, server):
    headers = {
        "content-type": "application/json",
        "x-tenant": "7",
        "message-id": "ID:1",
        "subscription": "s-1",
        "expires": "1",
        "AMQ_SCHEDULED_DELAY": "60000",
        "retrykit-attempts": "9",
    }
    number = park(cache, headers=headers)
    assert run("requeue", str(number), "--yes").stdout == "sent back: 1\n"
    assert numbers(cache) == []
    (message,) = server.messages(QUEUE)
    assert message.body == b'{"id": 7}'
    assert message.persistent
    ours = {name: message.headers.get(name) for name in (*headers, "retrykit-id", "retrykit-destination")}
    assert ours == {
        "content-type": "application/json",
        "x-tenant": "7",
        "message-id": None,
        "subscription": None,
        "expires": "0",
        "AMQ_SCHEDULED_DELAY": None,
        "retrykit-attempts": None,
        "retrykit-id": "ID:1",
        "retrykit-destination": QUEUE,
    }
    assert message.message_id != "ID:1"


@pytest.mark.parametrize("profile", ["activemq", "generic"])
def test_poison_message_is_parked_sent_back_and_counted_anew(run, cache, server, profile):
    seen, poisoned, over = [], True, threading.Event()

    def handler(message, context):
        seen.append((message.body, context.attempt))
        if poisoned:
            raise ValueError("not yet")
        over.set()

    def recover(message, context):
        over.set()
        return park_in_transaction(message, context)

    def consume():
        over.clear()
        container = ListenerContainer(
            StompBroker(server.url, destination=QUEUE, profile=profile),
            handler,
            template=RetryTemplate(
                name="orders",
                retry_policy=SimpleRetryPolicy(max_attempts=2),
                context_cache=cache,
                remember_completed=3_600,
            ),
            transaction=sessionmaker(cache.engine).begin,
            recover=recover,
        )
        with container:
            assert over.wait(PATIENCE)
        assert server.depth(QUEUE) == 0

    server.publish(QUEUE, b"7", {"retrykit-id": "order-7"})
    consume()
    (item,) = parked_items(cache.engine)
    assert seen == [(b"7", 1), (b"7", 2)]
    poisoned = False
    run("requeue", str(item.id), "--yes")
    consume()
    assert seen[2:] == [(b"7", 1)]
    assert numbers(cache) == []


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["1", "3", "3"], [2]),
        (["--name", "orders"], [2]),
        (["--reason", "attempt 3"], []),
        (["--all", "--to", "/queue/other"], []),
        (["--since", "1h"], []),
    ],
)
def test_many_go_back_by_their_numbers_or_by_a_filter(run, cache, server, options, left):  # noqa: PLR0917
    for name in ("orders", "mail", "orders"):
        park(cache, name.encode(), name=name)
    found = run("requeue", *options, "--yes")
    assert found.stdout == f"sent back: {3 - len(left)}\n"
    assert numbers(cache) == left
    assert server.depth("/queue/other" if "--to" in options else QUEUE) == 3 - len(left)


@pytest.mark.parametrize("options", [[], ["1", "--all"], ["1", "--name", "orders"], ["--all", "--since", "1h"]])
def test_it_must_be_said_which_ones(run, cache, options):
    park(cache)
    for command in ("requeue", "discard"):
        assert "Say which" in run(command, *options, "--yes", status=2).stderr
    assert numbers(cache) == [1]


def test_without_a_terminal_nothing_is_done_that_was_not_confirmed(run, cache, server):
    park(cache)
    assert "Send 1 item back to where it came from? There is no terminal" in run("requeue", "1", status=2).stderr
    assert "Discard 1 item for good? There is no terminal" in run("discard", "1", status=2).stderr
    assert numbers(cache) == [1]
    assert server.depths() == {}


def test_history_and_mark_are_forgotten_before_it_is_sent(run, cache, server):
    cache.save("orders/m-1", {"format": 1, "name": "orders", "key": "m-1", "retry_count": 3}, None)
    park(cache)
    run("requeue", "1", "--yes")
    assert cache.load("orders/m-1") is None


def test_history_can_be_kept_but_not_a_mark_that_would_swallow_it(run, cache, server):
    facts = {"format": 1, "name": "orders", "key": "m-1", "retry_count": 3}
    version = cache.save("orders/m-1", facts, None)
    park(cache)
    park(cache, key=None)
    run("requeue", "--all", "--yes", "--keep-history")
    assert cache.load("orders/m-1").version == version
    cache.save("orders/m-1", facts | {"completed_at": 1.0, "expires_at": 9e9}, version)
    park(cache)
    refused = run("requeue", "3", "--yes", "--keep-history", status=1)
    assert "item 3 is still parked: The item 'orders/m-1' is remembered as completed until 2255" in refused.stderr
    assert (numbers(cache), server.depth(QUEUE)) == ([3], 2)


def test_histories_may_be_in_another_store(run, cache, tmp_path):
    other = f"sqlite:///{tmp_path}/histories.db"
    with SqlRetryContextCache(other) as histories:
        histories.save("orders/m-1", {"retry_count": 3}, None)
        park(cache)
        run("requeue", "1", "--yes", "--contexts", other)
        assert histories.load("orders/m-1") is None
    park(cache)
    assert "there is no file" in run("requeue", "2", "--yes", "--contexts", other + ".typo", status=1).stderr
    assert numbers(cache) == [2]


def test_item_without_a_destination_goes_where_it_is_told(run, cache, server):
    park(cache, destination=None, message_id=None, content_type=None, headers={})
    assert "item 1 does not say where it came from" in run("requeue", "1", "--yes", status=1).stderr
    run("requeue", "1", "--yes", "--to", QUEUE)
    (message,) = server.messages(QUEUE)
    assert not any(name.startswith("retrykit-") for name in message.headers)


def test_copy_of_a_copy_has_the_id_of_the_first(cache):
    item = parked_item(cache.engine, park(cache, headers={"retrykit-id": "first", "retrykit-sent-back": "a1"}))
    assert headers_of(item) == {
        "content-type": "application/json",
        "retrykit-id": "first",
        "retrykit-destination": QUEUE,
        # Its consumer knew it by both.
        "retrykit-sent-back": "a1",
    }


# -- what goes wrong


@pytest.mark.parametrize("broker", ["stomp://localhost/queue/orders", "http://localhost"])
def test_broker_must_be_named_by_a_url_without_a_destination(run, cache, broker):
    park(cache)
    found = run("requeue", "1", "--yes", "--broker", broker, status=2)
    assert "--broker" in found.stderr


def test_broker_that_is_not_there_leaves_everything_as_it_is(run, cache, server):
    cache.save("orders/m-1", {"retry_count": 3}, None)
    park(cache)
    server.stop()
    assert "No connection to the broker" in run("requeue", "1", "--yes", status=1).stderr
    assert numbers(cache) == [1]
    assert cache.load("orders/m-1") is not None
    server.start()


@pytest.mark.parametrize(("fault", "sent"), [("drop_before_commit", 0), ("drop_before_receipt", 1)])
def test_item_that_the_broker_did_not_confirm_is_still_parked(run, cache, server, fault, sent):  # noqa: PLR0917
    park(cache)
    park(cache)
    getattr(server, fault)()
    told = run("requeue", "--all", "--yes", status=1).stderr
    assert "item 1 may have been sent, and is still parked: the broker has not confirmed it" in told
    assert "0 sent before" in told
    assert (numbers(cache), server.depth(QUEUE)) == ([1, 2], sent)


def test_interruption_says_what_is_in_doubt(run, cache, monkeypatch):
    def interrupted(self, item, to):
        raise KeyboardInterrupt

    park(cache)
    monkeypatch.setattr(Requeuer, "send", interrupted)
    assert "item 1 may have been sent, and is still parked" in run("requeue", "1", "--yes", status=1).stderr


def test_item_that_somebody_else_took_is_not_sent(run, cache, server):
    item = parked_item(cache.engine, park(cache))
    with cache.engine.begin() as connection:
        remove_parked_in(connection, item.id)
    session = StompBroker(server.url).connect(consume=False)
    assert Requeuer(cache.engine, session, Histories(cache)).send(item) is False
    session.close()
    assert server.depths() == {}


def test_a_header_that_is_too_long_for_the_broker_is_left_out_and_told(run, cache, server, caplog):
    park(cache, headers={"x-long": "x" * 11_000, "x-tenant": "7"})
    assert run("requeue", "--all", "--yes").stdout.strip() == "sent back: 1"
    assert "item 1 is sent back without headers that are too long for the broker: x-long" in caplog.text
    (sent,) = server.messages(QUEUE)
    assert (sent.headers["x-tenant"], sent.headers["retrykit-left-out"]) == ("7", '{"x-long": 11007}')


CRASHES = """
import os, sys
from retrykit.cli import main
from retrykit.messaging.stomp.session import StompSession

commit = StompSession.commit
StompSession.commit = lambda *args: (commit(*args), os._exit(9))
sys.argv = ["retrykit", "parked", "requeue", "--all", "--yes", "--store", sys.argv[1], "--broker", sys.argv[2]]
main()
"""


def test_crash_between_sending_and_removing_leaves_it_parked_and_sent(run, cache, server, url):
    park(cache)
    died = subprocess.run([sys.executable, "-c", CRASHES, url, server.url], check=False)
    assert died.returncode == 9
    assert (numbers(cache), server.depth(QUEUE)) == ([1], 1)
    run("requeue", "1", "--yes")
    assert (numbers(cache), server.depth(QUEUE)) == ([], 2)


# -- discard


def test_discarded_items_are_listed_first(run, cache):
    for name in ("orders", "mail"):
        park(cache, name=name)
    found = run("discard", "--name", "orders", "--yes").stdout.splitlines()
    assert found[1].startswith("1\torders\t")
    assert found[2:] == ["discarded: 1"]
    assert numbers(cache) == [2]


def test_discarded_items_are_written_to_a_new_file_first(run, cache, tmp_path):
    file = tmp_path / "discarded.jsonl"
    for _ in range(3):
        park(cache)
    assert run("discard", "--all", "--yes", "--export", str(file)).stdout == "discarded: 3\n"
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert json.loads(file.read_text().splitlines()[0])["body"] == {"text": '{"id": 7}'}
    park(cache)
    run("discard", "--all", "--yes", "--export", str(file), status=1)
    assert numbers(cache) == [4]


def test_where_nothing_is_discarded_no_file_is_made(run, cache, tmp_path):
    file = tmp_path / "discarded.jsonl"
    run("discard", "--all", "--yes", "--export", str(file))
    assert not file.exists()


def test_parked_items_are_looked_for_in_sql_databases_only(run, cache, tmp_path):
    pytest.importorskip("redis")
    found = CliRunner().invoke(retrykit, ["parked", "list", "--store", "redis://localhost:1/0"])
    assert found.exit_code == 2
    assert "parked items are kept in a SQL database" in found.stderr


def test_nobody_needs_to_read_to_the_end(cache, url):
    with Session(cache.engine) as session, session.begin():
        for _ in range(2_000):
            park_in(session, b"", name="orders", reason="a reason that fills the pipe " * 10, attempts=3)
    command = f"{sys.executable} -m retrykit.cli parked list --limit 2000 --store {url} | head -1"
    found = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602 - a pipe is the point
    assert found.stdout.startswith("id\tname\t")
    assert "Error" not in found.stderr


def test_items_that_cannot_be_written_first_are_not_discarded(run, cache, tmp_path, monkeypatch):
    def full(_number):
        raise OSError(errno.ENOSPC, "No space left on device")

    park(cache)
    monkeypatch.setattr(os, "fsync", full)
    told = run("discard", "--all", "--yes", "--export", str(tmp_path / "discarded"), status=1).stderr
    assert "No space left on device" in told
    assert numbers(cache) == [1]
