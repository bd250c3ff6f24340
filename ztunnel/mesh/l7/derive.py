"""From a set of objects to the configuration of one waypoint. Pure, and a function of the set only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.attach import ProxyTarget, Security, ServiceTarget
from ztunnel.mesh.l7.attachments import Attachments, routes_of
from ztunnel.mesh.l7.backend_tls import BackendTls
from ztunnel.mesh.l7.clusters import Resolution
from ztunnel.mesh.l7.config import PortProtocol, ProxyConfig, ProxyOptions, ServedPort, ServedService, ServedWorkload
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.destination_rules import DestinationRules
from ztunnel.mesh.l7.destinations import Destination, DestinationPort, Registry
from ztunnel.mesh.l7.gateway_routes import GatewayRoutes
from ztunnel.mesh.l7.grants import References
from ztunnel.mesh.l7.observing import Observing, extension_providers
from ztunnel.mesh.l7.peers import peers_of
from ztunnel.mesh.l7.rate_limit import rate_limits
from ztunnel.mesh.l7.routes import Backend, Route, TcpRoute
from ztunnel.mesh.l7.upstreams import Upstreams
from ztunnel.mesh.l7.virtual_services import At, VirtualServices
from ztunnel.mesh.manifests.authorization import is_true
from ztunnel.mesh.manifests.gateway import GatewayObject
from ztunnel.mesh.manifests.mesh_config import MeshConfig
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.workloads import Protocol, Workload

XFCC = "ambient.istio.io/xfcc-include-client-identity"


@dataclass(frozen=True, slots=True)
class Bound:
    """What is bound to one waypoint."""

    services: frozenset[str] = frozenset()
    """`Service.key`s."""
    workloads: frozenset[str] = frozenset()
    """UIDs."""


def derive_proxy(
    objects: Mapping[ObjectKey, KubeObject],
    state: MeshState,
    options: MeshOptions,
    who: ObjectKey,
    bound: Bound,
    node: str = "",
    mesh_config: MeshConfig | None = None,
) -> ProxyConfig:
    """What the waypoint of a Gateway does.

    Args:
        state: what `mesh.derive` made of the same objects.
        who: the Gateway; its namespace and name are also the identity's.
        node: where this replica runs, for locality.
        mesh_config: what `sources.mesh_config` found among the objects.
    """
    mesh_config = mesh_config or MeshConfig()
    registry = Registry(objects, state, options)
    rules = DestinationRules(objects, who.namespace, options.root_namespace, options.cluster_domain)
    upstreams = Upstreams(registry, rules, BackendTls(objects), Credentials(objects, who.namespace), bound.services)
    routing = _Routing(
        attachments=Attachments(routes_of(objects), registry, dict.fromkeys(bound.services, who)),
        gateway=GatewayRoutes(References(objects, registry), upstreams),
        virtual=VirtualServices(objects, registry, upstreams, who.namespace),
        upstreams=upstreams,
    )
    proxy = ProxyTarget(who.namespace, who.name)
    security = Security(objects.values(), proxy, options.root_namespace)
    observing = Observing(objects.values(), mesh_config, proxy, options.root_namespace, upstreams.find)
    services = tuple(_served(each, routing, security, observing) for each in registry.all() if each.service.key in bound.services)
    return ProxyConfig(
        name=who.name,
        namespace=who.namespace,
        identity=SpiffeId(options.trust_domain, who.namespace, who.name),
        services=services,
        workloads=tuple(_served_workload(state.workloads[uid], security) for uid in sorted(bound.workloads & state.workloads.keys())),
        providers=extension_providers(mesh_config, upstreams.find),
        clusters=upstreams.clusters,
        policies=security.policies,
        authentications=security.authentications,
        telemetry=observing.settings,
        peers=peers_of(state.workloads.values(), objects),
        options=ProxyOptions(path_normalization=mesh_config.path_normalization, xfcc=_tells_identity(objects.get(who))),
        locality=registry.locality_of_node(node),
        node=node,
    )


def _tells_identity(gateway: KubeObject | None) -> bool:
    """Whether applications are told who asks (Istio's annotation)."""
    return isinstance(gateway, GatewayObject) and is_true(gateway.metadata.annotations.get(XFCC))


@dataclass(frozen=True, slots=True)
class _Routing:
    """The routes of each port: Gateway API's where there are some, else VirtualServices', else the way to the service itself."""

    attachments: Attachments
    gateway: GatewayRoutes
    virtual: VirtualServices
    upstreams: Upstreams

    def http(self, destination: Destination, port: DestinationPort) -> tuple[Route, ...]:
        """For requests."""
        attached = self.attachments.http(destination, port)
        routes = self.gateway.http(attached)
        if any(not each.clients for each in attached):
            return routes
        virtual = self.virtual.http(self.virtual.of(destination), At(port.number))
        return (*routes, *(virtual or (Route("default", backends=(Backend(self.upstreams.key(destination, port.number)),)),)))

    def tcp(self, destination: Destination, port: DestinationPort) -> tuple[TcpRoute, ...]:
        """For connections."""
        at = At(port.number, vips=destination.service.vips, hostname=destination.hostname)
        return (
            self.gateway.tcp(self.attachments.tcp(destination, port))
            or self.virtual.tcp(self.virtual.of(destination), at)
            or (TcpRoute("default", backends=(Backend(self.upstreams.key(destination, port.number, tcp=True)),)),)
        )


def _served(destination: Destination, routing: _Routing, security: Security, observing: Observing) -> ServedService:
    ports = (
        ServedPort(
            port=each.number,
            protocol=each.protocol,
            routes=_limited(routing.http(destination, each), destination) if each.protocol is not PortProtocol.TCP else (),
            tcp_routes=routing.tcp(destination, each) if not each.protocol.is_http else (),
        )
        for each in destination.ports
    )
    target = ServiceTarget(destination.namespace, destination.key.name, destination.key.kind)
    held = security.of(target)
    return ServedService(
        hostname=destination.hostname,
        namespace=destination.namespace,
        name=destination.key.name,
        vips=destination.service.vips,
        ports=tuple(ports),
        kind=destination.key.kind,
        host_patterns=(destination.hostname,) if destination.resolution is Resolution.DYNAMIC else (),
        policies=held.policies,
        jwt=held.authentications,
        telemetry=observing.of(target),
    )


def _limited(routes: tuple[Route, ...], destination: Destination) -> tuple[Route, ...]:
    """The routes under the limits of the service as well."""
    limits = rate_limits(destination.metadata.annotations, str(destination.key))
    return tuple(replace(each, rate_limits=(*limits, *each.rate_limits)) for each in routes) if limits else routes


def _served_workload(workload: Workload, security: Security) -> ServedWorkload:
    hbone = workload.protocol is Protocol.HBONE
    held = security.of(None)
    identity = workload.identity if hbone else None
    return ServedWorkload(workload.uid, workload.addresses, identity, hbone, policies=held.policies, jwt=held.authentications)
