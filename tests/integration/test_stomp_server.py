"""Every behavior that the embedded server claims for its ActiveMQ profile, asked of it and of the real broker."""

from __future__ import annotations

import contextlib
import time
import uuid

import pytest

from retrykit.testing import StompServer
from tests.servers import StompErrorFrame, Wire
from tests.servers.activemq import ActiveMq, activemq_missing

DEAD_LETTERS = "/queue/ActiveMQ.DLQ"


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    with StompServer(profile="activemq", data=tmp_path_factory.mktemp("embedded") / "journal") as server:
        yield server


@pytest.fixture(params=["embedded", "activemq"])
def broker(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def open_wire(broker):
    """Open connections that end with the test."""
    wires = []

    def connect(**options):
        wires.append(Wire(broker.host, broker.port, **options))
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


def bodies(wire, count):
    return [wire.message().body for _ in range(count)]


def return_and_subscribe(wire, queue, old, new, *, prefetch=1):
    wire.ask("UNSUBSCRIBE", id=old)
    wire.subscribe(queue, new, prefetch=prefetch)


def dead_letter(wire, message_id):
    """The dead letter with this id; others stay for whom they concern."""
    wire.subscribe(DEAD_LETTERS, "dead", prefetch=1000)
    while True:
        message = wire.message()
        if message["message-id"] == message_id:
            wire.ask("UNSUBSCRIBE", id="dead")
            return message


# -- connecting


@pytest.mark.parametrize(
    ("offered", "agreed"), [("1.0", "1.0"), ("1.1", "1.1"), ("1.2", "1.2"), ("1.0,1.1,1.2", "1.2")]
)
def test_the_highest_common_version_is_agreed_upon(open_wire, offered, agreed):
    connected = open_wire(version=offered).connected
    assert connected["version"] == agreed
    assert connected["server"].startswith("ActiveMQ/5.17")


def test_an_unknown_version_is_refused_and_the_connection_ends(open_wire):
    wire = open_wire(connect=False, version="9.9")
    with pytest.raises(StompErrorFrame):
        wire.connect()
    assert wire.closed()


def test_frames_before_connect_are_refused(open_wire, queue):
    wire = open_wire(connect=False)
    wire.send("SEND", destination=queue)
    assert wire.error()["message"] == "Not connected."


def test_a_second_connect_is_refused(wire):
    wire.send("CONNECT", accept_version="1.2", host="localhost")
    assert wire.error()["message"] == "Already connected."


def test_disconnect_is_receipted_and_the_connection_ends(wire):
    wire.ask("DISCONNECT")
    assert wire.closed()


def test_the_heart_beats_wanted_are_sent(open_wire):
    wire = open_wire(heart_beat="0,200")
    assert wire.connected["heart-beat"] == "200,0"
    assert wire.next(1.5) is None
    assert 3 <= wire.heart_beats <= 15


def test_a_client_that_stops_its_heart_beats_is_cut_off(open_wire):
    wire = open_wire(heart_beat="200,0")
    assert wire.connected["heart-beat"] == "0,200"
    began = time.monotonic()
    assert wire.closed()
    assert time.monotonic() - began > 0.3


# -- messages


def test_a_message_arrives_with_its_headers_and_body(wire, queue):
    wire.publish(queue, "é".encode(), trace="a:b\n\\c\r", correlation_id="c", reply_to="/queue/x", priority=7)
    wire.subscribe(queue)
    message = wire.message()
    assert message.body == "é".encode()
    assert message["subscription"] == "1"
    assert message["destination"] == queue
    assert message["trace"] == "a:b\n\\c\r"
    assert (message["correlation-id"], message["reply-to"], message["priority"]) == ("c", "/queue/x", "7")
    assert (message["persistent"], message["expires"]) == ("true", "0")
    assert abs(int(message["timestamp"]) - time.time() * 1000) < 60_000


def test_headers_of_the_transport_do_not_travel(wire, queue):
    wire.publish(queue, b"", message_id="mine", redelivered="true", subscription="theirs", ack="no")
    wire.subscribe(queue)
    message = wire.message()
    assert message["message-id"] != "mine"
    assert message["subscription"] == "1"
    assert message["ack"] != "no"
    assert not {"redelivered", "receipt", "transaction", "content-length"} & set(message.headers)


def test_binary_bodies_travel_by_content_length(wire, queue):
    body = bytes(range(256)) * 3
    wire.publish(queue, body, content_length=len(body))
    wire.subscribe(queue)
    message = wire.message()
    assert message.body == body
    assert message["content-length"] == str(len(body))


def test_large_frames_arrive_whole(wire, queue):
    body = bytes(range(256)) * 12_000
    wire.publish(queue, body, content_length=len(body))
    wire.subscribe(queue)
    assert wire.message(20).body == body


def test_of_a_repeated_header_the_first_counts(wire, queue):
    wire.raw(f"SEND\ndestination:{queue}\nreceipt:r\nk:1\nk:2\n\n\0".encode())
    wire.await_receipt("r")
    wire.subscribe(queue)
    assert wire.message()["k"] == "1"


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])
def test_header_escapes_follow_the_version(open_wire, queue, version):
    sender = open_wire(version=version)
    sender.raw(f"SEND\ndestination:{queue}\nreceipt:r\nc:a\\cb\nn:a\\nb\nb:a\\\\b\nr:a\\rb\nt:a\\tb\n\n\0".encode())
    sender.await_receipt("r")
    wire = open_wire()
    wire.subscribe(queue)
    message = wire.message()
    expected = {"1.2": "a\rb"}.get(version, "a\\rb")
    if version != "1.0":
        assert (message["c"], message["n"], message["b"]) == ("a:b", "a\nb", "a\\b")
        assert message["t"] == "a\\tb"
        assert message["r"] == expected


def test_version_1_2_accepts_carriage_returns_at_line_ends(wire, queue):
    wire.raw(f"SEND\r\ndestination:{queue}\r\nreceipt:r\r\nk:v\r\n\r\nbody\0".encode())
    wire.await_receipt("r")
    wire.subscribe(queue)
    message = wire.message()
    assert (message["k"], message.body) == ("v", b"body")


def test_a_frame_may_come_in_pieces(wire, queue):
    for byte in f"\n\nSEND\ndestination:{queue}\nreceipt:r\n\nbody\0\n".encode():
        wire.raw(bytes([byte]))
    wire.await_receipt("r")
    wire.subscribe(queue)
    assert wire.message().body == b"body"


def test_a_frame_that_is_longer_than_it_says_ends_the_connection(wire, queue):
    wire.raw(f"SEND\ndestination:{queue}\ncontent-length:2\n\nbody\0".encode())
    assert "no trailing null byte" in wire.error()["message"]
    assert wire.closed()


def test_an_expired_message_becomes_a_dead_letter(wire, queue):
    wire.publish(queue, b"old", expires=int(time.time() * 1000) - 1000, mark=queue)
    wire.publish(queue, b"new")
    wire.subscribe(queue)
    assert wire.message().body == b"new"
    wire.subscribe(DEAD_LETTERS, "dead", prefetch=1000)
    while (dead := wire.message()).headers.get("mark") != queue:
        pass
    assert (dead.body, dead["original-destination"]) == (b"old", queue)


# -- what is wrong is refused, and the connection goes on


@pytest.mark.parametrize(
    ("command", "headers", "message"),
    [
        ("SEND", {}, "SEND received without a Destination specified!"),
        ("SEND", {"destination": "/queue/q", "transaction": "no"}, "Invalid transaction id: no"),
        ("SUBSCRIBE", {"id": "1"}, "Invalid empty or 'null' Destination header"),
        ("SUBSCRIBE", {"destination": "/queue/q"}, "SUBSCRIBE received without a subscription id!"),
        ("UNSUBSCRIBE", {"id": "no"}, "No subscription matched."),
        ("UNSUBSCRIBE", {}, "UNSUBSCRIBE received without a subscription id!"),
        ("BEGIN", {}, "Must specify the transaction you are beginning"),
        ("COMMIT", {}, "Must specify the transaction you are committing"),
        ("COMMIT", {"transaction": "no"}, "Invalid transaction id: no"),
        ("ABORT", {"transaction": "no"}, "Invalid transaction id: no"),
        ("ACK", {"id": "no"}, "Unexpected ACK received for message-id [null]"),
        ("ACK", {}, "ACK received without a ack id for acknowledge!"),
        ("NACK", {"id": "no"}, "Unexpected NACK received for message-id [null]"),
    ],
)
def test_a_wrong_frame_is_refused_and_the_connection_goes_on(wire, command, headers, message):
    assert refusal(wire, command, **headers) == message
    wire.ask("BEGIN", transaction="still here")


def test_an_error_names_the_receipt_asked_for(wire):
    wire.send("COMMIT", transaction="no", receipt="r-1")
    assert wire.error()["receipt-id"] == "r-1"


def test_an_unknown_command_ends_the_connection(wire):
    assert refusal(wire, "FOO") == "Unknown STOMP action: FOO"
    assert wire.closed()


def test_a_transaction_begins_once(wire):
    wire.ask("BEGIN", transaction="t")
    assert refusal(wire, "BEGIN", transaction="t") == "The transaction was already started: t"


def test_an_error_within_a_transaction_leaves_it_open(wire, queue):
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue, b"1", transaction="t")
    refusal(wire, "ACK", id="no", transaction="t")
    wire.ask("COMMIT", transaction="t")
    wire.subscribe(queue)
    assert wire.message().body == b"1"


# -- acknowledging


def test_an_individual_ack_settles_one_message(open_wire, wire, queue):
    fill(wire, queue, 3)
    wire.subscribe(queue, prefetch=3)
    messages = [wire.message() for _ in range(3)]
    wire.ask("ACK", id=messages[1]["ack"])
    wire.close()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert bodies(other, 2) == [b"0", b"2"]
    other.nothing()


def test_a_cumulative_ack_settles_what_came_before(open_wire, wire, queue):
    fill(wire, queue, 4)
    wire.subscribe(queue, prefetch=3, ack="client")
    messages = [wire.message() for _ in range(3)]
    wire.ask("ACK", id=messages[1]["ack"])
    assert wire.message().body == b"3"
    refusal(wire, "ACK", id=messages[0]["ack"])
    wire.close()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert bodies(other, 2) == [b"2", b"3"]
    other.nothing()


def test_a_cumulative_nack_concerns_one_message(open_wire, wire, queue):
    fill(wire, queue, 3)
    wire.subscribe(queue, prefetch=3, ack="client")
    messages = [wire.message() for _ in range(3)]
    wire.ask("NACK", id=messages[1]["ack"])
    wire.close()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert bodies(other, 2) == [b"0", b"2"]
    other.nothing()


def test_auto_acknowledged_messages_are_gone_once_delivered(open_wire, wire, queue):
    fill(wire, queue, 3)
    wire.subscribe(queue, ack="auto")
    messages = [wire.message() for _ in range(3)]
    assert "ack" not in messages[0].headers
    # A frame with a receipt after the last message: by its answer the acknowledgements are done.
    wire.ask("UNSUBSCRIBE", id="1")
    wire.close()
    other = open_wire()
    other.subscribe(queue)
    other.nothing()


def test_prefetch_bounds_what_is_in_flight(wire, queue):
    fill(wire, queue, 4)
    wire.subscribe(queue, prefetch=2)
    first, _ = wire.message(), wire.message()
    wire.nothing()
    wire.ask("ACK", id=first["ack"])
    assert wire.message().body == b"2"
    wire.nothing()


def test_an_id_acknowledges_once(wire, queue):
    wire.publish(queue)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("ACK", id=message["ack"])
    assert "Unexpected ACK" in refusal(wire, "ACK", id=message["ack"])


def test_the_ack_of_an_ended_subscription_has_no_effect(wire, queue):
    wire.publish(queue)
    wire.subscribe(queue)
    stale = wire.message()["ack"]
    return_and_subscribe(wire, queue, "1", "2")
    fresh = wire.message()["ack"]
    assert fresh != stale
    wire.ask("ACK", id=stale)
    assert "Unexpected ACK" in refusal(wire, "ACK", id=stale)
    return_and_subscribe(wire, queue, "2", "3")
    assert wire.message()["redelivered"] == "true"


def test_version_1_1_acknowledges_by_message_id_and_subscription(open_wire, queue):
    wire = open_wire(version="1.1")
    fill(wire, queue, 2)
    wire.subscribe(queue)
    message = wire.message()
    assert "ack" not in message.headers
    assert "without a subscription id" in refusal(wire, "ACK", message_id=message["message-id"])
    wire.ask("ACK", message_id=message["message-id"], subscription="1")
    assert wire.message().body == b"1"


def test_version_1_0_needs_the_message_id_alone(open_wire, queue):
    wire = open_wire(version="1.0")
    fill(wire, queue, 2)
    wire.frame("SUBSCRIBE", {"destination": queue, "ack": "client-individual", "activemq.prefetchSize": "1"})
    message = wire.message()
    assert "ack" not in message.headers
    wire.ask("ACK", message_id=message["message-id"])
    assert wire.message().body == b"1"
    wire.ask("UNSUBSCRIBE", destination=queue)
    other = open_wire()
    other.subscribe(queue)
    again = other.message()
    assert (again.body, again["redelivered"]) == (b"1", "true")


def test_an_unknown_ack_mode_means_auto(wire, queue):
    fill(wire, queue, 2)
    wire.subscribe(queue, ack="unheard-of")
    assert bodies(wire, 2) == [b"0", b"1"]


def test_version_1_1_refuses_the_ack_of_an_ended_subscription(open_wire, queue):
    wire = open_wire(version="1.1")
    wire.publish(queue)
    wire.subscribe(queue)
    message_id = wire.message()["message-id"]
    return_and_subscribe(wire, queue, "1", "2")
    assert wire.message()["message-id"] == message_id
    assert "Unexpected ACK" in refusal(wire, "ACK", message_id=message_id, subscription="1")
    wire.ask("ACK", message_id=message_id, subscription="2")


# -- dead letters


def test_nack_makes_a_dead_letter_under_the_same_id(wire, queue):
    wire.publish(queue, b"poison", trace="t")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("NACK", id=message["ack"])
    dead = dead_letter(wire, message["message-id"])
    assert (dead.body, dead["trace"], dead["original-destination"]) == (b"poison", "t", queue)
    assert dead["destination"] == DEAD_LETTERS
    assert dead["persistent"] == "true"
    assert dead["timestamp"] == message["timestamp"]
    assert "redelivered" not in dead.headers
    return_and_subscribe(wire, queue, "1", "2")
    wire.nothing()


def test_nack_drops_a_message_that_is_not_persistent(wire, queue):
    wire.ask("SEND", b"light", destination=queue, mark=queue)
    wire.subscribe(queue)
    wire.ask("NACK", id=wire.message()["ack"])
    wire.subscribe(DEAD_LETTERS, "dead", prefetch=1000)
    while (frame := wire.next(0.5)) is not None:
        assert frame.headers.get("mark") != queue


def test_nack_within_a_transaction_is_an_error(wire, queue):
    wire.publish(queue)
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    assert "cannot be transacted" in refusal(wire, "NACK", id=message["ack"], transaction="t")
    wire.ask("ABORT", transaction="t")


# -- redelivery


def test_an_ended_subscription_hands_back_everything_in_order_and_flagged(wire, queue):
    fill(wire, queue, 5)
    wire.subscribe(queue, "1", prefetch=3)
    first = [wire.message() for _ in range(3)]
    assert not any("redelivered" in message.headers for message in first)
    return_and_subscribe(wire, queue, "1", "2", prefetch=10)
    again = [wire.message() for _ in range(5)]
    assert [message.body for message in again] == [b"0", b"1", b"2", b"3", b"4"]
    assert [message.headers.get("redelivered") for message in again] == ["true", "true", "true", None, None]
    assert [message["message-id"] for message in again[:3]] == [message["message-id"] for message in first]
    assert {message["subscription"] for message in again} == {"2"}


def test_a_lost_connection_hands_back_everything_in_order_and_flagged(open_wire, wire, queue):
    fill(wire, queue, 3)
    wire.subscribe(queue, prefetch=2)
    ids = [wire.message()["message-id"] for _ in range(2)]
    wire.close()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    again = [other.message() for _ in range(3)]
    # The fresh one may come first: nothing tells when the broker notices that a connection is gone.
    assert [message["message-id"] for message in again if message.headers.get("redelivered") == "true"] == ids


def test_returned_messages_go_before_fresh_ones(open_wire, wire, queue):
    fill(wire, queue, 4)
    wire.subscribe(queue, prefetch=2)
    bodies(wire, 2)
    wire.ask("UNSUBSCRIBE", id="1")
    other = open_wire()
    other.subscribe(queue, prefetch=1)
    message = other.message()
    assert (message.body, message["redelivered"]) == (b"0", "true")


def test_redelivery_alternates_between_two_consumers(open_wire, queue):
    wires = [open_wire(), open_wire()]
    for wire in wires:
        wire.subscribe(queue, "0")
    wires[0].publish(queue, b"poison")
    order = []
    for cycle in range(6):
        expected = wires[cycle % 2]
        message = expected.message()
        order.append(message.headers.get("redelivered"))
        return_and_subscribe(expected, queue, message["subscription"], str(cycle + 1))
    assert order == [None, "true", "true", "true", "true", "true"]


def test_fresh_messages_are_shared_and_each_consumer_sees_its_own_in_order(open_wire, wire, queue):
    consumers = [open_wire(), open_wire()]
    for consumer in consumers:
        consumer.subscribe(queue, prefetch=5)
    # One more than a consumer may have: whoever is first, both take part. A busy broker promises no strict turns.
    fill(wire, queue, 6)
    shares = [[], []]
    deadline = time.monotonic() + 20
    while sum(map(len, shares)) < 6 and time.monotonic() < deadline:
        for consumer, share in zip(consumers, shares, strict=True):
            if (frame := consumer.next(0.05)) is not None:
                share.append(frame.body)
    assert sorted(shares[0] + shares[1]) == [b"%d" % number for number in range(6)]
    assert all(share and share == sorted(share) for share in shares)


# -- transactions


def test_sends_of_a_transaction_appear_at_its_commit(open_wire, wire, queue):
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue, b"1", transaction="t")
    wire.publish(queue, b"2", transaction="t")
    other.nothing()
    wire.ask("COMMIT", transaction="t")
    messages = [other.message(), other.message()]
    assert [message.body for message in messages] == [b"1", b"2"]
    assert "transaction" not in messages[0].headers


def test_sends_of_an_aborted_transaction_never_appear(wire, queue):
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue, transaction="t")
    wire.ask("ABORT", transaction="t")
    wire.subscribe(queue)
    wire.nothing()


def test_abort_redelivers_nothing_and_the_subscription_stalls(wire, queue):
    fill(wire, queue, 2)
    wire.subscribe(queue, prefetch=1)
    wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ABORT", transaction="t")
    wire.nothing()


def test_abort_undoes_an_ack_but_the_message_stays_in_flight(wire, queue):
    wire.publish(queue, b"0")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.ask("ABORT", transaction="t")
    wire.nothing()
    wire.ask("ACK", id=message["ack"])
    return_and_subscribe(wire, queue, "1", "2")
    wire.nothing()


def test_roll_back_is_abort_and_a_new_subscription(wire, queue):
    wire.publish(queue, b"0")
    wire.subscribe(queue)
    first = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=first["ack"], transaction="t")
    wire.ask("ABORT", transaction="t")
    return_and_subscribe(wire, queue, "1", "2")
    again = wire.message()
    assert (again["message-id"], again["redelivered"]) == (first["message-id"], "true")


def test_an_ack_within_a_transaction_makes_room_at_once(wire, queue):
    fill(wire, queue, 3)
    wire.subscribe(queue, prefetch=1)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    assert wire.message().body == b"1"
    wire.ask("ABORT", transaction="t")
    wire.ask("ACK", id=message["ack"])
    wire.nothing()


def test_what_is_acked_in_an_open_transaction_stays_away_until_it_ends(open_wire, wire, queue):
    fill(wire, queue, 2)
    wire.subscribe(queue, prefetch=2)
    first = wire.message()
    wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=first["ack"], transaction="t")
    wire.ask("UNSUBSCRIBE", id="1")
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert other.message().body == b"1"
    other.nothing()
    wire.ask("ABORT", transaction="t")
    late = other.message()
    assert (late.body, late["redelivered"]) == (b"0", "true")


def test_a_commit_after_the_subscription_ended_still_settles(open_wire, wire, queue):
    wire.publish(queue, b"0")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.ask("UNSUBSCRIBE", id="1")
    wire.ask("COMMIT", transaction="t")
    other = open_wire()
    other.subscribe(queue)
    other.nothing()


def test_send_and_ack_commit_together(open_wire, wire, queue):
    wire.publish(queue, b"in")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue + ".out", b"out", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.ask("COMMIT", transaction="t")
    wire.close()
    other = open_wire()
    other.subscribe(queue + ".out", "out")
    assert other.message().body == b"out"
    other.subscribe(queue, "in")
    other.nothing()


def test_a_lost_connection_undoes_its_transaction(open_wire, wire, queue):
    wire.publish(queue, b"in")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue + ".out", b"out", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.close()
    other = open_wire()
    other.subscribe(queue, "in")
    assert other.message()["redelivered"] == "true"
    other.subscribe(queue + ".out", "out")
    other.nothing()


def test_disconnect_undoes_an_open_transaction(open_wire, wire, queue):
    fill(wire, queue, 2)
    wire.subscribe(queue, prefetch=1)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.message()
    wire.ask("DISCONNECT")
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    assert sorted(bodies(other, 2)) == [b"0", b"1"]


# -- delayed delivery


def test_a_scheduled_message_comes_when_it_is_due(open_wire, queue):
    wire = open_wire()
    wire.subscribe(queue, prefetch=10)
    began = time.monotonic()
    scheduled(wire, queue, b"later", 600)
    wire.publish(queue, b"now")
    assert wire.message().body == b"now"
    message = wire.message()
    assert message.body == b"later"
    assert time.monotonic() - began >= 0.55
    assert "scheduledJobId" in message.headers
    assert "AMQ_SCHEDULED_DELAY" not in message.headers
    assert "redelivered" not in message.headers


def scheduled(wire, queue, body, milliseconds, **headers):
    headers |= {"destination": queue, "persistent": "true", "AMQ_SCHEDULED_DELAY": str(milliseconds)}
    wire.frame("SEND", headers | {"receipt": "scheduled"}, body)
    wire.await_receipt("scheduled")


def test_no_delay_means_at_once(wire, queue):
    wire.subscribe(queue)
    scheduled(wire, queue, b"now", 0)
    assert wire.message().body == b"now"


def test_a_delay_within_a_transaction_counts_from_the_commit(wire, queue):
    wire.subscribe(queue)
    wire.ask("BEGIN", transaction="t")
    scheduled(wire, queue, b"later", 500, transaction="t")
    wire.nothing(0.6)
    committed = time.monotonic()
    wire.ask("COMMIT", transaction="t")
    wire.message()
    assert time.monotonic() - committed >= 0.45


def test_a_delay_that_is_no_number_ends_the_connection(wire, queue):
    headers = {"destination": queue, "persistent": "true", "AMQ_SCHEDULED_DELAY": "soon"}
    wire.frame("SEND", headers)
    assert wire.closed()


def test_what_the_scheduler_has_sent_once_is_not_kept_back_again(wire, queue):
    wire.subscribe(queue)
    scheduled(wire, queue, b"again", 60_000, scheduledJobId="ID:1")
    assert wire.message().headers["AMQ_SCHEDULED_DELAY"] == "60000"


def test_the_time_of_waiting_is_added_to_the_time_of_expiry(wire, queue):
    wire.subscribe(queue)
    expires = round(time.time() * 1000) + 60_000
    scheduled(wire, queue, b"later", 300, expires=str(expires))
    later = int(wire.message()["expires"])
    assert 300 <= later - expires <= 1_300


def test_a_temporary_queue_belongs_to_its_connection(open_wire):
    one, other = open_wire(), open_wire()
    one.subscribe("/temp-queue/mine")
    other.subscribe("/temp-queue/mine")
    one.ask("SEND", b"for me", destination="/temp-queue/mine")
    assert one.message()["destination"] == "/temp-queue/mine"
    assert other.messages(0.3) == []


def test_a_temporary_queue_gets_what_the_scheduler_kept_back_for_it(wire):
    wire.subscribe("/temp-queue/mine")
    wire.frame("SEND", {"destination": "/temp-queue/mine", "AMQ_SCHEDULED_DELAY": "1"}, b"probe")
    message = wire.message()
    assert message.body == b"probe"
    assert "AMQ_SCHEDULED_DELAY" not in message.headers


@pytest.fixture(params=["embedded", "activemq"])
def equipped(request, tmp_path):
    """Starts a broker with or without some equipment."""
    with contextlib.ExitStack() as stack:

        def start(**equipment):
            if request.param == "embedded":
                server = stack.enter_context(StompServer(profile="activemq", **equipment))
            else:
                if (reason := activemq_missing()) is not None:
                    pytest.skip(reason)
                server = stack.enter_context(ActiveMq(tmp_path / "activemq", **equipment))
            return stack.enter_context(contextlib.closing(Wire(server.host, server.port)))

        yield start


def test_without_its_scheduler_a_broker_heeds_no_delay_and_shows_the_header(equipped, queue):
    wire = equipped(scheduler=False)
    wire.subscribe(queue)
    scheduled(wire, queue, b"now", 60_000)
    assert wire.message().headers["AMQ_SCHEDULED_DELAY"] == "60000"


def test_with_the_redelivery_plug_in_a_nacked_message_comes_again_later_under_its_id(equipped, queue):
    wire = equipped(redelivery=1.5)
    wire.subscribe(queue)
    wire.publish(queue, b"x")
    wire.publish(queue, b"y")
    first = wire.message()
    began = time.monotonic()
    wire.ask("NACK", id=first["ack"])
    other = wire.message()
    assert other.body == b"y"
    wire.ask("ACK", id=other["ack"])
    again = wire.message()
    assert time.monotonic() - began >= 1.4
    assert (again.body, again["message-id"], again["redelivered"]) == (b"x", first["message-id"], "true")
    assert again["redeliveryDelay"] == "1500"


# -- restart


@pytest.fixture(params=["stopped", "killed"])
def restart(request, broker):
    def act():
        if request.param == "killed":
            broker.kill()
        else:
            broker.stop()
        broker.start()

    return act


def test_a_restart_keeps_what_is_persistent_and_forgets_flags(open_wire, wire, queue, restart):
    wire.publish(queue, b"seen", trace="t")
    wire.publish(queue, b"unseen")
    wire.ask("SEND", b"light", destination=queue)
    scheduled(wire, queue, b"scheduled", 1500)
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue, b"uncommitted", transaction="t")
    wire.subscribe(queue)
    first = wire.message()
    return_and_subscribe(wire, queue, "1", "2")
    assert wire.message()["redelivered"] == "true"
    restart()
    other = open_wire()
    other.subscribe(queue, prefetch=10)
    messages = [other.message() for _ in range(3)]
    assert [message.body for message in messages] == [b"seen", b"unseen", b"scheduled"]
    assert [message.headers.get("redelivered") for message in messages] == [None, None, None]
    assert messages[0]["message-id"] == first["message-id"]
    assert messages[0]["trace"] == "t"
    other.nothing()


def test_a_restart_keeps_what_was_committed(open_wire, wire, queue, restart):
    wire.publish(queue, b"in")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("BEGIN", transaction="t")
    wire.publish(queue + ".out", b"out", transaction="t")
    wire.ask("ACK", id=message["ack"], transaction="t")
    wire.ask("COMMIT", transaction="t")
    restart()
    other = open_wire()
    other.subscribe(queue + ".out", "out")
    assert other.message().body == b"out"
    other.subscribe(queue, "in")
    other.nothing()


def test_dead_letters_survive_a_restart_under_their_id(open_wire, wire, queue, restart):
    wire.publish(queue, b"poison")
    wire.subscribe(queue)
    message = wire.message()
    wire.ask("NACK", id=message["ack"])
    restart()
    assert dead_letter(open_wire(), message["message-id"]).body == b"poison"
