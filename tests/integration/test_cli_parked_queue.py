"""`retrykit parked … --destination`: what was parked in a queue is shown, goes back, is dropped; on every broker."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest
from click.testing import CliRunner

from retrykit import RetryTemplate, SimpleRetryPolicy
from retrykit.cli.commands import retrykit
from retrykit.messaging import ListenerContainer, by_content, by_header, park
from retrykit.messaging.parked import browse, taken
from retrykit.messaging.stomp import StompBroker
from retrykit.sql import SqlRetryContextCache
from tests.servers import Wire

PATIENCE = 60.0


def parked(server, queue, *arguments, status=0, store=None):
    environment = {"RETRYKIT_BROKER": server.url, "RETRYKIT_STORE": store}
    where = () if "--destination" in arguments else ("--destination", f"{queue}.parked")
    found = CliRunner().invoke(retrykit, ["parked", *arguments, *where], env=environment)
    assert found.exit_code == status, found.output
    return found


def consume(server, queue, bodies, *, poisoned=True, cache=None, name="orders", identify=None, profile=None, **headers):
    """Send messages, and consume until each is handled or parked: their bodies, with the number of the attempt."""
    with closing(StompBroker(server.url).connect(consume=False)) as session:
        for body in bodies:
            session.send(queue, body, {"content-type": "application/json", "x-tenant": "7", **headers})
        session.commit()
    known = {"identify": identify, "profile": profile}
    return handled(server, queue, len(bodies), poisoned=poisoned, cache=cache, name=name, **known)


def handled(server, queue, count, *, poisoned=False, cache=None, name="orders", **known):
    seen = []

    def handler(message, context):
        seen.append((message.body, context.attempt))
        if poisoned:
            raise ValueError("not \x1b[2J yet")

    given = {} if cache is None else {"context_cache": cache, "remember_completed": 3600}
    template = RetryTemplate(name=name, retry_policy=SimpleRetryPolicy(max_attempts=2), **given)
    broker = StompBroker(server.url, destination=queue, **known)
    container = ListenerContainer(broker, handler, template=template, recover=park(f"{queue}.parked"))
    with container:
        deadline = time.monotonic() + PATIENCE
        while container.counters.parked + container.counters.acknowledged + container.counters.duplicates < count:
            assert time.monotonic() < deadline, container.counters
            container.wait(0.01)
    return seen


def rows(found):
    return [line.split("\t") for line in found.stdout.splitlines()]


def ids(server, queue, *options):
    return [row[0] for row in rows(parked(server, queue, "list", *options))[1:]]


def of(count):
    """So many are looked at, so none is waited for in vain."""
    return "--limit", str(count)


def delivered(server, queue, count=1):
    """What lies in a queue, taken out: so many messages, and then none."""
    with Wire(server.host, server.port, virtual_host=None) as wire:
        wire.subscribe(queue, prefetch=100, ack="auto")
        return [wire.message(PATIENCE) for _ in range(count)] + wire.messages(0.3)


def is_empty(server, queue):
    return delivered(server, queue, 0) == []


# -- list and show


def test_list_shows_what_is_parked_and_why_and_takes_nothing(server, queue):
    consume(server, queue, [b'{"id": 7}'])
    for _ in range(2):
        titles, row = rows(parked(server, queue, "list", *of(1)))
        assert titles[:5] == ["id", "name", "parked", "attempts", "destination"]
        assert [row[1], *row[3:5], row[6]] == ["orders", "2", queue, "9"]
        assert row[0] == row[5]
        assert row[7:] == ["ValueError: not [2J yet", "SimpleRetryPolicy: attempt 2 of 2"]
    assert len(delivered(server, f"{queue}.parked")) == 1


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_looking_leaves_no_trace_where_the_broker_can_show_a_queue(request, queue, kind):
    server = request.getfixturevalue(kind)
    consume(server, queue, [b"1", b"2"])
    assert len(ids(server, queue)) == 2
    assert ["redelivered" in frame.headers for frame in delivered(server, f"{queue}.parked", 2)] == [False, False]


def test_show_tells_everything_and_lets_nothing_command_the_terminal(server, queue, tmp_path):
    consume(server, queue, [b'{"id": "\x1b]0;owned\x07"}'])
    (id_,) = ids(server, queue, *of(1))
    shown = parked(server, queue, "show", id_, *of(1), "--body", str(tmp_path / "body"))
    assert "\x1b" not in shown.output
    assert "    x-tenant: 7\n" in shown.stdout
    assert "error 2:         builtins.ValueError: not [2J yet\n" in shown.stdout
    assert f"history:         orders(/{len(queue)}:{queue}," in shown.stdout
    assert (tmp_path / "body").read_bytes() == b'{"id": "\x1b]0;owned\x07"}'
    told = parked(server, queue, "show", "ID:none", *of(1), status=1).stderr
    assert f"no message ID:none is among the first 1 messages of {queue}.parked" in told


@pytest.mark.parametrize("name", ["ID:{delivered}", "my-id", "({queue!r}, 'ID:{delivered}')"])
def test_a_message_is_found_by_whatever_the_log_calls_it(embedded, queue, name):
    consume(embedded, queue, [b"7"], **{"retrykit-id": "my-id"})
    (_, row) = rows(parked(embedded, queue, "list", *of(1)))
    assert (row[0], row[5][:3]) == ("my-id", "ID:")
    named = name.format(delivered=row[5][3:], queue=queue)
    assert "id:              my-id\n" in parked(embedded, queue, "show", named, *of(1)).stdout
    assert parked(embedded, queue, "requeue", named, "--yes", *of(1)).stdout == "sent back: 1\n"
    assert [frame.body for frame in delivered(embedded, queue)] == [b"7"]


def test_an_id_comes_before_what_a_message_is_called_otherwise(embedded, queue):
    consume(embedded, queue, [b"7"], **{"retrykit-id": "my-id"})
    (_, row) = rows(parked(embedded, queue, "list", *of(1)))
    with Wire(embedded.host, embedded.port, virtual_host=None) as wire:
        wire.publish(f"{queue}.parked", b"other", retrykit_id=row[5])
    assert parked(embedded, queue, "discard", row[5], "--yes", *of(2)).stdout.endswith("discarded: 1\n")
    assert ids(embedded, queue, *of(1)) == ["my-id"]


def test_json_form_is_that_of_a_parked_item(server, queue):
    consume(server, queue, [b"\xff\x00"])
    listed = json.loads(parked(server, queue, "list", "--json", *of(1)).stdout)
    (item,) = listed["parked"]
    assert listed["next"] is None
    assert "body" not in item
    shown = json.loads(parked(server, queue, "show", item["id"], "--json", *of(1)).stdout)
    assert base64.b64decode(shown["body"]["base64"]) == b"\xff\x00"
    assert (shown["format"], shown["attempts"], shown["destination"], shown["bytes"]) == (1, 2, queue, 2)
    assert shown["errors"] == [
        {"attempt": 2, "type": "builtins.ValueError", "message": "not [2J yet", "at": shown["last_failed_at"]}
    ]
    assert shown["headers"]["x-tenant"] == "7"


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--name", "orders"], 2),
        (["--name", "mail"], 0),
        (["--reason", "ATTEMPT 2"], 2),
        (["--reason", "vetoed"], 0),
        (["--since", "1h"], 2),
        (["--until", "1h"], 0),
        (["--limit", "1"], 1),
    ],
)
def test_list_shows_those_for_which_every_filter_holds(embedded, queue, options, found):
    consume(embedded, queue, [b"1", b"2"])
    assert len(ids(embedded, queue, *options)) == found


def test_list_says_when_there_may_be_more(server, queue):
    consume(server, queue, [b"1", b"2", b"3"])
    found = parked(server, queue, "list", "--limit", "2")
    assert len(rows(found)) == 3
    assert "there may be more: of the queue's messages 2 were looked at (--limit)" in found.stderr


def test_what_nobody_parked_is_shown_too(server, queue):
    with Wire(server.host, server.port, virtual_host=None) as wire:
        wire.publish(f"{queue}.parked", b"stray", retrykit_attempts="x", retrykit_key="{", retrykit_other_headers="[")
    (item,) = json.loads(parked(server, queue, "list", "--json", *of(1)).stdout)["parked"]
    assert (item["attempts"], item["key"], item["destination"], item["errors"], item["bytes"]) == (0, None, None, [], 5)
    told = parked(server, queue, "requeue", "--all", "--yes", *of(1), status=1).stderr
    assert "does not say where it came from" in told


# -- requeue


def test_a_message_goes_back_as_it_came_and_is_no_longer_parked(server, queue):
    consume(server, queue, [b'{"id": 7}'])
    (id_,) = ids(server, queue, *of(1))
    assert parked(server, queue, "requeue", id_, "--yes", *of(1)).stdout == "sent back: 1\n"
    assert ids(server, queue) == []
    (frame,) = delivered(server, queue)
    ours = {name: frame.headers.get(name) for name in ("content-type", "x-tenant", "retrykit-id", "retrykit-attempts")}
    assert ours == {"content-type": "application/json", "x-tenant": "7", "retrykit-id": id_, "retrykit-attempts": None}
    assert frame.body == b'{"id": 7}'
    assert frame.headers.get("persistent") == "true"


def test_poison_is_parked_sent_back_and_counted_anew_although_it_is_remembered_as_completed(server, queue, tmp_path):
    with SqlRetryContextCache(f"sqlite:///{tmp_path}/orders.db") as cache:
        assert consume(server, queue, [b"7"], cache=cache) == [(b"7", 1), (b"7", 2)]
        parked(server, queue, "requeue", "--all", "--yes", *of(1))
        assert handled(server, queue, 1, cache=cache, poisoned=True) == [(b"7", 1), (b"7", 2)]
        parked(server, queue, "requeue", "--all", "--yes", *of(1))
        assert handled(server, queue, 1, cache=cache) == [(b"7", 1)]
        assert is_empty(server, f"{queue}.parked")


KNOWN = pytest.mark.parametrize(
    "identify", [by_header("retrykit-id", "message-id"), by_content()], ids=["by header", "by content"]
)


@KNOWN
def test_what_goes_back_is_no_duplicate_of_what_was_parked_whatever_it_is_known_by(server, queue, tmp_path, identify):
    with SqlRetryContextCache(f"sqlite:///{tmp_path}/orders.db") as cache:
        known = {"cache": cache, "identify": identify}
        assert consume(server, queue, [b"7"], **known, **{"retrykit-id": "o-7"}) == [(b"7", 1), (b"7", 2)]
        parked(server, queue, "requeue", "--all", "--yes", *of(1))
        assert handled(server, queue, 1, **known, poisoned=True) == [(b"7", 1), (b"7", 2)]
        parked(server, queue, "requeue", "--all", "--yes", *of(1))
        assert handled(server, queue, 1, **known) == [(b"7", 1)]
        # The mark of the first one stands: what its producer sends again was parked.
        assert consume(server, queue, [b"7"], **known, **{"retrykit-id": "o-7"}) == []


def test_what_goes_back_is_no_duplicate_to_consumers_that_know_nothing_of_their_broker(embedded, queue, tmp_path):
    with SqlRetryContextCache(f"sqlite:///{tmp_path}/orders.db") as cache:
        known = {"cache": cache, "profile": "generic"}
        assert consume(embedded, queue, [b"7"], **known, **{"retrykit-id": "o-7"}) == [(b"7", 1), (b"7", 2)]
        parked(embedded, queue, "requeue", "--all", "--yes", *of(1))
        assert handled(embedded, queue, 1, **known) == [(b"7", 1)]


@KNOWN
def test_what_was_forgotten_goes_back_under_the_id_that_it_had(embedded, queue, tmp_path, identify):
    store = f"sqlite:///{tmp_path}/orders.db"
    with SqlRetryContextCache(store) as cache:
        known = {"cache": cache, "identify": identify}
        assert consume(embedded, queue, [b"7"], **known, **{"retrykit-id": "o-7"}) == [(b"7", 1), (b"7", 2)]
        parked(embedded, queue, "requeue", "--all", "--yes", *of(1), store=store)
        assert handled(embedded, queue, 1, **known) == [(b"7", 1)]
        assert consume(embedded, queue, [b"7"], **known, **{"retrykit-id": "o-7"}) == []


def test_what_went_back_once_without_being_forgotten_is_forgotten_by_the_id_that_it_has_now(embedded, queue, tmp_path):
    store, identify = f"sqlite:///{tmp_path}/orders.db", by_header("retrykit-id")
    with SqlRetryContextCache(store) as cache:
        known = {"cache": cache, "identify": identify}
        consume(embedded, queue, [b"7"], **known, **{"retrykit-id": "o-7"})
        parked(embedded, queue, "requeue", "--all", "--yes", *of(1))
        handled(embedded, queue, 1, **known, poisoned=True)
        parked(embedded, queue, "requeue", "--all", "--yes", *of(1), store=store)
        assert handled(embedded, queue, 1, **known) == [(b"7", 1)]


def test_what_is_to_be_forgotten_where_it_is_not_is_no_duplicate_either(embedded, queue, tmp_path):
    other, identify = f"sqlite:///{tmp_path}/other.db", by_header("retrykit-id")
    with SqlRetryContextCache(other), SqlRetryContextCache(f"sqlite:///{tmp_path}/orders.db") as cache:
        consume(embedded, queue, [b"7"], cache=cache, identify=identify, **{"retrykit-id": "o-7"})
        parked(embedded, queue, "requeue", "--all", "--yes", *of(1), store=other)
        assert handled(embedded, queue, 1, cache=cache, identify=identify) == [(b"7", 1)]


def test_history_of_a_message_is_forgotten_where_it_is_said_to_be(server, queue, tmp_path):
    store = f"sqlite:///{tmp_path}/orders.db"
    with SqlRetryContextCache(store) as cache:
        for option in ({"store": store}, {}):
            consume(server, queue, [b"7"], cache=cache)
            (item,) = json.loads(parked(server, queue, "list", "--json", *of(1)).stdout)["parked"]
            assert cache.load(item["key"]) is not None
            arguments = () if option else ("--contexts", store)
            parked(server, queue, "requeue", "--all", "--yes", *of(1), *arguments, **option)
            assert cache.load(item["key"]) is None
            delivered(server, queue)


def test_those_that_are_not_meant_stay(server, queue):
    consume(server, queue, [b"1", b"2", b"3"])
    first, second, third = ids(server, queue, *of(3))
    parked(server, queue, "requeue", first, third, "--yes", *of(3), "--to", f"{queue}.other")
    assert ids(server, queue, *of(1)) == [second]
    assert [frame.body for frame in delivered(server, f"{queue}.other", 2)] == [b"1", b"3"]


def test_a_copy_that_the_broker_was_given_twice_goes_back_once(rabbit, queue):
    consume(rabbit, queue, [b"7"])
    (frame,) = delivered(rabbit, f"{queue}.parked")
    mine = {name: value for name, value in frame.headers.items() if name.startswith(("retrykit-", "amqp-"))}
    with closing(StompBroker(rabbit.url).connect(consume=False)) as session:
        for _ in range(2):
            session.send(f"{queue}.parked", b"7", mine)
        session.commit()
    assert len(ids(rabbit, queue, *of(2))) == 2
    assert parked(rabbit, queue, "requeue", "--all", "--yes", *of(2)).stdout == "sent back: 1\n"
    assert is_empty(rabbit, f"{queue}.parked")
    assert [frame.body for frame in delivered(rabbit, queue)] == [b"7"]


def test_a_copy_that_is_sent_twice_has_one_id(rabbit, queue):
    consume(rabbit, queue, [b"7"])
    broker = StompBroker(rabbit.url, destination=f"{queue}.parked")
    found = []
    for _ in range(2):
        with taken(broker, 1) as hands:
            (one,) = hands.found
            found.append(hands._headers(one.item)["amqp-message-id"])
    assert found[0] == found[1] != one.item.id


def test_a_queue_that_was_made_in_another_way_is_told_so(rabbit, queue):
    quorum = {"x-queue-type": "quorum"}
    with closing(StompBroker(rabbit.url, destination=queue, declare=quorum).connect()):
        pass
    with closing(StompBroker(rabbit.url, declare=quorum).connect(consume=False)) as session:
        session.send(f"{queue}.parked", b"7", {"retrykit-destination": queue, "retrykit-id": "m-7"})
        session.commit()
    assert ids(rabbit, queue, *of(1)) == ["m-7"]
    told = parked(rabbit, queue, "requeue", "m-7", "--yes", *of(1), status=1).stderr
    assert "message m-7 is still parked" in told
    assert "inequivalent arg" in told
    assert "(the queue was made otherwise: --declare x-queue-type=quorum)" in told
    parked(rabbit, queue, "requeue", "m-7", "--yes", *of(1), "--declare", "x-queue-type=quorum")
    assert [frame.body for frame in delivered(rabbit, queue.replace("/queue/", "/amq/queue/"))] == [b"7"]


# -- discard


def test_discarded_messages_are_listed_first_or_written_to_a_file(server, queue, tmp_path):
    consume(server, queue, [b"1", b"2"])
    first, second = ids(server, queue, *of(2))
    found = parked(server, queue, "discard", first, "--yes", *of(2)).stdout.splitlines()
    assert found[1].startswith(f"{first}\torders\t")
    assert found[2:] == ["discarded: 1"]
    file = tmp_path / "discarded.jsonl"
    assert parked(server, queue, "discard", "--all", "--yes", *of(1), "--export", str(file)).stdout == "discarded: 1\n"
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [second]
    assert is_empty(server, f"{queue}.parked")


# -- what goes wrong


def test_without_a_terminal_nothing_is_done_that_was_not_confirmed(server, queue):
    consume(server, queue, [b"7"])
    for command, question in (("requeue", "Send 1 item back"), ("discard", "Discard 1 item")):
        assert question in parked(server, queue, command, "--all", *of(1), status=2).stderr
    assert len(delivered(server, f"{queue}.parked")) == 1


def test_long_headers_come_back_with_their_message(server, queue, caplog):
    long = {name: name * 5_000 for name in ("x", "y", "z")}
    consume(server, queue, [b"7"], **long)
    assert parked(server, queue, "requeue", "--all", *of(1), "--yes").stdout.strip() == "sent back: 1"
    (back,) = delivered(server, queue)
    assert back.headers.items() >= long.items()
    assert "sent back without" not in caplog.text


def test_what_was_too_long_for_the_copy_is_named_and_the_message_goes_back_without_it(server, queue, caplog):
    with Wire(server.host, server.port, virtual_host=None) as wire:
        told = {"retrykit_left_out": '{"x-long": 19007}', "retrykit_destination": queue, "retrykit_id": "i-7"}
        wire.publish(f"{queue}.parked", b"7", **told, retrykit_other_headers='{"x-tenant": "7"}')
    (item,) = browse(StompBroker(server.url, destination=f"{queue}.parked"), 1)
    assert (item.left_out, item.headers["x-tenant"]) == ({"x-long": 19_007}, "7")
    assert "left out:" in (shown := parked(server, queue, "show", item.id, *of(1)).stdout)
    assert "x-long (19,007 bytes)" in shown
    assert json.loads(parked(server, queue, "show", item.id, *of(1), "--json").stdout)["left_out"] == item.left_out
    assert parked(server, queue, "requeue", "--all", *of(1), "--yes").stdout.strip() == "sent back: 1"
    assert "'i-7' is sent back without headers that were too long for its copies: x-long" in caplog.text
    (back,) = delivered(server, queue)
    assert (back.headers["x-tenant"], "x-long" in back.headers) == ("7", False)


@pytest.mark.parametrize("options", [[], ["1", "--all"], ["1", "--name", "orders"], ["--all", "--since", "1h"]])
def test_it_must_be_said_which_ones(embedded, queue, options):
    for command in ("requeue", "discard"):
        assert "Say which" in parked(embedded, queue, command, *options, "--yes", status=2).stderr


@pytest.mark.parametrize("destination", ["", "/topic/orders", "/exchange/amq.topic/orders"])
def test_what_is_no_queue_is_refused_before_anything_is_connected(embedded, queue, destination):
    told = parked(embedded, queue, "list", "--destination", destination, status=2).stderr
    assert f"a queue, such as /queue/orders.parked, not {destination!r}" in told


def test_what_would_be_taken_for_a_queue_of_a_strange_name_is_refused(embedded):
    told = parked(embedded, "", "list", "--destination", "/quene/orders.parked", status=1).stderr
    assert "destination: '/quene/orders.parked' begins neither with /queue/ nor with /topic/" in told


def test_nothing_is_made_that_was_not_there(rabbit, queue):
    told = f"there is no queue {queue}.parked: nobody has parked anything there\n"
    for _ in range(2):
        found = parked(rabbit, queue, "list", "--json")
        assert (json.loads(found.stdout), found.stderr) == ({"parked": [], "next": None}, told)
    assert parked(rabbit, queue, "discard", "--all").output == f"{told}discarded: 0\n"
    assert parked(rabbit, queue, "requeue", "--all").output == f"{told}sent back: 0\n"
    assert "no message i-7 is among" in parked(rabbit, queue, "discard", "i-7", status=1).stderr


def run(*arguments):
    return CliRunner().invoke(retrykit, ["parked", *arguments], env={"RETRYKIT_BROKER": None, "RETRYKIT_STORE": None})


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["list"], "Say where"),
        (["list", "--broker", "stomp://h"], "Say where"),
        (["list", "--broker", "stomp://u:p@h/queue/a.parked"], "goes there, out of the URL: /queue/a.parked\n"),
        (["list", "--destination", "/queue/a"], "--destination needs a --broker"),
        (["show", "1", "--store", "sqlite:///x", "--limit", "1"], "--limit needs a --destination"),
        (["list", "--broker", "stomp://h", "--destination", "/queue/a", "--store", "sqlite:///x"], "say one of them"),
        (["list", "--broker", "stomp://h", "--destination", "/queue/a", "--after", "1"], "say one of them"),
        (["list", "--broker", "stomp://h/queue/b", "--destination", "/queue/a"], "without a destination"),
        (
            ["list", "--broker", "stomp://u:***@h", "--destination", "/queue/a"],
            "RETRYKIT_BROKER may have the whole one",
        ),
        (["requeue", "1", "--store", "sqlite:///x"], "Missing option '--broker'"),
        (["requeue", "1", "--broker", "stomp://h", "--destination", "/queue/a", "--declare", "x"], "is no NAME=VALUE"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments, told):
    found = run(*arguments)
    assert (found.exit_code, told in found.stderr) == (2, True), found.output


def test_a_password_is_shown_nowhere(rabbitmq, queue):
    wrong = rabbitmq.url.replace(rabbitmq.password, "open-sesame")
    found = run("list", "--broker", wrong, "--destination", queue)
    assert found.exit_code == 1
    assert "sesame" not in found.output
    assert "denied" in found.stderr.lower() or "refused" in found.stderr.lower() or "Bad CONNECT" in found.stderr


@pytest.mark.parametrize(("fault", "sent"), [("drop_before_commit", 0), ("drop_before_receipt", 1)])
def test_what_the_broker_did_not_confirm_is_said_to_be_in_doubt(embedded, queue, fault, sent):
    consume(embedded, queue, [b"7"])
    getattr(embedded, fault)()
    try:
        told = parked(embedded, queue, "requeue", "--all", "--yes", *of(1), status=1).stderr
    finally:
        embedded.clear_faults()
    assert "may have been sent back or not: the broker has not confirmed it" in told
    assert "0 sent back before" in told
    assert (embedded.depth(f"{queue}.parked"), embedded.depth(queue)) == (1 - sent, sent)


def test_a_command_that_is_killed_gives_everything_back(server, queue):
    consume(server, queue, [b"1", b"2"])
    script = (
        "import sys\nfrom contextlib import suppress\nfrom retrykit.messaging.parked import taken\n"
        "from retrykit.messaging.stomp import StompBroker\n"
        "with taken(StompBroker(sys.argv[1], destination=sys.argv[2]), 2) as hands:\n"
        "    print(len(hands.found), flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, server.url, f"{queue}.parked"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"2\n"
        os.kill(holder.pid, signal.SIGKILL)
    assert len(delivered(server, f"{queue}.parked", 2)) == 2


@pytest.mark.parametrize("kind", ["embedded", "activemq"])
def test_a_browser_is_shown_all_that_lies_in_a_queue_and_takes_nothing(request, queue, kind):
    server = request.getfixturevalue(kind)
    with Wire(server.host, server.port) as consumer, Wire(server.host, server.port) as wire:
        for body in (b"1", b"2", b"3"):
            wire.publish(queue, body)
        consumer.subscribe(queue, prefetch=1)
        assert consumer.message().body == b"1"
        for id_ in ("a", "b"):
            wire.subscribe(queue, id_, prefetch=10, browser="true")
            assert [wire.message().body for _ in range(3)] == [b"1", b"2", b"3"]
            assert wire.message()["browser"] == "end"
            wire.ask("UNSUBSCRIBE", id=id_)
        wire.subscribe(queue, "c", prefetch=10)
        assert [frame.body for frame in wire.messages()] == [b"2", b"3"]


def test_a_url_may_name_several_servers(embedded, queue):
    consume(embedded, queue, [b"7"])
    url = f"failover:(stomp://127.0.0.1:1,{embedded.url})"
    found = run("requeue", "--all", "--yes", *of(1), "--broker", url, "--destination", f"{queue}.parked")
    assert found.stdout == "sent back: 1\n", found.output
    assert embedded.depth(queue) == 1


def test_a_queue_that_the_url_names_is_looked_at_too(embedded, embedded_rabbit, queue):
    for server in (embedded, embedded_rabbit):
        server.publish(queue, b"x", {"retrykit-id": "m-1", "retrykit-attempts": "9" * 5_000})
        (found,) = browse(StompBroker(f"{server.url}{queue}"), 5)
        # A number that nobody can have counted to is none.
        assert (found.id, found.attempts) == ("m-1", 0)
