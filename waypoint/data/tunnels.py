"""Tunnels to the nodes' proxies: one per endpoint and identity, many connections in each, a further one when the first is full.

Bounds: tunnels per endpoint; idle ones close after a while; none takes new streams past its certificates' end.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from waypoint.data.identity import OwnIdentity
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.bytestream import Receiver, Transport, TunnelStream
from ztunnel.dataplane.endings import TunnelTimes
from ztunnel.dataplane.loop import Loop, Timer
from ztunnel.dataplane.sockets import Dial, deliver_on_close
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone import connect
from ztunnel.hbone.events import Headers, RequestReceived
from ztunnel.hbone.handshake import Handshake
from ztunnel.mesh.errors import LocalError, MeshError, UpstreamRefused, UpstreamTimeout
from ztunnel.mesh.identity import SpiffeId

_SLACK_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class TunnelSettings:
    """Times in seconds."""

    times: TunnelTimes
    idle_seconds: float = 3600.0
    max_streams: int = 100
    tunnels_per_endpoint: int = 64
    own_records: bool = True
    early_data: bool = True


Key = tuple[Address, tuple[SpiffeId, ...]]


class _Member:
    """One tunnel. Implements `TunnelOwner`."""

    def __init__(self, tunnels: Tunnels, key: Key) -> None:
        self.tunnels = tunnels
        self.key = key
        self.tunnel = Tunnel(tunnels.loop, tunnels.scratch, self, tunnels.settings.times, client=True)
        self.dial: Dial | None = None
        self.idle: Timer | None = None
        self.idle_since = 0.0
        self.failure: MeshError | None = None

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        raise AssertionError("a client tunnel's mux never yields requests")

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        if not self.is_current or not self.tunnels.keeps(self):
            tunnel.go_away()
            return
        loop = self.tunnels.loop
        self.idle_since = loop.now
        if self.idle is None:
            self.idle = loop.call_later(self.tunnels.settings.idle_seconds, self._evict)

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        self.failure = error
        if self.idle is not None:
            self.idle.cancel()
        if self.dial is not None:
            self.dial.cancel()
        self.tunnels.forget(self)

    def _evict(self) -> None:
        self.idle = None
        if self.tunnel.relays:
            return
        loop = self.tunnels.loop
        left = self.idle_since + self.tunnels.settings.idle_seconds - loop.now
        if left > 0:
            self.idle = loop.call_later(left, self._evict)
        else:
            self.tunnel.go_away()

    @property
    def is_current(self) -> bool:
        """Whether it takes new streams, now or once some have ended."""
        tunnel = self.tunnel
        return not tunnel.is_dead and not tunnel.is_draining and self.tunnels.loop.now + _SLACK_SECONDS < tunnel.expires_at

    @property
    def is_usable(self) -> bool:
        """Whether it takes a new stream now."""
        return self.is_current and self.tunnel.mux.can_open and len(self.tunnel.relays) < self.tunnels.settings.max_streams

    def connect(self, handshake: Handshake, seconds: float) -> None:
        """Dials and starts the handshake; streams opened meanwhile wait in the mux."""
        address = self.key[0]
        loop = self.tunnels.loop

        def done(sock: socket.socket, error: OSError | None) -> None:
            self.dial = None
            where = f"{address[0]}:{address[1]}"
            if error is None:
                deliver_on_close(sock)
                self.tunnel.start(sock, handshake, address)
            elif isinstance(error, TimeoutError):
                self.tunnel.close(UpstreamTimeout(f"connect to {where} timed out, maybe a NetworkPolicy is blocking HBONE port 15008"))
            else:
                self.tunnel.close(UpstreamRefused(f"connect to {where}: {error.strerror}"))

        self.tunnel.peer_address = address
        self.dial = Dial(loop, new_socket(address[0]), seconds, done)
        self.dial.start(address, None)


def new_socket(address: str) -> socket.socket:
    """A TCP socket that can dial an address.

    Raises:
        LocalError: this process has no descriptor left.
    """
    try:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError as error:
        raise LocalError(f"no socket: {error.strerror}") from error
    return sock


class Tunnels:
    """All tunnels that this worker has dialled."""

    def __init__(self, loop: Loop, scratch: Scratch, identity: OwnIdentity, settings: TunnelSettings) -> None:
        self.loop = loop
        self.scratch = scratch
        self.settings = settings
        self._identity = identity
        self._members: dict[Key, list[_Member]] = {}
        self._leaving: set[_Member] = set()

    def stream(self, address: Address, expected: tuple[SpiffeId, ...], authority: str, receiver: Receiver, seconds: float) -> Transport:
        """A stream to `authority` through the proxy at `address`, which must be one of `expected`.

        Raises:
            MeshError: there is no certificate, no descriptor, or there are too many tunnels.
        """
        member = self._member((address, expected), seconds)
        tunnel = member.tunnel
        stream = tunnel.mux.open_stream(self._headers(authority))
        end = TunnelStream(tunnel, stream, receiver, answered=False, early=self.settings.early_data)
        tunnel.adopt(stream, end)
        tunnel.mark_dirty()
        return end

    def _headers(self, authority: str) -> Headers:
        return (
            (b":method", b"CONNECT"),
            (b":authority", authority.encode("ascii")),
            (b"baggage", connect.build_baggage(self._identity.baggage)),
        )

    def _member(self, key: Key, seconds: float) -> _Member:
        members = self._members.get(key)
        if members is not None:
            for place, member in enumerate(members):
                if member.is_usable:
                    if place:
                        members.insert(0, members.pop(place))
                    return member
            if sum(member.is_current for member in members) >= self.settings.tunnels_per_endpoint:
                raise LocalError("limit reached: tunnels_per_endpoint")
        handshake = Handshake(self._identity.contexts, server=False, expected=frozenset(key[1]), own_records=self.settings.own_records)
        member = _Member(self, key)
        self._members.setdefault(key, []).append(member)
        member.connect(handshake, seconds)
        if member.failure is not None:
            raise member.failure
        return member

    def keeps(self, member: _Member) -> bool:
        """Whether it is still one of those that take streams."""
        return member in self._members.get(member.key, ())

    def forget(self, member: _Member) -> None:
        """The tunnel is dead."""
        self._leaving.discard(member)
        members = self._members.get(member.key)
        if members is not None and member in members:
            members.remove(member)
            if not members:
                del self._members[member.key]

    def retire_all(self) -> None:
        """No new streams; each tunnel closes after its last."""
        for key in list(self._members):
            for member in self._members.pop(key, []):
                self._leaving.add(member)
                member.tunnel.go_away()

    def all(self) -> Iterator[Tunnel]:
        """Every tunnel that lives."""
        for members in [*self._members.values(), list(self._leaving)]:
            for member in members:
                yield member.tunnel
