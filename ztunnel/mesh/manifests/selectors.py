"""What a policy is attached to: the part that Istio's policy kinds have in common; and Kubernetes' label selectors."""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class Expression:
    """One of `matchExpressions`: `operator` is In, NotIn, Exists or DoesNotExist."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def holds(self, labels: Mapping[str, str]) -> bool:
        """Whether labels satisfy it. NotIn also holds where the key is absent, as in Kubernetes."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case _:
                return self.key not in labels


@dataclass(frozen=True, slots=True)
class LabelSelector:
    """Kubernetes' LabelSelector; an empty one matches everything."""

    labels: tuple[tuple[str, str], ...] = ()
    expressions: tuple[Expression, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether labels satisfy all of it."""
        return all(labels.get(key) == value for key, value in self.labels) and all(each.holds(labels) for each in self.expressions)


EVERYTHING = LabelSelector()


def read_label_selector(place: Field) -> LabelSelector:
    """A LabelSelector; an absent one is empty.

    Raises:
        ManifestError: an unknown field or operator, or values that do not fit the operator.
    """
    place.only(("matchLabels", "matchExpressions"))
    return LabelSelector(
        tuple(sorted(place.get("matchLabels").labels().items())),
        tuple(_expression(each) for each in place.get("matchExpressions").items()),
    )


def _expression(place: Field) -> Expression:
    place.only(("key", "operator", "values"))
    operator = place.get("operator").text()
    if operator not in ("In", "NotIn", "Exists", "DoesNotExist"):
        raise place.get("operator").wrong("not one of In, NotIn, Exists, DoesNotExist")
    values = tuple(each.label_value() for each in place.get("values").items())
    if bool(values) is not (operator in ("In", "NotIn")):
        raise place.get("values").error("In and NotIn need values, Exists and DoesNotExist have none")
    return Expression(place.get("key").text(), operator, values)
