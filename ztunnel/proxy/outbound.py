"""Port 15001: a connection that a pod opens. Original destination → route → tunnel or plain dial → relay."""

from __future__ import annotations

import secrets
import socket
from typing import Final

from ztunnel.dataplane.addresses import Address, text
from ztunnel.dataplane.flow import Direction
from ztunnel.dataplane.relay import StreamRelay
from ztunnel.dataplane.sockets import reset
from ztunnel.dataplane.splice import Splice
from ztunnel.hbone import connect
from ztunnel.mesh.addresses import is_loopback
from ztunnel.mesh.errors import LocalError, MeshError, UpstreamError
from ztunnel.mesh.ports import ILLEGAL_TARGETS
from ztunnel.mesh.routing import MAX_ROUTES, Refusal, Route, RouteKind, Router
from ztunnel.mesh.workloads import Workload
from ztunnel.proxy.connections import Connection, Unanswered
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.inbound import Inbound
from ztunnel.proxy.labels import baggage_of
from ztunnel.proxy.pods import Node, Pod, PodDial, redirected
from ztunnel.proxy.pool import Key, Pool

_OUTBOUND: Final = Direction.OUTBOUND
_HBONE: Final = RouteKind.HBONE
_TRACES_AT_ONCE: Final = 64
"""Randomness is asked of the kernel for so many connections at once."""


class RouteRefused(UpstreamError):
    """`mesh.routing` has no way for this connection."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)


class _Way:
    """What all connections that take one route have in common."""

    __slots__ = ("head", "key", "route", "source")

    def __init__(self, pod: Pod, source: Workload, route: Route) -> None:
        self.route = route
        self.source = source
        self.key = Key(pod.uid, pod.identity, route.expected, route.address, route.workload_uid or "")
        self.head = connect.RequestHead(route.authority, baggage_of(source), route.service or "")


class Outbound:
    """What happens to connections that the pods of this node open."""

    def __init__(self, node: Node, pool: Pool, inbound: Inbound) -> None:
        self._node = node
        self._pool = pool
        self._inbound = inbound
        self._traces: list[str] = []
        """For the next connections."""
        self._unanswered = Unanswered(node.loop, node.settings.connect_seconds + node.settings.response_seconds)
        self._router = Router(node.index)
        self._ways: dict[int, _Way] = {}
        """By their route's place in memory, which a route that is kept here does not leave to another."""

    def accept(self, pod: Pod, sock: socket.socket, peer: Address) -> None:
        """One connection that nftables redirected to us."""
        node = self._node
        destination = redirected(node, pod, sock, peer)
        if destination is None:
            return
        facts = Facts(_OUTBOUND, pod.uid, peer, destination, source_uid=pod.uid)
        connection = node.connections.register(facts)
        try:
            if destination[1] in ILLEGAL_TARGETS and (destination[0] == peer[0] or is_loopback(destination[0])):
                # Nobody redirected it: the pod dialled our own port.
                raise LocalError("attempted recursive call to ourselves")
            self._route(pod, connection, sock, destination)
        except MeshError as error:
            if connection.relay is None:
                reset(sock)
            facts.target = facts.target or text(destination)
            connection.abort(error)

    def _route(self, pod: Pod, connection: Connection, sock: socket.socket, destination: Address) -> None:
        node = self._node
        source = node.index.workload(pod.uid)
        if source is None:
            raise LocalError("failed to fetch information about local workload")
        route = self._router.resolve(source, destination, node.connections.load, node.random)
        if isinstance(route, Refusal):
            connection.facts.service = route.service or ""
            raise RouteRefused(route)
        facts = connection.facts
        facts.service, facts.service_name, facts.service_namespace = route.service or "", route.service_name, route.service_namespace
        facts.destination, facts.target, facts.waypoint = route.address, route.authority, route.waypoint
        if route.workload_uid is not None:
            facts.destination_uid = route.workload_uid
            node.connections.count_towards(connection)
        # A waypoint has to be told what was dialled, which only a tunnel does.
        near = node.settings.same_node_plaintext and not route.waypoint
        neighbour = node.pods.get(route.workload_uid or "") if near else None
        # An application may bind to an address that is not its pod's, `::1` for one. A tunnel comes from the pod's own all the same;
        # without one the neighbour's policies and application would take the connection for somebody else's.
        is_itself = facts.source[0] in source.addresses
        if route.kind is _HBONE and neighbour is not None and not neighbour.is_gone and is_itself:
            self._inbound.from_neighbour(pod, neighbour, connection, sock, route)
        elif route.kind is _HBONE:
            self._tunnel(pod, source, connection, sock, route)
        else:
            self._plain(pod, connection, sock, route)

    def _tunnel(self, pod: Pod, source: Workload, connection: Connection, sock: socket.socket, route: Route) -> None:
        node = self._node
        facts = connection.facts
        way = self._way(pod, source, route)
        tunnel = self._pool.tunnel(pod, way.key)
        facts.protocol, facts.mutual_tls = "HBONE", True
        facts.source_identity, facts.destination_identity = pod.identity, route.expected[0]
        facts.trace = self._new_trace()
        stream = tunnel.mux.open_block(way.head.block(facts.source, facts.trace))
        relay = StreamRelay(tunnel, stream, connection, answered=False, optimistic=node.settings.optimistic_data)
        connection.relay = relay
        tunnel.adopt(stream, relay)
        tunnel.mark_dirty()
        self._unanswered.add(connection)
        relay.attach(sock)
        if node.settings.optimistic_data and tunnel.mux.peer_takes_early_data and not relay.look():
            # What the application has to say first comes in an instant, if it is not there already: it leaves together with the request.
            node.loop.hold()

    def _way(self, pod: Pod, source: Workload, route: Route) -> _Way:
        """The same object for the same route: its key is looked up several times, hashing it is work, and so is writing a head."""
        known = self._ways.get(id(route))
        if (
            known is not None
            and known.route is route
            and known.source is source
            and known.key.source is pod.identity
            and known.key.pod_uid == pod.uid
        ):
            return known
        way = _Way(pod, source, route)
        if len(self._ways) >= MAX_ROUTES:
            self._ways.clear()
        self._ways[id(route)] = way
        return way

    def _new_trace(self) -> str:
        if not self._traces:
            self._traces = connect.new_traceparents(secrets.token_hex(connect.TRACE_LENGTH * _TRACES_AT_ONCE // 2))
        return self._traces.pop()

    def _plain(self, pod: Pod, connection: Connection, sock: socket.socket, route: Route) -> None:
        node = self._node
        splice = Splice(node.loop, node.scratch, sock, connection)
        connection.relay = splice
        PodDial(node, connection, route.address, None).start(pod)
