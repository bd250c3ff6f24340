"""When an object is as it is wanted, and when it is to go."""

from __future__ import annotations

import pytest

from ztunnel.controller.belongings import belongings, bindings, is_left_over
from ztunnel.controller.reconciler import covers
from ztunnel.mesh.manifests.tree import Tree, put, text


@pytest.mark.parametrize(
    ("live", "wanted", "expected"),
    [
        ({"a": 1, "b": 2}, {"a": 1}, True),
        ({"a": 1}, {"a": 2}, False),
        ({}, {"a": {"b": 1}}, False),
        ({"ports": [{"port": 80, "protocol": "TCP"}]}, {"ports": [{"port": 80}]}, True),
        ({"ports": [{"port": 80}, {"port": 81}]}, {"ports": [{"port": 80}]}, False),
        ({"ports": "none"}, {"ports": []}, False),
        ({}, {"value": "", "labels": {}, "ports": []}, True),
        ({"value": "x"}, {"value": ""}, False),
        (None, {"a": 1}, False),
    ],
)
def test_what_others_add_does_not_matter(live: object, wanted: object, expected: bool) -> None:
    assert covers(live, wanted) is expected


def gateway(**spec: object) -> Tree:
    metadata: Tree = {"name": "w", "namespace": "shop", "uid": "u"}
    return {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": metadata, "spec": spec}


def owned(made_for: str) -> dict[str, Tree]:
    of = gateway(gatewayClassName=made_for)
    return {text(each, "kind"): each for each in [*belongings(of, lambda _: {}), *bindings(of)[:1]]}


@pytest.mark.parametrize("made_for", ["istio-waypoint", "istio"])
def test_what_was_made_for_a_gateway_of_another_class_now_is_left_over(made_for: str) -> None:
    now = gateway(gatewayClassName="somebody-elses")
    assert all(is_left_over(body, [now], ()) for body in owned(made_for).values())
    assert not any(is_left_over(body, [now], ("u",)) for body in owned(made_for).values())
    assert not any(is_left_over(body, [], ()) for body in owned(made_for).values())


def test_what_the_controller_of_another_class_made_is_left_alone() -> None:
    theirs = owned("istio")["Deployment"]
    put(theirs, "istio-east-west", "metadata", "labels", "gateway.networking.k8s.io/gateway-class-name")
    assert not is_left_over(theirs, [gateway(gatewayClassName="istio-east-west")], ())


def test_what_another_revision_goes_on_with_is_left_alone_but_for_its_rights() -> None:
    now = gateway(gatewayClassName="istio")
    put(now, {"istio.io/rev": "canary"}, "metadata", "labels")
    assert [kind for kind, body in owned("istio").items() if is_left_over(body, [now], ())] == ["RoleBinding"]
