"""Batches, merges, deletion, generations: the API server's state without a server."""

from __future__ import annotations

from itertools import count

import pytest

from ztunnel.lab.admission import Offered, Rules
from ztunnel.lab.cluster import Cluster, Mint
from ztunnel.lab.objects import Key, LabError, is_deleting, uid_of
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.tree import Tree, at, put, text


def _object(kind: str, name: str, namespace: str = "", **rest: object) -> Tree:
    version = "apps/v1" if kind == "Deployment" else "v1"
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name} | ({"namespace": namespace} if namespace else {}), **rest}


def _pod(name: str, namespace: str = "default", **spec: object) -> Tree:
    return _object("Pod", name, namespace, spec={"containers": [{"name": "c", "image": "echo"}], **spec})


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def cluster(events: list[str]) -> Cluster:
    numbers = count(1)
    made = Cluster(Rules(), (4,), Mint(lambda: f"uid-{next(numbers)}", lambda: "2030-01-01T00:00:00Z"))
    made.bootstrap()
    made.create(_object("Node", "node-1"))
    made.listeners.append(lambda event, body: events.append(f"{event} {text(body, 'kind')} {text(body, 'metadata', 'name')}"))
    return made


def _apply(cluster: Cluster, *bodies: Tree) -> list[str]:
    return [verb for _, verb in cluster.apply([Offered("f", body) for body in bodies])]


def test_a_new_cluster_has_its_namespaces_with_service_accounts(cluster: Cluster) -> None:
    assert [text(body, "metadata", "name") for body in cluster.select("Namespace")] == ["default", "istio-system", "kube-system"]
    assert len(cluster.select("ServiceAccount")) == 3


def test_apply_creates_then_changes_nothing_then_configures(cluster: Cluster, events: list[str]) -> None:
    service = _object("Service", "s", spec={"ports": [{"port": 80}]})
    assert _apply(cluster, service) == ["created"]
    live = cluster.get(Key("Service", "default", "s"))
    assert (text(live, "spec", "clusterIP"), at(live, "spec", "ipFamilies")) == ("10.96.0.100", ["IPv4"])
    assert _apply(cluster, service) == ["unchanged"]
    assert events == ["ADDED Service s"]
    service["spec"] = {"ports": [{"port": 81}]}
    assert _apply(cluster, service) == ["configured"]
    changed = cluster.get(Key("Service", "default", "s"))
    assert (uid_of(changed), text(changed, "spec", "clusterIP")) == (uid_of(live), "10.96.0.100")
    assert int(text(changed, "metadata", "resourceVersion")) > int(text(live, "metadata", "resourceVersion"))


def test_a_batch_may_name_its_namespace_later_and_keeps_its_order(cluster: Cluster) -> None:
    done = cluster.apply([Offered("f", _pod("p", "shop")), Offered("f", _object("Namespace", "shop"))])
    assert [(key.kind, verb) for key, verb in done] == [("Pod", "created"), ("Namespace", "created")]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (_pod("p", "nowhere"), 'namespaces "nowhere" not found'),
        (_pod("p", serviceAccountName="ghost"), 'serviceaccount "ghost" not found'),
        (_pod("p", nodeName="node-9"), "no node 'node-9'; there are node-1"),
        (_object("Service", "s", spec={"clusterIP": "1.2.3.4", "ports": [{"port": 1}]}), "is not in 10.96.0.0/16"),
    ],
)
def test_a_refused_object_leaves_the_whole_batch_out(cluster: Cluster, events: list[str], bad: Tree, why: str) -> None:
    with pytest.raises((LabError, ManifestError), match=why):
        _apply(cluster, _pod("good"), bad)
    assert events == []
    assert cluster.find(Key("Pod", "default", "good")) is None


def test_exported_manifests_can_be_applied_to_another_cluster(cluster: Cluster) -> None:
    exported = _pod("p")
    put(exported, "foreign", "metadata", "uid")
    put(exported, "77", "metadata", "resourceVersion")
    put(exported, {"phase": "Running"}, "status")
    _apply(cluster, exported)
    live = cluster.get(Key("Pod", "default", "p"))
    assert (uid_of(live) != "foreign", text(live, "status", "phase")) == (True, "Pending")


def test_a_pods_spec_and_a_services_address_cannot_change(cluster: Cluster) -> None:
    _apply(cluster, _pod("p"), _object("Service", "s", spec={"ports": [{"port": 80}]}))
    with pytest.raises(ManifestError, match="may not change the spec"):
        _apply(cluster, _pod("p", hostname="other"))
    with pytest.raises(ManifestError, match="may not change once set"):
        _apply(cluster, _object("Service", "s", spec={"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ports": [{"port": 80}]}))
    labelled = _pod("p")
    put(labelled, {"a": "b"}, "metadata", "labels")
    assert _apply(cluster, labelled) == ["configured"]


def test_labels_set_by_hand_survive_apply(cluster: Cluster) -> None:
    _apply(cluster, _pod("p"))
    key = Key("Pod", "default", "p")
    assert cluster.label(key, {"team": "blue"}, overwrite=False)
    assert not cluster.label(key, {"team": "blue"}, overwrite=False)
    with pytest.raises(LabError, match="already has a value"):
        cluster.label(key, {"team": "red"}, overwrite=False)
    assert _apply(cluster, _pod("p")) == ["unchanged"]
    assert at(cluster.get(key), "metadata", "labels") == {"team": "blue"}
    cluster.label(key, {"team": None}, overwrite=False)
    assert at(cluster.get(key), "metadata", "labels") == {}


def test_a_label_by_hand_is_refused_as_in_a_manifest(cluster: Cluster) -> None:
    cluster.rules = Rules(validate=parse)
    key = Key("Namespace", "", "default")
    with pytest.raises(ManifestError, match="'a b' is not a key"):
        cluster.label(key, {"a b": "c"}, overwrite=False)
    with pytest.raises(ManifestError, match="not a label value"):
        cluster.label(key, {"a": "c d"}, overwrite=False)
    assert cluster.label(key, {"istio.io/dataplane-mode": "ambient"}, overwrite=False)
    assert cluster.label(Key("Node", "", "node-1"), {"zone": "a"}, overwrite=False)


def test_a_pod_is_gone_only_when_it_is_finalized(cluster: Cluster) -> None:
    _apply(cluster, _pod("p"))
    key = Key("Pod", "default", "p")
    cluster.delete(key)
    cluster.delete(key)
    assert is_deleting(cluster.get(key))
    cluster.finalize(key, "somebody else")
    assert cluster.find(key) is not None
    cluster.finalize(key, uid_of(cluster.get(key)))
    with pytest.raises(LabError, match=r'pods "p" not found'):
        cluster.get(key)


def test_a_namespace_goes_with_the_last_of_its_pods(cluster: Cluster) -> None:
    _apply(cluster, _object("Namespace", "shop"), _pod("p", "shop"), _object("Service", "s", "shop", spec={"ports": [{"port": 80}]}))
    cluster.delete(Key("Namespace", "", "shop"))
    assert cluster.find(Key("Service", "shop", "s")) is None
    with pytest.raises(LabError, match="being terminated"):
        _apply(cluster, _pod("q", "shop"))
    cluster.finalize(Key("Pod", "shop", "p"), uid_of(cluster.get(Key("Pod", "shop", "p"))))
    assert not [body for body in cluster if text(body, "metadata", "namespace") == "shop"]
    assert cluster.find(Key("Namespace", "", "shop")) is None


def test_the_labs_own_objects_stay(cluster: Cluster) -> None:
    for key in (Key("Namespace", "", "default"), Key("Node", "", "node-1")):
        with pytest.raises(LabError, match="forbidden"):
            cluster.delete(key)


def test_scaling_and_restarting_count_as_new_generations(cluster: Cluster) -> None:
    template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "echo"}]}}
    _apply(cluster, _object("Deployment", "d", spec={"selector": {"matchLabels": {"a": "b"}}, "template": template}))
    key = Key("Deployment", "default", "d")
    assert at(cluster.get(key), "metadata", "generation") == 1
    cluster.scale("d", "default", 3)
    cluster.restart("d", "default")
    assert (at(cluster.get(key), "spec", "replicas"), at(cluster.get(key), "metadata", "generation")) == (3, 3)
    with pytest.raises(ManifestError, match=r"spec\.replicas"):
        cluster.scale("d", "default", -1)
    assert _apply(cluster, _object("Deployment", "d", spec={"selector": {"matchLabels": {"a": "b"}}, "template": template})) == [
        "unchanged"
    ]


def test_updates_of_an_object_that_was_replaced_do_nothing(cluster: Cluster, events: list[str]) -> None:
    _apply(cluster, _pod("p"))
    events.clear()
    key = Key("Pod", "default", "p")
    assert not cluster.update(key, "other uid", lambda body: put(body, 1, "status", "x"))
    assert not cluster.update(key, uid_of(cluster.get(key)), lambda body: None)
    assert events == []
    assert cluster.update(key, uid_of(cluster.get(key)), lambda body: put(body, 1, "status", "x"))
    assert events == ["MODIFIED Pod p"]
