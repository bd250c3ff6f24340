"""What routes and listeners of ingress gateways are told."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.kit.builders import Json, mesh, service_manifest
from tests.kit.mesh_l7 import gateway_api, read_all, secret
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.route_status import ListenerTold, listener_told, route_statuses
from ztunnel.mesh.manifests.gateway import GatewayObject
from ztunnel.mesh.manifests.metadata import ObjectKey

WEB = service_manifest("web", "10.96.0.1", ports=[{"port": 80, "name": "http"}])
PEM = "-----BEGIN CERTIFICATE-----"
PAIR = secret("cert", tls_crt=PEM, tls_key=PEM)
FAR = {"name": "r", "namespace": "shop"}
HTTP: Json = {"name": "http", "port": 80, "protocol": "HTTP", "hostname": "*.example"}
HTTPS: Json = {"name": "https", "port": 443, "protocol": "HTTPS", "tls": {"certificateRefs": [{"name": "cert"}]}}


def front(*listeners: Json, class_name: str = "istio") -> Json:
    return gateway_api("Gateway", "gw", gatewayClassName=class_name, listeners=list(listeners))


def route(parent: Mapping[str, object] | None = None, backend: str = "web", **spec: object) -> Json:
    rules = [{"backendRefs": [{"name": backend, "port": 80}]}]
    return {**gateway_api("HTTPRoute", "r"), "spec": {"parentRefs": [{"name": "gw", **(parent or {})}], "rules": rules} | spec}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (route(), ["Accepted", "ResolvedRefs"]),
        (route({"sectionName": "other"}), ["!NoMatchingParent", "ResolvedRefs"]),
        (route(hostnames=["a.other"]), ["!NoMatchingListenerHostname", "ResolvedRefs"]),
        (route(backend="gone"), ["Accepted", "!BackendNotFound"]),
        (route(rules=[{"filters": [{"type": "ExtensionRef"}]}]), ["!UnsupportedValue", "ResolvedRefs"]),
        (
            {**route({"namespace": "default"}), "metadata": {"name": "r", "namespace": "shop"}},
            ["!NotAllowedByListeners", "!BackendNotFound"],
        ),
    ],
)
def test_conditions_of_a_route(body: Json, expected: list[str]) -> None:
    bodies = [WEB, front(HTTP), body]
    (status,) = route_statuses(read_all(bodies), mesh(*bodies), MeshOptions(), {}).values()
    (parent,) = status.parents
    assert parent.ingress
    assert [("" if each.status else "!") + each.reason for each in parent.conditions] == expected


def told(*bodies: Json) -> dict[str, ListenerTold]:
    objects = read_all([WEB, *bodies])
    gateway = objects[ObjectKey("Gateway", "default", "gw")]
    assert isinstance(gateway, GatewayObject)
    return listener_told(gateway, objects, mesh(WEB, *bodies), MeshOptions())


def test_listeners_count_the_routes_that_they_took() -> None:
    bad = {**route(rules=[{"filters": [{"type": "ExtensionRef"}]}]), "metadata": {"name": "bad"}}
    other = {**route({"sectionName": "https"}), "metadata": {"name": "other"}}
    found = told(front(HTTP, HTTPS), PAIR, route(), bad, other)
    assert {name: each.attached for name, each in found.items()} == {"http": 1, "https": 2}
    assert found["http"].kinds == ("HTTPRoute", "GRPCRoute")


@pytest.mark.parametrize(
    ("listener", "bodies", "resolved", "programmed"),
    [
        (HTTP, [], "ResolvedRefs", "Programmed"),
        (HTTPS, [PAIR], "ResolvedRefs", "Programmed"),
        (HTTPS, [], "!InvalidCertificateRef", "!Invalid"),
        ({**HTTPS, "tls": {"certificateRefs": [{"name": "cert", "namespace": "infra"}]}}, [], "!RefNotPermitted", "!Invalid"),
        ({**HTTP, "allowedRoutes": {"kinds": [{"kind": "HTTPRoute"}, {"kind": "UDPRoute"}]}}, [], "!InvalidRouteKinds", "Programmed"),
        ({**HTTP, "protocol": "UDP"}, [], "ResolvedRefs", "!Invalid"),
    ],
)
def test_conditions_of_a_listener(listener: Json, bodies: list[Json], resolved: str, programmed: str) -> None:
    (found,) = told(front(listener), *bodies).values()
    assert [("" if each.status else "!") + each.reason for each in found.conditions] == [resolved, programmed]


def test_certificates_that_nobody_may_see_are_not_judged() -> None:
    bodies = [WEB, front(HTTPS)]
    objects = read_all(bodies)
    gateway = objects[ObjectKey("Gateway", "default", "gw")]
    assert isinstance(gateway, GatewayObject)
    (found,) = listener_told(gateway, objects, mesh(*bodies), MeshOptions(), sees_secrets=False).values()
    assert all(each.status for each in found.conditions)
