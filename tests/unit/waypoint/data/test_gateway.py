"""An ingress gateway's ports: hosts, TLS by server name, passing TLS on, plain connections; and TLS towards endpoints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.http2 import H2End
from tests.kit.waypoint import CLUSTER, App, Bytes, LoopbackWaypoint
from tests.kit.web_pki import WebPki
from waypoint.data.client_hello import Unread, server_name
from waypoint.data.gateway import HostTable
from waypoint.data.tcp import route_for
from waypoint.data.tls import TlsRefused, TlsStream, name_matches, server_context
from ztunnel.mesh.l7.clusters import Endpoint, UpstreamTls
from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, TlsServer, VirtualHost
from ztunnel.mesh.l7.routes import Backend, DirectResponse, Route, TcpRoute, TextKind, TextMatch
from ztunnel.mesh.l7.security import L7Action, L7Policy, L7Rule, Operation

PKI = WebPki()
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
TO_APP = (Route("app", backends=(Backend(CLUSTER),)),)


def get(host: bytes, *lines: bytes) -> bytes:
    return b"\r\n".join([b"GET / HTTP/1.1", b"Host: " + host, *lines, b"", b""])


def says(text: str) -> tuple[Route, ...]:
    return (Route(text, direct=DirectResponse(200, text.encode())),)


def http(name: str, *hosts: VirtualHost, port: int = 80, **changes: object) -> GatewayServer:
    return replace(GatewayServer(name, port, ListenerProtocol.HTTP, virtual_hosts=hosts), **changes)  # type: ignore[arg-type]  # a test's


def https(name: str, *hosts: str, routes: tuple[Route, ...] = TO_APP, certificate: tuple[bytes, bytes] | None = None) -> GatewayServer:
    tls = TlsServer(*(certificate or PKI.certificate(*hosts)))
    return GatewayServer(name, 443, ListenerProtocol.HTTPS, hosts, tls, virtual_hosts=(VirtualHost(("*",), routes),))


def ask(waypoint: LoopbackWaypoint, client: Bytes, request: bytes, end: bytes) -> bytes:
    client.send(request)
    waypoint.run_until(lambda: client.data.endswith(end) or client.is_over)
    return client.take()


def test_requests_go_by_the_most_specific_host(waypoint: LoopbackWaypoint) -> None:
    waypoint.outside(
        http("a", VirtualHost(("*",), says("any"))),
        http("b", VirtualHost(("*.example.com",), says("wild")), VirtualHost(("www.example.com",), says("exact"))),
        http("c", VirtualHost(("*.a.example.com",), says("wilder"))),
    )
    client = waypoint.dial(80)
    for host, said in {
        b"www.example.com": b"exact",
        b"WWW.Example.com:80": b"exact",
        b"x.example.com": b"wild",
        b"x.a.example.com": b"wilder",
        b"a.b.a.example.com": b"wilder",
        b"a.example.com": b"wild",
        b"example.com": b"any",
        b"other": b"any",
        b"[fd00::1]:80": b"any",
    }.items():
        assert ask(waypoint, client, get(host), said).endswith(b"\r\n\r\n" + said), host


def test_nobodys_host_is_404_and_what_the_client_claims_is_not_believed(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    waypoint.outside(http("a", VirtualHost(("app",), TO_APP)))
    client = waypoint.dial(80)
    assert ask(waypoint, client, get(b"other"), b"\r\n\r\n").startswith(b"HTTP/1.1 404 Not Found")
    request = get(b"app", b"X-Envoy-Max-Retries: 100", b"X-Forwarded-For: 10.9.9.9", b"X-Forwarded-Proto: https")
    ask(waypoint, client, request, b"hello")
    lines = app.heads[0].split(b"\r\n")
    assert {b"x-forwarded-for: 10.9.9.9,127.0.0.1", b"x-forwarded-proto: http", b"x-envoy-external-address: 127.0.0.1"} <= set(lines)
    assert not any(line.startswith(b"x-envoy-max-retries") for line in lines)


def test_who_comes_from_outside_has_no_say_in_retries(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nsick")
    waypoint.outside(http("a", VirtualHost(("app",), TO_APP)))
    asking = get(b"app", b"X-Envoy-Retry-On: 5xx", b"X-Envoy-Max-Retries: 3")
    assert ask(waypoint, waypoint.dial(80), asking, b"sick").startswith(b"HTTP/1.1 503 ")
    assert len(app.heads) == 1


def test_a_listener_that_wants_tls_sends_there(waypoint: LoopbackWaypoint) -> None:
    waypoint.outside(http("a", hosts=("secure",), redirect_to_https=True), http("b", VirtualHost(("*",), says("plain"))))
    client = waypoint.dial(80)
    moved = ask(waypoint, client, get(b"secure:80"), b"\r\n\r\n")
    assert moved.startswith(b"HTTP/1.1 301 Moved Permanently")
    assert b"location: https://secure/\r\n" in moved
    assert ask(waypoint, client, get(b"open"), b"plain").endswith(b"plain")


def test_policies_judge_a_gateways_requests_and_connections(waypoint: LoopbackWaypoint, app: App) -> None:
    policy = L7Policy("no", "default", L7Action.DENY, rules=(L7Rule(),), tcp_rules=(L7Rule(),))
    waypoint.update(policies={policy.key: policy})
    route = TcpRoute("t", backends=(Backend(CLUSTER),))
    waypoint.outside(
        http("a", VirtualHost(("*",), TO_APP, (policy.key,))),
        GatewayServer("t", 81, ListenerProtocol.TCP, tcp_routes=(route,), policies=(policy.key,)),
        http("c", VirtualHost(("*",), TO_APP, ("default/missing",)), port=82),
    )
    assert ask(waypoint, waypoint.dial(80), get(b"app"), b"denied").startswith(b"HTTP/1.1 403 ")
    assert ask(waypoint, waypoint.dial(82), get(b"app"), b"denied").startswith(b"HTTP/1.1 403 "), "a policy that is missing denies"
    client = waypoint.dial(81)
    waypoint.run_until(lambda: client.is_over)
    assert not app.connections


@pytest.mark.parametrize("protocol", [b"http/1.1", b"h2", b""])
def test_tls_ends_here_by_server_name(waypoint: LoopbackWaypoint, app: App, protocol: bytes) -> None:
    app.answers(OK)
    waypoint.outside(https("a", "a.example"), https("b", "*.b.example", routes=says("b")))
    tls = UpstreamTls(sni="a.example", roots=PKI.root_pem)
    client = waypoint.dial_tls(443, tls, *([protocol] if protocol else []))
    waypoint.run_until(lambda: client.is_open)
    assert isinstance(client.stream, TlsStream)
    assert client.stream.protocol == protocol
    if protocol == b"h2":
        h2 = H2End(client, client=True)
        stream = h2.get()
        waypoint.run_until(lambda: h2.is_over(stream))
        assert h2.data[stream] == b"hello"
    else:
        assert ask(waypoint, client, get(b"a.example"), b"hello").endswith(b"hello")
    assert b"x-forwarded-proto: https" in app.heads[0]
    other = waypoint.dial_tls(443, replace(tls, sni="x.b.example"))
    waypoint.run_until(lambda: other.is_open)
    assert ask(waypoint, other, get(b"whatever"), b"b").endswith(b"\r\n\r\nb")
    nobody = waypoint.dial_tls(443, replace(tls, sni="c.example"))
    waypoint.run_until(lambda: nobody.error is not None)


def test_a_new_certificate_counts_for_new_connections_and_ends_none(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    waypoint.outside(https("a", "a.example"))
    tls = UpstreamTls(sni="a.example", roots=PKI.root_pem)
    client = waypoint.dial_tls(443, tls)
    ask(waypoint, client, get(b"a.example"), b"hello")
    other = WebPki()
    waypoint.outside(https("a", "a.example", certificate=other.certificate("a.example")))
    refused = waypoint.dial_tls(443, tls)
    waypoint.run_until(lambda: refused.error is not None)
    assert "certificate" in str(refused.error)
    fresh = waypoint.dial_tls(443, replace(tls, roots=other.root_pem))
    ask(waypoint, fresh, get(b"a.example"), b"hello")
    assert ask(waypoint, client, get(b"a.example"), b"hello").endswith(b"hello")
    waypoint.outside()
    assert ask(waypoint, client, get(b"a.example"), b"\r\n\r\n").startswith(b"HTTP/1.1 404 ")


def test_clients_show_certificates_where_they_must(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    server = https("a", "a.example")
    assert server.tls is not None
    waypoint.outside(replace(server, tls=replace(server.tls, client_roots=PKI.root_pem)))
    certificate, key = PKI.certificate("someone")
    tls = UpstreamTls(sni="a.example", roots=PKI.root_pem)
    with_one = waypoint.dial_tls(443, replace(tls, certificate=certificate, key=key))
    assert ask(waypoint, with_one, get(b"a.example"), b"hello").endswith(b"hello")
    without = waypoint.dial_tls(443, tls)
    without.send(get(b"a.example"))
    waypoint.run_until(lambda: without.error is not None)
    assert len(app.heads) == 1


def test_a_host_of_another_tls_listener_is_not_served_past_its_client_certificates(waypoint: LoopbackWaypoint) -> None:
    closed = https("closed", "closed.example", routes=says("closed"))
    assert closed.tls is not None
    certificate = PKI.certificate("open.example")
    anyone = https("anyone", "*", routes=says("open"), certificate=certificate)
    waypoint.outside(anyone, replace(closed, tls=replace(closed.tls, client_roots=PKI.root_pem)))
    client = waypoint.dial_tls(443, UpstreamTls(sni="open.example", roots=PKI.root_pem))
    assert ask(waypoint, client, get(b"open.example"), b"open").endswith(b"\r\n\r\nopen")
    for host in (b"closed.example", b"CLOSED.example.:443"):
        assert ask(waypoint, client, get(host), b"\r\n\r\n").startswith(b"HTTP/1.1 421 "), host
    assert ask(waypoint, client, get(b"else.example"), b"open").endswith(b"\r\n\r\nopen")


def test_a_listener_without_a_certificate_serves_nobody(waypoint: LoopbackWaypoint) -> None:
    broken = replace(https("a", "a.example"), tls=TlsServer(b"nonsense", b"nonsense"))
    waypoint.outside(broken, replace(https("b", "b.example"), problem="its Secret is missing"), https("c", "c.example", routes=says("c")))
    tls = UpstreamTls(sni="a.example", roots=PKI.root_pem)
    for name in ("a.example", "b.example"):
        client = waypoint.dial_tls(443, replace(tls, sni=name))
        waypoint.run_until(lambda client=client: client.error is not None)  # type: ignore[misc]
    assert ask(waypoint, waypoint.dial_tls(443, replace(tls, sni="c.example")), get(b"c"), b"c").endswith(b"c")


def test_tls_is_passed_on_by_server_name(waypoint: LoopbackWaypoint) -> None:
    app, other = waypoint.app(), waypoint.app()
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.cluster(waypoint.endpoint(other), key="other")
    routes = (
        TcpRoute("a", backends=(Backend(CLUSTER),), sni=("a.example",)),
        TcpRoute("b", backends=(Backend("other"),), sni=("*.b.example",)),
    )
    waypoint.outside(GatewayServer("tls", 443, ListenerProtocol.TLS, tcp_routes=routes))
    context = server_context(TlsServer(*PKI.certificate("a.example", "x.b.example")), ())
    served: list[Bytes] = []

    def accept(end: Bytes) -> None:
        """The application's own TLS, once it has the first bytes."""
        inner = Bytes()
        assert end.stream is not None
        tls = TlsStream(waypoint.loop, context, inner, server=True, seconds=30.0)
        inner.stream = tls
        inner.on_data = lambda each: each.send(OK)
        tls.join(end.stream)
        end.stream.use(tls)
        served.append(inner)
        tls.received(memoryview(end.take()))

    app.on_data = other.on_data = accept
    tls = UpstreamTls(sni="a.example", roots=PKI.root_pem)
    assert ask(waypoint, waypoint.dial_tls(443, tls), get(b"a.example"), b"hello").endswith(b"hello")
    assert (len(app.connections), len(other.connections)) == (1, 0)
    ask(waypoint, waypoint.dial_tls(443, replace(tls, sni="x.b.example")), get(b"a"), b"hello")
    assert len(other.connections) == 1
    nobody = waypoint.dial_tls(443, replace(tls, sni="c.example"))
    waypoint.run_until(lambda: nobody.error is not None)
    plain = waypoint.dial(443)
    plain.send(get(b"a.example"))
    waypoint.run_until(lambda: plain.is_over)


def test_bytes_inside_of_tls_that_ends_here(waypoint: LoopbackWaypoint, app: App) -> None:
    tls = TlsServer(*PKI.certificate("db.example"), client_roots=PKI.root_pem)
    route = TcpRoute("t", backends=(Backend(CLUSTER),))
    waypoint.outside(GatewayServer("db", 443, ListenerProtocol.TLS, ("db.example",), tls, tcp_routes=(route,)))
    certificate, key = PKI.certificate("someone")
    asked = UpstreamTls(sni="db.example", roots=PKI.root_pem)
    stranger = waypoint.dial_tls(443, asked)
    waypoint.run_until(lambda: stranger.error is not None or stranger.has_ended)
    assert not app.connections, "nobody is dialled for a client that has not proved who it is"
    client = waypoint.dial_tls(443, replace(asked, certificate=certificate, key=key))
    waypoint.run_until(lambda: app.connections)
    app.connections[0].send(b"220 ready")
    waypoint.run_until(lambda: client.data == b"220 ready")
    client.send(b"HELO")
    waypoint.run_until(lambda: app.connections[0].data == b"HELO")
    client.end()
    app.connections[0].end()
    waypoint.run_until(lambda: client.has_ended and app.connections[0].has_ended)


def test_the_way_through_a_waypoint(waypoint: LoopbackWaypoint) -> None:
    front = waypoint.app(hbone=True).answers(OK)
    endpoint = Endpoint("10.96.0.9", 80, identity=waypoint.pki.identity("app"), hbone=True, waypoint=(front.address[0], 15008))
    waypoint.cluster(endpoint)
    waypoint.outside(http("a", VirtualHost(("*",), TO_APP)))
    assert ask(waypoint, waypoint.dial(80), get(b"a"), b"hello").endswith(b"hello")
    assert front.authorities == ["10.96.0.9:80"]


def test_bytes_of_a_tcp_listener(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.outside(GatewayServer("t", 81, ListenerProtocol.TCP, tcp_routes=(TcpRoute("t", backends=(Backend(CLUSTER),)),)))
    client = waypoint.dial(81)
    waypoint.run_until(lambda: app.connections)
    app.connections[0].send(b"220 ready")
    waypoint.run_until(lambda: client.data == b"220 ready")
    client.end()
    app.connections[0].end()
    waypoint.run_until(lambda: client.has_ended)


def test_connections_have_a_bound(waypoint: LoopbackWaypoint) -> None:
    waypoint.outside(http("a", VirtualHost(("*",), says("x"))))
    waypoint.proxy._ports[80]._max_connections = 1
    first = waypoint.dial(80)
    assert ask(waypoint, first, get(b"a"), b"x").endswith(b"x")
    second = waypoint.dial(80)
    waypoint.run_until(lambda: second.error is not None)
    assert waypoint.proxy.take_limits() == {"connections": 1}
    first.close()
    waypoint.run_until(lambda: waypoint.proxy._ports[80]._open == 0)
    assert ask(waypoint, waypoint.dial(80), get(b"a"), b"x").endswith(b"x")


@pytest.mark.parametrize(
    ("tls", "problem"),
    [
        (UpstreamTls(sni="app.example", roots=PKI.root_pem), ""),
        (UpstreamTls(sni="app.example", roots=PKI.root_pem, names=("spiffe://x/app",)), ""),
        (UpstreamTls(roots=PKI.root_pem), ""),
        (UpstreamTls(sni="other.example", roots=PKI.root_pem), "not for other.example"),
        (UpstreamTls(sni="app.example", roots=PKI.root_pem, names=("spiffe://x/other",)), "not for spiffe://x/other"),
        (UpstreamTls(sni="app.example", roots=WebPki().root_pem), "certificate verify failed"),
        (UpstreamTls(sni="app.example"), "certificate verify failed"),
        (UpstreamTls(sni="whatever", verify=False), ""),
    ],
)
def test_tls_to_an_endpoint(waypoint: LoopbackWaypoint, app: App, tls: UpstreamTls, problem: str) -> None:
    context = server_context(TlsServer(*PKI.certificate("app.example", "spiffe://x/app")), (b"http/1.1",))

    def accept(end: Bytes) -> None:
        inner = Bytes()
        assert end.stream is not None
        stream = TlsStream(waypoint.loop, context, inner, server=True, seconds=30.0)
        inner.stream = stream
        inner.on_data = lambda each: each.send(OK) if each.data.endswith(b"\r\n\r\n") else None
        stream.join(end.stream)
        end.stream.use(stream)
        stream.received(memoryview(end.take()))

    app.on_data = accept
    waypoint.cluster(waypoint.endpoint(app), tls=tls)
    waypoint.serve()
    client = waypoint.client()
    client.send(get(b"app.example:8443"))
    waypoint.run_until(lambda: client.data.endswith(b"hello") or b"reset reason" in client.data)
    if problem:
        assert client.data.startswith(b"HTTP/1.1 503 ")
        assert problem.encode() in client.data
    else:
        assert client.data.endswith(b"hello")


def test_names_of_certificates() -> None:
    from cryptography import x509  # noqa: PLC0415

    certificate = x509.load_pem_x509_certificate(PKI.certificate("a.example", "*.b.example", "10.0.0.1", "spiffe://x/y")[0])
    for wanted in ("a.example", "A.Example.", "x.b.example", "10.0.0.1", "spiffe://x/y"):
        assert name_matches(certificate, (wanted,)), wanted
    for wanted in ("b.example", "x.y.b.example", "10.0.0.2", "spiffe://x/z", "", "example"):
        assert not name_matches(certificate, (wanted,)), wanted


def test_a_clients_first_message_in_any_pieces() -> None:
    import ssl  # noqa: PLC0415

    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="Some.Host.example")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    assert server_name(hello) == "some.host.example"
    assert server_name(hello + b"more") == "some.host.example"
    for cut in range(1, len(hello)):
        assert server_name(hello[:cut]) is Unread.INCOMPLETE
    middle = len(hello) // 2
    split = b"\x16\x03\x01" + (middle - 5).to_bytes(2, "big") + hello[5:middle]
    split += b"\x16\x03\x01" + (len(hello) - middle).to_bytes(2, "big") + hello[middle:]
    assert server_name(split) == "some.host.example"
    for wrong in (
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\xff\xff",
        b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
        b"\x16\x03\x01\x00\x06\x01\x00\x00\x02\x00\x00",
    ):
        assert server_name(wrong) is Unread.NO_TLS


def test_routes_and_hosts_by_name() -> None:
    table: HostTable[str] = HostTable()
    table.add(("*", "*.b", "a.b"), "x")
    table.add(("a.b", "*.a.b"), "y")
    assert [table.find(host) for host in ("a.b", "c.a.b", "c.b", "b", "")] == ["x", "y", "x", "x", "x"]
    routes = (TcpRoute("any"), TcpRoute("wild", sni=("*.b",)), TcpRoute("exact", sni=("a.b",)))
    found = [route_for(routes, sni) for sni in ("a.b", "c.b", "z", "")]
    assert [each.name if each else "" for each in found] == ["exact", "wild", "any", "any"]
    assert route_for(routes[1:], "z") is None
    assert issubclass(TlsRefused, Exception)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        (b"admin.example", b"403"),
        (b"ADMIN.example.", b"403"),
        (b"admin.example.:80", b"403"),
        (b"admin.example..", b"403"),
        (b"[admin.example]", b"400"),
        (b"[admin.example]:80", b"400"),
        (b"admin.example]", b"400"),
        (b"other.example.", b"200"),
        (b"[fd00::1]:80", b"200"),
        (b"[::ffff:1.2.3.4]", b"200"),
    ],
)
def test_no_spelling_of_a_host_is_routed_as_it_and_judged_as_another(waypoint: LoopbackWaypoint, host: bytes, status: bytes) -> None:
    hosts = (TextMatch(TextKind.EXACT, "admin.example"), TextMatch(TextKind.PREFIX, "admin.example:"))
    policy = L7Policy("no", "default", L7Action.DENY, rules=(L7Rule(operations=(Operation(hosts=hosts),)),))
    waypoint.update(policies={policy.key: policy})
    waypoint.outside(http("a", VirtualHost(("*", "admin.example"), says("any"), (policy.key,))))
    client = waypoint.dial(80)
    client.send(get(host, b"Connection: close"))
    waypoint.run_until(lambda: client.is_over)
    assert client.data.startswith(b"HTTP/1.1 " + status)
