from __future__ import annotations

import pytest

from retrykit.messaging.stomp import StompBroker
from retrykit.messaging.stomp.address import Address, parse_servers, redacted, without_path
from retrykit.messaging.stomp.failover import Rota

A, B, C = (Address(host, 61613) for host in "abc")
IN_ORDER = "failover:(stomp://a,stomp://b,stomp://c)?randomize=false"


@pytest.mark.parametrize(
    ("url", "addresses", "randomize"),
    [
        ("stomp://a", (A,), False),
        (IN_ORDER, (A, B, C), False),
        ("failover:(stomp://a,stomp://b)", (A, B), True),
        ("failover://(stomp://a, stomp://b)?randomize=true", (A, B), True),
        ("failover:(stomp://a)", (A,), True),
        ("failover:(stomp+ssl://a,stomps://b:7)", (Address("a", 61614, tls=True), Address("b", 7, tls=True)), True),
    ],
)
def test_a_url_names_one_server_or_several(url, addresses, randomize):
    servers = parse_servers(url)
    assert (servers.addresses, servers.randomize) == (addresses, randomize)


def test_each_server_has_credentials_of_its_own():
    one, other = parse_servers("failover:(stomp://me:p%2C1@a,stomp://you:p2@b)").addresses
    assert (one.login, one.passcode, other.login, other.passcode) == ("me", "p,1", "you", "p2")


def test_the_destination_is_named_by_one_of_them_or_by_all():
    assert parse_servers("failover:(stomp://a/queue/q,stomp://b)").path == "/queue/q"
    assert parse_servers("failover:(stomp://a/queue/q,stomp://b/queue/q)").path == "/queue/q"
    with pytest.raises(ValueError, match="one destination"):
        parse_servers("failover:(stomp://a/queue/q,stomp://b/queue/r)")


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("stomp://me:pw@a:7", "stomp://me:pw@a:7"),
        ("stomp://me:pw@a:7/queue/a", "stomp://me:pw@a:7"),
        ("stomp://a/a/", "stomp://a"),
        ("stomps://[::1]/a.b", "stomps://[::1]"),
        (
            "failover:(stomp://a,stomp://b/a , stomp://c/a)?randomize=false",
            "failover:(stomp://a,stomp://b , stomp://c)?randomize=false",
        ),
    ],
)
def test_a_url_can_do_without_its_destination(url, bare):
    assert without_path(url) == bare
    assert parse_servers(bare).path == ""


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("failover:stomp://a,stomp://b", "must look like 'failover:"),
        ("failover:()", "must look like 'stomp:"),
        ("failover:(stomp+ssl://a,stomp://b)", "must all be encrypted, or none"),
        ("failover:(stomp://a,tcp://b)", "must look like 'stomp:"),
        ("failover:(stomp://a)?randomize=maybe", "randomize must be true or false, not 'maybe'"),
        ("failover:(stomp://a)?maxReconnectAttempts=3", "`reconnect`, not 'maxReconnectAttempts'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(url, names):
    with pytest.raises(ValueError, match=names):
        parse_servers(url)


@pytest.mark.parametrize(
    "url",
    [
        "failover:(stomp://me:secret@a,stomp://you:secret@b)",
        "failover:(stomp://me:sec,ret@a,stomp://b)",
        "failover:(stomp://me:12,ret@a,stomp://b)",
        "failover:(stomp://me:12?sec,x@a)",
        "failover:(stomp://me:12)?secret@a)",
        "failover:(stomp://a,stomp://me:secret@b)?what=ever",
        "failover:(stomp://a,http://me:secret@b)",
        "failover:(stomp+ssl://me:secret@a,stomp://me:secret@b)",
    ],
)
def test_no_password_is_shown_whether_it_can_be_read_or_not(url):
    told = redacted(url)
    try:
        broker = StompBroker(url, destination="/queue/q")
    except ValueError as refused:
        told += f"{refused} {refused.__cause__}"
    else:
        told += f"{broker!r} {broker.name} {broker.servers!r}"
    assert "sec" not in told
    assert "ret" not in told


def test_the_name_of_several_servers_is_their_url_without_credentials():
    broker = StompBroker("failover:(stomp+ssl://me:secret@a,stomps://b)", destination="/queue/q")
    assert broker.name == "failover:(stomp+ssl://a:61614,stomp+ssl://b:61614)/queue/q"
    assert "failover:(stomp+ssl://me:***@a:61614,stomp+ssl://b:61614)?randomize=true" in repr(broker)


def test_in_order_the_next_connection_begins_after_the_server_that_was_lost():
    servers = parse_servers(IN_ORDER)
    rota, (a, b, c) = Rota(servers), servers.addresses
    assert rota.order() == (a, b, c)
    rota.used(a)
    rota.lost(a)
    assert rota.order() == (b, c, a)
    rota.lost(a)
    assert rota.order() == (b, c, a), "a second session that was lost with it goes no further"
    rota.used(c)
    assert rota.order() == (c, a, b)
    rota.lost(c)
    assert rota.order() == (a, b, c)


def test_in_any_order_the_server_that_was_lost_comes_last_until_it_is_used_again():
    servers = parse_servers("failover:(stomp://a,stomp://b,stomp://c)")
    rota, (a, *_) = Rota(servers), servers.addresses
    assert {rota.order()[0] for _ in range(200)} == set(servers.addresses)
    rota.lost(a)
    assert {rota.order()[-1] for _ in range(50)} == {a}
    rota.used(a)
    assert {rota.order()[-1] for _ in range(200)} == set(servers.addresses)
