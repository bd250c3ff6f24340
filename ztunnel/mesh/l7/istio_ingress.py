"""Istio's Gateway as servers of an ingress gateway, and the routes of VirtualServices that are bound to a gateway by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, TlsServer
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.routes import Route, TcpRoute
from ztunnel.mesh.l7.virtual_services import At, VirtualServices
from ztunnel.mesh.manifests.istio_gateway import IstioGatewayObject, Server, ServerTls
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.virtual_hosts import covers, expand
from ztunnel.mesh.manifests.virtual_service import VirtualServiceObject

_HTTP = ("HTTP", "HTTP2", "GRPC", "GRPC-WEB")
Hosts = Iterable[tuple[str, str]]
"""(namespace that a VirtualService must be of, empty for any, and host)."""


@dataclass(frozen=True, slots=True)
class BoundService:
    """A VirtualService at a gateway, under the hosts that both have."""

    item: VirtualServiceObject
    hosts: tuple[str, ...]


class IstioIngress:
    """The VirtualServices that a proxy may bind to its gateways."""

    def __init__(self, services: VirtualServices, domain: str) -> None:
        self._services = services
        self._domain = domain

    def bound(self, gateway: tuple[str, str], hosts: Hosts) -> list[BoundService]:
        """The VirtualServices that name a gateway, the oldest first.

        Args:
            gateway: its namespace and name.
            hosts: of the gateway's server.
        """
        found = []
        for item in self._services.visible():
            if gateway in {_qualified(each, item.metadata.namespace) for each in item.gateways}:
                shared = _shared(item, hosts, self._domain)
                if shared:
                    found.append(BoundService(item, shared))
        return found

    def http(self, bound: Iterable[BoundService], gateway: tuple[str, str], port: int) -> dict[str, tuple[Route, ...]]:
        """The routes of each host."""
        routes: dict[str, tuple[Route, ...]] = {}
        for each in bound:
            own = self._services.http([each.item], _at(each.item, gateway, port))
            for host in each.hosts:
                routes[host] = (*routes.get(host, ()), *own)
        return routes

    def connections(self, bound: Iterable[BoundService], gateway: tuple[str, str], port: int, *, tls: bool) -> tuple[TcpRoute, ...]:
        """The routes of a server for connections: by server name, where TLS is passed through."""
        found: list[TcpRoute] = []
        for each in bound:
            at = _at(each.item, gateway, port)
            rules = each.item.tls if tls else each.item.tcp
            for index, rule in enumerate(rules):
                places = [place for place in rule.matches if self._services.is_at(place, at)]
                if rule.matches and not places:
                    continue
                route = self._services.l4_route(each.item, "tls" if tls else "tcp", index, rule, at)
                names = tuple(name for place in places for name in place.sni if any(covers(host, name) for host in each.hosts))
                if not tls or names:
                    found.append(replace(route, sni=names))
        return tuple(found)


def gateways_of(objects: Mapping[ObjectKey, KubeObject], labels: Mapping[str, str], namespace: str) -> list[IstioGatewayObject]:
    """The Istio Gateways that select pods with these labels, the oldest first.

    Args:
        namespace: of the pods; a Gateway selects in every namespace, one without selector only in its own.
    """
    found = [
        each
        for each in objects.values()
        if isinstance(each, IstioGatewayObject)
        and each.selector.items() <= labels.items()
        and (each.selector or each.metadata.namespace == namespace)
    ]
    return sorted(found, key=lambda each: (each.metadata.created, each.metadata.namespace, each.metadata.name))


def server_of(server: Server, credentials: Credentials) -> GatewayServer:
    """One server without its routes.

    Args:
        credentials: of the gateway's own namespace.
    """
    tls, problem = _tls(server.tls, credentials)
    passthrough = server.tls is not None and server.tls.mode == "PASSTHROUGH"
    if server.protocol in _HTTP and (server.tls is None or not server.tls.mode):
        protocol = ListenerProtocol.HTTP
    elif server.protocol in (*_HTTP, "HTTPS") and not passthrough:
        protocol = ListenerProtocol.HTTPS
    elif (server.protocol in ("TLS", "HTTPS") and passthrough) or (server.tls is not None and server.tls.mode):
        protocol = ListenerProtocol.TLS
    else:
        protocol = ListenerProtocol.TCP
    return GatewayServer(
        name=server.name,
        port=server.port,
        protocol=protocol,
        hosts=tuple(dict.fromkeys(host for _, host in server.hosts)),
        tls=tls if protocol in (ListenerProtocol.HTTPS, ListenerProtocol.TLS) else None,
        redirect_to_https=server.tls is not None and server.tls.redirect,
        problem=server.problem or problem,
    )


def _tls(tls: ServerTls | None, credentials: Credentials) -> tuple[TlsServer | None, str]:
    if tls is None or tls.mode in ("", "PASSTHROUGH") or not tls.credential:
        return None, ""
    found = credentials.secret(tls.credential)
    if isinstance(found, str):
        return None, found
    if not (found.certificate and found.key):
        return None, f"Secret {tls.credential} has no certificate with its key"
    mutual = tls.mode in ("MUTUAL", "OPTIONAL_MUTUAL")
    if mutual and not found.roots:
        return None, f"Secret {tls.credential} has no roots (ca.crt) for clients' certificates"
    if tls.mode == "OPTIONAL_MUTUAL":
        return None, "OPTIONAL_MUTUAL is not supported: use SIMPLE or MUTUAL"
    return TlsServer(found.certificate, found.key, found.roots if mutual else b"", tls.min_version), ""


def _qualified(name: str, namespace: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    return (first, rest) if slash else (namespace, first)


def _at(item: VirtualServiceObject, gateway: tuple[str, str], port: int) -> At:
    namespace, name = gateway
    names = (f"{namespace}/{name}", *((name,) if item.metadata.namespace == namespace else ()))
    return At(port, names)


def _shared(item: VirtualServiceObject, hosts: Hosts, domain: str) -> tuple[str, ...]:
    """The hosts that a VirtualService and a server have in common, each as narrow as the narrower of the two."""
    own = [expand(each, item.metadata.namespace, domain) for each in item.hosts]
    served = [host for namespace, host in hosts if namespace in ("", item.metadata.namespace)]
    found = []
    for host in own:
        found += [host if covers(wide, host) else wide for wide in served if covers(wide, host) or covers(host, wide)]
    return tuple(dict.fromkeys(found))
