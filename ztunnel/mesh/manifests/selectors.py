"""What a policy is attached to: the part that Istio's policy kinds have in common."""

from __future__ import annotations

from ztunnel.mesh.manifests.fields import Field

SPEC = ("apiVersion", "kind", "metadata", "spec", "status")
"""The members of a policy document."""


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


def targets_waypoint(spec: Field) -> bool:
    """Whether the policy is attached by `targetRef(s)`, so that a waypoint enforces it and L4 does not.

    Raises:
        ManifestError: references of the wrong type, or beside a selector.
    """
    several, one = spec.get("targetRefs"), spec.get("targetRef")
    references = [*several.items(), *([] if one.absent else [one])]
    for reference in references:
        reference.get("kind").text()
        reference.get("name").text()
    if references and not spec.get("selector").absent:
        raise spec.get("selector").error("a policy has a selector or targetRefs, not both")
    return bool(references)
