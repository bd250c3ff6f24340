"""Where policies are attached, for whom they count, and what their status says."""

from __future__ import annotations

import pytest

from tests.kit.builders import authorization, mesh, namespace, pod, service_manifest
from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.attach import ProxyTarget, ServiceTarget, World, attached, condition, placed_policies
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.l7.security import L7Action
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject, RefusedPolicy, key, parse
from ztunnel.mesh.refused import stand_in

PROXY = ProxyTarget("shop", "waypoint")
REVIEWS = ServiceTarget("shop", "reviews")
GATEWAY_GROUP = "gateway.networking.k8s.io"


def ref(kind: str, name: str) -> dict[str, object]:
    groups = {"Service": "", "ServiceEntry": "networking.istio.io"}
    return {"kind": kind, "name": name, "group": groups.get(kind, GATEWAY_GROUP)}


def attach_to(name: str, *refs: dict[str, object], namespace: str = "shop", **spec: object) -> KubeObject:
    body = {**authorization(name, namespace=namespace), "spec": {"targetRefs": list(refs), **spec}}
    try:
        return parse(body, "test")
    except ManifestError as error:
        refused = stand_in(body, error)
        assert refused is not None
        return refused


def names(*objects: KubeObject, proxy: ProxyTarget = PROXY, service: ServiceTarget | None = REVIEWS) -> list[str]:
    return [policy.key for policy in attached(placed_policies(objects), proxy, service, "istio-system")]


def test_a_service_has_its_own_policies_and_those_of_its_proxy() -> None:
    policies = (
        attach_to("z", ref("Gateway", "waypoint")),
        attach_to("a", ref("Service", "reviews")),
        attach_to("b", ref("Service", "ratings"), ref("Service", "reviews")),
        attach_to("other", ref("Service", "ratings")),
        attach_to("elsewhere", ref("Service", "reviews"), ref("Gateway", "waypoint"), namespace="lab"),
        attach_to("entry", ref("ServiceEntry", "reviews")),
        attach_to("class", ref("GatewayClass", "istio-waypoint"), namespace="istio-system"),
        attach_to("wrong-class", ref("GatewayClass", "istio"), namespace="istio-system"),
        attach_to("class-elsewhere", ref("GatewayClass", "istio-waypoint")),
        parse(authorization("selector", namespace="shop"), "test"),
    )
    assert names(*policies) == ["istio-system/class", "shop/a", "shop/b", "shop/z"]
    assert names(*policies, service=None) == ["istio-system/class", "shop/z"]
    assert names(*policies, service=ServiceTarget("shop", "reviews", "ServiceEntry")) == ["istio-system/class", "shop/entry", "shop/z"]


def test_a_refused_policy_denies_what_it_was_attached_to() -> None:
    refused = attach_to("x", ref("Service", "reviews"), rules=5)
    (policy,) = attached(placed_policies([refused]), PROXY, REVIEWS, "istio-system")
    assert policy.action is L7Action.DENY
    assert "spec.rules: not a list" in policy.reason
    assert names(refused, service=ServiceTarget("shop", "ratings")) == []


def test_a_refused_policy_with_unreadable_targets_denies_its_namespace() -> None:
    refused = attach_to("x", {"kind": "Servis", "name": "reviews"})
    assert names(refused, service=None) == ["shop/x"]
    assert names(refused, proxy=ProxyTarget("lab", "waypoint"), service=ServiceTarget("lab", "x")) == []
    assert names(refused, proxy=ProxyTarget("lab", "waypoint")) == ["shop/x"]


def test_a_policy_with_a_selector_beside_its_targets_denies_at_waypoints_too() -> None:
    refused = attach_to("x", ref("Service", "reviews"), selector={"matchLabels": {"app": "other"}})
    assert names(refused) == ["shop/x"]


def test_l4_leaves_a_refused_policy_to_the_waypoint_only_if_its_targets_are_known() -> None:
    body = authorization("x", targetRefs=[ref("Gateway", "w")], rules=5)
    with pytest.raises(ManifestError):
        mesh(body)
    from_targets = stand_in(body, ManifestError("s", "f", "r"))
    unknown = stand_in({**body, "spec": {"targetRefs": 5}}, ManifestError("s", "f", "r"))
    assert isinstance(from_targets, RefusedPolicy)
    assert isinstance(unknown, RefusedPolicy)
    assert (len(from_targets.targets), unknown.targets) == (1, ())


def accepted(holds: bool, reason: str, message: str) -> Condition:
    return Condition("WaypointAccepted", holds, reason, message)


WORLD = World(
    root_namespace="istio-system",
    gateways={("shop", "waypoint"): "istio-waypoint"},
    services={REVIEWS: "shop/waypoint", ServiceTarget("shop", "lonely"): ""},
    classes={"istio-waypoint": True, "nginx": False},
)


@pytest.mark.parametrize(
    ("refs", "namespace", "found"),
    [
        ([ref("Service", "reviews")], "shop", accepted(True, "Accepted", "bound to shop/waypoint")),
        ([ref("Gateway", "waypoint")], "shop", accepted(True, "Accepted", "bound to shop/waypoint")),
        (
            [ref("GatewayClass", "istio-waypoint")],
            "istio-system",
            accepted(True, "Accepted", "bound to GatewayClass istio-waypoint"),
        ),
        ([ref("Service", "gone")], "shop", accepted(False, "TargetNotFound", "Service shop/gone was not found")),
        ([ref("Gateway", "gone")], "shop", accepted(False, "TargetNotFound", "Gateway shop/gone was not found")),
        ([ref("GatewayClass", "gone")], "istio-system", accepted(False, "TargetNotFound", "GatewayClass gone was not found")),
        ([ref("Service", "lonely")], "shop", accepted(False, "AncestorNotBound", "Service shop/lonely is not bound to a waypoint")),
        (
            [ref("GatewayClass", "istio-waypoint")],
            "shop",
            accepted(False, "Invalid", "GatewayClass istio-waypoint can only be targeted from the root namespace istio-system"),
        ),
        ([ref("GatewayClass", "nginx")], "istio-system", accepted(False, "Invalid", "GatewayClass nginx has another controller")),
        (
            [ref("Service", "gone"), ref("Service", "reviews")],
            "shop",
            accepted(True, "PartiallyInvalid", "bound to shop/waypoint. Invalid targetRefs: Service shop/gone was not found"),
        ),
    ],
)
def test_conditions(refs: list[dict[str, object]], namespace: str, found: Condition) -> None:
    (placed,) = placed_policies([attach_to("x", *refs, namespace=namespace)])
    assert condition(placed, WORLD) == found


def test_a_proxy_is_told_which_policies_are_for_whom() -> None:
    mine, everywhere = ref("Service", "web"), ref("Gateway", "waypoint")
    authenticated = {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": {"name": "jwt", "namespace": "shop"},
        "spec": {"targetRefs": [everywhere], "jwtRules": [{"issuer": "i"}]},
    }
    bodies = [
        namespace("shop"),
        service_manifest("web", "10.96.0.1", namespace="shop", ports=[{"port": 80, "name": "http"}]),
        pod("a", "10.0.0.1", namespace="shop"),
        {**authorization("own", namespace="shop"), "spec": {"targetRefs": [mine], "rules": [{}]}},
        {**authorization("all", namespace="shop"), "spec": {"targetRefs": [everywhere], "action": "DENY"}},
        {**authorization("other", namespace="shop"), "spec": {"targetRefs": [ref("Service", "x")]}},
        authenticated,
    ]
    objects = {key(each): each for each in (parse(body, "test") for body in bodies)}
    bound = Bound(frozenset({"shop/web.shop.svc.cluster.local"}), frozenset({"uid-a"}))
    config = derive_proxy(objects, mesh(*bodies), MeshOptions(), ObjectKey("Gateway", "shop", "waypoint"), bound)
    (service,), (workload,) = config.services, config.workloads
    assert (service.policies, service.jwt) == (("shop/all", "shop/own"), ("shop/jwt",))
    assert (workload.policies, workload.jwt) == (("shop/all",), ("shop/jwt",))
    assert (sorted(config.policies), sorted(config.authentications)) == (["shop/all", "shop/own"], ["shop/jwt"])


def test_conditions_tell_what_is_not_in_force_as_written() -> None:
    reviews = ref("Service", "reviews")
    (refused,) = placed_policies([attach_to("x", reviews, rules=5)])
    told = condition(refused, WORLD)
    assert told is not None
    assert (told.status, told.reason) == (False, "Invalid")
    assert "spec.rules: not a list" in told.message
    unknown = {"when": [{"key": "experimental.envoy.filters.x[y]", "values": ["z"]}]}
    (partly,) = placed_policies([attach_to("x", reviews, rules=[unknown])])
    told = condition(partly, WORLD)
    assert told is not None
    assert (told.status, told.reason) == (True, "Accepted")
    assert told.message.startswith("bound to shop/waypoint. spec.rules[0] never matches: it needs what a proxy does not know")
