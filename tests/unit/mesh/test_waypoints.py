"""Which waypoint serves what, and why."""

from __future__ import annotations

import pytest

from tests.kit.builders import HBONE_LISTENER, Json, gateway, identity, labelled, mesh, namespace, pod, service_account, service_manifest
from ztunnel.mesh.manifests.core import Pod, ServiceObject
from ztunnel.mesh.manifests.gateway import GatewayObject
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.waypoints import (
    CANARY,
    CANARY_WEIGHT,
    GATEWAY_NAME,
    INBOUND_BINDING,
    INGRESS_USE_WAYPOINT,
    MANAGED,
    MANAGED_WAYPOINT,
    USE_WAYPOINT,
    USE_WAYPOINT_NAMESPACE,
    Binding,
    Level,
    Reason,
    Traffic,
    Waypoints,
    gateway_conditions,
    listener_conditions,
)
from ztunnel.mesh.workloads import Sandwich

READY = gateway("waypoint", "10.96.0.9", traffic="all")


def use(name: str, **more: str) -> dict[str, dict[str, str]]:
    return {"labels": {USE_WAYPOINT: name, **more}}


def of(*bodies: Json) -> Waypoints:
    return Waypoints.of(parse(body, "test") for body in bodies)


def service_of(*bodies: Json, labels: dict[str, str] | None = None, annotations: dict[str, str] | None = None) -> Binding | None:
    """The binding of service web in namespace default, among these objects."""
    item = parse(labelled(service_manifest("web", "10.96.0.1"), labels=labels or {}, annotations=annotations or {}), "test")
    assert isinstance(item, ServiceObject)
    return of(*bodies).for_service(item.metadata)


def pod_of(*bodies: Json, labels: dict[str, str] | None = None) -> Binding | None:
    item = parse(pod("web", "10.0.0.1", labels=labels or {}, spec={"serviceAccountName": "cart"}), "test")
    assert isinstance(item, Pod)
    return of(*bodies).for_pod(item.metadata, item.service_account)


def test_nobody_who_does_not_ask_gets_one() -> None:
    assert service_of(READY, namespace("default")) is None
    assert pod_of(READY, namespace("default")) is None


def test_a_services_own_label_wins_over_its_namespaces() -> None:
    other = gateway("other", "10.96.0.8")
    everybody = labelled(namespace("default"), **use("other"))
    own = service_of(READY, other, everybody, labels={USE_WAYPOINT: "waypoint"})
    assert own is not None
    assert own.waypoint is not None
    assert (own.waypoint.key, own.level, own.reason) == ("default/waypoint", Level.OBJECT, Reason.ACCEPTED)
    assert own.waypoint.addresses == ("10.96.0.9",)
    assert own.waypoint.identity == identity("default", "waypoint")
    inherited = service_of(READY, other, everybody)
    assert inherited is not None
    assert inherited.wanted == "default/other"
    assert inherited.level is Level.NAMESPACE


def test_none_opts_out() -> None:
    everybody = labelled(namespace("default"), **use("waypoint"))
    assert service_of(READY, everybody, labels={USE_WAYPOINT: "none"}) is None
    assert pod_of(READY, everybody, labels={USE_WAYPOINT: "none"}) is None
    quiet = labelled(service_account("cart"), **use("none"))
    assert pod_of(READY, everybody, quiet) is None


def test_a_service_accounts_label_stands_between_its_pods_and_their_namespace() -> None:
    account = labelled(service_account("cart"), **use("account"))
    gateways = (READY, gateway("account", "10.96.0.7", traffic="workload"), labelled(namespace("default"), **use("waypoint")))
    bound = pod_of(*gateways, account)
    assert bound is not None
    assert (bound.wanted, bound.level) == ("default/account", Level.SERVICE_ACCOUNT)
    own = pod_of(*gateways, account, labels={USE_WAYPOINT: "waypoint"})
    assert own is not None
    assert own.wanted == "default/waypoint"
    elsewhere = pod_of(*gateways, labelled(service_account("other"), **use("account")))
    assert elsewhere is not None
    assert elsewhere.wanted == "default/waypoint"


def test_the_waypoint_may_be_in_another_namespace_that_admits_ours() -> None:
    def there(**allowed: object) -> Json:
        return gateway("waypoint", "10.96.0.9", namespace="infra", listeners=[{**HBONE_LISTENER, "allowedRoutes": {"namespaces": allowed}}])

    labels = {USE_WAYPOINT: "waypoint", USE_WAYPOINT_NAMESPACE: "infra"}
    bound = service_of(there(**{"from": "All"}), labels=labels)
    assert bound is not None
    assert bound.waypoint is not None
    assert bound.waypoint.key == "infra/waypoint"
    denied = service_of(there(**{"from": "Same"}), labels=labels)
    assert denied is not None
    assert denied.reason is Reason.ATTACHMENT_DENIED
    assert denied.closes
    chosen = there(**{"from": "Selector", "selector": {"matchLabels": {"team": "a"}}})
    assert_reason(service_of(chosen, labelled(namespace("default"), labels={"team": "a"}), labels=labels), Reason.ACCEPTED)
    assert_reason(service_of(chosen, namespace("default"), labels=labels), Reason.ATTACHMENT_DENIED)


def assert_reason(binding: Binding | None, reason: Reason) -> None:
    assert binding is not None
    assert binding.reason is reason


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (namespace("unrelated"), "no such Gateway"),
        (gateway("waypoint"), "no address yet"),
        (gateway("waypoint", "10.96.0.9", traffic="sevice"), "istio.io/waypoint-for"),
        (labelled(gateway("waypoint", "10.96.0.9"), annotations={INBOUND_BINDING: "PROXI"}), "waypoint-inbound-binding"),
        (gateway("waypoint", "10.96.0.9", meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}), "being deleted"),
    ],
)
def test_a_waypoint_that_cannot_be_used_has_no_stand_in(body: Json, words: str) -> None:
    binding = service_of(
        body, gateway("other", "10.96.0.8"), labelled(namespace("default"), **use("other")), labels={USE_WAYPOINT: "waypoint"}
    )
    assert binding is not None
    assert (binding.waypoint, binding.reason, binding.closes) == (None, Reason.NOT_READY, True)
    assert binding.message.startswith('waypoint "default/waypoint" is not ready')
    assert words in binding.message
    condition = binding.condition()
    assert (condition.type, condition.status, condition.reason) == ("istio.io/WaypointBound", False, "WaypointIsNotReady")


def test_addresses_of_the_spec_count_where_nobody_writes_a_status() -> None:
    bound = service_of(gateway("waypoint", addresses=[{"value": "10.0.0.5"}]), labels={USE_WAYPOINT: "waypoint"})
    assert bound is not None
    assert bound.waypoint is not None
    assert bound.waypoint.addresses == ("10.0.0.5",)


@pytest.mark.parametrize(
    ("traffic", "services", "pods"),
    [(None, True, False), ("service", True, False), ("workload", False, True), ("all", True, True), ("none", False, False)],
)
def test_a_waypoint_serves_one_kind_of_addressing_or_both(traffic: str | None, services: bool, pods: bool) -> None:
    body = gateway("waypoint", "10.96.0.9", traffic=traffic)
    own = {USE_WAYPOINT: "waypoint"}
    for binding, served in ((service_of(body, labels=own), services), (pod_of(body, labels=own), pods)):
        assert binding is not None
        assert (binding.waypoint is not None) is served
        assert binding.reason is (Reason.ACCEPTED if served else Reason.UNSUPPORTED_TRAFFIC)
        assert not binding.closes
    inherited = pod_of(body, labelled(namespace("default"), **use("waypoint")))
    assert (inherited is not None) is pods  # one that is for services only is passed over without a word


def test_a_class_may_say_what_its_waypoints_are_for() -> None:
    body: Json = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "GatewayClass",
        "metadata": {"name": "mine", "labels": {"istio.io/waypoint-for": "workload"}},
        "spec": {"controllerName": "istio.io/mesh-controller"},
    }
    found = of(
        body, gateway("waypoint", "10.96.0.9", class_name="mine"), gateway("other", "10.96.0.9", class_name="mine", traffic="service")
    )
    assert found.by_key["default/waypoint"].traffic is Traffic.WORKLOAD
    assert found.by_key["default/other"].traffic is Traffic.SERVICE


def test_waypoints_have_no_waypoint() -> None:
    labels = {USE_WAYPOINT: "waypoint", MANAGED: MANAGED_WAYPOINT}
    assert service_of(READY, labels=labels) is None
    assert pod_of(READY, labels=labels) is None
    assert pod_of(READY, labels={USE_WAYPOINT: "waypoint", GATEWAY_NAME: "waypoint"}) is None


def test_a_headless_service_is_told_that_its_connections_go_another_way() -> None:
    """They go to its pods' addresses, where nobody can tell them from others; nothing may say that the waypoint's policies hold."""
    headless = labelled(service_manifest("web", selector={"app": "web"}), labels={USE_WAYPOINT: "waypoint"})
    item = parse(headless, "test")
    assert isinstance(item, ServiceObject)
    waypoints = of(READY)
    binding = waypoints.for_service(item.metadata, headless=True)
    assert_reason(binding, Reason.UNSUPPORTED_TRAFFIC)
    assert binding is not None
    assert "let its pods ask for a waypoint for workloads" in binding.message
    assert not binding.closes
    assert waypoints.bound("default/waypoint", [item], []).services == ()
    state = mesh(READY, headless, pod("web", "10.0.0.1", labels={"app": "web"}))
    (service,) = (each for each in state.services.values() if each.name == "web")
    assert service.waypoint is None


def test_a_private_entry_cannot_use_another_namespaces_waypoint() -> None:
    open_to_all = gateway(
        "waypoint", "10.96.0.9", namespace="infra", listeners=[{**HBONE_LISTENER, "allowedRoutes": {"namespaces": {"from": "All"}}}]
    )
    item = parse(labelled(service_manifest("web"), labels={USE_WAYPOINT: "waypoint", USE_WAYPOINT_NAMESPACE: "infra"}), "test")
    assert isinstance(item, ServiceObject)
    assert_reason(of(open_to_all).for_service(item.metadata, private=True), Reason.CROSS_NAMESPACE)


def test_ingress_goes_through_it_where_that_is_asked_for() -> None:
    own = {USE_WAYPOINT: "waypoint"}
    plain = service_of(READY, labels=own)
    assert plain is not None
    assert not plain.ingress
    assert "set the istio.io/ingress-use-waypoint label" in plain.message
    everybody = labelled(namespace("default"), labels={INGRESS_USE_WAYPOINT: "true"})
    through = service_of(READY, everybody, labels=own)
    assert through is not None
    assert through.ingress
    assert through.message == "Successfully attached to waypoint default/waypoint. Ingress traffic will traverse the waypoint"
    except_us = service_of(READY, everybody, labels={**own, INGRESS_USE_WAYPOINT: "false"})
    assert except_us is not None
    assert not except_us.ingress


@pytest.mark.parametrize(
    ("name", "weight", "share", "words"),
    [
        ("canary", "25", 25, "canary waypoint default/canary gets 25 %"),
        ("canary", None, 0, "gets 0 %"),
        ("canary", "101", 0, "CanaryInvalidWeight"),
        ("canary", "half", 0, "CanaryInvalidWeight"),
        ("waypoint", "25", 0, "CanarySameAsPrimary"),
        ("missing", "25", 0, "WaypointIsNotReady"),
    ],
)
def test_a_canary_gets_its_share_or_the_status_says_why_not(name: str, weight: str | None, share: int, words: str) -> None:
    annotations = {} if weight is None else {CANARY_WEIGHT: weight}
    binding = service_of(READY, gateway("canary", "10.96.0.8"), labels={USE_WAYPOINT: "waypoint", CANARY: name}, annotations=annotations)
    assert binding is not None
    assert binding.waypoint is not None
    assert (binding.canary_weight, binding.canary is not None) == (share, share > 0)
    assert words in binding.message


def test_a_namespaces_canary_is_for_services_without_a_label_of_their_own() -> None:
    everybody = labelled(namespace("default"), labels={USE_WAYPOINT: "waypoint", CANARY: "canary"}, annotations={CANARY_WEIGHT: "50"})
    inherited = service_of(READY, gateway("canary", "10.96.0.8"), everybody)
    assert inherited is not None
    assert inherited.canary_weight == 50
    own = service_of(READY, gateway("canary", "10.96.0.8"), everybody, labels={USE_WAYPOINT: "waypoint"})
    assert own is not None
    assert own.canary is None


def test_a_foreign_proxys_pods_get_what_the_annotation_says() -> None:
    front = parse(pod("nginx", "10.0.0.9", labels={GATEWAY_NAME: "waypoint"}), "test")
    assert isinstance(front, Pod)
    for text, sandwich in (("PROXY/15088", Sandwich("PROXY", 15088)), ("NONE", Sandwich("NONE"))):
        body = labelled(gateway("waypoint", "10.96.0.9", class_name="foreign"), annotations={INBOUND_BINDING: text})
        assert of(body).sandwich_of(front.metadata) == sandwich
    assert of(READY).sandwich_of(front.metadata) is None
    allowed = {"allowedRoutes": {"namespaces": {"from": "All"}}}
    inner = labelled(
        gateway("waypoint", "10.96.0.9", listeners=[{"name": "in", "port": 15088, "protocol": "istio.io/PROXY", **allowed}]),
        annotations={INBOUND_BINDING: "PROXY/15088"},
    )
    assert of(inner).by_key["default/waypoint"].allowed.namespaces.value == "All"


def test_what_one_waypoint_serves() -> None:
    bodies = [
        READY,
        gateway("canary", "10.96.0.8"),
        labelled(
            service_manifest("web", "10.96.0.1"), labels={USE_WAYPOINT: "waypoint", CANARY: "canary"}, annotations={CANARY_WEIGHT: "5"}
        ),
        service_manifest("plain", "10.96.0.2"),
        labelled(service_manifest("name"), **use("waypoint")) | {"spec": {"type": "ExternalName"}},
        pod("a", "10.0.0.1", labels={USE_WAYPOINT: "waypoint"}),
        pod("b", "10.0.0.2"),
    ]
    items = [parse(body, "test") for body in bodies]
    services = [each for each in items if isinstance(each, ServiceObject)]
    pods = [each for each in items if isinstance(each, Pod)]
    bound = Waypoints.of(items).bound("default/waypoint", services, pods)
    assert [each.metadata.name for each, _ in bound.services] == ["web"]
    assert [(each.metadata.name, binding.reason) for each, binding in bound.pods] == [("a", Reason.ACCEPTED)]
    canary = Waypoints.of(items).bound("default/canary", services, pods)
    assert [each.metadata.name for each, _ in canary.services] == ["web"]
    assert canary.pods == ()


def conditions(body: Json) -> dict[str, tuple[bool, str]]:
    item = parse(body, "test")
    assert isinstance(item, GatewayObject)
    return {each.type: (each.status, each.reason) for each in gateway_conditions(item)}


def test_conditions_of_a_gateway() -> None:
    ready = {"Accepted": (True, "Accepted"), "Programmed": (True, "Programmed"), "ResolvedRefs": (True, "ResolvedRefs")}
    assert conditions(READY) == ready
    assert conditions(gateway("waypoint")) == {**ready, "Programmed": (False, "AddressNotAssigned")}
    assert conditions(gateway("waypoint", traffic="x"))["Accepted"] == (False, "InvalidParameters")
    assert conditions(gateway("waypoint", class_name="nginx"))["Accepted"] == (False, "InvalidParameters")
    assert conditions(gateway("waypoint", defaultScope="All"))["Accepted"] == (False, "InvalidParameters")
    odd = labelled(gateway("waypoint"), annotations={INBOUND_BINDING: "x"})
    assert conditions(odd)["Accepted"] == (False, "InvalidParameters")


def listener_of(*listeners: Json, class_name: str = "istio-waypoint") -> dict[str, tuple[bool, str]]:
    item = parse(gateway("waypoint", listeners=listeners, class_name=class_name), "test")
    assert isinstance(item, GatewayObject)
    return {each.type: (each.status, each.reason) for each in listener_conditions(item, item.listeners[0])}


def test_conditions_of_a_listener() -> None:
    http: Json = {"name": "http", "port": 80, "protocol": "HTTP"}
    assert listener_of(HBONE_LISTENER)["Accepted"] == (True, "Accepted")
    assert listener_of(http)["Accepted"] == (False, "UnsupportedProtocol")
    assert listener_of(http)["Programmed"] == (False, "Invalid")
    assert listener_of(HBONE_LISTENER, http)["Accepted"] == (False, "UnsupportedProtocol")
    assert listener_of(http, class_name="istio") == {
        "Accepted": (True, "Accepted"),
        "Conflicted": (False, "NoConflicts"),
        "Programmed": (True, "Programmed"),
        "ResolvedRefs": (True, "ResolvedRefs"),
    }
    twice = listener_of(http, {**http, "name": "again"}, class_name="istio")
    assert (twice["Conflicted"], twice["Programmed"]) == ((True, "HostnameConflict"), (False, "Invalid"))
