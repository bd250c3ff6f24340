"""What this proxy serves, ready to be asked: by address and port who judges and routes a connection's requests.

Live connections hold a `PortAtWork`, which a new configuration changes in place: each request is judged by the policies of the moment.
"""

from __future__ import annotations

from typing import Final

from waypoint.http.authorization import Guard
from waypoint.http.jwt import JwtGate, KeySets
from waypoint.http.matching import RouteTable
from waypoint.telemetry.service import ServiceTelemetry
from ztunnel.mesh.l7.clusters import Cluster, Endpoint
from ztunnel.mesh.l7.config import (
    GatewayServer,
    PortProtocol,
    ProxyConfig,
    ProxyOptions,
    ServedPort,
    ServedService,
    ServedWorkload,
    VirtualHost,
)
from ztunnel.mesh.l7.routes import Backend, Route, TcpRoute
from ztunnel.mesh.l7.security import JwtAuthentication, L7Action, L7Policy, L7Rule
from ztunnel.mesh.l7.telemetry import TelemetrySettings

MAX_POD_PORTS: Final = 4096
"""Ports of pods, addressed by themselves, that are remembered."""

_NO_GUARD: Final = Guard(())

Judged = ServedService | ServedWorkload | VirtualHost | GatewayServer
"""What policies are named by."""


class PortAtWork:
    """One port of a service, or of a pod that is addressed by itself."""

    __slots__ = (
        "cluster",
        "gate",
        "guard",
        "is_gone",
        "port",
        "routes",
        "service",
        "tcp_routes",
        "telemetry",
        "workload",
        "_authentications",
        "_observed",
        "_policies",
        "_routes",
        "protocol",
    )

    def __init__(self, port: int, protocol: PortProtocol) -> None:
        self.port = port
        self.protocol = protocol
        self.service: ServedService | None = None
        self.workload: ServedWorkload | None = None
        self.cluster: Cluster | None = None
        """Of a pod that is addressed by itself."""
        self.routes = RouteTable(())
        self.tcp_routes: tuple[TcpRoute, ...] = ()
        self.guard = _NO_GUARD
        self.gate: JwtGate | None = None
        """None: no RequestAuthentication applies."""
        self.telemetry = ServiceTelemetry("", "", "", TelemetrySettings())
        self.is_gone = False
        self._observed = ("", "", "")
        self._routes: tuple[Route, ...] = ()
        """Of a gateway's hosts."""
        self._policies: tuple[L7Policy, ...] = ()
        self._authentications: tuple[JwtAuthentication, ...] = ()

    def serve(self, service: ServedService, config: ServedPort, proxy: ProxyConfig, key_sets: KeySets) -> None:
        """From now on it is that port of that service."""
        before = self.service
        self.protocol = config.protocol
        self.tcp_routes = config.tcp_routes
        known = None if before is None else next((each for each in before.ports if each.port == config.port), None)
        if known is None or known.routes != config.routes:
            self.routes = RouteTable(config.routes, self.routes)
        self.service = service
        self._judge(service, proxy, key_sets)

    def serve_pod(self, workload: ServedWorkload, address: str, proxy: ProxyConfig, key_sets: KeySets) -> None:
        """From now on it is that port of that pod."""
        self.workload = workload
        endpoint = Endpoint(address, self.port, workload.uid, workload.identity, workload.hbone)
        cluster = pod_cluster(workload, endpoint)
        if self.cluster != cluster:
            self.cluster = cluster
            self.routes = RouteTable((Route("default", backends=(Backend(cluster.key),)),))
            self.tcp_routes = (TcpRoute("default", backends=(Backend(cluster.key),)),)
        self._judge(workload, proxy, key_sets)

    def serve_host(self, virtual: VirtualHost, proxy: ProxyConfig, key_sets: KeySets) -> None:
        """From now on it is those hosts of a gateway's listener."""
        if virtual.routes != self._routes:
            self._routes = virtual.routes
            self.routes = RouteTable(virtual.routes, self.routes)
        self._judge(virtual, proxy, key_sets)

    def serve_connections(self, server: GatewayServer, proxy: ProxyConfig, key_sets: KeySets) -> None:
        """From now on it is the connections of a gateway's TLS or TCP listener."""
        self.tcp_routes = server.tcp_routes
        self._judge(server, proxy, key_sets)

    def _judge(self, served: Judged, proxy: ProxyConfig, key_sets: KeySets) -> None:
        policies = tuple(proxy.policies.get(key) or missing_policy(key) for key in served.policies)
        asks = any(policy.action is L7Action.CUSTOM for policy in policies)
        if policies != self._policies or asks:
            # Providers may have changed; they are of no interest to others.
            self._policies = policies
            self.guard = Guard(policies, proxy.providers) if policies else _NO_GUARD
        self._observe(served, proxy)
        jwt = () if isinstance(served, GatewayServer) else served.jwt
        authentications = tuple(proxy.authentications.get(key) or missing_authentication(key) for key in jwt)
        if authentications != self._authentications:
            # Tokens that were found good are remembered as long as nothing changes.
            self._authentications = authentications
            gate = JwtGate(authentications, key_sets)
            self.gate = None if gate.is_idle else gate

    def _observe(self, served: Judged, proxy: ProxyConfig) -> None:
        key = served.telemetry if isinstance(served, ServedService | ServedWorkload) else ""
        settings = proxy.telemetry.get(key) or proxy.telemetry.get("") or TelemetrySettings()
        if isinstance(served, ServedService):
            name = (served.hostname, served.name, served.namespace)
        elif not isinstance(served, ServedWorkload):
            name = ("", "", "")
        else:
            name = ("", "", "" if served.identity is None else served.identity.namespace)
        if settings != self.telemetry.settings or name != self._observed:
            self._observed = name
            self.telemetry = ServiceTelemetry(*name, settings, self.port)


def missing_policy(key: str) -> L7Policy:
    """What stands for a policy that is named and not there: it denies everything."""
    namespace, _, name = key.rpartition("/")
    return L7Policy(name, namespace, L7Action.DENY, rules=(L7Rule(),), tcp_rules=(L7Rule(),), reason="the policy is missing")


def missing_authentication(key: str) -> JwtAuthentication:
    """What stands for a RequestAuthentication that is named and not there: every token is refused."""
    namespace, _, name = key.rpartition("/")
    return JwtAuthentication(name, namespace, reason="it is missing")


def pod_cluster(workload: ServedWorkload, endpoint: Endpoint) -> Cluster:
    """The cluster of a pod that is addressed by itself."""
    return Cluster(
        key=f"inbound-pod|{endpoint.port}||{endpoint.address}",
        hostname=endpoint.address,
        namespace="" if workload.identity is None else workload.identity.namespace,
        service="",
        port=endpoint.port,
        endpoints=(endpoint,),
    )


class Served:
    """All that is served."""

    def __init__(self, key_sets: KeySets) -> None:
        self._key_sets = key_sets
        self.config: ProxyConfig | None = None
        self.options = ProxyOptions()
        self.told_identity = b""
        """Our own, where applications are to be told who asks; else empty."""
        self._services: dict[tuple[str, int], PortAtWork] = {}
        self._by_name: dict[tuple[str, str, int], PortAtWork] = {}
        self._workloads: dict[str, ServedWorkload] = {}
        self._pods: dict[tuple[str, int], PortAtWork] = {}

    def update(self, config: ProxyConfig) -> None:
        """A new configuration is in force."""
        self.config = config
        self.options = config.options
        self.told_identity = config.identity.uri.encode() if config.options.xfcc else b""
        before, self._by_name = self._by_name, {}
        self._services = {}
        for service in config.services:
            for port in service.ports:
                name = (service.namespace, service.hostname, port.port)
                at_work = before.pop(name, None) or PortAtWork(port.port, port.protocol)
                at_work.serve(service, port, config, self._key_sets)
                self._by_name[name] = at_work
                for vip in service.vips:
                    self._services[vip, port.port] = at_work
        for gone in before.values():
            gone.is_gone = True
        self._workloads = {address: workload for workload in config.workloads for address in workload.addresses}
        for (address, number), at_work in list(self._pods.items()):
            workload = self._workloads.get(address)
            if workload is None:
                at_work.is_gone = True
                del self._pods[address, number]
            else:
                at_work.serve_pod(workload, address, config, self._key_sets)

    def find(self, address: str, port: int) -> PortAtWork | None:
        """Who serves an address and port. A service's address counts before a pod's."""
        found = self._services.get((address, port)) or self._pods.get((address, port))
        if found is not None or self.config is None:
            return found
        workload = self._workloads.get(address)
        if workload is None:
            return None
        if len(self._pods) >= MAX_POD_PORTS:
            # No configuration reaches it any more: its connections end, lest they be judged by the policies of today for ever.
            forgotten = self._pods.pop(next(iter(self._pods)))
            forgotten.is_gone = True
            forgotten.routes = RouteTable(())
        found = self._pods[address, port] = PortAtWork(port, PortProtocol.AUTO)
        found.serve_pod(workload, address, self.config, self._key_sets)
        return found
