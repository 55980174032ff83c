"""`BrokerContract`: the suite that every `Broker` of `retrykit.messaging` must pass, retrykit's own and yours."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest

from retrykit.errors import CommitInDoubtError
from retrykit.message import Message
from retrykit.messaging.broker import Broker, Overlapping, Session
from retrykit.messaging.errors import ConnectionLostError, NoStableIdError
from retrykit.messaging.recoverers import ID

if TYPE_CHECKING:
    from retrykit.messaging.broker import Told
    from retrykit.messaging.delays import Postponing

BINARY = bytes(range(256)) * 3


class BrokerContract:
    """What a broker promises to the listener container, as a pytest class: subclass it as Test…, give `make_broker`.

    ```python
    class TestMyBroker(BrokerContract):
        def make_broker(self, server, destination):
            return MyBroker(server.url, destination)
    ```

    `server` is a fixture of the subclass (or a conftest): whatever the brokers of one test share. `make_broker(server,
    destination)` gives a broker that consumes from `destination`, one delivery on its way at a time; it is called with
    several destinations, which do not exist before. What a broker cannot do it declares in its `capabilities`; its
    absence is tested then. One without `stable_ids` gives `send_without_id` too.

    `patience` bounds the waits for what must come, in seconds; `silence` is how long nothing may come.
    """

    patience = 15.0
    silence = 0.3

    def make_broker(self, server: Any, destination: str) -> Broker:
        """A broker that consumes from `destination`: to be given by the subclass."""
        raise NotImplementedError(f"{type(self).__name__} must define make_broker(self, server, destination)")

    def send_without_id(self, server: Any, destination: str, body: bytes) -> None:
        """Send a message as a producer does who sets no id: to be given where ids are not stable without his help."""
        raise NotImplementedError(f"{type(self).__name__} must define send_without_id(self, server, destination, body)")

    @pytest.fixture
    def server(self) -> Any:
        """What the brokers of a test share: nothing, unless the subclass says what."""
        return None

    @pytest.fixture
    def queue(self) -> str:
        """A destination of this test's own."""
        return f"/queue/contract.{uuid.uuid4().hex}"

    @pytest.fixture
    def broker(self, server: Any, queue: str) -> Broker:
        """Consumes from `queue`."""
        return self.make_broker(server, queue)

    # -- how the tests speak

    @contextmanager
    def session(self, broker: Broker, *, consume: bool = True) -> Iterator[Session]:
        """A session that is closed in the end."""
        session = broker.connect(consume=consume)
        try:
            yield session
        finally:
            session.close()

    def publish(self, broker: Broker, queue: str, *bodies: bytes, **headers: str) -> None:
        """Send bodies to `queue`, each with a stable id, in one transaction."""
        with self.session(broker, consume=False) as session:
            for body in bodies:
                session.send(queue, body, {ID: uuid.uuid4().hex, **headers})
            session.flush()
            session.commit()

    def next(self, session: Session) -> Message:
        """The next delivery, which must come."""
        message = session.receive(self.patience)
        assert message is not None, f"nothing came in {self.patience} s"
        return message

    def nothing_is_left(self, broker: Broker) -> bool:
        """Whether a new consumer gets nothing."""
        with self.session(broker) as session:
            return session.receive(self.silence) is None

    def bodies(self, broker: Broker, count: int) -> list[bytes]:
        """Consume `count` messages, which must come, and whatever else there is."""
        found: list[bytes] = []
        with self.session(broker) as session:
            while (message := session.receive(self.patience if len(found) < count else self.silence)) is not None:
                found.append(message.body)
                session.commit(message)
        return found

    def again(self, broker: Broker, session: Session, message: Message) -> tuple[Message, Session]:
        """Roll the message back and receive it again; in a new session, where giving back costs the connection."""
        session.rollback(message)
        try:
            return self.next(session), session
        except ConnectionLostError:
            session.close()
            fresh = broker.connect()
            return self.next(fresh), fresh

    # -- messages

    def test_a_broker_has_a_name_for_logs(self, broker: Broker) -> None:
        assert isinstance(broker, Broker)
        assert broker.name

    @pytest.mark.parametrize("body", [b"", b"text", "größer".encode(), BINARY, b"x" * 300_000])
    def test_a_body_arrives_unchanged(self, broker: Broker, queue: str, body: bytes) -> None:
        self.publish(broker, queue, body)
        with self.session(broker) as session:
            message = self.next(session)
            assert message.body == body
            assert message.destination == queue
            session.commit(message)

    @pytest.mark.parametrize("kind", ["application/json", "text/plain; charset=utf-8", "application/octet-stream"])
    def test_the_content_type_arrives_and_does_not_change_the_body(self, broker: Broker, queue: str, kind: str) -> None:
        self.publish(broker, queue, b'{"a": 1}', **{"content-type": kind})
        with self.session(broker) as session:
            message = self.next(session)
            assert (message.body, message.headers["content-type"]) == (b'{"a": 1}', kind)
            session.commit(message)

    def test_header_values_arrive_unchanged(self, broker: Broker, queue: str) -> None:
        value = "a:b\\c\nd größer"
        self.publish(broker, queue, b"x", **{"my-header": value})
        with self.session(broker) as session:
            message = self.next(session)
            assert message.headers["my-header"] == value
            session.commit(message)

    def test_messages_come_in_the_order_of_sending(self, broker: Broker, queue: str) -> None:
        sent = [b"%d" % number for number in range(20)]
        self.publish(broker, queue, *sent)
        assert self.bodies(broker, len(sent)) == sent

    # -- transactions

    def test_what_is_acknowledged_does_not_come_again(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            session.commit(self.next(session))
        assert self.nothing_is_left(broker)

    def test_what_is_acknowledged_without_waiting_is_confirmed_before_the_next(
        self, broker: Broker, queue: str
    ) -> None:
        bodies = [b"1", b"2", b"3"]
        self.publish(broker, queue, *bodies)
        told: list[tuple[bytes, Exception | None]] = []
        with self.session(broker) as session:
            for number, body in enumerate(bodies):
                message = self.next(session)
                self._acknowledge(session, message, partial(_note, told, body))
                assert len(told) >= number
        assert told == [(body, None) for body in bodies]
        assert self.nothing_is_left(broker)

    def test_whoever_acknowledges_without_waiting_is_told_once_however_the_session_ends(
        self, broker: Broker, queue: str
    ) -> None:
        self.publish(broker, queue, b"x")
        told: list[tuple[bytes, Exception | None]] = []
        with self.session(broker) as session:
            self._acknowledge(session, self.next(session), partial(_note, told, b"x"))
            session.close(wait=False)
            session.close()
        # In doubt or not, which only chance decides: the broker may have been told, and that has to be heard.
        assert [body for body, _ in told] == [b"x"]

    @staticmethod
    def _acknowledge(session: Session, message: Message, told: Told) -> None:
        """Without waiting, if the session can."""
        if isinstance(session, Overlapping):
            session.acknowledge(message, told)
        else:
            session.commit(message)
            told(None)

    def test_what_is_not_committed_is_never_seen(self, broker: Broker, queue: str) -> None:
        with self.session(broker, consume=False) as session:
            session.send(queue, b"undone", {ID: "1"})
            session.flush()
            session.rollback()
            session.send(queue, b"done", {ID: "2"})
            session.commit()
            session.send(queue, b"abandoned", {ID: "3"})
            session.flush()
        assert self.bodies(broker, 1) == [b"done"]

    def test_a_send_and_the_acknowledgement_commit_together(self, server: Any, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            message = self.next(session)
            session.send(f"{queue}.parked", b"copy", {ID: "copy"})
            session.flush()
            session.commit(message)
        assert self.nothing_is_left(broker)
        assert self.bodies(self.make_broker(server, f"{queue}.parked"), 1) == [b"copy"]

    def test_a_session_that_dies_before_the_commit_has_sent_and_acknowledged_nothing(
        self, server: Any, broker: Broker, queue: str
    ) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            self.next(session)
            session.send(f"{queue}.parked", b"copy", {ID: "copy"})
            session.flush()
            session.close(wait=False)
        assert self.bodies(broker, 1) == [b"x"]
        assert self.bodies(self.make_broker(server, f"{queue}.parked"), 0) == []

    def test_rolling_back_undoes_the_sends(self, server: Any, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            message = self.next(session)
            session.send(f"{queue}.parked", b"copy", {ID: "copy"})
            session.rollback(message)
        assert self.bodies(self.make_broker(server, f"{queue}.parked"), 0) == []

    def test_sends_can_be_undone_with_the_delivery_in_hand(self, server: Any, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            message = self.next(session)
            session.send(f"{queue}.parked", b"first", {ID: "first"})
            session.rollback()
            session.send(f"{queue}.parked", b"second", {ID: "second"})
            session.commit(message)
        assert self.nothing_is_left(broker)
        assert self.bodies(self.make_broker(server, f"{queue}.parked"), 1) == [b"second"]

    # -- redelivery

    def test_a_message_rolled_back_comes_again_under_the_same_key(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        session = broker.connect()
        first = self.next(session)
        second, session = self.again(broker, session, first)
        assert (second.key, second.id, second.body) == (first.key, first.id, b"x")
        assert second.key is not None
        session.commit(second)
        session.close()
        assert self.nothing_is_left(broker)

    def test_it_comes_again_as_often_as_it_is_rolled_back(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        session = broker.connect()
        message = self.next(session)
        keys = {message.key}
        for _ in range(5):
            message, session = self.again(broker, session, message)
            keys.add(message.key)
        assert len(keys) == 1
        session.commit(message)
        session.close()

    @pytest.mark.parametrize("wait", [True, False])
    def test_what_a_session_leaves_behind_comes_again_elsewhere(
        self, broker: Broker, queue: str, *, wait: bool
    ) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as gone, self.session(broker) as other:
            (holder, message), spare = self._either(gone, other)
            holder.close(wait=wait)
            again = self.next(spare)
            assert (again.key, again.body) == (message.key, b"x")
            spare.commit(again)

    def _either(self, one: Session, other: Session) -> tuple[tuple[Session, Message], Session]:
        """Which of two sessions gets the only message."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            for session, spare in ((one, other), (other, one)):
                message = session.receive(0.1)
                if message is not None:
                    return (session, message), spare
        raise AssertionError("nothing came")

    def test_each_message_goes_to_one_consumer(self, broker: Broker, queue: str) -> None:
        with self.session(broker) as one, self.session(broker) as other:
            self.publish(broker, queue, *[b"%d" % number for number in range(10)])
            found: list[bytes] = []
            while len(found) < 10:
                (holder, message), _ = self._either(one, other)
                found.append(message.body)
                holder.commit(message)
        assert sorted(found) == sorted(b"%d" % number for number in range(10))
        assert self.nothing_is_left(broker)

    def test_an_earlier_delivery_cannot_acknowledge_the_present_one(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        session = broker.connect()
        stale = self.next(session)
        _, session = self.again(broker, session, stale)
        with pytest.raises(CommitInDoubtError):
            session.commit(stale)
        session.close()
        assert self.bodies(broker, 1) == [b"x"]

    def test_a_delivery_cannot_be_acknowledged_twice(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"1", b"2")
        with self.session(broker) as session:
            message = self.next(session)
            session.commit(message)
            with pytest.raises(CommitInDoubtError):
                session.commit(message)
        assert self.bodies(broker, 1) == [b"2"]

    def test_a_delivery_cannot_be_acknowledged_twice_without_waiting_either(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"1", b"2")
        told: list[tuple[bytes, Exception | None]] = []
        with self.session(broker) as session:
            message = self.next(session)
            self._acknowledge(session, message, partial(_note, told, b"first"))
            with pytest.raises(CommitInDoubtError):
                self._acknowledge(session, message, partial(_note, told, b"second"))
        assert told == [(b"first", None)]
        assert self.bodies(broker, 1) == [b"2"]

    def test_a_session_cannot_acknowledge_what_an_earlier_one_was_given(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"1", b"2")
        with self.session(broker) as gone:
            stale = self.next(gone)
        with self.session(broker) as session:
            self.next(session)
            with pytest.raises(CommitInDoubtError):
                session.commit(stale)
        assert sorted(self.bodies(broker, 2)) == [b"1", b"2"]

    # -- capabilities

    def test_the_delay_of_a_redelivery_is_kept_or_not_claimed(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            message = self.next(session)
            started = time.monotonic()
            if not session.capabilities.delayed_redelivery:
                session.rollback(message, 60.0)
                session.close()
                assert self.bodies(broker, 1) == [b"x"]
                return
            session.rollback(message, 0.3)
            session.commit(self.next(session))
            assert time.monotonic() - started >= 0.3

    def test_a_copy_comes_later_as_the_same_message_or_that_is_not_claimed(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x", **{"my-header": "mine"})
        with self.session(broker, consume=False) as asked:
            claimed = asked.capabilities.delayed_copies
            assert bool(getattr(asked, "lacks", _lacks_all)("schedule")) is not claimed
        if not claimed:
            return
        with self.session(broker) as session:
            first = self.next(session)
            started = time.monotonic()
            cast("Postponing", session).put_off(first, 0.5)
            again = self.next(session)
            assert time.monotonic() - started >= 0.5
            assert (again.key, again.id, again.body) == (first.key, first.id, b"x")
            assert (again.redelivered, again.headers["my-header"]) == (True, "mine")
            session.commit(again)
        assert self.nothing_is_left(broker)

    def test_deliveries_are_counted_or_not_claimed(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        session = broker.connect()
        counted = session.capabilities.counts_deliveries
        first = self.next(session)
        second, session = self.again(broker, session, first)
        assert (first.delivery_count, second.delivery_count) == ((1, 2) if counted else (None, None))
        session.commit(second)
        session.close()

    def test_a_trustworthy_flag_is_false_first_and_true_ever_after(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        session = broker.connect()
        can = session.capabilities
        first = self.next(session)
        second, session = self.again(broker, session, first)
        third, session = self.again(broker, session, second)
        if can.trustworthy_flag or can.flags_while_connected:
            assert [first.redelivered, second.redelivered, third.redelivered] == [False, True, True]
        session.commit(third)
        session.close()

    def test_what_a_session_sends_is_known_again(self, broker: Broker, queue: str) -> None:
        with self.session(broker, consume=False) as sender:
            sender.send(queue, b"x", {})
            sender.commit()
        session = broker.connect()
        first = self.next(session)
        second, session = self.again(broker, session, first)
        assert first.key is not None
        assert second.key == first.key
        session.commit(second)
        session.close()

    def test_a_message_without_a_stable_id_is_refused_where_there_can_be_one(
        self, server: Any, broker: Broker, queue: str
    ) -> None:
        with self.session(broker) as session:
            if session.capabilities.stable_ids:
                session.send(queue, b"x", {})
                session.commit()
                assert self.next(session).key is not None
                return
            self.send_without_id(server, queue, b"x")
            with pytest.raises(NoStableIdError):
                session.receive(self.patience)

    # -- waiting and leaving

    def test_receiving_gives_up_after_its_timeout(self, broker: Broker) -> None:
        with self.session(broker) as session:
            started = time.monotonic()
            assert session.receive(0.05) is None
            assert time.monotonic() - started >= 0.04

    def test_a_pause_lasts(self, broker: Broker) -> None:
        with self.session(broker) as session:
            started = time.monotonic()
            assert session.pause(0.05)
            assert time.monotonic() - started >= 0.04

    @pytest.mark.parametrize("wait", ["receive", "pause"])
    @pytest.mark.parametrize("end", ["interrupt", "close"])
    def test_waiting_ends_when_the_session_does(self, broker: Broker, wait: str, end: str) -> None:
        with self.session(broker) as session:
            results: list[object] = []
            waiting = threading.Thread(target=_record, args=(results, session, wait))
            waiting.start()
            session.interrupt() if end == "interrupt" else session.close(wait=False)
            waiting.join(self.patience)
            assert not waiting.is_alive()
        expected = False if wait == "pause" else (None if end == "interrupt" else ConnectionLostError)
        assert results == [expected]

    def test_an_interrupted_session_delivers_nothing_more_but_settles(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"1", b"2")
        with self.session(broker) as session:
            message = self.next(session)
            session.interrupt()
            assert session.receive(self.patience) is None
            assert not session.pause(self.patience)
            session.commit(message)
        assert self.bodies(broker, 1) == [b"2"]

    def test_a_closed_session_settles_nothing_and_says_so(self, broker: Broker, queue: str) -> None:
        self.publish(broker, queue, b"x")
        with self.session(broker) as session:
            message = self.next(session)
            session.close()
            session.close()
            with pytest.raises(ConnectionLostError):
                session.receive(self.patience)
            session.send(queue, b"never", {})
            with pytest.raises(ConnectionLostError):
                session.flush()
            with pytest.raises(CommitInDoubtError):
                session.commit(message)
            session.rollback(message)
            session.rollback()
        assert self.bodies(broker, 1) == [b"x"]


def _lacks_all(_way: str) -> str:
    return "it does not say"


def _note(told: list[tuple[bytes, Exception | None]], body: bytes, doubt: Exception | None) -> None:
    told.append((body, doubt))


def _record(results: list[object], session: Session, wait: str) -> None:
    try:
        results.append(session.pause(60.0) if wait == "pause" else session.receive(60.0))
    except ConnectionLostError as error:
        results.append(type(error))
