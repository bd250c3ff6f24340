"""What a policy is attached to."""

from __future__ import annotations

import pytest

from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.selectors import read_selector, targets_waypoint


def spec(**members: object) -> Field:
    return Field("AuthorizationPolicy default/x", "spec", members)


def test_a_selector_is_its_labels() -> None:
    assert read_selector(spec()) is None
    assert read_selector(spec(selector={})) == {}
    assert read_selector(spec(selector={"matchLabels": {"app": "x"}})) == {"app": "x"}


def test_labels_outside_match_labels_are_refused() -> None:
    with pytest.raises(ManifestError, match=r"spec\.selector\.app: unknown field"):
        read_selector(spec(selector={"app": "x"}))
    with pytest.raises(ManifestError, match=r"spec\.selector\.matchExpressions: unknown field"):
        read_selector(spec(selector={"matchExpressions": []}))


def test_target_refs_mean_a_waypoint() -> None:
    reference = {"kind": "Gateway", "name": "waypoint", "group": "gateway.networking.k8s.io"}
    assert not targets_waypoint(spec())
    assert not targets_waypoint(spec(targetRefs=[]))
    assert targets_waypoint(spec(targetRefs=[reference]))
    assert targets_waypoint(spec(targetRef=reference))


def test_hostile_target_refs_are_refused() -> None:
    with pytest.raises(ManifestError, match=r"spec\.selector: a policy has a selector or targetRefs, not both"):
        targets_waypoint(spec(targetRef={"kind": "Gateway", "name": "w"}, selector={}))
    with pytest.raises(ManifestError, match=r"spec\.targetRefs\[0\]\.kind: required"):
        targets_waypoint(spec(targetRefs=[{}]))
    with pytest.raises(ManifestError, match=r"spec\.targetRefs: not a list"):
        targets_waypoint(spec(targetRefs="x"))
