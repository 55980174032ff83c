"""Every behavior that the embedded server claims for its RabbitMQ profile, asked of it and of the real broker."""

from __future__ import annotations

import contextlib
import threading
import uuid

import pytest

from retrykit.testing import StompServer
from tests.servers import RabbitMq, StompErrorFrame, Wire

QUORUM = {"x_queue_type": "quorum"}
# The real one writes acknowledgements of a classic queue down when it has been idle for about 0.2 s.
IDLE = 1.0


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    with StompServer(profile="rabbitmq", data=tmp_path_factory.mktemp("embedded") / "journal") as server:
        yield server


@pytest.fixture(scope="module")
def embedded_in_memory():
    with StompServer(profile="rabbitmq") as server:
        yield server


@pytest.fixture(params=["embedded", "embedded_in_memory", "rabbitmq"])
def broker(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def open_wire(broker):
    """Open connections that end with the test."""
    wires = []

    def connect(**options):
        wires.append(Wire(broker.host, broker.port, **{"virtual_host": None} | options))
        return wires[-1]

    yield connect
    for wire in wires:
        wire.close()


@pytest.fixture
def wire(open_wire):
    return open_wire()


@pytest.fixture
def queue():
    """A destination that no other test uses."""
    return f"/queue/test.{uuid.uuid4().hex}"


def refusal(wire, command, /, **headers):
    with pytest.raises(StompErrorFrame) as refused:
        wire.ask(command, **headers)
    return refused.value.frame["message"]


def fill(wire, queue, count):
    for number in range(count):
        wire.publish(queue, b"%d" % number)


def everything(wire, seconds=0.5):
    """What comes until nothing comes for a while: body and flag."""
    return [(frame.body.decode(), frame["redelivered"] == "true") for frame in wire.messages(seconds)]


def flagged(*bodies):
    return [(body, True) for body in bodies]


def fresh(*bodies):
    return [(body, False) for body in bodies]


# -- connecting


@pytest.mark.parametrize("host", [None, "/"])
def test_the_default_virtual_host_needs_no_name(open_wire, host):
    assert open_wire(virtual_host=host).connected["server"].startswith("RabbitMQ/3.10")


def test_the_host_of_connect_is_a_virtual_host(open_wire):
    with pytest.raises(StompErrorFrame) as refused:
        open_wire(virtual_host="127.0.0.1")
    assert refused.value.frame["message"] == "Bad CONNECT"
    assert refused.value.frame.body == b"Virtual host '127.0.0.1' access denied"


# -- messages


def test_a_message_travels_with_all_its_headers_those_of_its_frame_too(wire, queue):
    wire.ask("BEGIN", transaction="t")
    wire.send("SEND", b"a\0b", destination=queue, transaction="t", receipt="r-1", my="a:b", content_length=3)
    wire.ask("COMMIT", transaction="t")
    wire.subscribe(queue)
    message = wire.message()
    assert message.body == b"a\0b"
    assert (message["receipt"], message["transaction"], message["my"], message["content-length"]) == (
        "r-1",
        "t",
        "a:b",
        "3",
    )
    assert message["redelivered"] == "false"
    assert not {"persistent", "expires", "timestamp", "priority"} & set(message.headers)


def test_a_message_id_is_not_for_the_sender_to_give(wire, queue):
    assert refusal(wire, "SEND", destination=queue, message_id="mine") == "Invalid header"


def test_each_delivery_has_another_message_id_and_the_producers_stays(wire, queue):
    wire.publish(queue, b"1", amqp_message_id="mine")
    wire.subscribe(queue)
    first = wire.message()
    wire.ask("NACK", id=first["ack"])
    again = wire.message()
    assert first["message-id"] == first["ack"]
    assert again["message-id"] != first["message-id"]
    assert first["message-id"].startswith("T_1@@")
    assert (first["amqp-message-id"], again["amqp-message-id"]) == ("mine", "mine")
    assert (first["redelivered"], again["redelivered"]) == ("false", "true")


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("/elsewhere/x", "Unknown destination"),
        ("/queue/", "Invalid destination"),
        ("/queue/a/b", "Invalid destination"),
    ],
)
def test_a_destination_that_cannot_be_is_refused(wire, destination, message):
    assert refusal(wire, "SEND", destination=destination) == message


@pytest.mark.parametrize("destination", ["/amq/queue/nobody-made-this", "nobody-made-this"])
def test_what_is_sent_to_a_queue_that_nobody_made_is_confirmed_and_lost(wire, destination):
    wire.publish(destination, b"lost")


def test_a_queue_that_nobody_made_cannot_be_subscribed(broker, wire):
    wire.send("SUBSCRIBE", destination="/amq/queue/nobody-made-this", id="1", receipt="r")
    found = []
    with contextlib.suppress(ConnectionError):
        while "not_found" not in found and (frame := wire.next(5)) is not None:
            found.append(frame.headers.get("message"))
    # The real one may send a receipt too, before or after; on a busy machine it has sent nothing else.
    assert set(found) <= {None, "not_found"}
    assert "not_found" in found or isinstance(broker, RabbitMq)


def test_a_queue_that_was_made_has_a_second_name(wire, queue):
    wire.publish(queue, b"1")
    wire.publish(queue.replace("/queue/", "/amq/queue/"), b"2")
    wire.subscribe(queue.replace("/queue/", "/amq/queue/"), prefetch=10)
    messages = [wire.message(), wire.message()]
    assert [message.body for message in messages] == [b"1", b"2"]
    assert {message["destination"] for message in messages} == {queue}


# -- what is wrong


def test_an_error_names_no_receipt_and_the_connection_goes_on(wire):
    wire.send("COMMIT", transaction="no", receipt="r")
    error = wire.error()
    assert error["message"] == "Bad transaction"
    assert "receipt-id" not in error.headers
    wire.ask("BEGIN", transaction="still here")


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({}, "Missing header"),
        ({"id": "no"}, "Invalid header"),
        ({"id": "T_9@@session@@1"}, "Subscription not found"),
    ],
)
@pytest.mark.parametrize("command", ["ACK", "NACK"])
def test_an_id_that_means_nothing_is_refused(wire, command, headers, message):
    assert refusal(wire, command, **headers) == message


def test_an_id_that_is_used_up_is_confirmed_and_ends_the_connection(wire, queue):
    fill(wire, queue, 1)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("ACK", id=message["ack"])
    wire.ask("ACK", id=message["ack"])
    assert wire.error()["message"] == "precondition_failed"
    assert wire.closed()


def test_an_id_of_another_session_acknowledges_the_message_with_its_number(open_wire, queue):
    gone, wire = open_wire(), open_wire()
    fill(gone, queue, 2)
    gone.subscribe(queue)
    stale = gone.message()["ack"]
    gone.ask("DISCONNECT")
    wire.subscribe(queue)
    assert wire.message()["ack"] != stale
    wire.ask("ACK", id=stale)
    assert wire.message().body == b"1"


# -- acknowledging


def test_a_nack_puts_a_message_back_where_it_was(wire, queue):
    fill(wire, queue, 4)
    wire.subscribe(queue, prefetch=3)
    messages = [wire.message() for _ in range(3)]
    for message in (messages[2], messages[1]):
        wire.ask("NACK", id=message["ack"])
    wire.ask("ACK", id=messages[0]["ack"])
    # What came back first was delivered again at once, before the other was there.
    assert sorted(everything(wire)) == [("1", True), ("2", True), ("3", False)]


def test_a_nack_without_requeue_drops_the_message(wire, queue):
    fill(wire, queue, 1)
    wire.subscribe(queue)
    wire.ask("NACK", id=wire.message()["ack"], requeue="false")
    wire.nothing()


@pytest.mark.parametrize(("command", "left"), [("ACK", fresh("3", "4")), ("NACK", flagged("0", "1"))])
def test_a_cumulative_settlement_takes_along_what_came_before(wire, queue, command, left):
    fill(wire, queue, 5)
    wire.subscribe(queue, prefetch=3, ack="client")
    messages = [wire.message() for _ in range(3)]
    wire.ask(command, id=messages[1]["ack"])
    assert [wire.message().body.decode() for _ in left] == [body for body, _ in left]
    wire.nothing()


def test_leaving_a_subscription_gives_nothing_back_until_the_connection_ends(open_wire, wire, queue):
    fill(wire, queue, 4)
    wire.subscribe(queue, prefetch=2)
    messages = [wire.message(), wire.message()]
    wire.ask("UNSUBSCRIBE", id="1")
    assert refusal(wire, "ACK", id=messages[0]["ack"]) == "Subscription not found"
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert everything(other) == fresh("2", "3")
    wire.close()
    assert everything(other) == flagged("0", "1")


def test_the_end_of_a_connection_gives_back_in_order_and_flags_what_nobody_has_seen(open_wire, queue):
    gone, wire = open_wire(), open_wire()
    fill(wire, queue, 4)
    gone.subscribe(queue, prefetch=3)
    for _ in range(3):
        gone.message()
    gone.ask("DISCONNECT")
    wire.subscribe(queue, prefetch=10)
    assert everything(wire) == [*flagged("0", "1", "2"), ("3", False)]


def test_version_1_1_acknowledges_by_message_id(open_wire, queue):
    wire = open_wire(version="1.1")
    fill(wire, queue, 2)
    wire.subscribe(queue)
    message = wire.message()
    assert "ack" not in message.headers
    wire.ask("ACK", message_id=message["message-id"], subscription="1")
    assert wire.message().body == b"1"


# -- transactions


def test_sends_are_confirmed_after_their_commit_and_acknowledgements_before(wire, queue):
    fill(wire, queue, 1)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.send("SEND", b"out", destination=f"{queue}.out", transaction="t", persistent="true", receipt="sent")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.nothing()
    wire.send("COMMIT", transaction="t", receipt="committed")
    receipts = [wire.next(10)["receipt-id"], wire.next(10)["receipt-id"]]
    assert receipts == ["committed", "sent"]


def test_an_ack_within_a_transaction_makes_no_room_before_the_commit(wire, queue):
    fill(wire, queue, 2)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.nothing()
    wire.ask("COMMIT", transaction="t")
    assert wire.message().body == b"1"


def test_abort_gives_nothing_back_and_a_nack_does(wire, queue):
    fill(wire, queue, 2)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.send("SEND", b"never", destination=queue, transaction="t", receipt="never")
    wire.ask("ABORT", transaction="t")
    wire.nothing()
    wire.ask("NACK", id=message["ack"])
    assert wire.message().body == b"0"


def test_a_nack_within_a_transaction_waits_for_its_commit(wire, queue):
    fill(wire, queue, 1)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("NACK", id=message["ack"], transaction="t")
    wire.nothing()
    wire.ask("COMMIT", transaction="t")
    assert wire.message()["redelivered"] == "true"


def test_a_transaction_may_begin_twice(wire):
    wire.ask("BEGIN", transaction="t")
    wire.ask("BEGIN", transaction="t")


@pytest.mark.parametrize("order", [["ACK", "SEND"], ["SEND", "ACK"]])
def test_a_send_that_fails_at_the_commit_undoes_nothing_before_it(open_wire, wire, queue, order):
    fill(wire, queue, 1)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    for command in order:
        if command == "ACK":
            wire.send("ACK", id=message["ack"], transaction="t")
        else:
            wire.send("SEND", b"x", destination="/exchange/nobody-made-this/x", transaction="t", receipt="sent")
    wire.ask("COMMIT", transaction="t")
    assert wire.error()["message"] == "not_found"
    assert wire.closed()
    other = open_wire()
    other.subscribe(queue)
    assert everything(other) == ([] if order[0] == "ACK" else flagged("0"))


def test_a_lost_connection_undoes_its_transaction(open_wire, queue):
    gone, wire = open_wire(), open_wire()
    fill(wire, queue, 1)
    gone.subscribe(queue)
    message = gone.message()
    gone.ask("BEGIN", transaction="t")
    gone.send("SEND", b"out", destination=queue, transaction="t", receipt="r")
    gone.ask("ACK", id=message["ack"], transaction="t")
    gone.close()
    wire.subscribe(queue, prefetch=10)
    assert everything(wire) == flagged("0")


# -- queues with arguments


def test_a_queue_is_made_by_what_comes_first_and_the_others_have_to_agree(open_wire, queue):
    open_wire().publish(queue, b"1", **QUORUM)
    assert refusal(open_wire(), "SEND", destination=queue) == "precondition_failed"
    assert refusal(open_wire(), "SUBSCRIBE", destination=queue, id="1") == "precondition_failed"
    other = open_wire()
    other.publish(queue.replace("/queue/", "/amq/queue/"), b"2")
    other.subscribe(queue, prefetch=10, **QUORUM)
    assert everything(other) == fresh("1", "2")


def test_a_quorum_queue_counts_what_came_back(open_wire, wire, queue):
    wire.publish(queue, b"1", **QUORUM)
    wire.subscribe(queue, **QUORUM)
    counts = []
    for _ in range(3):
        message = wire.message()
        counts.append((message.headers.get("x-delivery-count"), message["redelivered"]))
        wire.ask("NACK", id=message["ack"])
    wire.message()
    wire.close()
    other = open_wire()
    other.subscribe(queue, **QUORUM)
    assert counts == [(None, "false"), ("1", "true"), ("2", "true")]
    assert other.message()["x-delivery-count"] == "4"


def test_a_queue_can_hold_messages_back_and_send_them_on(wire, queue):
    wire.publish(queue, b"first")
    delay = {"x_message_ttl": "300", "x_dead_letter_exchange": "", "x_dead_letter_routing_key": queue[7:]}
    wire.publish(f"{queue}.wait", b"later", amqp_message_id="mine", **delay)
    wire.subscribe(queue, prefetch=10)
    assert wire.message().body == b"first"
    later = wire.message()
    assert (later.body, later["amqp-message-id"], later["redelivered"]) == (b"later", "mine", "false")
    assert later["destination"] == queue
    # Which its header `x-death` does not tell over STOMP.
    death = {name: value for name, value in later.headers.items() if name.startswith("x-first-death")}
    wait = {"x-first-death-exchange": "", "x-first-death-queue": f"{queue[7:]}.wait", "x-first-death-reason": "expired"}
    assert death == wait


def test_a_queue_that_nobody_uses_goes_and_what_a_connection_that_made_it_sends_there_is_confirmed_and_lost(
    open_wire, wire, queue
):
    wire.subscribe(queue, prefetch=10)
    short = {"x_expires": "400", "x_message_ttl": "100", "x_dead_letter_exchange": ""}
    delay = short | {"x_dead_letter_routing_key": queue[7:]}
    sender = open_wire()
    sender.publish(f"{queue}.wait", b"first", **delay)
    assert wire.message().body == b"first"
    # To look for it would be to use it: nothing else is to be waited for.
    assert wire.messages(1.5) == []
    sender.publish(f"{queue}.wait", b"lost", **delay)
    assert wire.messages(0.5) == []
    open_wire().publish(f"{queue}.wait", b"second", **delay)
    assert wire.message().body == b"second"


def test_what_waits_in_a_queue_that_expires_goes_with_it(wire, queue):
    wire.subscribe(queue)
    delay = {"x_expires": "300", "x_message_ttl": "1500", "x_dead_letter_exchange": ""}
    wire.publish(f"{queue}.wait", b"never", **delay, x_dead_letter_routing_key=queue[7:])
    assert wire.messages(2.0) == []


# -- restarts


def acknowledge(wire, count):
    for _ in range(count):
        wire.ask("ACK", id=wire.message()["ack"])


def keep_queues(broker):
    """The real one may lose a queue that was made a moment before a crash, and all that is in it."""
    if isinstance(broker, RabbitMq):
        broker.keep_queues()


def test_a_crash_forgets_the_latest_acknowledgements_and_flags_everything(broker, open_wire, wire, queue):
    fill(wire, queue, 4)
    wire.ask("SEND", b"light", destination=queue)
    keep_queues(broker)
    wire.subscribe(queue)
    acknowledge(wire, 2)
    broker.kill()
    broker.start()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    found = everything(other)
    if isinstance(broker, RabbitMq):
        # It forgets none if this machine was so slow that it had its idle moment.
        found = flagged("0", "1") + [one for one in found if one[0] in "23"]
    assert found == flagged("0", "1", "2", "3")


def test_a_crash_after_an_idle_moment_forgets_none(broker, open_wire, wire, queue):
    fill(wire, queue, 4)
    keep_queues(broker)
    wire.subscribe(queue)
    acknowledge(wire, 2)
    threading.Event().wait(IDLE)
    broker.kill()
    broker.start()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert everything(other) == flagged("2", "3")


def test_a_clean_restart_forgets_nothing(broker, open_wire, wire, queue):
    fill(wire, queue, 4)
    wire.subscribe(queue)
    acknowledge(wire, 2)
    broker.stop()
    broker.start()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert everything(other) == [("2", True), ("3", False)]


def test_a_quorum_queue_forgets_nothing_in_a_crash(broker, open_wire, wire, queue):
    for number in range(4):
        wire.publish(queue, b"%d" % number, **QUORUM)
    wire.subscribe(queue, **QUORUM)
    acknowledge(wire, 2)
    if isinstance(broker, RabbitMq):
        # One that was made a moment ago may come back without a leader, and stay so.
        threading.Event().wait(5 * IDLE)
    broker.kill()
    broker.start()
    other = open_wire()
    other.subscribe(queue, prefetch=10, **QUORUM)
    # What was with the consumer comes back when that is missed, which may be later.
    assert sorted(everything(other)) == [("2", True), ("3", False)]
