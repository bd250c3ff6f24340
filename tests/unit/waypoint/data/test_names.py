"""Services of wildcard hosts: the host that a request names is looked up, and only one of theirs."""

from __future__ import annotations

from dataclasses import replace

from tests.kit.waypoint import CLUSTER, LoopbackWaypoint
from waypoint.data.names import MAX_WAITING, Names, serves
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.l7.clusters import Resolution

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def test_a_request_goes_to_the_host_that_it_names(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app().answers(OK)
    waypoint.cluster(resolution=Resolution.DYNAMIC, port=app.address[1])
    waypoint.serve()
    (service,) = waypoint.config.services
    waypoint.update(services=(replace(service, host_patterns=("*.example.com",)),))
    asked: list[str] = []
    waypoint.engine.names.ask = asked.append
    client = waypoint.client()
    client.send(b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
    waypoint.run_until(lambda: asked == ["api.example.com"])
    waypoint.proxy.resolved("api.example.com", 0, ("127.0.0.1",))
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert b"host: api.example.com" in app.heads[0]
    client.take()
    client.send(b"GET / HTTP/1.1\r\nHost: API.example.com:80\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert asked == ["api.example.com"]
    assert len(app.connections) == 1
    for host, status in ((b"evil.com", b"404"), (b"example.com", b"404"), (b"gone.example.com", b"503")):
        client.take()
        client.send(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
        if status == b"503":
            waypoint.run_until(lambda: len(asked) == 2)
            waypoint.proxy.resolved("gone.example.com", 0, ())
        waypoint.run_until(lambda: b"\r\n\r\n" in client.data)
        assert client.data[9:12] == status
    assert CLUSTER in waypoint.config.clusters


def test_a_client_that_leaves_while_its_host_is_looked_up(waypoint: LoopbackWaypoint) -> None:
    waypoint.cluster(resolution=Resolution.DYNAMIC, port=1)
    waypoint.serve()
    (service,) = waypoint.config.services
    waypoint.update(services=(replace(service, host_patterns=("*.example.com",)),))
    asked: list[str] = []
    waypoint.engine.names.ask = asked.append
    client = waypoint.client()
    client.send(b"GET / HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
    waypoint.run_until(lambda: asked)
    client.close()
    waypoint.run_until(lambda: not waypoint.proxy.connections.http)
    waypoint.proxy.resolved("api.example.com", 0, ("127.0.0.1",))
    waypoint.turn()


def test_names_are_bounded_and_what_was_known_stays() -> None:
    now = 0.0
    loop = Loop(lambda: now)
    names = Names(loop)
    asked: list[str] = []
    heard: list[tuple[str, ...]] = []
    names.ask = asked.append
    for number in range(MAX_WAITING + 5):
        names.resolve(f"h{number % 3}", heard.append)
    assert asked == ["h0", "h1", "h2"]
    assert heard == [()] * 5
    names.resolved("h0", ("10.0.0.1",))
    assert heard.count(("10.0.0.1",)) == 342
    names.resolved("h0", ())
    heard.clear()
    names.resolve("h0", heard.append)
    assert heard == [("10.0.0.1",)]
    loop.close()


def test_which_hosts_a_service_stands_for() -> None:
    assert serves(("*.a.b",), "x.a.b")
    assert serves(("*.a.b",), "x.y.a.b")
    assert serves(("a.b",), "a.b")
    for host in ("a.b", ".a.b", "xa.b", "x.a.b.c", ""):
        assert not serves(("*.a.b",), host), host
