"""What becomes of a namespace's pods and of their connections when it joins or leaves the mesh. Pure: before and after, compared.

Nobody counts the connections of pods that are not in the mesh, so what is said of live connections is what will be done with them, not
how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ztunnel.mesh.derive import Capture, MeshOptions, MeshState, derive
from ztunnel.mesh.enrolment import MODE_LABEL
from ztunnel.mesh.manifests.core import Namespace
from ztunnel.mesh.manifests.metadata import Metadata, ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.rules import Action, Policy, Scope

_STRICT = "PeerAuthentication"
_NAMED = 8
_KEPT = "go on as they are, untunnelled and unjudged, until they end"
_CUT = "are ended: it takes no plaintext (PeerAuthentication STRICT)"
_DRAINED = "go on through their tunnels until they end; new ones are plaintext"
_SAME = "are not touched"


@dataclass(frozen=True, slots=True)
class PodPlan:
    """One pod. `becomes`: captured, released, or the empty text where nothing changes."""

    name: str
    node: str
    becomes: str
    connections: str
    """What happens to those that it has."""
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a label on a namespace changes. `warnings` are sentences."""

    namespace: str
    joins: bool
    pods: tuple[PodPlan, ...]
    warnings: tuple[str, ...]

    @property
    def changed(self) -> int:
        """Pods that come in or go out."""
        return sum(bool(pod.becomes) for pod in self.pods)


def plan(objects: Mapping[ObjectKey, KubeObject], namespace: str, joins: bool, options: MeshOptions) -> Plan:
    """The plan for one namespace.

    Args:
        objects: of the mesh; at least the namespaces, this one's pods and services, and all policies.
        joins: false: it leaves.
    """
    key = ObjectKey("Namespace", "", namespace)
    known = objects.get(key)
    metadata = known.metadata if isinstance(known, Namespace) else Metadata(namespace)
    labels = {name: value for name, value in metadata.labels.items() if name != MODE_LABEL} | ({MODE_LABEL: "ambient"} if joins else {})
    before = derive(objects, options)
    after = derive({**objects, key: Namespace(replace(metadata, labels=labels))}, options)
    captures = [capture for capture in after.captures.values() if capture.namespace == namespace]
    pods = tuple(_pod(before.captures[each.uid], each) for each in sorted(captures, key=lambda each: each.name))
    if not joins:
        warnings = tuple(_on_leaving(before, namespace))
    elif pods and not any(pod.becomes for pod in pods):
        warnings = ()
    else:
        warnings = tuple(_on_joining(before, after, namespace))
    return Plan(namespace, joins, pods, warnings)


def _pod(old: Capture, new: Capture) -> PodPlan:
    if old.wanted is new.wanted:
        return PodPlan(new.name, new.node, "", _SAME, new.reason)
    if not new.wanted:
        return PodPlan(new.name, new.node, "released", _DRAINED, new.reason)
    return PodPlan(new.name, new.node, "captured", _CUT if new.strict else _KEPT, new.reason)


def _on_joining(before: MeshState, after: MeshState, namespace: str) -> Iterator[str]:
    """What is in force from then on, and was not."""
    allowing = sorted(policy.name for policy in _policies(after, namespace) if policy.action is Action.ALLOW and policy.kind != _STRICT)
    if allowing:
        yield (
            f"AuthorizationPolicies that ALLOW come into force ({_listed(allowing)}): "
            "who is in no rule of theirs is refused, and clients outside of the mesh have no identity"
        )
    strict = sorted(each.name for each in after.captures.values() if each.namespace == namespace and each.strict and each.wanted)
    if strict:
        yield f"{len(strict)} pods take no plaintext: clients outside of the mesh are refused (with probes.enabled, kubelet is not)"
    for service in sorted(after.services.values(), key=lambda each: each.key):
        if service.namespace == namespace and service.waypoint is not None and service.waypoint.problem:
            yield f"service {service.name}: clients in the mesh are refused until its waypoint is ready: {service.waypoint.problem}"
    if not any(capture.namespace == namespace for capture in before.captures.values()):
        yield "it has no pods yet: what is started there from then on is in the mesh"


def _on_leaving(before: MeshState, namespace: str) -> Iterator[str]:
    """What was in force, and is not from then on."""
    names = sorted(policy.name for policy in _policies(before, namespace) if policy.kind != _STRICT)
    if names:
        yield f"its AuthorizationPolicies ({_listed(names)}) are enforced by nobody on its pods' ports"
    elsewhere = [policy for policy in before.policies.values() if policy.namespace != namespace]
    if any(policy.kind == _STRICT for policy in elsewhere):
        yield "pods elsewhere that take no plaintext (PeerAuthentication STRICT) refuse its pods from then on"
    if any(
        policy.action is Action.ALLOW and policy.kind != _STRICT and policy.namespace != namespace for policy in before.policies.values()
    ):
        yield "policies elsewhere that allow its identities do not know its pods any more"


def _policies(state: MeshState, namespace: str) -> list[Policy]:
    """Those that concern the pods of a namespace."""
    return [
        policy
        for policy in state.policies.values()
        if not policy.dry_run and (policy.namespace == namespace or (policy.scope is Scope.GLOBAL))
    ]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
