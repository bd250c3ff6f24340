"""Ports of an ingress gateway: which listener a connection is for by its server name, and which host's routes a request by its authority.

More specific names win: exact, then the longer wildcard, then `*`. A connection lives on over changes of the configuration: each request
asks for the routes of the moment, and certificates count for new handshakes. Source: Gateway API, Listener; Envoy's filter chain match.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

from OpenSSL import SSL

from waypoint.data.answers import answer, refusal
from waypoint.data.client_hello import LONGEST, Unread, server_name
from waypoint.data.connections import Connections, Opening, serve_http1, serve_http2, serve_tcp
from waypoint.data.ends import ClientStream, RequestUser, Service
from waypoint.data.engine import Engine
from waypoint.data.exchange import Exchange
from waypoint.data.served import PortAtWork
from waypoint.data.sniff import Seen, http_version
from waypoint.data.sockets import SocketStream
from waypoint.data.tcp import Reusable
from waypoint.data.tls import TlsStream, host_of, server_context
from waypoint.http.authority import split_authority
from waypoint.http.jwt import KeySets
from waypoint.http.messages import Client, LocalReply, Request
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.addresses import canonical as canonical_address
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.loop import Timer
from ztunnel.dataplane.sockets import deliver_on_close, reset
from ztunnel.mesh.errors import LocalError, MeshError
from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, PortProtocol, ProxyConfig, TlsServer, VirtualHost

HANDSHAKE_SECONDS: Final = 10.0
PROTOCOLS: Final = (b"h2", b"http/1.1")
_Value = TypeVar("_Value")


class HostTable(Generic[_Value]):
    """Values by host pattern."""

    __slots__ = ("_any", "_exact", "_suffixes")

    def __init__(self) -> None:
        self._exact: dict[str, _Value] = {}
        self._suffixes: dict[str, _Value] = {}
        """By what follows `*`, with its dot."""
        self._any: _Value | None = None

    def add(self, patterns: Iterable[str], value: _Value) -> None:
        """The first that claims a pattern has it."""
        for pattern in patterns:
            lower = pattern.lower()
            if lower == "*":
                self._any = value if self._any is None else self._any
            elif lower.startswith("*."):
                self._suffixes.setdefault(lower[1:], value)
            else:
                self._exact.setdefault(lower, value)

    def find(self, host: str) -> _Value | None:
        """The value of the most specific pattern. A wildcard stands for one label or more, never for none."""
        found = self._exact.get(host)
        if found is not None:
            return found
        if self._suffixes:
            at = host.find(".", 1)
            while at >= 0:
                found = self._suffixes.get(host[at:])
                if found is not None:
                    return found
                at = host.find(".", at + 1)
        return self._any


class ServerAtWork:
    """One listener of a gateway's port."""

    __slots__ = ("config", "connections", "context", "hosts", "problem")

    def __init__(self, config: GatewayServer) -> None:
        self.config = config
        self.hosts: HostTable[PortAtWork] = HostTable()
        self.connections = PortAtWork(config.port, PortProtocol.TCP)
        """Of a TCP or TLS listener."""
        self.context: SSL.Context | None = None
        self.problem = config.problem


class GatewayPort:
    """One port. Mutable: live connections hold it."""

    def __init__(self, connections: Connections, scratch: Scratch, key_sets: KeySets, number: int, max_connections: int) -> None:
        self._connections = connections
        self._scratch = scratch
        self._key_sets = key_sets
        self.number = number
        self._max_connections = max_connections
        self._servers: HostTable[ServerAtWork] = HostTable()
        """By server name."""
        self._plain: HostTable[tuple[ServerAtWork, PortAtWork]] = HostTable()
        """Of HTTP listeners, which share a port: by the request's host."""
        self._nobody = PortAtWork(number, PortProtocol.HTTP)
        self._tcp: ServerAtWork | None = None
        self._by_name: dict[str, ServerAtWork] = {}
        self._hosts: dict[tuple[str, tuple[str, ...]], PortAtWork] = {}
        self._is_tls = False
        self.refused = 0
        """Connections that were too many since the count was last taken."""
        self._open = 0

    def update(self, servers: list[GatewayServer], proxy: ProxyConfig) -> None:
        """What is served from now on."""
        before, self._by_name = self._by_name, {}
        kept, self._hosts = self._hosts, {}
        self._servers, self._plain = HostTable(), HostTable()
        self._tcp = None
        self._is_tls = any(server.protocol in (ListenerProtocol.HTTPS, ListenerProtocol.TLS) for server in servers)
        for config in servers:
            server = self._by_name[config.name] = ServerAtWork(config)
            former = before.get(config.name)
            self._certify(server, former)
            for virtual in config.virtual_hosts:
                host = self._host(virtual, config, kept, proxy)
                server.hosts.add(virtual.hosts, host)
                if config.protocol is ListenerProtocol.HTTP:
                    self._plain.add(virtual.hosts, (server, host))
            if config.protocol is ListenerProtocol.HTTP and config.redirect_to_https:
                self._plain.add(config.hosts, (server, self._nobody))
            server.connections = former.connections if former is not None else server.connections
            server.connections.serve_connections(config, proxy, self._key_sets)
            if config.protocol in (ListenerProtocol.HTTPS, ListenerProtocol.TLS):
                self._servers.add(config.hosts, server)
            elif config.protocol is ListenerProtocol.TCP and self._tcp is None:
                self._tcp = server
        for name, gone in before.items():
            if name not in self._by_name:
                gone.connections.is_gone = True

    def _certify(self, server: ServerAtWork, former: ServerAtWork | None) -> None:
        tls: TlsServer | None = server.config.tls
        if server.problem or server.config.protocol not in (ListenerProtocol.HTTPS, ListenerProtocol.TLS):
            return
        protocols = PROTOCOLS if server.config.protocol is ListenerProtocol.HTTPS else ()
        if tls is None:
            server.problem = "no certificate" if protocols else ""
        elif former is not None and former.context is not None and former.config.tls == tls:
            server.context = former.context
        else:
            try:
                server.context = server_context(tls, protocols)
            except LocalError as error:
                server.problem = str(error)

    def _host(
        self, virtual: VirtualHost, config: GatewayServer, kept: dict[tuple[str, tuple[str, ...]], PortAtWork], proxy: ProxyConfig
    ) -> PortAtWork:
        key = (config.name, virtual.hosts)
        host = kept[key] if key in kept else PortAtWork(self.number, PortProtocol.HTTP)
        self._hosts[key] = host
        host.serve_host(virtual, proxy, self._key_sets)
        return host

    def close(self) -> None:
        """It is served no more."""
        for server in self._by_name.values():
            server.connections.is_gone = True
        self._by_name = {}
        self._servers, self._plain, self._tcp = HostTable(), HostTable(), None

    # Connections

    def accept(self, sock: socket.socket, peer: Address) -> None:
        """One TCP connection."""
        if self._open >= self._max_connections:
            self.refused += 1
            reset(sock)
            return
        try:
            local = canonical_address(sock.getsockname())
        except OSError:
            reset(sock)
            return
        deliver_on_close(sock)
        client = Client(None, peer[0], peer[1], "", self.number, local[0], tls=False)
        self._open += 1
        stream = _CountedStream(self._scratch, self)
        stream.attach(sock)
        if self._is_tls:
            stream.use(_Hello(self, stream, client))
        elif self._tcp is not None:
            opening = Opening(self._connections, stream, client, self._tcp.connections)
            stream.use(opening)
            opening.start()
        else:
            stream.use(_FirstBytes(self, stream, client, None))

    def ended(self) -> None:
        """A connection is over."""
        self._open -= 1

    def server_for(self, name: str) -> ServerAtWork | None:
        """The TLS listener for a server name."""
        found = self._servers.find(name)
        return None if found is None or found.problem else found

    def host_for(self, server: str, authority: bytes) -> tuple[ServerAtWork | None, PortAtWork]:
        """Whose request it is. `server`: the name of the TLS listener; empty on a plain port. Nobody's has no routes (404)."""
        host = _host(authority)
        if not server:
            return self._plain.find(host) or (None, self._nobody)
        at_work = self._by_name.get(server)
        if at_work is None:
            return None, self._nobody
        return at_work, at_work.hosts.find(host) or self._nobody

    def is_misdirected(self, server: str, authority: bytes) -> bool:
        """Whether another TLS listener has the host: its certificates and what it asks of clients would be passed by.

        Source: Gateway API, `Listener.hostname` (421 Misdirected Request).
        """
        if not server:
            return False
        found = self._servers.find(_host(authority))
        return found is not None and found.config.name != server

    def is_gone(self, server: str) -> bool:
        """Whether a listener is served no more."""
        return server not in self._by_name if server else not self._by_name

    def terminate(self, stream: Reusable, client: Client, server: ServerAtWork, hello: bytes) -> None:
        """TLS of a client ends here."""
        assert server.context is not None
        client.tls = True
        tls = TlsStream(self._connections.engine.loop, server.context, _NOBODY, server=True, seconds=HANDSHAKE_SECONDS)
        if server.config.protocol is ListenerProtocol.HTTPS:
            tls.use(_FirstBytes(self, tls, client, server))
        else:
            tls.use(Opening(self._connections, tls, client, server.connections))
        tls.join(stream)
        stream.use(tls)
        tls.received(memoryview(hello))

    def pass_on(self, stream: Reusable, client: Client, server: ServerAtWork, hello: bytes) -> None:
        """TLS of a client ends elsewhere."""
        serve_tcp(self._connections, stream, client, server.connections, memoryview(hello))

    def serve(self, stream: Reusable, client: Client, server: ServerAtWork | None, data: memoryview, *, http2: bool) -> None:
        """Requests from here on."""
        service = GatewayService(self._connections.engine, self, "" if server is None else server.config.name, server is not None)
        make = serve_http2 if http2 else serve_http1
        make(self._connections, stream, client, service, data)

    @property
    def loop_engine(self) -> Engine:
        """What its exchanges share."""
        return self._connections.engine


class GatewayService(Service):
    """Serves the requests of one connection to a gateway."""

    __slots__ = ("_engine", "_port", "_scheme", "_server")

    def __init__(self, engine: Engine, port: GatewayPort, server: str, tls: bool) -> None:
        self._engine = engine
        self._port = port
        self._server = server
        self._scheme = b"https" if tls else b"http"

    def begin(self, stream: ClientStream, request: Request, client: Client, ended: bool) -> RequestUser | None:
        request.scheme = self._scheme
        if self._port.is_misdirected(self._server, request.authority):
            answer(self._engine, stream, LocalReply(421, b"", [], "NR", "misdirected_request"))
            return None
        server, host = self._port.host_for(self._server, request.authority)
        if server is not None and server.config.redirect_to_https and self._scheme == b"http":
            answer(self._engine, stream, to_https(request))
            return None
        exchange = Exchange(self._engine, stream, request, client, host, ended)
        exchange.start()
        return exchange

    def refused(self, stream: ClientStream, client: Client, status: int, details: str) -> None:
        answer(self._engine, stream, refusal(status, details))

    @property
    def is_draining(self) -> bool:
        return self._engine.is_draining or self._port.is_gone(self._server)


def _host(authority: bytes) -> str:
    """As tables of hosts have it."""
    return host_of(authority.decode("ascii", "replace")).lower().rstrip(".")


def to_https(request: Request) -> LocalReply:
    """The same place over TLS."""
    host, _ = split_authority(request.authority)
    return LocalReply(301, b"", [(b"location", b"https://" + host + request.path)], "", "direct_response")


class _CountedStream(SocketStream):
    """A client's socket, which its port counts."""

    __slots__ = ("_is_counted", "_port")

    def __init__(self, scratch: Scratch, port: GatewayPort) -> None:
        super().__init__(port.loop_engine.loop, scratch, _NOBODY)
        self._port = port
        self._is_counted = True

    def _end(self, *, graceful: bool) -> None:
        super()._end(graceful=graceful)
        if self._is_counted:
            self._is_counted = False
            self._port.ended()


class _Nobody:
    """Receives nothing, for the moment until somebody does."""

    def opened(self) -> None:
        pass

    def received(self, data: memoryview) -> None:
        pass

    def peer_ended(self) -> None:
        pass

    def writable(self) -> None:
        pass

    def lost(self, error: MeshError) -> None:
        pass

    def closed(self) -> None:
        pass


_NOBODY: Final = _Nobody()


class _Waiter:
    """A connection that has yet to show what it is, and has so long for it. Implements `Receiver`."""

    __slots__ = ("_bytes", "_timer", "client", "port", "stream")

    def __init__(self, port: GatewayPort, stream: Reusable | None, client: Client) -> None:
        self.port = port
        self.stream = stream
        self.client = client
        self._bytes = b""
        self._timer: Timer | None = port.loop_engine.loop.call_later(HANDSHAKE_SECONDS, self._close)

    def opened(self) -> None:
        pass

    def received(self, data: memoryview) -> None:
        raise NotImplementedError

    def peer_ended(self) -> None:
        self._close()

    def writable(self) -> None:
        pass

    def lost(self, error: MeshError) -> None:
        self._cancel()

    def closed(self) -> None:
        self._cancel()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self) -> None:
        self._cancel()
        if self.stream is not None:
            self.stream.close()


class _Hello(_Waiter):
    """Waits for a TLS client's first message."""

    __slots__ = ()

    def received(self, data: memoryview) -> None:
        self._bytes += bytes(data)
        name = server_name(self._bytes)
        if name is Unread.INCOMPLETE and len(self._bytes) <= LONGEST:
            return
        server = None if isinstance(name, Unread) else self.port.server_for(name)
        stream = self.stream
        if server is None or stream is None:
            self._close()
            return
        self._cancel()
        assert isinstance(name, str)
        self.client.sni = name
        if server.context is not None:
            self.port.terminate(stream, self.client, server, self._bytes)
        else:
            self.port.pass_on(stream, self.client, server, self._bytes)


class _FirstBytes(_Waiter):
    """Waits for HTTP, and tells its version: by ALPN where the client has one, else by its first bytes."""

    __slots__ = ("server",)

    def __init__(self, port: GatewayPort, stream: Reusable | None, client: Client, server: ServerAtWork | None) -> None:
        super().__init__(port, stream, client)
        self.server = server

    def received(self, data: memoryview) -> None:
        self._bytes += bytes(data)
        seen = http_version(self._bytes)
        stream = self.stream
        if seen is Seen.UNKNOWN or stream is None:
            return
        self._cancel()
        self.port.serve(stream, self.client, self.server, memoryview(self._bytes), http2=seen is Seen.HTTP2)
