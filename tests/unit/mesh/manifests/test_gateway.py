"""Gateway and GatewayClass."""

from __future__ import annotations

import pytest

from tests.kit.builders import HBONE_LISTENER, Json, gateway, metadata
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.gateway import (
    AllowedRoutes,
    From,
    GatewayAddress,
    GatewayClassObject,
    GatewayObject,
    Listener,
    ListenerTls,
    ObjectRef,
)
from ztunnel.mesh.manifests.metadata import Metadata, ObjectKey
from ztunnel.mesh.manifests.parse import key, key_of, parse
from ztunnel.mesh.manifests.selectors import Expression, LabelSelector


def read(body: Json) -> GatewayObject:
    item = parse(body, "test")
    assert isinstance(item, GatewayObject)
    return item


def listening(**parts: object) -> Listener:
    return read(gateway("g", listeners=[{"name": "l", "port": 443, "protocol": "HTTPS", **parts}])).listeners[0]


def test_a_waypoint_gateway() -> None:
    item = read(gateway("waypoint", "10.96.0.9", "waypoint.default.svc.cluster.local", traffic="all"))
    assert item.class_name == "istio-waypoint"
    assert item.listeners == (Listener("mesh", 15008, "HBONE"),)
    assert item.addresses == (GatewayAddress("IPAddress", "10.96.0.9"), GatewayAddress("Hostname", "waypoint.default.svc.cluster.local"))
    assert key(item) == ObjectKey("Gateway", "default", "waypoint") == key_of(gateway("waypoint"))


def test_defaults_are_those_of_an_api_server() -> None:
    listener = listening(tls={"certificateRefs": [{"name": "cert"}]})
    assert listener.tls == ListenerTls("Terminate", (ObjectRef("", "Secret", "default", "cert"),))
    assert listener.allowed == AllowedRoutes(From.SAME)
    assert read(gateway("g", addresses=[{"value": "10.0.0.1"}, {"type": "IPAddress"}])).wanted_addresses == (
        GatewayAddress("IPAddress", "10.0.0.1"),
    )


def test_infrastructure() -> None:
    parts = {"labels": {"a": "b"}, "annotations": {"c": "d e"}, "parametersRef": {"group": "", "kind": "ConfigMap", "name": "options"}}
    item = read(gateway("g", infrastructure=parts, allowedListeners={}))
    assert (item.infrastructure_labels, item.infrastructure_annotations) == ({"a": "b"}, {"c": "d e"})
    assert item.unsupported == ("spec.allowedListeners", "spec.infrastructure.parametersRef")


def test_listeners_say_who_may_attach() -> None:
    selector = {"matchLabels": {"team": "a"}, "matchExpressions": [{"key": "stage", "operator": "In", "values": ["prod"]}]}
    allowed = listening(allowedRoutes={"namespaces": {"from": "Selector", "selector": selector}, "kinds": [{"kind": "HTTPRoute"}]}).allowed
    assert allowed.selector == LabelSelector((("team", "a"),), (Expression("stage", "In", ("prod",)),))
    assert allowed.kinds == (("gateway.networking.k8s.io", "HTTPRoute"),)
    assert allowed.admits("default", "other", {"team": "a", "stage": "prod"})
    assert not allowed.admits("default", "other", {"team": "a"})
    assert not AllowedRoutes(From.NONE).admits("default", "default", {})
    assert AllowedRoutes(From.ALL).admits("default", "other", {})
    by_name = AllowedRoutes(From.SELECTOR, LabelSelector((("kubernetes.io/metadata.name", "other"),)))
    assert by_name.admits("default", "other", {})


@pytest.mark.parametrize(
    ("operator", "values", "labels", "holds"),
    [
        ("In", ("a", "b"), {"k": "b"}, True),
        ("In", ("a",), {}, False),
        ("NotIn", ("a",), {"k": "a"}, False),
        ("NotIn", ("a",), {}, True),
        ("Exists", (), {"k": ""}, True),
        ("Exists", (), {}, False),
        ("DoesNotExist", (), {}, True),
        ("DoesNotExist", (), {"k": "a"}, False),
    ],
)
def test_expressions(operator: str, values: tuple[str, ...], labels: dict[str, str], holds: bool) -> None:
    assert Expression("k", operator, values).holds(labels) is holds


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (gateway("g", gatewayClassName=None), "spec.gatewayClassName"),
        (gateway("g", typo=1), "spec.typo"),
        (gateway("g", listeners=[HBONE_LISTENER, HBONE_LISTENER]), "spec.listeners[1].name"),
        (gateway("g", listeners=[{"name": "l", "port": 0, "protocol": "HTTP"}]), "spec.listeners[0].port"),
        (gateway("g", listeners=[{"name": "l", "port": 80, "protocol": "H TTP"}]), "spec.listeners[0].protocol"),
        (gateway("g", listeners=[{"name": "l", "port": 80, "protocol": "HTTP", "hostname": "a*"}]), "spec.listeners[0].hostname"),
        (gateway("g", listeners=[{**HBONE_LISTENER, "tls": {"mode": "Maybe"}}]), "spec.listeners[0].tls.mode"),
        (
            gateway("g", listeners=[{**HBONE_LISTENER, "allowedRoutes": {"namespaces": {"from": "Al"}}}]),
            "spec.listeners[0].allowedRoutes.namespaces.from",
        ),
        (
            gateway("g", listeners=[{**HBONE_LISTENER, "allowedRoutes": {"namespaces": {"from": "Selector"}}}]),
            "spec.listeners[0].allowedRoutes.namespaces.selector",
        ),
        (gateway("g", addresses=[{"value": "x"}]), "spec.addresses[0].value"),
    ],
)
def test_what_is_wrong_is_named(body: Json, field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse(body, "test")
    assert caught.value.field == field


@pytest.mark.parametrize("expression", [{"operator": "In"}, {"operator": "Exists", "values": ["a"]}, {"operator": "Is"}])
def test_a_selector_that_means_nothing_is_refused(expression: Json) -> None:
    with pytest.raises(ManifestError):
        listening(allowedRoutes={"namespaces": {"from": "Selector", "selector": {"matchExpressions": [{"key": "k", **expression}]}}})


@pytest.mark.parametrize(
    ("validation", "field"),
    [
        ({}, "caCertificateRefs"),
        ({"caCertificateRefs": []}, "caCertificateRefs"),
        ({"caCertificateRef": {"name": "roots"}}, "caCertificateRef"),
        ({"caCertificateRefs": [{"name": "roots"}], "mode": "AllowInsecureFallback"}, "mode"),
    ],
)
def test_a_check_of_clients_that_would_let_everybody_in_is_refused(validation: Json, field: str) -> None:
    listener = {"name": "a", "port": 443, "protocol": "HTTPS", "tls": {"frontendValidation": validation}}
    spec: Json = {"gatewayClassName": "istio", "listeners": [listener]}
    with pytest.raises(ManifestError, match=rf"frontendValidation\.{field}: "):
        read({**gateway("g"), "spec": spec})
    spec = {**spec, "listeners": [{**listener, "tls": {}}], "tls": {"frontend": {"default": {"validation": validation}}}}
    with pytest.raises(ManifestError, match=rf"validation\.{field}: "):
        read({**gateway("g"), "spec": spec})


def test_a_gateway_class_has_no_namespace() -> None:
    body = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": metadata("my.class", "ignored"),
        "spec": {"controllerName": "istio.io/mesh-controller"},
    }
    item = parse(body, "test")
    assert item == GatewayClassObject(Metadata("my.class", uid="ignored.my.class"), "istio.io/mesh-controller")
    assert key(item) == key_of(body) == ObjectKey("GatewayClass", "", "my.class")


def test_istios_own_gateway_is_not_taken_for_it() -> None:
    body: Json = {"apiVersion": "networking.istio.io/v1", "kind": "Gateway", "metadata": metadata("g", "default")}
    body["spec"] = {"servers": [{"port": {"number": 80, "protocol": "HTTP"}, "hosts": ["*"]}]}
    assert key(parse(body, "test")) == key_of(body) == ObjectKey("Gateway.networking.istio.io", "default", "g")
