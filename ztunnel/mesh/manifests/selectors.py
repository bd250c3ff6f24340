"""What a policy is attached to: the part that Istio's policy kinds have in common."""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.manifests.fields import Field

SPEC = ("apiVersion", "kind", "metadata", "spec", "status")
"""The members of a policy document."""
MAX_TARGETS = 16
"""As Istio has it."""
_GROUPS = {
    "Service": ("", "core"),
    "ServiceEntry": ("networking.istio.io",),
    "Gateway": ("gateway.networking.k8s.io",),
    "GatewayClass": ("gateway.networking.k8s.io",),
}


@dataclass(frozen=True, slots=True)
class TargetRef:
    """One thing that a policy is attached to, in the policy's own namespace; a GatewayClass has none."""

    kind: str
    """Service, ServiceEntry, Gateway or GatewayClass."""
    name: str


def read_selector(spec: Field) -> dict[str, str] | None:
    """The labels that a policy selects pods by; None when it has no selector (then it is for its whole namespace).

    Raises:
        ManifestError: anything but `matchLabels`, which would be ignored and so widen what is selected.
    """
    selector = spec.get("selector")
    if selector.absent:
        return None
    selector.only(("matchLabels",))
    return selector.get("matchLabels").labels()


def read_targets(spec: Field) -> tuple[TargetRef, ...]:
    """What the policy is attached to by `targetRef(s)`: then a waypoint or a gateway enforces it and L4 does not.

    Raises:
        ManifestError: references of the wrong type, to another namespace, to something that cannot be a target, too many, or beside
            a selector.
    """
    several, one = spec.get("targetRefs"), spec.get("targetRef")
    references = [*several.items(MAX_TARGETS), *([] if one.absent else [one])]
    targets = tuple(_target(reference) for reference in references)
    if targets and not spec.get("selector").absent:
        raise spec.get("selector").error("a policy has a selector or targetRefs, not both")
    return tuple(dict.fromkeys(targets))


def _target(place: Field) -> TargetRef:
    place.only(("group", "kind", "name", "namespace"))
    kind, name = place.get("kind").text(), place.get("name").name()
    if kind not in _GROUPS:
        raise place.get("kind").wrong(f"not one of {', '.join(_GROUPS)}")
    group = place.get("group")
    if not group.absent and (group.value or "") not in _GROUPS[kind]:
        raise group.wrong(f"not the group of {kind} ({' or '.join(name or 'empty' for name in _GROUPS[kind])})")
    if not place.get("namespace").absent:
        raise place.get("namespace").error("a policy is attached to objects of its own namespace")
    return TargetRef(kind, name)
