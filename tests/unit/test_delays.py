"""Where messages wait for their next attempt: the rules, without a broker."""

from __future__ import annotations

import json
import logging
import threading
import time
from datetime import UTC, datetime

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrykit.backoff import (
    ErrorHintBackOffPolicy,
    ExponentialBackOffPolicy,
    FixedBackOffPolicy,
    NoBackOffPolicy,
    ScheduleBackOffPolicy,
    UniformRandomBackOffPolicy,
)
from retrykit.errors import BackOffInterruptedError, CommitInDoubtError
from retrykit.message import EXPIRES_AT, Message
from retrykit.messaging import (
    BrokerRefusedError,
    Capabilities,
    ConnectionLostError,
    DelayUnavailableError,
    ListenerContainer,
    park,
)
from retrykit.messaging.counters import Tally
from retrykit.messaging.delays import (
    REFUSED_SECONDS,
    SHORTEST,
    Delays,
    Origin,
    Pauses,
    PutOffError,
    delay_queue,
    origin_of,
    step_of,
    still_due,
    waits,
)
from retrykit.messaging.kept import Kept
from retrykit.messaging.memory import MemoryBroker
from retrykit.messaging.recoverers import COPY_OF, in_copies, may_travel
from retrykit.messaging.stomp.delays import as_original, copy_headers, has_ended, lack_of
from retrykit.messaging.stomp.profiles import ACTIVEMQ, GENERIC, RABBITMQ
from retrykit.policy import SimpleRetryPolicy
from retrykit.template import RetryTemplate

QUEUE = "/queue/orders"
DAY = 86_400.0


def message(**facts):
    return Message(**{"destination": QUEUE, "id": "m-1", "key": (QUEUE, "m-1"), "body": b"x"} | facts)


def is_ignored():
    return True


def is_heeded():
    return False


# -- delays of queues


@given(st.floats(0.0, 30 * DAY))
def test_a_delay_in_a_queue_is_never_shorter_than_asked_and_at_most_28_percent_longer(seconds):
    step = step_of(seconds) / 1000
    assert step >= seconds
    assert step <= max(SHORTEST, seconds * 1.281)


def test_all_delays_up_to_a_month_share_few_queues():
    steps = {step_of(1.01**power / 10) for power in range(1_720)}
    assert max(steps) > 25 * DAY * 1000
    assert len(steps) <= 80


@pytest.mark.parametrize(("seconds", "step"), [(0.001, 100), (0.9, 1000), (1.0, 1000), (1.001, 1250), (59, 63_000)])
def test_a_delay_is_rounded_up_to_the_next_step(seconds, step):
    assert step_of(seconds) == step


def test_a_delay_queue_sends_back_and_outlives_its_messages_by_two_days():
    queue = delay_queue("orders", 1.5, 1_800_000_000.0)
    assert queue.name == "orders.retry.1600ms.20270115"
    assert queue.arguments == {
        "x-message-ttl": 1600,
        "x-expires": 1600 + 2 * 86_400_000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "orders",
    }


def test_each_day_has_delay_queues_of_its_own():
    names = {delay_queue("orders", 1.0, day * DAY).name for day in range(5)}
    assert len(names) == 5


def test_the_arguments_of_the_longest_delay_fit_into_32_bits():
    arguments = delay_queue("orders", RABBITMQ.longest_delay, 0.0).arguments
    assert max(value for value in arguments.values() if isinstance(value, int)) < 2**32


# -- what a copy says of itself


def test_a_copy_names_its_original():
    origin = Origin(QUEUE, "ä:1", "ID:x", early=True)
    assert origin_of({COPY_OF: origin.to_header()}, QUEUE) == attrs.evolve(origin, early=1)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "",
        "{}",
        "[]",
        "1",
        "nonsense",
        '["/queue/orders"]',
        '["/queue/orders", 1, ""]',
        '["/queue/orders", "", ""]',
        # No header can carry these.
        r'["/queue/orders", "\ud800x", "m"]',
        r'["/queue/orders", "\u0000", "m"]',
        r'["/queue/orders", "m-1", "\u0000"]',
        '["/queue/orders", "m-1", "m", 0, "soon"]',
    ],
)
def test_what_is_no_origin_makes_no_copy(text):
    assert origin_of({COPY_OF: text}, QUEUE) is None


def test_a_copy_that_was_moved_elsewhere_is_another_message():
    assert origin_of({COPY_OF: Origin(QUEUE, "m-1", "").to_header()}, "/queue/others") is None


def test_a_copy_of_a_copy_says_no_more_than_the_first():
    first = copy_headers(ACTIVEMQ, message(headers={"message-id": "ID:1"}), 1.0)
    seen = as_original(first, origin_of(first, QUEUE))
    again = copy_headers(ACTIVEMQ, message(headers=seen), 1.0)
    assert again == first


OWN = {"content-type": "text/plain", "priority": "7", "reply-to": "/queue/answers", "correlation-id": "c", "my": "own"}
OF_THE_DELIVERY = {
    "message-id": "ID:1",
    "subscription": "s-1",
    "ack": "a",
    "redelivered": "true",
    "timestamp": "1",
    "destination": QUEUE,
    "scheduledJobId": "j",
    "user-id": "u",
    "x-delivery-count": "2",
    "AMQ_SCHEDULED_DELAY": "1",
}


@pytest.mark.parametrize("profile", [ACTIVEMQ, RABBITMQ], ids=lambda profile: profile.name)
def test_a_copy_has_the_headers_of_the_message_and_none_of_its_delivery(profile):
    headers = copy_headers(profile, message(headers=OWN | OF_THE_DELIVERY), 2.0)
    assert {name: headers[name] for name in OWN} == OWN
    assert not {"message-id", "subscription", "ack", "redelivered", "timestamp", "scheduledJobId"} & set(headers)
    assert not {"user-id", "x-delivery-count"} & set(headers)
    assert headers["persistent"] == "true"


ARGUMENTS = {"durable": "no", "auto-delete": "no", "exclusive": "no", "x-queue-type": "quorum", "x-max-priority": "9"}
LIKE_ARGUMENTS = {"durable-goods": "1", "exclusiveOffer": "yes", "x-max-retries": "7", "x-expires-at": "noon"}


def test_a_header_that_only_begins_like_a_command_is_in_the_copy_and_an_argument_of_queues_not_on_rabbitmq():
    headers = LIKE_ARGUMENTS | ARGUMENTS
    on_activemq = copy_headers(ACTIVEMQ, message(headers=headers), 2.0)
    assert {name: on_activemq.get(name) for name in headers} == headers
    on_rabbitmq = copy_headers(RABBITMQ, message(headers=headers), 2.0)
    assert {name: on_rabbitmq[name] for name in headers if name in on_rabbitmq} == LIKE_ARGUMENTS


def test_activemq_is_told_the_delay_and_rabbitmq_a_queue():
    assert copy_headers(ACTIVEMQ, message(), 2.0)["AMQ_SCHEDULED_DELAY"] == "2000"
    headers = copy_headers(RABBITMQ, message(), 2.0)
    assert headers["destination"].startswith("/queue/orders.retry.2000ms.")
    assert headers["x-dead-letter-routing-key"] == "orders"
    assert "AMQ_SCHEDULED_DELAY" not in headers


def test_a_queue_with_an_escaped_name_gets_its_messages_back():
    headers = copy_headers(RABBITMQ, message(destination="/queue/a%2Fb"), 2.0)
    assert headers["destination"].startswith("/queue/a%2Fb.retry.2000ms.")
    assert headers["x-dead-letter-routing-key"] == "a/b"


def test_a_queue_made_by_others_gets_its_messages_back():
    headers = copy_headers(RABBITMQ, message(destination="/amq/queue/orders"), 2.0)
    assert headers["destination"].startswith("/queue/orders.retry.2000ms.")


def test_a_copy_expires_when_the_original_does():
    headers = copy_headers(ACTIVEMQ, message(headers={"expires": "5000"}), 2.0)
    assert headers["expires"] == "3000"
    assert "expires" not in copy_headers(ACTIVEMQ, message(headers={"expires": "0"}), 2.0)


def test_the_end_of_a_message_is_not_moved_by_copies():
    # The scheduler adds the time that it kept the copy, which is more than it was asked for.
    headers = copy_headers(ACTIVEMQ, message(headers={"expires": "5000"}), 2.0) | {"expires": "5460"}
    seen = as_original(headers, origin_of(headers, QUEUE))
    assert seen["expires"] == "5000"
    again = copy_headers(ACTIVEMQ, message(headers=seen | {"expires": "5460"}), 1.0)
    assert again["expires"] == "4000"


@pytest.mark.parametrize("told", ["0", "", "soon", "9" * 5_000])
def test_an_end_that_is_none_ends_nothing(told):
    headers = copy_headers(RABBITMQ, message(headers={EXPIRES_AT: told}), 2.0)
    assert not has_ended(message(headers=headers))


@pytest.mark.parametrize("name", ["expires", EXPIRES_AT])
def test_only_a_copy_is_looked_at_for_its_end(name):
    late = {name: "5000"}
    assert not has_ended(message(headers=late))
    assert has_ended(message(headers=copy_headers(RABBITMQ, message(headers=late), 2.0)))
    assert not has_ended(message(headers=copy_headers(RABBITMQ, message(headers={name: "9" * 15}), 2.0)))


def test_what_came_as_text_goes_as_text_and_bytes_as_bytes():
    text = copy_headers(ACTIVEMQ, message(), 2.0)
    assert (text.get("amq-msg-type"), text.get("content-length")) == ("text", None)
    odd = copy_headers(ACTIVEMQ, message(body=b"a NUL: \0"), 2.0)
    assert (odd.get("amq-msg-type"), odd.get("content-length")) == ("text", None)
    binary = copy_headers(ACTIVEMQ, message(headers={"content-length": "1"}), 2.0)
    assert (binary.get("amq-msg-type"), binary.get("content-length")) == (None, "1")


@pytest.mark.parametrize("profile", [ACTIVEMQ, RABBITMQ], ids=lambda profile: profile.name)
def test_a_delay_longer_than_the_broker_takes_is_sent_in_turns(profile):
    short = attrs.evolve(profile, longest_delay=5.0)
    assert json.loads(copy_headers(short, message(), 6.0)[COPY_OF])[-1] == 1
    assert json.loads(copy_headers(short, message(), 5.0)[COPY_OF])[-1] == 0


def test_a_message_whose_id_is_too_long_for_a_header_is_not_copied():
    with pytest.raises(ValueError, match="too long"):
        copy_headers(RABBITMQ, message(id="ü" * 5_000), 2.0)


def test_a_message_from_a_topic_is_not_copied():
    with pytest.raises(ValueError, match="is no queue"):
        copy_headers(ACTIVEMQ, message(destination="/topic/prices"), 2.0)


def test_a_copy_comes_as_the_original_did():
    headers = copy_headers(RABBITMQ, message(headers=OWN | {"message-id": "T_1"}), 2.0)
    seen = as_original(headers | {"message-id": "T_2"}, origin_of(headers, QUEUE))
    assert seen["message-id"] == "T_1"
    assert not [name for name in seen if name.startswith("x-")]


def test_nothing_that_a_handler_sends_on_says_that_it_is_a_copy():
    given_on = {COPY_OF: "[]", "scheduledJobId": "j", "my": "own"}
    assert may_travel(given_on) == {"my": "own"} == in_copies(given_on, makes_queues=True)


# -- what a broker lacks


@pytest.mark.parametrize(
    ("profile", "way", "words"),
    [
        (GENERIC, "schedule", "nothing is known of the profile 'generic'"),
        (GENERIC, "redeliver", "nothing is known of the profile 'generic'"),
        (RABBITMQ, "redeliver", "brokers of the kind 'rabbitmq' can keep back copies only (delay='schedule')"),
    ],
)
def test_a_way_that_a_kind_of_broker_does_not_know_is_refused(profile, way, words):
    assert words in lack_of(profile, QUEUE, way, is_heeded)


@pytest.mark.parametrize("way", ["schedule", "redeliver"])
def test_an_activemq_without_its_scheduler_is_refused(way):
    assert "schedulerSupport" in lack_of(ACTIVEMQ, QUEUE, way, is_ignored)
    assert lack_of(ACTIVEMQ, QUEUE, way, is_heeded) == ""


@pytest.mark.parametrize("destination", ["/topic/prices", "/exchange/amq.topic/prices", "/temp-queue/x"])
def test_copies_for_every_subscriber_of_a_topic_are_refused(destination):
    assert "every subscriber" in lack_of(RABBITMQ, destination, "schedule", is_heeded)


# -- what a container does


class Recording:
    """A session that notes what is asked of it; `fault` is raised by `put_off`."""

    def __init__(self, fault=None, *, keeps_back=False, **capabilities):
        self.capabilities = Capabilities(**capabilities)
        self.keeps_back = keeps_back
        self.fault = fault
        self.asked = []

    def rollback(self, message=None, delay=0.0):
        self.asked.append(("rollback", message is not None, delay))

    def put_off(self, message, delay):
        self.asked.append(("put_off", delay))
        if self.fault is not None:
            raise self.fault

    def redeliver(self, message):
        self.asked.append(("redeliver",))


def give_back(delays, session, delay, tally=None):
    delays.give_back(session, message(), delay, Tally() if tally is None else tally)
    return session.asked


def test_a_pause_that_is_held_goes_back_with_its_delay():
    assert give_back(Delays(), Recording(), 5.0) == [("rollback", True, 5.0)]


def test_a_pause_is_put_off_after_what_is_open_was_undone():
    tally = Tally()
    assert give_back(Delays("schedule"), Recording(), 5.0, tally) == [("rollback", False, 0.0), ("put_off", 5.0)]
    assert tally.snapshot().postponed == 1


def test_a_short_pause_is_worth_no_copy():
    assert give_back(Delays("schedule"), Recording(), SHORTEST / 2) == [("rollback", True, SHORTEST / 2)]


def test_what_has_no_pause_is_not_left_to_the_redelivery_policy():
    assert give_back(Delays("redeliver"), Recording(), 0.0) == [("rollback", True, 0.0)]
    assert give_back(Delays("redeliver"), Recording(), 1.0) == [("redeliver",)]


def test_a_source_that_keeps_back_what_is_rolled_back_is_told_how_long():
    assert give_back(Delays("redeliver"), Recording(delayed_redelivery=True), 1.0) == [("rollback", True, 1.0)]


REFUSED = BrokerRefusedError(broker="b", what="a copy", reason="no room")


def numbered(number):
    return attrs.evolve(message(), key=(QUEUE, str(number)))


def test_a_refused_copy_gives_the_message_back_which_waits_in_the_session_while_others_are_copied(caplog, monkeypatch):
    delays, tally = Delays("schedule"), Tally()
    asked = give_back(delays, Recording(REFUSED), 5.0, tally)
    assert asked == [("rollback", False, 0.0), ("put_off", 5.0), ("rollback", True, 0.0)]
    assert tally.snapshot().postponed == 0
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "no room" in caplog.text
    assert give_back(delays, Recording(), 5.0) == [("rollback", True, 5.0)]
    assert not delays.defers(Recording(), message(), 5.0)
    assert delays.defers(Recording(), numbered(2), 5.0)
    later = time.monotonic() + REFUSED_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert delays.defers(Recording(), message(), 5.0)


def test_copies_of_several_messages_that_are_refused_in_a_row_have_all_wait_in_the_session(caplog):
    delays = Delays("schedule")
    for number in range(3):
        assert delays.defers(Recording(), numbered(9), 5.0)
        delays.give_back(Recording(REFUSED), numbered(number), 5.0, Tally())
    assert not delays.defers(Recording(), numbered(9), 5.0)
    assert "3 copies in a row were not taken, so for 60 s all pauses" in caplog.text


def test_what_is_known_of_refused_copies_is_bounded():
    delays = Delays("schedule")
    for number in range(2_100):
        # Every other one is taken: it is no fault of the broker's.
        session = Recording(REFUSED) if number % 2 else Recording()
        delays.give_back(session, numbered(number), 5.0, Tally())
    assert not delays.refused_for(numbered(1))
    assert delays.refused_for(numbered(2_099))


@pytest.mark.parametrize(
    ("way", "session", "words"),
    [
        ("hold", Recording(), "it goes back, and whoever gets it waits until {due}"),
        ("hold", Recording(keeps_back=True), "it stays with its session until {due}"),
        ("hold", Recording(delayed_redelivery=True), "it goes back to its source, which keeps it until {due}"),
        ("schedule", Recording(), "a copy waits at the broker until {due}, and the original is acknowledged"),
        ("schedule", Recording(REFUSED), "it goes back, and whoever gets it waits until {due}"),
        (
            "redeliver",
            Recording(),
            "it goes back, and comes when the broker's redelivery policy says so, for an attempt",
        ),
    ],
)
def test_it_is_told_where_a_message_waits_and_until_when(way, session, words):
    due = datetime(2026, 11, 18, 11, 6, 45, 250_000, tzinfo=UTC)
    where = Delays(way).give_back(session, message(), 5.0, Tally())
    assert waits(where, due).startswith(words.format(due="2026-11-18T11:06:45.250Z"))


def test_without_a_pause_nothing_waits():
    where = Delays("schedule").give_back(Recording(), message(), 0.0, Tally())
    assert waits(where, None) == "it goes back, and comes again at once"


def test_a_copy_in_doubt_gives_the_message_back_and_the_next_one_is_tried(caplog):
    doubt = CommitInDoubtError()
    doubt.__cause__ = ConnectionLostError(broker="b", reason="cut")
    delays = Delays("schedule")
    assert give_back(delays, Recording(doubt), 5.0)[-1] == ("rollback", True, 0.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert delays.defers(Recording(), message(), 5.0)


def test_copies_that_are_never_confirmed_are_given_up_as_if_they_were_refused(caplog):
    delays = Delays("schedule")
    for _ in range(2):
        give_back(delays, Recording(CommitInDoubtError()), 5.0)
    give_back(delays, Recording(), 5.0)  # one that is confirmed begins the count anew
    for _ in range(2):
        give_back(delays, Recording(CommitInDoubtError()), 5.0)
    assert delays.refused_for(message()) == 0.0
    give_back(delays, Recording(CommitInDoubtError()), 5.0)
    assert REFUSED_SECONDS - 5 < delays.refused_for(message()) <= REFUSED_SECONDS
    assert [record.levelname for record in caplog.records].count("ERROR") == 1


class Passing(Recording):
    """Its pauses move a clock, up to the end of the session."""

    def __init__(self, monkeypatch, end=1e9):
        super().__init__()
        self.now, self.end = 1_000.0, 1_000.0 + end
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def pause(self, seconds):
        self.asked.append(round(seconds, 3))
        self.now += seconds
        return self.now <= self.end


def test_while_copies_are_refused_a_session_waits_no_longer_than_until_they_are_tried_again(monkeypatch):
    delays, session = Delays("schedule"), Passing(monkeypatch)
    pauses = Pauses(delays, session, message())
    give_back(delays, Recording(BrokerRefusedError(broker="b", what="a copy", reason="no")), 5.0)
    assert not pauses.defers(3_600.0)
    with pytest.raises(PutOffError) as put_off:
        pauses.wait(3_600.0)
    assert (session.asked, put_off.value.seconds) == ([REFUSED_SECONDS], 3_600.0 - REFUSED_SECONDS)
    assert pauses.wait(5.0)
    pauses.message = None
    assert pauses.wait(7_200.0)
    assert session.asked[1:] == [5.0, 7_200.0]


def test_a_session_that_ends_while_copies_are_refused_ends_its_pause(monkeypatch):
    delays, session = Delays("schedule"), Passing(monkeypatch, end=10.0)
    give_back(delays, Recording(BrokerRefusedError(broker="b", what="a copy", reason="no")), 5.0)
    assert not Pauses(delays, session, message()).wait(3_600.0)


def test_a_rest_is_put_off_unless_it_is_of_a_copy_that_came_early_by_itself():
    delays = Delays("schedule")
    copy = {COPY_OF: Origin(QUEUE, "m-1", "").to_header()}
    in_turns = {COPY_OF: Origin(QUEUE, "m-1", "", early=True).to_header()}
    assert delays.defers(Recording(), message(), 5.0)
    assert not delays.defers(Recording(), message(), SHORTEST / 2)
    assert not delays.defers(Recording(), message(headers=copy), 5.0)
    assert delays.defers(Recording(), message(headers=in_turns), 5.0)
    # Its process died after the attempt, before the next copy.
    assert delays.defers(Recording(), message(headers=copy | {"redelivered": "true"}), 5.0)
    assert not Delays("hold").defers(Recording(), message(), 5.0)


def test_a_session_that_can_keep_a_message_and_go_on_does_not_wait():
    keeping = Recording()
    keeping.keeps_back = True
    assert Delays().defers(keeping, message(), 5.0)
    assert not Delays().defers(keeping, message(), SHORTEST / 2)
    assert not Delays("redeliver").defers(keeping, message(), 5.0)


def test_only_a_pause_of_a_delivery_on_its_way_is_put_off():
    pauses = Pauses(Delays("schedule"), Recording())
    assert not pauses.defers(5.0)
    pauses.message = message()
    assert pauses.defers(5.0)


def test_what_is_kept_is_due_in_the_order_of_its_time_and_flagged(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    kept = Kept()
    assert (kept.wait(None), kept.wait(101.0), kept.due(bool)) == (None, 1.0, None)
    for name, delay in (("late", 5.0), ("early", 2.0), ("gone", 1.0)):
        kept.keep(message(id=name), delay)
    assert (kept.wait(None), kept.wait(100.5), kept.due(bool)) == (1.0, 0.5, None)
    now[0] = 110.0
    assert kept.wait(None) == 0.0
    found = [kept.due(lambda one: one.id != "gone") for _ in range(3)]
    assert [one and (one.id, one.redelivered) for one in found] == [("early", True), ("late", True), None]


def test_a_pause_longer_than_any_wait_is_waited_for_in_turns():
    kept = Kept()
    kept.keep(message(), 1e300)
    assert kept.wait(None) == threading.TIMEOUT_MAX
    assert kept.due(bool) is None


def test_only_a_pause_that_was_put_off_is_still_due():
    interrupted = BackOffInterruptedError(name="orders", key="k", seconds=3.0)
    interrupted.__cause__ = InterruptedError("stopping")
    assert still_due(interrupted) == 0.0
    interrupted.__cause__ = PutOffError(2.0)
    assert still_due(interrupted) == 2.0
    assert still_due(ValueError()) == 0.0


class Asked(Recording):
    """A broker, and its session, which answer `lacks` with an error, or with words."""

    name = "asked"

    def __init__(self, answer):
        super().__init__()
        self.answer, self.connections = answer, 0

    def connect(self, *, consume=True):
        assert not consume
        self.connections += 1
        return self

    def close(self, *, wait=True):
        self.asked.append("close")

    def lacks(self, way):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_a_broker_is_asked_once_and_not_at_all_where_sessions_wait():
    broker, delays = Asked(""), Delays("schedule")
    delays.check(broker)
    delays.check(broker)
    Delays().check(broker)
    assert (broker.connections, broker.asked) == (1, ["close"])


def test_a_broker_that_may_not_be_asked_is_believed_with_a_warning(caplog):
    delays = Delays("schedule")
    delays.check(Asked(ConnectionLostError(broker="b", reason="not authorized")))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "not authorized" in caplog.text


def test_a_broker_that_lacks_something_is_asked_again_by_the_next_worker():
    broker, delays = Asked("a scheduler"), Delays("schedule")
    for _ in range(2):
        with pytest.raises(DelayUnavailableError, match="a scheduler"):
            delays.check(broker)
    assert broker.connections == 2


# -- what is told


def told(caplog, delays, back_off, **capabilities):
    caplog.set_level(logging.INFO, "retrykit.messaging")
    session = Recording(**capabilities)
    delays.tell("orders", session, back_off)
    delays.tell("orders", session, back_off)
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize(
    ("way", "capabilities", "words"),
    [
        ("hold", {}, "in a session (delay='hold')"),
        ("hold", {"delayed_redelivery": True}, "where it came from"),
        ("schedule", {"delayed_copies": True}, "at the broker (delay='schedule')"),
        ("redeliver", {}, "at the broker (delay='redeliver')"),
        ("redeliver", {}, "without one (the redeliveryPlugin of ActiveMQ) it is a dead letter after its first failure"),
    ],
)
def test_where_messages_wait_is_told_once(caplog, way, capabilities, words):
    records = told(caplog, Delays(way), FixedBackOffPolicy(2.5), **capabilities)
    assert [level for level, _ in records] == ["INFO"]
    assert words in records[0][1]
    assert "for up to 2.5 s" in records[0][1]


def test_a_back_off_without_pauses_says_so(caplog):
    ((level, words),) = told(caplog, Delays(), NoBackOffPolicy())
    assert (level, "no pauses" in words) == ("INFO", True)


class Unknown:
    """A back-off of a user's own, which does not say how long it can be."""

    def delay(self, context):
        return 1.0


@pytest.mark.parametrize("back_off", [FixedBackOffPolicy(1_801), Unknown()])
def test_a_pause_that_the_broker_may_not_bear_in_a_session_is_warned_of(caplog, back_off):
    records = told(caplog, Delays(), back_off, longest_hold=1_800.0)
    assert [level for level, _ in records] == ["INFO", "WARNING"]
    assert "1800 s" in records[1][1]


def test_a_long_pause_at_the_broker_is_no_reason_to_warn(caplog):
    records = told(caplog, Delays("schedule"), FixedBackOffPolicy(1_801), longest_hold=1_800.0)
    assert [level for level, _ in records] == ["INFO"]


@pytest.mark.parametrize(
    ("back_off", "longest"),
    [
        (NoBackOffPolicy(), 0),
        (FixedBackOffPolicy(2), 2),
        (UniformRandomBackOffPolicy(1, 3), 3),
        (ExponentialBackOffPolicy(1, 2, 30), 30),
        (ExponentialBackOffPolicy(1, 2, 30, jitter="full"), 30),
        (ExponentialBackOffPolicy(1, 2, 30, jitter=0.5), 45),
        (ExponentialBackOffPolicy(1, 1, 30), 1),
        (ExponentialBackOffPolicy(1, 1, 30, jitter="decorrelated"), 30),
        (ScheduleBackOffPolicy((1, 9, 5)), 9),
        (ErrorHintBackOffPolicy(FixedBackOffPolicy(2), max_interval=60), 60),
        (ErrorHintBackOffPolicy(FixedBackOffPolicy(90), max_interval=60), 90),
        (ErrorHintBackOffPolicy(Unknown()), None),
    ],
)
def test_a_back_off_knows_its_longest_pause(back_off, longest):
    assert back_off.longest == longest


# -- in a container


def container(broker, **options):
    template = RetryTemplate(
        name="orders", retry_policy=SimpleRetryPolicy(max_attempts=2), back_off_policy=FixedBackOffPolicy(0.15)
    )
    return ListenerContainer(broker, fail, template=template, recover=park("/queue/parked"), **options)


def fail(message):
    raise ConnectionError(message.id)


@pytest.mark.parametrize("value", ["", "wait", None, 3])
def test_a_way_that_there_is_not_is_refused(value):
    with pytest.raises((TypeError, ValueError), match="delay"):
        container(MemoryBroker(QUEUE), delay=value)


def test_a_source_that_cannot_keep_copies_back_stops_the_container_before_it_takes_a_message():
    broker = MemoryBroker(QUEUE)
    broker.publish("x")
    stopped = container(broker, delay="schedule")
    with pytest.raises(DelayUnavailableError, match="schedule"), stopped:
        stopped.wait(10)
    assert broker.messages()[0].delivery_count is None
    assert stopped.counters.received == 0


@pytest.mark.parametrize("way", ["hold", "redeliver"])
def test_a_source_that_keeps_back_what_is_rolled_back_does_so_either_way(way):
    broker = MemoryBroker(QUEUE)
    broker.publish("x")
    with container(broker, delay=way) as running:
        assert broker.wait_until_empty()
    assert running.counters.parked == 1
    assert running.counters.received == 2
