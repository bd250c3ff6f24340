"""A waypoint's data path in one loop and one process: real tunnels, real sockets, no supervisor and no namespaces.

waypoint = LoopbackWaypoint()
app = waypoint.app()                                   # an endpoint that answers over plain TCP, or behind HBONE
waypoint.serve(port, routes...)                        # its configuration
client = waypoint.client("10.96.0.1", 80)              # a connection of a mesh client to a service
client.send(b"GET / HTTP/1.1\\r\\nhost: a\\r\\n\\r\\n"); waypoint.run_until(lambda: client.data...)
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.kit.pki import FakePki
from waypoint.data.channel import ConfigureWaypoint
from waypoint.data.proxy import Proxy
from waypoint.data.sockets import SocketStream
from waypoint.data.tls import TlsStream, client_context, expecting
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.bytestream import TunnelStream
from ztunnel.dataplane.endings import TunnelTimes
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.sockets import Acceptor
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.events import RequestReceived
from ztunnel.hbone.handshake import Handshake, TlsContexts
from ztunnel.mesh.errors import LocalError, MeshError
from ztunnel.mesh.l7.clusters import Cluster, Endpoint, UpstreamTls
from ztunnel.mesh.l7.config import GatewayServer, PortProtocol, ProxyConfig, ServedPort, ServedService
from ztunnel.mesh.l7.routes import Backend, Route, TcpRoute

TIMES = TunnelTimes(handshake=30.0, ping=10.0, ping_timeout=20.0)
SETTINGS = ConfigureWaypoint(
    prefix="",
    hostname="waypoint-0",
    own_records=True,
    idle_seconds=3600.0,
    max_streams=100,
    tunnels_per_endpoint=64,
    handshake_seconds=30.0,
    ping_seconds=10.0,
    ping_timeout_seconds=20.0,
    max_tunnels=1000,
    max_handshakes=100,
    max_connections=1000,
)
VIP = "10.96.0.1"
CLUSTER = "inbound-vip|80|http|app.default.svc.cluster.local"


class Bytes:
    """One end of a transport that keeps what comes. Implements `Receiver`."""

    def __init__(self) -> None:
        self.stream: TunnelStream | SocketStream | TlsStream | None = None
        self.data = bytearray()
        self.is_open = False
        self.has_ended = False
        self.error: MeshError | None = None
        self.on_data: Callable[[Bytes], None] = lambda _end: None

    def opened(self) -> None:
        self.is_open = True

    def received(self, data: memoryview) -> None:
        self.data += data
        self.on_data(self)

    def peer_ended(self) -> None:
        self.has_ended = True

    def writable(self) -> None:
        pass

    def lost(self, error: MeshError) -> None:
        self.error = error

    def closed(self) -> None:
        pass

    @property
    def is_over(self) -> bool:
        return self.has_ended or self.error is not None

    def send(self, data: bytes) -> None:
        assert self.stream is not None
        self.stream.write(data)

    def end(self) -> None:
        assert self.stream is not None
        self.stream.end()

    def close(self) -> None:
        assert self.stream is not None
        self.stream.close()

    def take(self) -> bytes:
        """What has come, and forget it."""
        taken = bytes(self.data)
        self.data.clear()
        return taken


@dataclass
class App:
    """An endpoint: its address, and each connection to it."""

    address: Address
    connections: list[Bytes] = field(default_factory=list)
    on_data: Callable[[Bytes], None] = lambda _end: None
    tunnels: list[Tunnel] = field(default_factory=list)
    authorities: list[str] = field(default_factory=list)
    acceptor: Acceptor | None = None

    def answers(self, response: bytes) -> App:
        """Each connection's every request (a head without a body) is answered with this."""

        def reply(end: Bytes) -> None:
            while b"\r\n\r\n" in end.data:
                head, _, rest = bytes(end.data).partition(b"\r\n\r\n")
                self.heads.append(head)
                end.data[:] = rest
                end.send(response)

        self.on_data = reply
        return self

    heads: list[bytes] = field(default_factory=list)


class LoopbackWaypoint:
    """See the module."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.pki = FakePki()
        self.name = self.pki.identity("waypoint")
        self.proxy = Proxy(self.loop, SETTINGS, random.Random(7))
        self.scratch = self.proxy.scratch
        self.engine = self.proxy.engine
        self.proxy.identity.renew(TlsContexts(self.pki.credentials(self.name)))
        listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = listener.getsockname()
        self.proxy.listen(0, [listener])
        self._acceptors: list[Acceptor] = []
        self._sockets: list[SocketStream] = []
        self._client: Tunnel | None = None
        self._tunnels: list[Tunnel] = []
        self.ports: dict[int, Address] = {}
        self.config = ProxyConfig("waypoint", "default", self.name)

    # Configuration

    def serve(self, *routes: Route, protocol: PortProtocol = PortProtocol.HTTP, clusters: dict[str, Cluster] | None = None) -> None:
        """One service at VIP:80 with these routes; without any, all goes to `CLUSTER`."""
        routes = routes or (Route("default", backends=(Backend(CLUSTER),)),)
        port = ServedPort(80, protocol, routes, (TcpRoute("tcp", backends=(Backend(CLUSTER),)),))
        service = ServedService("app.default.svc.cluster.local", "default", "app", (VIP,), (port,))
        self.update(services=(service,), clusters={**self.config.clusters, **(clusters or {})})

    def cluster(self, *endpoints: Endpoint, key: str = CLUSTER, **changes: object) -> Cluster:
        """A cluster of the configuration to come."""
        cluster = replace(Cluster(key, "app.default.svc.cluster.local", "default", "app", 80, endpoints=endpoints), **changes)  # type: ignore[arg-type]  # a test's keywords
        self.config = replace(self.config, clusters={**self.config.clusters, key: cluster})
        return cluster

    def update(self, **changes: object) -> None:
        """Puts a changed configuration into force."""
        self.config = replace(self.config, **changes)  # type: ignore[arg-type]  # a test's keywords
        self.proxy.serve(self.config)

    # A gateway's clients

    def outside(self, *servers: GatewayServer) -> None:
        """Serves these on ports of its own, whatever theirs are; `dial` them by their number."""
        self.update(servers=servers)
        for number in {server.port for server in servers} - self.ports.keys():
            listener = socket.create_server(("127.0.0.1", 0))
            self.ports[number] = listener.getsockname()
            self.proxy.listen(number, [listener])

    def dial(self, number: int) -> Bytes:
        """A connection from outside the mesh."""
        end = Bytes()
        end.stream = SocketStream(self.loop, self.scratch, end)
        self._sockets.append(end.stream)
        end.stream.connect(self.ports[number], 30.0)
        return end

    def dial_tls(self, number: int, tls: UpstreamTls, *protocols: bytes) -> Bytes:
        """The same over TLS."""
        end = Bytes()
        stream = TlsStream(self.loop, client_context(tls), end, server=False, seconds=30.0, check=expecting(tls, tls.sni))
        stream.offer(tls.sni, list(protocols))
        lower = SocketStream(self.loop, self.scratch, stream)
        self._sockets.append(lower)
        stream.join(lower)
        end.stream = stream
        lower.connect(self.ports[number], 30.0)
        return end

    # Endpoints

    def app(self, *, hbone: bool = False) -> App:
        """An endpoint on a loopback address of its own; with `hbone` on 15008 there, in tunnels."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = "127.0.0.1"
        if hbone:
            for last in range(2, 250):
                address = f"127.{random.randrange(2, 250)}.{random.randrange(2, 250)}.{last}"
                try:
                    listener.bind((address, 15008))
                    break
                except OSError:
                    continue
        else:
            listener.bind((address, 0))
        listener.listen(64)
        app = App((address, 8080) if hbone else listener.getsockname())
        accept = self._accept_tunnel if hbone else self._accept_plain
        app.acceptor = Acceptor(self.loop, listener, lambda sock, peer: accept(app, sock, peer), lambda: None)
        self._acceptors.append(app.acceptor)
        return app

    def endpoint(self, app: App) -> Endpoint:
        """How a cluster names it."""
        hbone = app.address[1] == 8080
        return Endpoint(app.address[0], app.address[1], "app", self.pki.identity("app"), hbone=hbone)

    def _accept_plain(self, app: App, sock: socket.socket, peer: Address) -> None:
        end = self._end(app)
        end.stream = SocketStream(self.loop, self.scratch, end)
        self._sockets.append(end.stream)
        end.stream.attach(sock)

    def _end(self, app: App) -> Bytes:
        end = Bytes()
        end.on_data = lambda each: app.on_data(each)  # noqa: PLW0108 - what it does may be set later
        app.connections.append(end)
        return end

    def _accept_tunnel(self, app: App, sock: socket.socket, peer: Address) -> None:
        contexts = TlsContexts(self.pki.credentials(self.pki.identity("app")))
        owner = _AppOwner(self, app)
        tunnel = Tunnel(self.loop, self.scratch, owner, TIMES, client=False)
        app.tunnels.append(tunnel)
        self._tunnels.append(tunnel)
        tunnel.start(sock, Handshake(contexts, server=True, expected=None, own_records=True), peer)

    # Clients

    def client(self, host: str = VIP, port: int = 80, *, account: str = "client") -> Bytes:
        """A connection of the mesh's client; all clients of one account share a tunnel."""
        end = Bytes()
        end.stream = self.carry(end, host, port, account=account)
        return end

    def carry(self, end: Bytes, host: str = VIP, port: int = 80, *, account: str = "client") -> TunnelStream:
        """The transport of such a connection, for an end of the test's own."""
        tunnel = self.tunnel(account)
        authority = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        stream = tunnel.mux.open_stream(((b":method", b"CONNECT"), (b":authority", authority.encode())))
        carried = TunnelStream(tunnel, stream, end, answered=False, early=False)
        tunnel.adopt(stream, carried)
        tunnel.mark_dirty()
        return carried

    def tunnel(self, account: str = "client") -> Tunnel:
        """A live tunnel of this client to 15008."""
        known = next((each for each in self._tunnels if each.client and not each.is_dead and each.id.endswith(account)), None)
        if known is not None and not known.is_draining:
            return known
        contexts = TlsContexts(self.pki.credentials(self.pki.identity(account)))
        sock = socket.create_connection(self.address)
        tunnel = Tunnel(self.loop, self.scratch, _Owner(), TIMES, client=True)
        tunnel.id += account
        self._tunnels.append(tunnel)
        tunnel.start(sock, Handshake(contexts, server=False, expected=frozenset({self.name}), own_records=True), self.address)
        return tunnel

    def ask(self, request: bytes, *, account: str = "client") -> bytes:
        """A request on a connection of its own; what has come back when the connection ends."""
        end = self.client(account=account)
        end.send(request)
        self.run_until(lambda: end.is_over)
        return end.take()

    # Time

    def run_until(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        """Turns the loop until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true"
            self.loop.run_once(0.01)

    def turn(self, times: int = 20) -> None:
        """A few rounds."""
        for _ in range(times):
            self.loop.run_once(0)

    def close(self) -> None:
        """Ends everything; a bug that was met fails the test."""
        over = LocalError("the test is over")
        for acceptor in self._acceptors:
            acceptor.close()
        for tunnel in self._tunnels:
            tunnel.close(over)
        self.proxy.close()
        for stream in self._sockets:
            stream.close()
        self.proxy.clusters.retire_all()
        self.turn(5)
        for handler in list(self.loop._handlers.values()):
            handler.on_bug()
        self.loop.close()
        assert self.loop.bugs == 0, "a callback raised"
        assert self.scratch.waiting.bytes == 0, "bytes are counted as waiting that nobody has"
        assert not self.proxy.connections.http, "a connection outlived its transport"
        assert not self.proxy.connections.tcp, "a connection outlived its transport"


class _Owner:
    """Owner of a client's tunnel."""

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        raise AssertionError("a client's tunnel is asked nothing")

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        pass


class _AppOwner(_Owner):
    """The node proxy in front of an application: every CONNECT is its."""

    def __init__(self, waypoint: LoopbackWaypoint, app: App) -> None:
        self._waypoint = waypoint
        self._app = app

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        self._app.authorities.append(dict(request.headers)[b":authority"].decode())
        end = self._waypoint._end(self._app)
        end.stream = TunnelStream(tunnel, request.stream, end, answered=True)
        tunnel.adopt(request.stream, end.stream)
        tunnel.answer(request.stream)
