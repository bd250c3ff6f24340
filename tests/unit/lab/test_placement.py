"""Nodes for pods, pods for deployments, endpoints for services."""

from __future__ import annotations

from ztunnel.lab.placement import (
    Forward,
    choose_node,
    deployment_pod,
    forwards,
    is_rolled_out,
    owner_name,
    rollout,
    template_hash,
)
from ztunnel.mesh.manifests.tree import Tree, branches, put, text


def _pod(name: str, node: str = "", *, app: str = "web", ready: bool = True, addresses: tuple[str, ...] = ("10.0.0.1",)) -> Tree:
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "labels": {"app": app}},
        "spec": {"nodeName": node, "containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {
            "podIPs": [{"ip": address} for address in addresses],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


def _service(*vips: str, **spec: object) -> Tree:
    ports = [{"port": 80, "targetPort": "http", "protocol": "TCP"}]
    return {
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"selector": {"app": "web"}, "clusterIPs": [*vips], "ports": ports, **spec},
    }


def _deployment(replicas: int = 2) -> Tree:
    template = {"metadata": {"labels": {"app": "web"}, "annotations": {"a": "b"}}, "spec": {"containers": [{"name": "c"}]}}
    return {
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop", "uid": "u"},
        "spec": {"replicas": replicas, "template": template},
    }


def _ready(pod: Tree) -> Tree:
    put(pod, [{"type": "Ready", "status": "True"}], "status", "conditions")
    return pod


def test_the_node_with_the_fewest_living_pods_is_chosen() -> None:
    ended = _pod("x", "b")
    put(ended, "Succeeded", "status", "phase")
    assert choose_node(["a", "b"], []) == "a"
    assert choose_node(["a", "b"], [_pod("p", "a"), ended]) == "b"
    assert choose_node(["a", "b"], [_pod("p", "a"), _pod("q", "b")]) == "a"


def test_a_deployments_pods_are_named_and_owned_as_in_kubernetes() -> None:
    deployment = _deployment()
    pod = deployment_pod(deployment, "seed")
    name, current = text(pod, "metadata", "name"), template_hash(deployment)
    assert name.startswith(f"web-{current}-")
    assert len(name.rsplit("-", 1)[1]) == 5
    assert branches(pod, "metadata", "ownerReferences")[0]["name"] == f"web-{current}"
    assert owner_name(pod) == "web"
    assert pod["metadata"] == {**deployment_pod(deployment, "seed")["metadata"]}  # type: ignore[dict-item]
    assert deployment_pod(deployment, "other")["metadata"] != pod["metadata"]


def test_a_rollout_creates_what_is_missing_and_removes_what_is_too_much() -> None:
    deployment = _deployment(2)
    pods = [deployment_pod(deployment, str(number)) for number in range(3)]
    assert rollout(deployment, []).create == 2
    assert rollout(deployment, pods[:1]).create == 1
    unready = rollout(deployment, [_ready(pods[0]), _ready(pods[1]), pods[2]])
    assert [key.name for key in unready.remove] == [text(pods[2], "metadata", "name")]


def test_an_old_pod_goes_for_each_new_one_that_is_ready() -> None:
    deployment = _deployment(2)
    old = [_ready(deployment_pod(deployment, str(number))) for number in range(2)]
    put(deployment, "changed", "spec", "template", "metadata", "annotations", "x")
    first = rollout(deployment, old)
    assert (first.create, first.remove) == (2, ())
    new = [deployment_pod(deployment, str(number)) for number in range(2)]
    assert rollout(deployment, [*old, *new]).remove == ()
    assert len(rollout(deployment, [*old, _ready(new[0]), new[1]]).remove) == 1
    assert len(rollout(deployment, [*old, new[0], _ready(new[1])]).remove) == 2


def test_a_deployment_is_rolled_out_when_its_status_is_of_its_own_generation() -> None:
    deployment = _deployment(1)
    put(deployment, 2, "metadata", "generation")
    put(deployment, {"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1}, "status")
    assert not is_rolled_out(deployment)
    put(deployment, 2, "status", "observedGeneration")
    assert is_rolled_out(deployment)


def test_forwards_are_the_ready_endpoints_of_the_addresss_family() -> None:
    pods = [
        _pod("a", addresses=("10.0.0.2", "fd00::2")),
        _pod("b", addresses=("10.0.0.1", "fd00::1")),
        _pod("unready", ready=False),
        _pod("other", app="db"),
    ]
    assert forwards([_service("10.96.0.1", "fd96::1")], pods) == (
        Forward("10.96.0.1", 80, "TCP", (("10.0.0.1", 8080), ("10.0.0.2", 8080))),
        Forward("fd96::1", 80, "TCP", (("fd00::1", 8080), ("fd00::2", 8080))),
    )


def test_a_service_without_endpoints_still_has_its_addresses_and_a_headless_one_has_none() -> None:
    assert forwards([_service("10.96.0.1")], []) == (Forward("10.96.0.1", 80, "TCP", ()),)
    assert forwards([_service("None")], [_pod("a")]) == ()
