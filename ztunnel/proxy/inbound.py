"""Port 15008: a peer's tunnel into a pod. This is where a CONNECT is accepted or refused.

Order per request: read it (400), find its target and the verdict (400, 503; one question to `mesh.inbound`, whose answer a tunnel
remembers until the mesh changes), register the connection, act on the verdict (401), connect to the application with the client's
address as source (503), only then answer 200. Nothing waits before that connect. The peer learns a status and nothing of policies.
A foreign proxy that serves as a waypoint may get a PROXY header first; then it is reached by loopback, as only its own node can do.
Source: Istio ztunnel `proxy/inbound.rs`.
"""

from __future__ import annotations

import socket
from collections import Counter
from typing import Final

from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.addresses import canonical as canonical_address
from ztunnel.dataplane.flow import Direction
from ztunnel.dataplane.loop import Timer
from ztunnel.dataplane.relay import StreamRelay
from ztunnel.dataplane.sockets import reset
from ztunnel.dataplane.splice import Splice
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone import connect, proxy_protocol
from ztunnel.hbone.events import RequestReceived
from ztunnel.hbone.handshake import Handshake
from ztunnel.mesh.errors import BadConnect, LocalError, MeshError, PolicyDenied, UntrustedPeer, UpstreamRefused
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.inbound import Admission, Admissions
from ztunnel.mesh.policy import Connection as Asked
from ztunnel.mesh.policy import Verdict
from ztunnel.mesh.routing import Route
from ztunnel.mesh.workloads import Workload
from ztunnel.proxy.connections import Connection
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.labels import answer_of
from ztunnel.proxy.pods import Node, NoIdentity, Pod, PodDial

_UNAUTHORIZED: Final = 401
_UNAVAILABLE: Final = 503
_INBOUND: Final = Direction.INBOUND


class Inbound:
    """What happens to tunnels that end in the pods of this node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._shaking: Counter[str] = Counter()
        """Handshakes under way, by the peer's address."""

    def accept(self, pod: Pod, sock: socket.socket, peer: Address) -> None:
        """One TCP connection on 15008."""
        node = self._node
        # One address may have as many handshakes under way as are left for all: nobody can hold the door shut alone.
        room = node.settings.max_handshakes_per_pod - pod.handshaking
        if self._shaking[peer[0]] >= room or len(pod.inbound) >= node.settings.max_connections:
            node.hit("inbound_tunnels")
            reset(sock)
            return
        try:
            contexts = node.tls(pod)
            local = canonical_address(sock.getsockname())
        except (NoIdentity, OSError) as error:
            self.refused(pod, peer, ("", 0), error if isinstance(error, NoIdentity) else LocalError(str(error)))
            reset(sock)
            return
        handshake = Handshake(contexts, server=True, expected=None, own_records=node.settings.own_records)
        gate = _Gate(self, pod, local, peer)
        tunnel = Tunnel(node.loop, node.scratch, gate, node.times, client=False, switch=node.kernel)
        pod.inbound.add(tunnel)
        pod.handshaking += 1
        self._shaking[peer[0]] += 1
        tunnel.start(sock, handshake, peer)

    def shaken(self, peer: Address) -> None:
        """A handshake has come to an end, good or bad."""
        self._shaking[peer[0]] -= 1
        if not self._shaking[peer[0]]:
            del self._shaking[peer[0]]

    def admissions(self, pod: Pod, tunnel: Tunnel, local: Address) -> Admissions:
        """For a tunnel whose peer is known now."""
        return Admissions(self._node.index, pod.uid, local[0], tunnel.peer_address[0], tunnel.peer)

    def request(self, pod: Pod, tunnel: Tunnel, local: Address, admissions: Admissions, request: RequestReceived) -> None:
        """One CONNECT: accepted or refused here."""
        node = self._node
        try:
            asked = connect.parse_request(request.headers)
            admission = admissions.ask(asked.authority, asked.forwarded_host)
            if node.connections.is_full_for(pod.uid):
                raise BadConnect(str(node.hit("connections")), _UNAVAILABLE)
        except BadConnect as error:
            tunnel.mux.respond(request.stream, error.status, end=True)
            tunnel.mark_dirty()
            self.refused(pod, tunnel.peer_address, local, error, tunnel.peer)
            return
        connection = self._register(pod, tunnel, local, admission, asked.traceparent)
        denied = _denied(connection, admission.verdict)
        if denied is not None:
            tunnel.mux.respond(request.stream, _UNAUTHORIZED, end=True)
            tunnel.mark_dirty()
            connection.end(denied)
            return
        self._connect(pod, tunnel, connection, request, admission)

    def _register(self, pod: Pod, tunnel: Tunnel, local: Address, admission: Admission, trace: str) -> Connection:
        service = admission.service
        facts = Facts(_INBOUND, pod.uid, tunnel.peer_address, local, source_uid=admission.source_uid, destination_uid=pod.uid)
        facts.target, facts.endpoint = admission.authority, admission.endpoint
        facts.protocol, facts.mutual_tls = "HBONE", True
        facts.source_identity, facts.destination_identity = tunnel.peer, pod.identity
        if service is not None:
            facts.service, facts.service_name, facts.service_namespace = service.hostname, service.name, service.namespace
        facts.trace = trace
        return self._node.connections.register(facts)

    def _connect(self, pod: Pod, tunnel: Tunnel, connection: Connection, request: RequestReceived, admission: Admission) -> None:
        node = self._node
        stream = request.stream
        relay = StreamRelay(tunnel, stream, connection, answered=True, optimistic=True)
        connection.relay = relay
        tunnel.adopt(stream, relay)
        if request.ended:
            relay.remote_ended()
        dial = _Accepting(node, connection, tunnel, stream, admission)
        relay.on_refused = dial.refuse
        dial.start(pod)

    def from_neighbour(self, client: Pod, pod: Pod, connection: Connection, sock: socket.socket, route: Route) -> None:
        """A connection between two pods of this node, when the operator lets it go without TLS: the same questions, no tunnel.

        Both identities are as sure as a handshake makes them: this node has each pod's namespace in its hands and a valid
        certificate of its identity. The connection is accounted for on both sides, and both have the relay.

        Raises:
            MeshError: refused, for a reason that the inbound record has; the socket is still the caller's.
        """
        node = self._node
        node.tls(client)
        node.tls(pod)
        if pod.identity not in route.expected:
            raise UntrustedPeer(f"the pod at {route.target[0]} is {pod.identity}, not {route.expected[0]}")
        workload = node.index.workload(pod.uid)
        if workload is None:
            raise LocalError("failed to fetch information about the neighbouring workload")
        outer = connection.facts
        outer.protocol, outer.destination = "LOCAL", route.target
        outer.source_identity, outer.destination_identity = client.identity, pod.identity
        facts = outer.inbound(pod.uid, route.target)
        inner = node.connections.register(facts)
        denied = judge(node, workload, inner)
        if denied is not None:
            inner.end(denied)
            raise UpstreamRefused("refused by the neighbouring workload", _UNAUTHORIZED)
        splice = Splice(node.loop, node.scratch, sock, _Both(connection, inner))
        connection.relay = inner.relay = splice
        source_ip, target = facts.source[0], route.target
        PodDial(node, inner, target, None if source_ip == target[0] else source_ip).start(pod)

    def refused(self, pod: Pod, peer: Address, local: Address, error: MeshError, identity: SpiffeId | None = None) -> None:
        """A record for what never became a connection."""
        facts = Facts(Direction.INBOUND, pod.uid, peer, local, destination_uid=pod.uid)
        facts.source_identity, facts.mutual_tls = identity, identity is not None
        if not self._node.connections.is_full_for(pod.uid):
            self._node.connections.register(facts).end(error)


class _Gate:
    """One inbound tunnel's owner. Implements `TunnelOwner`."""

    def __init__(self, inbound: Inbound, pod: Pod, local: Address, peer: Address) -> None:
        self._inbound = inbound
        self._peer = peer
        self._pod = pod
        self._local = local
        self._shaking = True
        self._admissions: Admissions | None = None
        self._expiry: Timer | None = None

    def tunnel_ready(self, tunnel: Tunnel) -> None:
        self._shaken()
        self._admissions = self._inbound.admissions(self._pod, tunnel, self._local)
        # Who holds a tunnel open must not be served for longer than its certificate says.
        self._expiry = tunnel.loop.call_later(tunnel.expires_at - tunnel.loop.now, tunnel.go_away)

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        assert self._admissions is not None
        self._inbound.request(self._pod, tunnel, self._local, self._admissions, request)

    def tunnel_idle(self, tunnel: Tunnel) -> None:
        pass

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        if self._shaking:
            self._shaken()
            if error is not None:
                self._inbound.refused(self._pod, tunnel.peer_address, self._local, error)
        if self._expiry is not None:
            self._expiry.cancel()
        self._pod.inbound.discard(tunnel)

    def _shaken(self) -> None:
        if self._shaking:
            self._shaking = False
            self._pod.handshaking -= 1
            self._inbound.shaken(self._peer)


class _Accepting(PodDial):
    """Dials the application that a CONNECT names, and answers the CONNECT."""

    def __init__(self, node: Node, connection: Connection, tunnel: Tunnel, stream: int, admission: Admission) -> None:
        target, original = admission.endpoint, admission.original
        source_ip = tunnel.peer_address[0]
        self._introduction = b""
        """What the application gets first."""
        if original is not None:
            self._introduction = proxy_protocol.header(tunnel.peer_address, original, str(tunnel.peer or ""))
            source_ip = "::1" if ":" in target[0] else "127.0.0.1"
            target = (source_ip, target[1])
        super().__init__(node, connection, target, None if source_ip == target[0] else source_ip)
        self._tunnel = tunnel
        self._stream = stream
        self._workload = admission.workload

    def connected(self, sock: socket.socket) -> None:
        if self._introduction and not _sent(sock, self._introduction):
            self._loop.forget(sock.fileno())
            sock.close()
            self._connection.abort(UpstreamRefused("the PROXY header cannot be delivered"))
            return
        self._tunnel.answer(self._stream, answer_of(self._workload))
        super().connected(sock)

    def refuse(self, error: MeshError) -> None:
        """It could not be reached, or a policy has changed meanwhile."""
        self._tunnel.mux.respond(self._stream, _UNAUTHORIZED if isinstance(error, PolicyDenied) else _UNAVAILABLE, end=True)
        self._tunnel.mark_dirty()


class _Both:
    """One relay, two accounts. Implements `RelayOwner`."""

    def __init__(self, outer: Connection, inner: Connection) -> None:
        self._outer = outer
        self._inner = inner

    def relay_answered(self) -> None:
        pass

    def relay_done(self, error: MeshError | None) -> None:
        self._outer.end(error)
        self._inner.end(error)


def _sent(sock: socket.socket, introduction: bytes) -> bool:
    """Whether the first bytes of a connection went: they always fit into an empty buffer, so that nothing has to wait."""
    try:
        return sock.send(introduction) == len(introduction)
    except OSError:
        return False


def judge(node: Node, workload: Workload, connection: Connection, cause: str = "policy rejection") -> PolicyDenied | None:
    """Asks `mesh.policy` about an inbound connection to a workload, and notes in its facts which policy had the word. None: it may be."""
    facts = connection.facts
    verdict = node.index.decide(workload, Asked(facts.source[0], facts.source_identity, *facts.endpoint))
    return _denied(connection, verdict, cause)


def _denied(connection: Connection, verdict: Verdict, cause: str = "policy rejection") -> PolicyDenied | None:
    connection.facts.policy = verdict.policy or ""
    return None if verdict.allowed else PolicyDenied(f"connection closed due to {cause}: {verdict.text}", verdict.policy)
