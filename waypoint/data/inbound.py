"""Port 15008: tunnels of the mesh's clients. Each CONNECT names an address and port that we serve, or is refused.

A waypoint serves the addresses of services and pods that are bound to it and nothing else: 400 for any other, whatever the client is.
"""

from __future__ import annotations

import socket
from collections import Counter
from dataclasses import dataclass

from waypoint.data.connections import Connections
from waypoint.data.identity import NoCertificate, OwnIdentity
from waypoint.http.messages import Client
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.bytestream import TunnelStream
from ztunnel.dataplane.endings import TunnelTimes
from ztunnel.dataplane.loop import Loop, Timer
from ztunnel.dataplane.sockets import deliver_on_close, reset
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone import connect
from ztunnel.hbone.events import RequestReceived
from ztunnel.hbone.handshake import Handshake
from ztunnel.mesh.errors import BadConnect, MeshError


@dataclass(frozen=True, slots=True)
class InboundSettings:
    """Bounds of 15008."""

    times: TunnelTimes
    max_tunnels: int = 10_000
    max_handshakes: int = 512
    own_records: bool = True


class Inbound:
    """Accepts tunnels."""

    def __init__(self, loop: Loop, scratch: Scratch, identity: OwnIdentity, connections: Connections, settings: InboundSettings) -> None:
        self.loop = loop
        self._scratch = scratch
        self._identity = identity
        self.connections = connections
        self.settings = settings
        self.tunnels: set[Tunnel] = set()
        self.handshaking = 0
        self.limits: Counter[str] = Counter()
        self._shaking: Counter[str] = Counter()
        """Handshakes under way, by the peer's address."""

    def accept(self, sock: socket.socket, peer: Address) -> None:
        """One TCP connection."""
        room = self.settings.max_handshakes - self.handshaking
        if self._shaking[peer[0]] >= room or len(self.tunnels) >= self.settings.max_tunnels:
            self.limits["inbound_tunnels"] += 1
            reset(sock)
            return
        try:
            contexts = self._identity.contexts
        except NoCertificate:
            reset(sock)
            return
        deliver_on_close(sock)
        handshake = Handshake(contexts, server=True, expected=None, own_records=self.settings.own_records)
        gate = _Gate(self, peer)
        tunnel = Tunnel(self.loop, self._scratch, gate, self.settings.times, client=False)
        self.tunnels.add(tunnel)
        self.handshaking += 1
        self._shaking[peer[0]] += 1
        tunnel.start(sock, handshake, peer)

    def shaken(self, peer: Address) -> None:
        """A handshake has come to an end, good or bad."""
        self.handshaking -= 1
        self._shaking[peer[0]] -= 1
        if not self._shaking[peer[0]]:
            del self._shaking[peer[0]]

    def request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        """One CONNECT."""
        try:
            asked = connect.parse_request(request.headers)
            authority = asked.authority
            port = self.connections.engine.served.find(authority.host, authority.port)
            if port is None:
                raise BadConnect(f"{authority} is not served here")
        except BadConnect as error:
            tunnel.mux.respond(request.stream, error.status, end=True)
            tunnel.mark_dirty()
            return
        peer = tunnel.peer
        assert peer is not None
        # By the connection, which the client's node opens from the pod's own address; what is claimed in headers decides nothing.
        client = Client(peer, *tunnel.peer_address[:2], peer.namespace, authority.port, authority.host)
        stream = TunnelStream(tunnel, request.stream, _NOBODY, answered=True)
        opening = self.connections.accept(stream, client, port)
        stream.use(opening)
        tunnel.adopt(request.stream, stream)
        tunnel.answer(request.stream)
        opening.start()
        if request.ended:
            stream.remote_ended()

    def drain(self) -> None:
        """No new tunnels and streams; the live ones end in their time."""
        for tunnel in list(self.tunnels):
            tunnel.go_away()


class _Nobody:
    """Receives what nobody wants, for the moment between a stream and its user."""

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


_NOBODY = _Nobody()


class _Gate:
    """One tunnel's owner. Implements `TunnelOwner`."""

    def __init__(self, inbound: Inbound, peer: Address) -> None:
        self._inbound = inbound
        self._peer = peer
        self._shaking = True
        self._expiry: Timer | None = None

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        self._shaken()
        self._expiry = tunnel.loop.call_later(tunnel.expires_at - tunnel.loop.now, tunnel.go_away)

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        self._inbound.request(tunnel, request)

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        self._shaken()
        if self._expiry is not None:
            self._expiry.cancel()
        self._inbound.tunnels.discard(tunnel)

    def _shaken(self) -> None:
        if self._shaking:
            self._shaking = False
            self._inbound.shaken(self._peer)
