"""Which policies a proxy enforces for whom: `targetRefs` of policies against a proxy and the services that it serves. Pure.

A policy reaches what it names in its own namespace: a Service or ServiceEntry that is served, a Gateway (all that it serves), or a
GatewayClass (every proxy of it), the last only from the root namespace. Without targetRefs a policy is for pods, by selector: ztunnel
enforces it, no waypoint does; but an ingress gateway does for its own pods, which no ztunnel stands in front of.
Source: Istio `pilot/pkg/model/policyattachment.go`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ztunnel.mesh.authentication import selects
from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.l7.security import JwtAuthentication, L7Policy
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.authorization_l7 import refused_l7_policy
from ztunnel.mesh.manifests.parse import KubeObject, RefusedPolicy
from ztunnel.mesh.manifests.request_authentication import RequestAuthenticationObject, refused_authentication
from ztunnel.mesh.manifests.selectors import TargetRef

WAYPOINT_CLASS = "istio-waypoint"


_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Placed(Generic[_Value]):
    """A policy of any kind, and where its object says that it belongs."""

    namespace: str
    name: str
    value: _Value
    targets: tuple[TargetRef, ...] = ()
    whole_namespace: bool = False
    """It was refused, and not even its targets could be read: for everything in its namespace."""
    whole_mesh: bool = False
    """Nor its namespace."""
    refused: str = ""
    """Why this stands in the place of what was written."""
    note: str = ""
    """What of it is not enforced as written."""
    selected: bool = False
    """It selects the pods of the proxy, an ingress gateway."""


@dataclass(frozen=True, slots=True)
class ProxyTarget:
    """The Gateway that a proxy is."""

    namespace: str
    name: str
    gateway_class: str = WAYPOINT_CLASS


@dataclass(frozen=True, slots=True)
class SelectedPods:
    """The pods of an ingress gateway: policies without targetRefs are for them as for any pod, and no ztunnel enforces those."""

    namespace: str
    labels: Mapping[str, str]
    root_namespace: str

    def are_selected(self, namespace: str, selector: Mapping[str, str] | None) -> bool:
        """Whether a policy of a namespace is for them, by its selector (None: all pods)."""
        return namespace in (self.namespace, self.root_namespace) and selects(selector or {}, self.labels)


@dataclass(frozen=True, slots=True)
class ServiceTarget:
    """A Service or ServiceEntry that a proxy serves."""

    namespace: str
    name: str
    kind: str = "Service"


def placed_policies(objects: Iterable[KubeObject], pods: SelectedPods | None = None) -> tuple[Placed[L7Policy], ...]:
    """The AuthorizationPolicies that proxies enforce, refused ones included, in order of namespace and name.

    Args:
        pods: an ingress gateway's, for the policies that select them.
    """
    found: list[Placed[L7Policy]] = []
    for item in objects:
        match item:
            case AuthorizationPolicyObject(metadata=metadata, layer7=L7Policy() as policy):
                found.append(Placed(metadata.namespace, metadata.name, policy, item.targets, note=policy.reason))
            case AuthorizationPolicyObject(metadata=metadata) if pods and pods.are_selected(metadata.namespace, item.selector):
                cannot = "it selects the pods of a gateway, which cannot enforce it"
                policy = item.at_gateways or refused_l7_policy(metadata.name, metadata.namespace, cannot)
                found.append(Placed(metadata.namespace, metadata.name, policy, selected=True))
            case RefusedPolicy(key=key, selector=dict()) if key.kind == "AuthorizationPolicy":
                if pods and pods.are_selected(key.namespace, item.selector):
                    policy = refused_l7_policy(key.name, key.namespace, item.reason)
                    found.append(Placed(key.namespace, key.name, policy, selected=True))
            case RefusedPolicy(key=key, selector=None) if key.kind == "AuthorizationPolicy":
                policy = refused_l7_policy(key.name, key.namespace, item.reason)
                found.append(Placed(key.namespace, key.name, policy, item.targets, not item.targets, item.everywhere, item.reason))
            case _:
                pass
    return _in_order(found)


def placed_authentications(objects: Iterable[KubeObject], pods: SelectedPods | None = None) -> tuple[Placed[JwtAuthentication], ...]:
    """The RequestAuthentications likewise."""
    found: list[Placed[JwtAuthentication]] = []
    for item in objects:
        match item:
            case RequestAuthenticationObject(metadata=metadata) if item.targets:
                found.append(Placed(metadata.namespace, metadata.name, item.authentication, item.targets))
            case RequestAuthenticationObject(metadata=metadata) if pods and pods.are_selected(metadata.namespace, item.selector):
                found.append(Placed(metadata.namespace, metadata.name, item.authentication, selected=True))
            case RefusedPolicy(key=key, selector=None) if key.kind == "RequestAuthentication":
                authentication = refused_authentication(key.name, key.namespace, item.reason)
                found.append(Placed(key.namespace, key.name, authentication, item.targets, not item.targets, item.everywhere, item.reason))
            case _:
                pass
    return _in_order(found)


def _in_order(found: Iterable[Placed[_Value]]) -> tuple[Placed[_Value], ...]:
    return tuple(sorted(found, key=lambda each: (each.namespace, each.name)))


def applies_to_proxy(placed: Placed[_Value], proxy: ProxyTarget, root_namespace: str) -> bool:
    """Whether a policy is for all that a proxy serves."""
    if placed.selected or placed.whole_mesh or (placed.whole_namespace and placed.namespace in (proxy.namespace, root_namespace)):
        return True
    return any(_names_proxy(target, placed.namespace, proxy, root_namespace) for target in placed.targets)


def applies_to_service(placed: Placed[_Value], service: ServiceTarget) -> bool:
    """Whether a policy names this service."""
    if placed.namespace != service.namespace:
        return False
    return placed.whole_namespace or TargetRef(service.kind, service.name) in placed.targets


def attached(
    policies: Iterable[Placed[_Value]], proxy: ProxyTarget, service: ServiceTarget | None, root_namespace: str
) -> tuple[_Value, ...]:
    """What holds for one service behind a proxy, in the order of `policies`.

    Args:
        service: None for what is addressed otherwise (a pod, a gateway's host): only what is for the whole proxy.
    """
    return tuple(
        placed.value
        for placed in policies
        if applies_to_proxy(placed, proxy, root_namespace) or (service is not None and applies_to_service(placed, service))
    )


def _names_proxy(target: TargetRef, namespace: str, proxy: ProxyTarget, root_namespace: str) -> bool:
    if target.kind == "Gateway":
        return (namespace, target.name) == (proxy.namespace, proxy.name)
    return target.kind == "GatewayClass" and namespace == root_namespace and target.name == proxy.gateway_class


@dataclass(frozen=True, slots=True)
class Held:
    """Keys of what applies to one service or pod."""

    policies: tuple[str, ...] = ()
    authentications: tuple[str, ...] = ()


class Security:
    """Policies and authentications of one proxy, and which of them apply to what it serves."""

    def __init__(self, objects: Iterable[KubeObject], proxy: ProxyTarget, root_namespace: str, pods: SelectedPods | None = None) -> None:
        """
        Args:
            pods: an ingress gateway's.
        """
        listed = list(objects)
        self._proxy = proxy
        self._root_namespace = root_namespace
        self._policies = placed_policies(listed, pods)
        self._authentications = placed_authentications(listed, pods)
        self.policies: dict[str, L7Policy] = {}
        """Those that apply to anything that was asked about, by key."""
        self.authentications: dict[str, JwtAuthentication] = {}

    def of(self, service: ServiceTarget | None) -> Held:
        """What applies to a service, or to anything else behind the proxy."""
        policies = attached(self._policies, self._proxy, service, self._root_namespace)
        authentications = attached(self._authentications, self._proxy, service, self._root_namespace)
        self.policies.update({each.key: each for each in policies})
        self.authentications.update({each.key: each for each in authentications})
        return Held(tuple(each.key for each in policies), tuple(each.key for each in authentications))


# Conditions.


CONDITION = "WaypointAccepted"


class AttachmentReason:
    """Closed set of reasons of `WaypointAccepted`."""

    ACCEPTED = "Accepted"
    PARTIALLY_INVALID = "PartiallyInvalid"
    TARGET_NOT_FOUND = "TargetNotFound"
    NOT_BOUND = "AncestorNotBound"
    INVALID = "Invalid"


@dataclass(frozen=True, slots=True)
class World:
    """What conditions depend on."""

    root_namespace: str
    gateways: Mapping[tuple[str, str], str]
    """Class by (namespace, name)."""
    services: Mapping[ServiceTarget, str]
    """`namespace/name` of the waypoint that serves it, or empty."""
    classes: Mapping[str, bool]
    """Whether a GatewayClass is of a controller of ours, by name."""


def condition(policy: Placed[_Value], world: World) -> Condition | None:
    """What to say of a policy's attachment; None for one without targetRefs."""
    if policy.refused:
        return Condition(CONDITION, False, AttachmentReason.INVALID, policy.refused)
    if not policy.targets:
        return None
    bound: list[str] = []
    problems: list[tuple[str, str]] = []
    for target in policy.targets:
        place, problem = _judge(target, policy.namespace, world)
        if problem is None:
            bound.append(place)
        else:
            problems.append(problem)
    if not problems:
        said = f"bound to {', '.join(bound)}"
        return Condition(CONDITION, True, AttachmentReason.ACCEPTED, f"{said}. {policy.note}" if policy.note else said)
    text = "; ".join(message for _, message in problems)
    if bound:
        return Condition(CONDITION, True, AttachmentReason.PARTIALLY_INVALID, f"bound to {', '.join(bound)}. Invalid targetRefs: {text}")
    return Condition(CONDITION, False, problems[0][0], text)


def _judge(target: TargetRef, namespace: str, world: World) -> tuple[str, tuple[str, str] | None]:
    """Where a target leads, or the reason and message why nowhere."""
    judge = _JUDGES[target.kind]
    return judge(target, namespace, world)


def _judge_service(target: TargetRef, namespace: str, world: World) -> tuple[str, tuple[str, str] | None]:
    place = f"{target.kind} {namespace}/{target.name}"
    waypoint = world.services.get(ServiceTarget(namespace, target.name, target.kind))
    if waypoint is None:
        return "", (AttachmentReason.TARGET_NOT_FOUND, f"{place} was not found")
    if not waypoint:
        return "", (AttachmentReason.NOT_BOUND, f"{place} is not bound to a waypoint")
    return waypoint, None


def _judge_gateway(target: TargetRef, namespace: str, world: World) -> tuple[str, tuple[str, str] | None]:
    if (namespace, target.name) not in world.gateways:
        return "", (AttachmentReason.TARGET_NOT_FOUND, f"Gateway {namespace}/{target.name} was not found")
    return f"{namespace}/{target.name}", None


def _judge_class(target: TargetRef, namespace: str, world: World) -> tuple[str, tuple[str, str] | None]:
    if namespace != world.root_namespace:
        return "", (
            AttachmentReason.INVALID,
            f"GatewayClass {target.name} can only be targeted from the root namespace {world.root_namespace}",
        )
    ours = world.classes.get(target.name)
    if ours is None:
        return "", (AttachmentReason.TARGET_NOT_FOUND, f"GatewayClass {target.name} was not found")
    if not ours:
        return "", (AttachmentReason.INVALID, f"GatewayClass {target.name} has another controller")
    return f"GatewayClass {target.name}", None


_JUDGES: Mapping[str, Callable[[TargetRef, str, World], tuple[str, tuple[str, str] | None]]] = {
    "Service": _judge_service,
    "ServiceEntry": _judge_service,
    "Gateway": _judge_gateway,
    "GatewayClass": _judge_class,
}
