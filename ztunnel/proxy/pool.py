"""Tunnels to share: one per (pod, identity, peer), many streams, a further one when the first is full.

Keyed by everything that makes two connections the same to the peer, and by the destination workload's UID, so that a pod that got
the address of a former one never gets its tunnel (istio/ztunnel#1637). A tunnel that was full is used again once streams have ended.
Bounds: tunnels per key; idle ones close after a while; none takes new streams past its certificates' end.
Source: Istio ztunnel `proxy/pool.rs` for the key and the idle time.
"""

from __future__ import annotations

import socket
from typing import ClassVar, Final

from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.loop import Timer
from ztunnel.dataplane.sockets import Dial, deliver_on_close
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.events import RequestReceived
from ztunnel.hbone.handshake import Handshake
from ztunnel.mesh.errors import Flag, LocalError, MeshError, UpstreamRefused, UpstreamTimeout
from ztunnel.mesh.identity import SpiffeId
from ztunnel.proxy.pods import Node, Pod

_SLACK_SECONDS: Final = 0.5


class PolicySuspected(UpstreamTimeout):
    """Nothing answers on 15008: usually a NetworkPolicy that does not know of HBONE."""

    flag: ClassVar[Flag] = Flag.NETWORK_POLICY


class Key:
    """What a tunnel is good for. Not to be changed; its hash is made once."""

    __slots__ = ("_hash", "_values", "address", "expected", "pod_uid", "source", "workload_uid")

    def __init__(self, pod_uid: str, source: SpiffeId, expected: tuple[SpiffeId, ...], address: Address, workload_uid: str) -> None:
        self.pod_uid = pod_uid
        self.source = source
        self.expected = expected
        self.address = address
        self.workload_uid = workload_uid
        self._values = (pod_uid, source, expected, address, workload_uid)
        self._hash = hash(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._values == other._values)


class _Member:
    """One tunnel in the pool. Implements `TunnelOwner`."""

    def __init__(self, pool: Pool, key: Key) -> None:
        self.pool = pool
        self.key = key
        node = pool.node
        self.tunnel = Tunnel(node.loop, node.scratch, self, node.times, client=True, switch=node.kernel)
        self.dial: Dial | None = None
        self.idle: Timer | None = None
        self.idle_since = 0.0
        self.failure: MeshError | None = None
        """Why it ended."""

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        raise AssertionError("a client tunnel's mux never yields requests")

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        node = self.pool.node
        if self.key not in self.pool or not self.is_current:
            tunnel.go_away()
            return
        self.idle_since = node.loop.now
        if self.idle is None:
            self.idle = node.loop.call_later(node.settings.idle_seconds, self._evict)

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        self.failure = error
        if self.idle is not None:
            self.idle.cancel()
        if self.dial is not None:
            self.dial.cancel()
        self.pool.forget(self)

    def _evict(self) -> None:
        """Closes it if it has been idle for long enough. The timer is left alone when it is used meanwhile: that is most often."""
        self.idle = None
        if self.tunnel.relays:
            return
        loop = self.pool.node.loop
        left = self.idle_since + self.pool.node.settings.idle_seconds - loop.now
        if left > 0:
            self.idle = loop.call_later(left, self._evict)
        else:
            self.tunnel.go_away()

    @property
    def is_current(self) -> bool:
        """Whether it takes new streams, now or once some have ended."""
        tunnel = self.tunnel
        return not tunnel.is_dead and not tunnel.is_draining and self.pool.node.loop.now + _SLACK_SECONDS < tunnel.expires_at

    @property
    def is_usable(self) -> bool:
        """Whether it takes a new stream now."""
        tunnel = self.tunnel
        return self.is_current and tunnel.mux.can_open and len(tunnel.relays) < self.pool.node.settings.max_streams

    def connect(self, pod: Pod, handshake: Handshake) -> None:
        """Dials and starts the handshake; streams opened meanwhile wait in the mux."""
        node = self.pool.node
        address = self.key.address

        def taken(sock: socket.socket | None) -> None:
            if self.tunnel.is_dead or sock is None:
                if sock is not None:
                    sock.close()
                self.tunnel.close(LocalError("no socket to be had in the pod's namespace"))
                return
            self.dial = Dial(node.loop, sock, node.settings.connect_seconds, done)
            self.dial.start(address, None)

        def done(sock: socket.socket, error: OSError | None) -> None:
            self.dial = None
            if error is None:
                # TLS tells the peer of a tunnel that was cut; and what a tunnel says last, a GOAWAY or an alert, is to arrive.
                deliver_on_close(sock)
                self.tunnel.start(sock, handshake, address)
            elif isinstance(error, TimeoutError):
                where = f"{address[0]}:{address[1]}"
                self.tunnel.close(PolicySuspected(f"connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {where}"))
            else:
                self.tunnel.close(UpstreamRefused(f"connect to {address[0]}:{address[1]}: {error.strerror}"))

        self.tunnel.peer_address = address
        if not pod.stock(address[0]).take(taken):
            self.tunnel.close(node.hit("sockets_waiting"))


class Pool:
    """All outbound tunnels of a worker."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._members: dict[Key, list[_Member]] = {}
        self._leaving: set[_Member] = set()

    def __contains__(self, key: Key) -> bool:
        return key in self._members

    def tunnel(self, pod: Pod, key: Key) -> Tunnel:
        """A tunnel that takes one more stream: a live one, one that is being made, or a new one.

        Raises:
            LimitReached: the key has as many tunnels as it may. Those that only see their last streams off do not count: each of them
                has a live connection, and those are bounded.
            NoIdentity: there is no certificate to make one with.
            MeshError: the new one failed at once.
        """
        members = self._members.get(key)
        if members is not None:
            for place, member in enumerate(members):
                if member.is_usable:
                    # It comes first until it is full: with dozens of full ones, finding it would cost more than the stream.
                    if place:
                        members.insert(0, members.pop(place))
                    return member.tunnel
            if sum(member.is_current for member in members) >= self.node.settings.tunnels_per_peer:
                raise self.node.hit("tunnels_per_peer")
        contexts = self.node.tls(pod)
        handshake = Handshake(contexts, server=False, expected=frozenset(key.expected), own_records=self.node.settings.own_records)
        member = _Member(self, key)
        self._members.setdefault(key, []).append(member)
        member.connect(pod, handshake)
        if member.failure is not None:
            # Nobody will tell a stream that is opened on it now.
            raise member.failure
        return member.tunnel

    def forget(self, member: _Member) -> None:
        """The tunnel is dead."""
        self._leaving.discard(member)
        members = self._members.get(member.key)
        if members is not None and member in members:
            members.remove(member)
            if not members:
                del self._members[member.key]

    def retire(self, key: Key) -> None:
        """The key is of no use any more: no new streams, each tunnel closes after its last."""
        for member in self._members.pop(key, []):
            self._leaving.add(member)
            member.tunnel.go_away()

    def retire_all(self) -> None:
        """Nothing new will leave here: idle tunnels close now, the others after their last streams."""
        for key in list(self._members):
            self.retire(key)

    def retire_workload(self, uid: str) -> None:
        """A destination workload is gone: a later one may have its address."""
        for key in [key for key in self._members if key.workload_uid == uid]:
            self.retire(key)

    def drop_pod(self, uid: str) -> None:
        """A pod of ours is gone: its tunnels end at once."""
        for member in self._all():
            if member.key.pod_uid == uid:
                member.tunnel.abort(LocalError("the pod is gone"))

    def tunnels(self) -> list[tuple[str, Tunnel]]:
        """All of them, with the UID of the pod that each belongs to."""
        return [(member.key.pod_uid, member.tunnel) for member in self._all()]

    def _all(self) -> list[_Member]:
        return [*self._leaving, *(member for members in self._members.values() for member in members)]
