"""What our waypoint is told, in manifests: services, routes by header, rules by path. PURE."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Json = dict[str, object]

NAME = "waypoint"
_ROUTE_RULES, _POLICY_RULES = 16, 500
"""As many as one HTTPRoute, and about as many as one AuthorizationPolicy, may have."""


@dataclass(frozen=True, slots=True)
class Service:
    """One service of the benchmark. `size`: routes, and rules; 0: it has no waypoint."""

    name: str
    vip: str
    target: int
    size: int
    grpc: bool = False

    @property
    def url(self) -> str:
        """What a load asks for: the path that the last rule allows. The last route is chosen by the header `x-route: SIZE-1`."""
        return f"http://{self.vip}:{PORT}/p{max(0, self.size - 1)}/{'Method' if self.grpc else 'x'}"

    @property
    def route(self) -> str:
        """The header that chooses the last route."""
        return f"x-route: {max(0, self.size - 1)}"


PORT = 80


def manifests(service: Service) -> Iterator[Json]:
    """The service, and if it has a waypoint its routes and policies."""
    labels: Json = {"istio.io/use-waypoint": NAME} if service.size else {}
    port = {"name": "grpc" if service.grpc else "http", "port": PORT, "targetPort": service.target}
    yield {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": service.name, "namespace": "default", "labels": labels},
        "spec": {"clusterIP": service.vip, "clusterIPs": [service.vip], "selector": {"app": "server"}, "ports": [port]},
    }
    for first in range(0, service.size, _ROUTE_RULES):
        yield _route(service, range(first, min(first + _ROUTE_RULES, service.size)))
    for first in range(0, service.size, _POLICY_RULES):
        yield _policy(service, range(first, min(first + _POLICY_RULES, service.size)))


def gateway(address: str) -> Json:
    """The waypoint, at this address."""
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
        "status": {"addresses": [{"type": "IPAddress", "value": address}]},
    }


def _route(service: Service, numbers: range) -> Json:
    rules = [
        {
            "matches": [{"headers": [{"name": "x-route", "value": f"{number}"}]}],
            "backendRefs": [{"name": service.name, "port": PORT}],
        }
        for number in numbers
    ]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": f"{service.name}-{numbers[0]}", "namespace": "default"},
        "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": service.name}], "rules": rules},
    }


def _policy(service: Service, numbers: range) -> Json:
    methods = ["POST"] if service.grpc else ["GET", "PUT"]
    rules = [{"to": [{"operation": {"methods": methods, "paths": [f"/p{number}/*"]}}]} for number in numbers]
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": f"{service.name}-{numbers[0]}", "namespace": "default"},
        "spec": {"targetRefs": [{"kind": "Service", "group": "", "name": service.name}], "action": "ALLOW", "rules": rules},
    }
