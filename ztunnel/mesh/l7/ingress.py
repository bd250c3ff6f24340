"""From a set of objects to the configuration of one ingress gateway: Gateway API's Gateway, and Istio's that select its pods.

A Gateway of Gateway API has its routes from the routes that name it and from VirtualServices that do; an Istio Gateway from the latter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.attach import Held, ProxyTarget, Security, SelectedPods
from ztunnel.mesh.l7.attachments import routes_of
from ztunnel.mesh.l7.backend_tls import BackendTls
from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, ProxyConfig, ProxyOptions, VirtualHost
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.destination_rules import DestinationRules
from ztunnel.mesh.l7.destinations import Registry
from ztunnel.mesh.l7.front import IngressWaypoints
from ztunnel.mesh.l7.gateway_routes import GatewayRoutes
from ztunnel.mesh.l7.grants import References
from ztunnel.mesh.l7.istio_ingress import IstioIngress, gateways_of, server_of
from ztunnel.mesh.l7.listener_tls import listener_server
from ztunnel.mesh.l7.listeners import ANY_HOST, Listeners
from ztunnel.mesh.l7.observing import Observing, extension_providers
from ztunnel.mesh.l7.peers import peers_of
from ztunnel.mesh.l7.route_status import INGRESS_CLASS
from ztunnel.mesh.l7.routes import Route, TcpRoute
from ztunnel.mesh.l7.upstreams import Upstreams
from ztunnel.mesh.l7.virtual_services import VirtualServices
from ztunnel.mesh.manifests.gateway import GatewayObject
from ztunnel.mesh.manifests.mesh_config import MeshConfig
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.virtual_hosts import covers, specificity


@dataclass(frozen=True, slots=True)
class GatewayPods:
    """Which pods are configured: what their labels select, and who they are."""

    namespace: str
    service_account: str
    labels: tuple[tuple[str, str], ...] = ()
    """Istio's Gateways select by them."""


def derive_gateway(
    objects: Mapping[ObjectKey, KubeObject],
    state: MeshState,
    options: MeshOptions,
    who: ObjectKey,
    pods: GatewayPods | None = None,
    node: str = "",
    mesh_config: MeshConfig | None = None,
) -> ProxyConfig:
    """What an ingress gateway does.

    Args:
        state: what `mesh.derive` made of the same objects.
        who: the Gateway of Gateway API; it need not be there when `pods` are selected by Istio's.
        pods: None: those that are made for the Gateway, with the service account `NAME-istio`.
        node: where this replica runs, for locality.
        mesh_config: what `sources.mesh_config` found among the objects.
    """
    mesh_config = mesh_config or MeshConfig()
    pods = pods or GatewayPods(who.namespace, f"{who.name}-istio")
    registry = Registry(objects, state, options)
    rules = DestinationRules(objects, who.namespace, options.root_namespace, options.cluster_domain)
    front = IngressWaypoints(objects, state, options)
    upstreams = Upstreams(registry, rules, BackendTls(objects), Credentials(objects, who.namespace), frozenset(), front)
    proxy = ProxyTarget(who.namespace, who.name, INGRESS_CLASS)
    selected = SelectedPods(pods.namespace, dict(pods.labels), options.root_namespace)
    security = Security(objects.values(), proxy, options.root_namespace, selected)
    observing = Observing(objects.values(), mesh_config, proxy, options.root_namespace, upstreams.find)
    virtual = VirtualServices(objects, registry, upstreams, who.namespace)
    ingress = _Ingress(
        objects=objects,
        references=References(objects, registry),
        routes=GatewayRoutes(References(objects, registry), upstreams),
        virtual=IstioIngress(virtual, options.cluster_domain),
        held=security.of(None),
    )
    gateway = objects.get(who)
    servers: list[GatewayServer] = list(ingress.listeners(gateway)) if isinstance(gateway, GatewayObject) else []
    servers += ingress.selected(pods)
    return ProxyConfig(
        name=who.name,
        namespace=who.namespace,
        identity=SpiffeId(options.trust_domain, pods.namespace, pods.service_account),
        servers=tuple(servers),
        providers=extension_providers(mesh_config, upstreams.find),
        clusters=upstreams.clusters,
        policies=security.policies,
        authentications=security.authentications,
        telemetry=observing.settings,
        peers=peers_of(state.workloads.values(), objects),
        options=ProxyOptions(path_normalization=mesh_config.path_normalization),
        locality=registry.locality_of_node(node),
        node=node,
    )


@dataclass(frozen=True, slots=True)
class _Ingress:
    """What servers are made with."""

    objects: Mapping[ObjectKey, KubeObject]
    references: References
    routes: GatewayRoutes
    virtual: IstioIngress
    held: Held

    def listeners(self, gateway: GatewayObject) -> Iterator[GatewayServer]:
        """Of a Gateway of Gateway API."""
        attached = Listeners(gateway, routes_of(self.objects), self.objects)
        name = (gateway.metadata.namespace, gateway.metadata.name)
        for listener in gateway.listeners:
            server = listener_server(gateway, listener, self.objects, self.references)
            bound = self.virtual.bound(name, [("", listener.hostname or ANY_HOST)])
            own = attached.by_name[listener.name]
            if server.protocol in (ListenerProtocol.HTTP, ListenerProtocol.HTTPS):
                hosts = {host: tuple(self.routes.merged(each)) for host, each in own.by_host.items()}
                more = self.virtual.http(bound, name, listener.port)
                yield replace(server, virtual_hosts=self._virtual_hosts(hosts, more))
                continue
            connections = [
                self.routes.connections(route, tuple(host for host, each in own.by_host.items() if any(one.route is route for one in each)))
                for route in own.routes
                if route.rules
            ]
            found = tuple(_any_name(each) for each in connections)
            tls = server.protocol is ListenerProtocol.TLS and server.tls is None
            more_connections = self.virtual.connections(bound, name, listener.port, tls=tls)
            yield replace(server, tcp_routes=(*found, *more_connections), policies=self.held.policies)

    def selected(self, pods: GatewayPods) -> Iterator[GatewayServer]:
        """Of Istio's Gateways that select the pods; the first of several servers for the same port and host has it."""
        credentials = Credentials(self.objects, pods.namespace)
        labels = dict(pods.labels)
        for gateway in gateways_of(self.objects, labels, pods.namespace) if labels else ():
            name = (gateway.metadata.namespace, gateway.metadata.name)
            for each in gateway.servers:
                server = server_of(each, credentials)
                bound = self.virtual.bound(name, each.hosts)
                if server.protocol in (ListenerProtocol.HTTP, ListenerProtocol.HTTPS):
                    yield replace(server, virtual_hosts=self._virtual_hosts({}, self.virtual.http(bound, name, each.port)))
                else:
                    tls = server.protocol is ListenerProtocol.TLS and server.tls is None
                    connections = self.virtual.connections(bound, name, each.port, tls=tls)
                    yield replace(server, tcp_routes=connections, policies=self.held.policies)

    def _virtual_hosts(self, first: Mapping[str, tuple[Route, ...]], second: Mapping[str, tuple[Route, ...]]) -> tuple[VirtualHost, ...]:
        """By host, the more particular first. What no route of a host matches is for the routes of wider hosts."""
        hosts = sorted({*first, *second}, key=lambda host: (specificity(host), host))
        found = []
        for host in hosts:
            wider = [other for other in hosts if other == host or (other.startswith("*") and covers(other, host))]
            routes = tuple(route for routes in (first, second) for other in wider for route in routes.get(other, ()))
            found.append(VirtualHost((host,), routes, self.held.policies, self.held.authentications))
        return tuple(found)


def _any_name(route: TcpRoute) -> TcpRoute:
    """A route for every name says none."""
    return replace(route, sni=()) if ANY_HOST in route.sni else route
