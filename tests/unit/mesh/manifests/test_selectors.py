"""What a policy is attached to."""

from __future__ import annotations

import pytest

from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.selectors import TargetRef, read_selector, read_targets


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


GATEWAY = {"kind": "Gateway", "name": "waypoint", "group": "gateway.networking.k8s.io"}


def test_target_refs_are_objects_of_the_policys_namespace() -> None:
    assert read_targets(spec()) == read_targets(spec(targetRefs=[])) == ()
    assert read_targets(spec(targetRef=GATEWAY)) == (TargetRef("Gateway", "waypoint"),)
    service = {"kind": "Service", "name": "x", "group": "core"}
    assert read_targets(spec(targetRefs=[GATEWAY, service, {**service, "group": ""}])) == (
        TargetRef("Gateway", "waypoint"),
        TargetRef("Service", "x"),
    )


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"targetRef": GATEWAY, "selector": {}}, "spec.selector: a policy has a selector or targetRefs, not both"),
        ({"targetRefs": [{}]}, "spec.targetRefs[0].kind: required"),
        ({"targetRefs": "x"}, "spec.targetRefs: not a list"),
        ({"targetRefs": [GATEWAY] * 17}, "spec.targetRefs: more than 16 items"),
        ({"targetRef": {**GATEWAY, "kind": "Pod"}}, "spec.targetRef.kind: not one of Service, ServiceEntry, Gateway, GatewayClass"),
        ({"targetRef": {**GATEWAY, "group": "x.io"}}, "spec.targetRef.group: not the group of Gateway (gateway.networking.k8s.io)"),
        ({"targetRef": {**GATEWAY, "namespace": "b"}}, "spec.targetRef.namespace: a policy is attached to objects of its own namespace"),
    ],
)
def test_hostile_target_refs_are_refused(members: dict[str, object], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_targets(spec(**members))
    assert message in str(caught.value)
