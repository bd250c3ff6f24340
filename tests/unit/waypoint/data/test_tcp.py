"""Connections without requests: judged, relayed both ways, judged again; and how a protocol is told by its first bytes."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tests.kit.waypoint import CLUSTER, VIP, App, LoopbackWaypoint
from waypoint.data.served import MAX_POD_PORTS
from waypoint.data.sniff import PREFACE, Seen, http_version, protocol
from ztunnel.mesh.l7.config import PortProtocol, ServedWorkload
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import L7Action, L7Policy, L7Rule, Source

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def denied(waypoint: LoopbackWaypoint, account: str = "client") -> None:
    """From now on this client may not connect."""
    principal = TextMatch(TextKind.EXACT, waypoint.pki.identity(account).principal)
    rule = L7Rule(sources=(Source(principals=(principal,)),))
    policy = L7Policy("no", "default", L7Action.DENY, rules=(rule,), tcp_rules=(rule,))
    (service,) = waypoint.config.services
    waypoint.update(policies={policy.key: policy}, services=(replace(service, policies=(policy.key,)),))


@pytest.mark.parametrize("hbone", [True, False], ids=["hbone", "plain"])
def test_bytes_pass_both_ways_and_each_direction_ends_by_itself(waypoint: LoopbackWaypoint, hbone: bool) -> None:
    app = waypoint.app(hbone=hbone)
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve(protocol=PortProtocol.TCP)
    client = waypoint.client()
    waypoint.run_until(lambda: app.connections)
    far = app.connections[0]
    far.send(b"the server speaks first")
    waypoint.run_until(lambda: client.data == b"the server speaks first")
    there, back = os.urandom(1_000_000), os.urandom(1_000_000)
    client.take()
    client.send(there)
    far.send(back)
    waypoint.run_until(lambda: far.data == there and client.data == back)
    client.end()
    waypoint.run_until(lambda: far.has_ended)
    far.send(b"more")
    waypoint.run_until(lambda: client.data.endswith(b"more"))
    far.end()
    waypoint.run_until(lambda: client.has_ended)
    assert client.error is None


def test_who_does_not_read_stops_who_sends(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(protocol=PortProtocol.TCP)
    client = waypoint.client()
    waypoint.run_until(lambda: app.connections)
    far = app.connections[0]
    assert far.stream is not None
    assert client.stream is not None
    far.stream.pause()
    sent = 0
    while not client.stream.is_full and sent < 90_000_000:
        client.send(bytes(1 << 18))
        sent += 1 << 18
        waypoint.turn(5)
    assert sent < 40_000_000
    far.stream.resume()
    waypoint.run_until(lambda: len(far.data) == sent)


@pytest.mark.parametrize("side", ["client", "app"])
def test_a_cut_on_one_side_is_one_on_the_other(waypoint: LoopbackWaypoint, app: App, side: str) -> None:
    waypoint.serve(protocol=PortProtocol.TCP)
    client = waypoint.client()
    client.send(b"x")
    waypoint.run_until(lambda: app.connections and app.connections[0].data)
    far = app.connections[0]
    near, other = (client, far) if side == "client" else (far, client)
    near.close()
    waypoint.run_until(lambda: other.error is not None)


def test_a_policy_keeps_connections_out_and_ends_those_that_live(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(protocol=PortProtocol.TCP)
    live, others = waypoint.client(), waypoint.client(account="friend")
    live.send(b"x")
    others.send(b"x")
    waypoint.run_until(lambda: len(app.connections) == 2 and all(each.data for each in app.connections))
    denied(waypoint)
    waypoint.run_until(lambda: live.error is not None)
    late = waypoint.client()
    waypoint.run_until(lambda: late.error is not None)
    others.send(b"y")
    waypoint.run_until(lambda: any(each.data == b"xy" for each in app.connections))


def test_a_policy_judges_the_next_request_of_a_live_connection(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    client = waypoint.client()
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    client.take()
    denied(waypoint)
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    waypoint.run_until(lambda: client.data)
    assert client.data.startswith(b"HTTP/1.1 403 Forbidden")
    assert b"RBAC: access denied" in client.data


def test_a_service_that_is_not_served_any_more_ends_its_connections(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(protocol=PortProtocol.TCP)
    live = waypoint.client()
    live.send(b"x")
    waypoint.run_until(lambda: app.connections and app.connections[0].data)
    waypoint.update(services=())
    waypoint.run_until(lambda: live.error is not None)
    late = waypoint.client()
    waypoint.run_until(lambda: late.error is not None)
    assert "400" in str(late.error)


def test_a_connection_does_not_outlive_the_policies_that_its_pods_port_is_judged_by(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app().answers(OK)
    address, port = app.address[0], app.address[1]
    pod = ServedWorkload("uid", (address,), waypoint.pki.identity("app"))
    waypoint.update(workloads=(pod,))
    client = waypoint.client(address, port)
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    client.take()
    others = (number for number in range(1, MAX_POD_PORTS + 2) if number != port)
    assert all(waypoint.proxy.served.find(address, number) for number in others), "so many that the first is forgotten"
    policy = L7Policy("no", "default", L7Action.DENY, rules=(L7Rule(),), tcp_rules=(L7Rule(),))
    waypoint.update(policies={policy.key: policy}, workloads=(replace(pod, policies=(policy.key,)),))
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    waypoint.run_until(lambda: client.is_over or b"\r\n\r\n" in client.data)
    assert b"hello" not in client.data
    assert len(app.heads) == 1


@pytest.mark.parametrize(
    ("start", "seen"),
    [
        (b"GET / HTTP/1.1\r\n", "http"),
        (b"\x16\x03\x01\x02\x00", "bytes"),
        (b"GET is no request\r\n", "bytes"),
        (b"hello\n", "bytes"),
        (b"", "bytes"),
    ],
)
def test_an_undeclared_port_is_told_by_its_first_bytes(waypoint: LoopbackWaypoint, app: App, start: bytes, seen: str) -> None:
    waypoint.serve(protocol=PortProtocol.AUTO)
    client = waypoint.client()
    for at in range(0, len(start), 3):
        client.send(start[at : at + 3])
        waypoint.turn(3)
    if seen == "http":
        client.send(b"Host: a\r\n\r\n")
    waypoint.run_until(lambda: app.connections and len(app.connections[0].data) >= len(start))
    assert (b"x-request-id" in app.connections[0].data) is (seen == "http")
    assert app.connections[0].data.startswith(start[:3])


def test_what_ends_in_front_of_its_first_line_is_passed_on(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(protocol=PortProtocol.AUTO)
    client = waypoint.client()
    client.send(b"GE")
    client.end()
    waypoint.run_until(lambda: app.connections and app.connections[0].has_ended)
    assert app.connections[0].data == b"GE"


def test_a_pod_that_is_addressed_by_itself_has_any_port(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app().answers(OK)
    address, port = app.address[0], app.address[1]
    waypoint.update(workloads=(ServedWorkload("uid", (address,), waypoint.pki.identity("app")),))
    client = waypoint.client(address, port)
    client.send(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert b"x-request-id" in app.heads[0]
    for host, number in ((VIP, 80), ("127.0.0.2", port)):
        refused = waypoint.client(host, number)
        waypoint.run_until(lambda refused=refused: refused.error is not None)  # type: ignore[misc]
    assert CLUSTER not in waypoint.config.clusters


@pytest.mark.parametrize(
    ("start", "seen"),
    [
        (PREFACE, Seen.HTTP2),
        (PREFACE[:5], Seen.UNKNOWN),
        (b"PRI * HTTP/1.1\r\n", Seen.HTTP1),
        (b"PROPFIND / HTTP/1.1\r\n", Seen.HTTP1),
        (b"GET /" + b"x" * 9000, Seen.OTHER),
        (b"GET / HTTP/1.0\r\n", Seen.HTTP1),
        (b"GET / HTTP/2.0\r\n", Seen.OTHER),
        (b" GET / HTTP/1.1\r\n", Seen.OTHER),
        (b"GET", Seen.UNKNOWN),
        (b"\0", Seen.OTHER),
    ],
)
def test_what_first_bytes_say(start: bytes, seen: Seen) -> None:
    assert protocol(start) is seen
    assert http_version(start) is (seen if seen in (Seen.HTTP2, Seen.UNKNOWN) and start.startswith(b"PRI") else Seen.HTTP1)
