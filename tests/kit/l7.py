"""Short words for requests, clients and L7 values, so that a test shows only what it is about."""

from __future__ import annotations

from waypoint.http.messages import Client, Request
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.clusters import Cluster, Endpoint, LoadBalancing, Locality, Outlier, PoolLimits
from ztunnel.mesh.l7.routes import Backend, NamedMatch, PathKind, PathMatch, RequestMatch, Route, TextKind, TextMatch

_BALANCING = LoadBalancing()
_LIMITS = PoolLimits()


def request(path: str = "/", method: str = "GET", authority: str = "reviews:9080", **headers: str) -> Request:
    """A request; `x_user="jason"` is the header `x-user`."""
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request(method.encode(), path.encode(), authority.encode(), lines)


def client(namespace: str = "default", account: str = "curl", *, address: str = "10.0.0.9", port: int = 9080) -> Client:
    """A client of the mesh, which addressed `port` of a service."""
    return Client(SpiffeId("cluster.local", namespace, account), address, 40000, namespace, port, "10.96.0.1")


def exact(value: str, *, ignore_case: bool = False) -> TextMatch:
    return TextMatch(TextKind.EXACT, value, ignore_case)


def regex(value: str) -> TextMatch:
    return TextMatch(TextKind.REGEX, value)


def path(value: str, kind: PathKind = PathKind.PREFIX, *, ignore_case: bool = False) -> RequestMatch:
    return RequestMatch(path=PathMatch(kind, value, ignore_case))


def named(name: str, match: TextMatch, *, inverted: bool = False) -> NamedMatch:
    return NamedMatch(name, match, inverted)


def route(name: str, *matches: RequestMatch, cluster: str = "reviews") -> Route:
    return Route(name, matches=matches, backends=(Backend(cluster),))


def endpoint(address: str, *, healthy: bool = True, weight: int = 1, locality: str = "") -> Endpoint:
    """On port 8080; `locality` as `region/zone/subzone`."""
    return Endpoint(address, 8080, healthy=healthy, weight=weight, locality=Locality(*locality.split("/")))


def cluster(
    *endpoints: Endpoint, balancing: LoadBalancing = _BALANCING, limits: PoolLimits = _LIMITS, outlier: Outlier | None = None
) -> Cluster:
    return Cluster(
        key="inbound-vip|9080|http|reviews.default.svc.cluster.local",
        hostname="reviews.default.svc.cluster.local",
        namespace="default",
        service="reviews",
        port=9080,
        endpoints=endpoints,
        balancing=balancing,
        limits=limits,
        outlier=outlier,
    )
