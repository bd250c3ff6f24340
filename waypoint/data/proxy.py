"""The object graph of one worker's data path: listeners, tunnels, clusters, connections. Tests build it without a supervisor."""

from __future__ import annotations

import random
import socket
from collections import Counter

from waypoint.data.channel import ConfigureWaypoint, Counted, DryRunVerdicts
from waypoint.data.clusters import Clusters
from waypoint.data.connections import Connections
from waypoint.data.dialler import Dialler
from waypoint.data.engine import Engine
from waypoint.data.exporting import Exporter
from waypoint.data.gateway import GatewayPort
from waypoint.data.identity import OwnIdentity
from waypoint.data.inbound import Inbound, InboundSettings
from waypoint.data.served import Served
from waypoint.data.tunnels import Tunnels, TunnelSettings
from waypoint.http.jwt import KeySets
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.endings import TunnelTimes
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.sockets import Acceptor
from ztunnel.hbone.connect import Baggage
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.l7.config import ProxyConfig

SWEEP_SECONDS = 5.0
EXPORT_SECONDS = 1.0


class Proxy:
    """See the module."""

    def __init__(self, loop: Loop, settings: ConfigureWaypoint, dice: random.Random) -> None:
        self.loop = loop
        self.scratch = Scratch()
        times = TunnelTimes(settings.handshake_seconds, settings.ping_seconds, settings.ping_timeout_seconds)
        self.identity = OwnIdentity()
        self.key_sets = KeySets()
        self.served = Served(self.key_sets)
        outbound = TunnelSettings(times, settings.idle_seconds, settings.max_streams, settings.tunnels_per_endpoint, settings.own_records)
        self.tunnels = Tunnels(loop, self.scratch, self.identity, outbound)
        self.clusters = Clusters(loop, Dialler(loop, self.scratch, self.tunnels), dice)
        self.engine = Engine(loop, self.served, self.clusters, dice, settings.hostname)
        self.exporter = Exporter(loop, self.clusters, self.engine.recorder)
        self.connections = Connections(self.engine)
        bounds = InboundSettings(times, settings.max_tunnels, settings.max_handshakes, settings.own_records)
        self.inbound = Inbound(loop, self.scratch, self.identity, self.connections, bounds)
        self._max_connections = settings.max_connections
        self.config: ProxyConfig | None = None
        """What is in force."""
        self._ports: dict[int, GatewayPort] = {}
        self._acceptors: dict[int, list[Acceptor]] = {}
        self._limits: Counter[str] = Counter()
        loop.call_later(SWEEP_SECONDS, self._sweep)
        loop.call_later(EXPORT_SECONDS, self._export)

    # What the supervisor says

    def serve(self, config: ProxyConfig) -> None:
        """A new configuration is in force."""
        self.config = config
        self.identity.baggage = Baggage(
            namespace=config.namespace, workload_type="deployment", workload_name=config.name, service_name=config.name
        )
        self.clusters.update(config)
        self.engine.recorder.update(config.peers, "source" if config.servers else "waypoint", own_tags(config))
        self.exporter.service = f"{config.name}.{config.namespace}"
        self.served.update(config)
        self._serve_gateway(config)
        self.connections.judge_again()

    def resolved(self, name: str, port: int, addresses: tuple[str, ...]) -> None:
        """What DNS says of a name."""
        if port:
            self.clusters.resolved((name, port), addresses)
        else:
            self.engine.names.resolved(name, addresses)

    def listen(self, port: int, listeners: list[socket.socket]) -> None:
        """Accepts on a gateway's port, or (0) tunnels."""
        self.unlisten(port)
        accept = self._port(port).accept if port else self.inbound.accept
        self._acceptors[port] = [Acceptor(self.loop, each, accept, self._short) for each in listeners]

    def _port(self, number: int) -> GatewayPort:
        known = self._ports.get(number)
        if known is None:
            known = self._ports[number] = GatewayPort(self.connections, self.scratch, self.key_sets, number, self._max_connections)
        return known

    def _serve_gateway(self, config: ProxyConfig) -> None:
        wanted = {server.port for server in config.servers}
        for number in wanted:
            self._port(number).update([server for server in config.servers if server.port == number], config)
        for number in self._ports.keys() - wanted:
            # Its acceptors stop when the supervisor says so; connections hear of it with their next request.
            self._ports[number].close()

    def unlisten(self, port: int) -> None:
        """Accepts no more there."""
        for acceptor in self._acceptors.pop(port, []):
            acceptor.close()

    def _short(self) -> None:
        self._limits["descriptors"] += 1

    def take_limits(self) -> dict[str, int]:
        """Limits that were hit since the last call."""
        limits = self._limits + self.inbound.limits
        if self.exporter.lost:
            limits["spans"] += self.exporter.lost
            self.exporter.lost = 0
        self._limits.clear()
        self.inbound.limits.clear()
        for port in self._ports.values():
            if port.refused:
                limits["connections"] += port.refused
                port.refused = 0
        if refused := self.scratch.waiting.take_refused():
            limits["waiting_bytes"] += refused
        return dict(limits)

    def take_counted(self) -> Counted | None:
        """Requests and connections since the last call; None without any."""
        recorder = self.engine.recorder
        increments = tuple(recorder.take())
        shadow = tuple(DryRunVerdicts(*verdict, count) for verdict, count in recorder.take_shadow().items())
        dropped, recorder.dropped = recorder.dropped, 0
        lines = recorder.take_log()
        return Counted(increments, shadow, dropped, lines) if increments or shadow or dropped or lines else None

    def state(self) -> dict[str, object]:
        """For operators."""
        return {
            "http_connections": len(self.connections.http) + len(self.connections.http2),
            "tcp_connections": len(self.connections.tcp),
            "inbound_tunnels": len(self.inbound.tunnels),
            "outbound_tunnels": sum(1 for _ in self.tunnels.all()),
            "clusters": self.clusters.state(),
        }

    # The end

    def drain(self) -> None:
        """Nothing new; what is under way may end."""
        for port in list(self._acceptors):
            self.unlisten(port)
        self.connections.drain()
        self.inbound.drain()

    def live(self) -> int:
        """Connections that are not over."""
        parting = sum(tunnel.is_parting for tunnel in self.inbound.tunnels)
        return len(self.connections.http) + len(self.connections.http2) + len(self.connections.tcp) + parting

    def close(self) -> None:
        """Cuts what is left."""
        self.exporter.cancel()
        for port in list(self._acceptors):
            self.unlisten(port)
        over = LocalError("it outlived the drain deadline of the proxy")
        for tunnel in [*self.inbound.tunnels, *self.tunnels.all()]:
            tunnel.close(over)

    def _export(self) -> None:
        self.exporter.flush()
        self.loop.call_later(EXPORT_SECONDS, self._export)

    def _sweep(self) -> None:
        self.clusters.sweep()
        self.connections.sweep()
        self.loop.call_later(SWEEP_SECONDS, self._sweep)


def own_tags(config: ProxyConfig) -> dict[str, str]:
    """What spans say of this proxy."""
    return {
        "node_id": f"waypoint~{config.name}.{config.namespace}",
        "istio.canonical_service": config.name,
        "istio.canonical_revision": "latest",
        "istio.mesh_id": config.identity.trust_domain,
        "istio.namespace": config.namespace,
    }
