"""What a waypoint is told of services without routes."""

from __future__ import annotations

import pytest

from tests.kit.builders import Json, identity, mesh, namespace, pod, service_manifest
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.clusters import Endpoint, Locality, UpstreamHttp
from ztunnel.mesh.l7.config import PortProtocol, ProxyConfig, ServedWorkload
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.l7.destinations import parse_locality
from ztunnel.mesh.l7.protocols import declared_protocol, port_protocol
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, parse

WAYPOINT = ObjectKey("Gateway", "default", "waypoint")
WEB = "default/web.default.svc.cluster.local"


def proxy(*bodies: Json, services: tuple[str, ...] = (WEB,), workloads: tuple[str, ...] = (), node: str = "") -> ProxyConfig:
    objects = {key(each): each for each in (parse(body, "test") for body in bodies)}
    bound = Bound(frozenset(services), frozenset(workloads))
    return derive_proxy(objects, mesh(*bodies), MeshOptions(), WAYPOINT, bound, node)


def node_manifest(name: str, **labels: str) -> Json:
    topology = {f"topology.kubernetes.io/{each}": value for each, value in labels.items()}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": topology}}


def web(**port: object) -> Json:
    return service_manifest("web", "10.96.0.1", selector={"app": "web"}, ports=[{"port": 80, "targetPort": 8080, **port}])


def test_a_service_with_an_http_port_gets_a_default_route_to_its_endpoints() -> None:
    config = proxy(
        namespace("default"),
        node_manifest("node", region="r", zone="z"),
        web(name="http"),
        pod("a", "10.0.0.1", labels={"app": "web", "version": "v1"}),
        pod("b", "10.0.0.2", labels={"app": "web"}, status={"conditions": []}),
        pod("c", "10.0.0.3", labels={"app": "web", "istio.io/dataplane-mode": "none", "istio-locality": "r.y"}),
        pod("other", "10.0.0.9"),
        node="node",
    )
    assert (config.name, config.namespace, config.identity, config.locality) == (
        "waypoint",
        "default",
        identity("default", "waypoint"),
        Locality("r", "z"),
    )
    (service,) = config.services
    assert (service.hostname, service.name, service.vips, service.kind) == (
        "web.default.svc.cluster.local",
        "web",
        ("10.96.0.1",),
        "Service",
    )
    (port,) = service.ports
    assert (port.port, port.protocol, port.tcp_routes) == (80, PortProtocol.HTTP, ())
    (route,) = port.routes
    (backend,) = route.backends
    assert (route.name, backend.cluster) == ("default", "inbound-vip|80|http|web.default.svc.cluster.local")
    cluster = config.clusters[backend.cluster]
    assert cluster.endpoints == (
        Endpoint("10.0.0.1", 8080, "uid-a", identity(), hbone=True, locality=Locality("r", "z"), node="node"),
        Endpoint("10.0.0.2", 8080, "uid-b", identity(), hbone=True, healthy=False, locality=Locality("r", "z"), node="node"),
        Endpoint("10.0.0.3", 8080, "uid-c", locality=Locality("r", "y"), node="node"),
    )
    assert (config.peers["10.0.0.1"].app, config.peers["10.0.0.1"].version) == ("web", "v1")
    assert config.peers["10.0.0.9"].app == "unknown"


@pytest.mark.parametrize(
    ("port", "protocol", "http", "families"),
    [
        ({"name": "grpc-api"}, PortProtocol.GRPC, UpstreamHttp.HTTP2, {"http"}),
        ({"name": "tcp"}, PortProtocol.TCP, None, {"tcp"}),
        ({}, PortProtocol.AUTO, UpstreamHttp.CLIENT, {"http", "tcp"}),
    ],
)
def test_what_is_derived_follows_the_protocol(port: Json, protocol: PortProtocol, http: UpstreamHttp | None, families: set[str]) -> None:
    config = proxy(web(**port))
    (served,) = config.services[0].ports
    assert served.protocol is protocol
    assert (bool(served.routes), bool(served.tcp_routes)) == ("http" in families, "tcp" in families)
    assert {cluster.split("|")[2] for cluster in config.clusters} == families
    if http is not None:
        assert config.clusters["inbound-vip|80|http|web.default.svc.cluster.local"].http is http


def test_only_what_is_bound_is_served() -> None:
    config = proxy(
        namespace("default"), web(), pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), services=("default/unknown",), workloads=("uid-a", "uid-x")
    )
    assert (config.services, config.clusters) == ((), {})
    assert config.workloads == (ServedWorkload("uid-a", ("10.0.0.1",), identity(), hbone=True),)


@pytest.mark.parametrize(
    ("number", "name", "app_protocol", "expected"),
    [
        (80, "", "", PortProtocol.AUTO),
        (80, "web", "", PortProtocol.AUTO),
        (80, "HTTP-web", "", PortProtocol.HTTP),
        (80, "http2", "", PortProtocol.HTTP2),
        (80, "grpc-web-x", "", PortProtocol.GRPC_WEB),
        (80, "grpc-web", "", PortProtocol.GRPC_WEB),
        (80, "https-x", "", PortProtocol.TCP),
        (80, "tls", "", PortProtocol.TCP),
        (80, "mysql", "", PortProtocol.TCP),
        (80, "tcp", "http", PortProtocol.HTTP),
        (80, "tcp", "kubernetes.io/h2c", PortProtocol.HTTP2),
        (80, "tcp", "kubernetes.io/ws", PortProtocol.HTTP),
        (80, "http", "kubernetes.io/wss", PortProtocol.TCP),
        (80, "http", "example.com/own", PortProtocol.HTTP),
        (3306, "", "", PortProtocol.TCP),
        (3306, "http", "", PortProtocol.HTTP),
    ],
)
def test_protocols(number: int, name: str, app_protocol: str, expected: PortProtocol) -> None:
    assert port_protocol(number, name, app_protocol) is expected


def test_protocols_of_service_entries() -> None:
    assert [declared_protocol(each) for each in ("HTTP", "GRPC-Web", "TLS", "odd")] == [
        PortProtocol.HTTP,
        PortProtocol.GRPC_WEB,
        PortProtocol.TCP,
        PortProtocol.AUTO,
    ]


def test_localities() -> None:
    assert [parse_locality(text) for text in ("r/z/s", "r.z.s", "r", "r/z.a")] == [
        Locality("r", "z", "s"),
        Locality("r", "z", "s"),
        Locality("r"),
        Locality("r", "z.a"),
    ]
