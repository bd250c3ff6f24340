"""A connection without requests that we read: judged, sent to a weighted target, bytes both ways, judged again when policies change.

Source: Envoy's `tcp_proxy` and RBAC network filter as Istio uses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from waypoint.data.clusters import ClusterHere
from waypoint.data.engine import Engine
from waypoint.data.pools import reason_of
from waypoint.data.served import PortAtWork
from waypoint.http.hashing import hash_of
from waypoint.http.messages import Client, Request
from waypoint.telemetry.summary import Flow
from waypoint.upstream.cluster import PickContext, Shortage
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import Outcome
from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.l7.routes import Backend, TcpRoute

_NO_REQUEST: Final = Request(b"", b"", b"", [])
_STANDS: Final = Outcome(200)


class Reusable(Transport, Protocol):
    """A transport that can be given to another receiver."""

    def use(self, receiver: Receiver) -> None:
        """Another receiver takes over."""


class TcpExchange:
    """Two transports. Implements `Receiver` for the client's; `_Far` does for the endpoint's."""

    __slots__ = (
        "_began",
        "_counted",
        "_client",
        "_done",
        "_early",
        "_engine",
        "_far",
        "_far_closed",
        "_near_closed",
        "_near",
        "_on_done",
        "_port",
        "_target_of",
        "_told",
        "flow",
    )

    def __init__(self, engine: Engine, near: Transport, client: Client, port: PortAtWork, on_done: Callable[[TcpExchange], None]) -> None:
        self._engine = engine
        self._near = near
        self._client = client
        self._port = port
        self._on_done = on_done
        self._far: Transport | None = None
        self._target_of: tuple[ClusterHere, EndpointAtWork] | None = None
        """What counts it."""
        self._told = False
        self._near_closed = False
        self._far_closed = False
        self._done = False
        self.flow = Flow(port.telemetry, client, time.time())
        self._began = engine.loop.now
        self._counted = False

    def start(self) -> None:
        """Judges it and dials."""
        if not self.judge():
            return
        target = self._target()
        if target is None:
            self._end("no_route", "NR")
            return
        if isinstance(target, Shortage):
            self._end("no_healthy_upstream", "UH")
            return
        cluster, endpoint = target
        if not cluster.work.breakers.admit_connection():
            self._end("upstream_overflow", "UO")
            return
        self._target_of = (cluster, endpoint)
        endpoint.active += 1
        flow = self.flow
        flow.cluster, flow.endpoint = cluster.cluster.key, endpoint.endpoint
        route = route_for(self._port.tcp_routes, self._client.sni)
        flow.route = "" if route is None else route.name
        self._count()
        far = _Far(self)
        try:
            transport = cluster.open(endpoint, far, self._client)
        except MeshError as error:
            self._tell(Outcome(reset=reason_of(error)))
            flow.transport_failure = str(error)
            self._end(str(error), "UF")
            return
        if not self._done:
            self._far = transport

    def _count(self) -> None:
        """Once: that it began."""
        if not self._counted:
            self._counted = True
            self._engine.recorder.tcp_opened(self.flow)

    def _tell(self, outcome: Outcome) -> None:
        """Once: whether the connection stands."""
        if self._target_of is not None and not self._told:
            self._told = True
            cluster, endpoint = self._target_of
            cluster.work.done(endpoint, outcome, self._engine.loop.now)

    def judge(self) -> bool:
        """Whether it may be (still). If not, it has ended."""
        verdict = self._port.guard.decide_tcp(self._client)
        if self._port.is_gone:
            self._end("not_served_any_more")
        elif not verdict.allowed:
            self._end(verdict.reply().details)
        return not self._done

    def _target(self) -> tuple[ClusterHere, EndpointAtWork] | Shortage | None:
        route = route_for(self._port.tcp_routes, self._client.sni)
        backend = None if route is None else choose(route, self._engine.dice)
        if backend is None or backend.status:
            return None
        cluster = self._engine.clusters.get(backend.cluster)
        own = self._port.cluster
        if cluster is None and own is not None and own.key == backend.cluster:
            cluster = self._engine.clusters.own(own)
        if cluster is None:
            return None
        client = self._client
        key = None
        if cluster.work.hashed:
            key, _ = hash_of(cluster.cluster.balancing.hash_keys, _NO_REQUEST, client, self._engine.randrange)
        context = PickContext(key, (client.destination, client.service_port))
        endpoint = cluster.work.pick(context, self._engine.loop.now)
        return endpoint if isinstance(endpoint, Shortage) else (cluster, endpoint)

    # The client's side

    def opened(self) -> None:
        pass

    def received(self, data: memoryview) -> None:
        far = self._far
        if far is None:
            return
        self.flow.received += len(data)
        far.write(bytes(data))
        if far.is_full:
            self._near.pause()

    def peer_ended(self) -> None:
        if self._far is not None:
            self._far.end()

    def writable(self) -> None:
        if self._far is not None:
            self._far.resume()

    def lost(self, error: MeshError) -> None:
        self._end("downstream_remote_disconnect", near=False)

    def closed(self) -> None:
        self._near_closed = True
        if self._far_closed:
            self._end("", near=False)

    # The endpoint's side

    def far_opened(self) -> None:
        """The endpoint's connection stands."""
        self._tell(_STANDS)

    def far_received(self, data: memoryview) -> None:
        """Bytes of the endpoint."""
        self.flow.sent += len(data)
        self._near.write(bytes(data))
        if self._near.is_full and self._far is not None:
            self._far.pause()

    def far_ended(self) -> None:
        """The endpoint sends no more."""
        self._near.end()

    def far_writable(self) -> None:
        """The endpoint takes more."""
        self._near.resume()

    def far_has_closed(self) -> None:
        """Both directions of the endpoint's connection have ended well."""
        self._far = None
        self._far_closed = True
        if self._near_closed:
            self._end("", near=False)

    def far_lost(self, error: MeshError) -> None:
        """The endpoint's connection is gone."""
        self._far = None
        was_open = self._told
        self._tell(Outcome(reset=reason_of(error)))
        self.flow.transport_failure = str(error)
        self._end(f"upstream: {error}", "" if was_open else "UF")

    def end(self, why: str) -> None:
        """Cuts it."""
        self._end(why)

    def _end(self, why: str, flag: str = "", *, near: bool = True) -> None:
        if self._done:
            return
        self._done = True
        flow = self.flow
        flow.details = why
        flow.flags = flow.flags or flag
        flow.duration = self._engine.loop.now - self._began
        far, self._far = self._far, None
        if far is not None:
            far.close()
        if self._target_of is not None:
            cluster, endpoint = self._target_of
            endpoint.active -= 1
            cluster.work.breakers.release_connection()
        if near:
            self._near.close()
        self._count()
        self._engine.recorder.tcp_closed(flow)
        self._on_done(self)


class _Far:
    """The endpoint's side of a `TcpExchange`. Implements `Receiver`."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: TcpExchange) -> None:
        self._exchange = exchange

    def opened(self) -> None:
        self._exchange.far_opened()

    def received(self, data: memoryview) -> None:
        self._exchange.far_received(data)

    def peer_ended(self) -> None:
        self._exchange.far_ended()

    def writable(self) -> None:
        self._exchange.far_writable()

    def lost(self, error: MeshError) -> None:
        self._exchange.far_lost(error)

    def closed(self) -> None:
        self._exchange.far_has_closed()


def route_for(routes: Sequence[TcpRoute], sni: str) -> TcpRoute | None:
    """The route of a connection: of those that name its server, the one that does so most closely; without a name, the first."""
    best: TcpRoute | None = None
    closest = -1
    for route in routes:
        for pattern in route.sni or ("*",):
            lower = pattern.lower()
            if lower == sni:
                length = 1 << 16
            elif lower == "*":
                length = 0
            elif lower.startswith("*.") and sni.endswith(lower[1:]) and len(sni) > len(lower) - 1:
                length = len(lower)
            else:
                continue
            if length > closest:
                best, closest = route, length
    return best


def choose(route: TcpRoute, dice: Callable[[], float]) -> Backend | None:
    """A connection's backend, by weight."""
    total = sum(backend.weight for backend in route.backends)
    point = dice() * total
    for backend in route.backends:
        point -= backend.weight
        if point < 0 and backend.weight:
            return backend
    return None
