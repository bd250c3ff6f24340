"""What manifests add up to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.builders import authentication, authorization, identity, index_of, mesh, namespace, pod, selecting, service_manifest
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.derive import Capture, MeshOptions, MeshState, derive, diff, with_addresses
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.manifests.parse import key, parse
from ztunnel.mesh.policy import Connection
from ztunnel.mesh.refused import stand_in
from ztunnel.mesh.rules import Scope
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload

AMBIENT = namespace("default")
WEB = {"app": "web"}
BROKEN = [{"from": [{"source": {"prinicpals": ["x"]}}]}]


def with_refused(*bodies: object, refused: object) -> MeshState:
    with pytest.raises(ManifestError) as caught:
        parse(refused, "test")
    stands = stand_in(refused, caught.value)
    assert stands is not None
    objects = [*(parse(body, "test") for body in bodies), stands]
    return derive({key(each): each for each in objects}, MeshOptions())


def plaintext_allowed(state: MeshState, uid: str) -> bool:
    return index_of(state).decide(state.workloads[uid], Connection("10.0.0.9", None, "10.0.0.1", 80)).allowed


def test_a_pod_of_the_mesh() -> None:
    state = mesh(AMBIENT, pod("a", "10.0.0.1", "fd00::1", spec={"serviceAccountName": "cart"}))
    assert state.workloads == {
        "uid-a": Workload(
            uid="uid-a",
            name="a",
            namespace="default",
            identity=identity("default", "cart"),
            node="node",
            addresses=("10.0.0.1", "fd00::1"),
            protocol=Protocol.HBONE,
            canonical_name="a",
            canonical_revision="latest",
            workload_name="a",
        )
    }
    assert state.captures == {
        "uid-a": Capture(
            uid="uid-a",
            name="a",
            namespace="default",
            node="node",
            addresses=("10.0.0.1", "fd00::1"),
            identity=identity("default", "cart"),
            wanted=True,
            strict=False,
            reason="namespace default is labelled istio.io/dataplane-mode=ambient",
        )
    }


def test_a_pod_outside_the_mesh_is_a_workload_reached_in_plain() -> None:
    state = mesh(pod("a", "10.0.0.1"), pod("b", "10.0.0.2", namespace="elsewhere"))
    assert state.workloads["uid-a"].protocol is Protocol.TCP
    assert not state.captures["uid-a"].wanted
    assert not state.captures["uid-b"].wanted


def test_options_reach_identities_and_hostnames() -> None:
    options = MeshOptions(trust_domain="example.org", cluster="east", cluster_domain="corp")
    state = mesh(pod("a", "10.0.0.1"), service_manifest("web"), options=options)
    assert state.workloads["uid-a"].identity == SpiffeId("example.org", "default", "default")
    assert state.workloads["uid-a"].cluster == "east"
    assert list(state.services) == ["default/web.default.svc.corp"]


def test_hbone_may_wait_for_the_annotation() -> None:
    annotated = pod("b", "10.0.0.2", meta={"annotations": {"ambient.istio.io/redirection": "enabled"}})
    pending = pod("c", "10.0.0.3", meta={"annotations": {"ambient.istio.io/redirection": "pending"}})
    state = mesh(AMBIENT, pod("a", "10.0.0.1"), annotated, pending, options=MeshOptions(hbone_needs_annotation=True))
    assert [state.workloads[uid].protocol for uid in ("uid-a", "uid-b", "uid-c")] == [Protocol.TCP, Protocol.HBONE, Protocol.TCP]
    assert state.captures["uid-a"].wanted


def test_pods_that_are_no_workloads() -> None:
    state = mesh(AMBIENT, pod("ended", "10.0.0.1", status={"phase": "Failed"}), pod("young"))
    assert state.workloads == {}
    assert [each.wanted for each in state.captures.values()] == [False, False]


def test_pods_in_the_nodes_network() -> None:
    state = mesh(AMBIENT, pod("a", "192.168.0.1", spec={"hostNetwork": True}))
    assert state.workloads["uid-a"].host_network
    assert state.workloads["uid-a"].protocol is Protocol.TCP


def test_a_deleted_pod_is_not_ready_but_still_captured() -> None:
    state = mesh(AMBIENT, pod("a", "10.0.0.1", meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}))
    assert not state.workloads["uid-a"].ready
    assert state.captures["uid-a"].wanted


def test_one_uid_is_one_pod() -> None:
    state = mesh(pod("a", "10.0.0.1", meta={"uid": "same"}), pod("b", "10.0.0.2", meta={"uid": "same"}))
    assert [each.name for each in state.workloads.values()] == ["a"]


@pytest.mark.parametrize(
    ("kind", "owner", "labels", "expected"),
    [
        ("ReplicaSet", "web-5d4f", {"pod-template-hash": "5d4f"}, ("deployment", "web")),
        ("ReplicaSet", "web-5d4f", {}, ("pod", "web-5d4f")),
        ("ReplicaSet", "web", {"pod-template-hash": "5d4f"}, ("pod", "web")),
        ("Job", "report-27520800", {}, ("cronjob", "report")),
        ("Job", "report", {}, ("job", "report")),
        ("StatefulSet", "db", {}, ("pod", "db")),
    ],
)
def test_what_made_a_pod(kind: str, owner: str, labels: dict[str, str], expected: tuple[str, str]) -> None:
    reference = {"kind": kind, "name": owner, "controller": True}
    state = mesh(pod("a", "10.0.0.1", labels=labels, meta={"labels": labels, "ownerReferences": [reference]}))
    found = state.workloads["uid-a"]
    assert (found.workload_type, found.workload_name) == expected
    assert found.canonical_name == expected[1]


def test_canonical_names_and_revisions() -> None:
    def canonical(**labels: str) -> tuple[str, str]:
        found = mesh(pod("a", "10.0.0.1", labels={name.replace("__", "/").replace("_", "."): value for name, value in labels.items()}))
        return found.workloads["uid-a"].canonical_name, found.workloads["uid-a"].canonical_revision

    assert canonical(app="x", version="v1") == ("x", "v1")
    assert canonical(app="x", app_kubernetes_io__name="y", version="v1", app_kubernetes_io__version="v2") == ("y", "v2")
    everything = {"service.istio.io/canonical-name": "z", "service.istio.io/canonical-revision": "v3", "app": "x", "version": "v1"}
    found = mesh(pod("a", "10.0.0.1", labels=everything)).workloads["uid-a"]
    assert (found.canonical_name, found.canonical_revision) == ("z", "v3")
    assert canonical(app="", version="") == ("a", "latest")


def test_a_service_and_its_endpoints() -> None:
    http = {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}
    ports = [{"name": "web", "port": 80, "targetPort": "http"}, {"port": 90, "targetPort": 9090}]
    state = mesh(
        pod("a", "10.0.0.1", labels=WEB, spec=http),
        pod("b", "10.0.0.2", labels=WEB, status={"conditions": []}),
        pod("c", "10.0.0.3", labels={"app": "other"}),
        pod("d", "10.0.0.4", labels=WEB, namespace="elsewhere"),
        pod("e", labels=WEB),
        service_manifest("web", "10.1.0.1", selector=WEB, ports=ports),
    )
    assert state.services == {
        "default/web.default.svc.cluster.local": Service(
            name="web",
            namespace="default",
            hostname="web.default.svc.cluster.local",
            vips=("10.1.0.1",),
            ports=(ServicePort(80, 0, "web"), ServicePort(90, 9090)),
            endpoints=(Endpoint("uid-a", ((80, 8080), (90, 9090))), Endpoint("uid-b", ((90, 9090),), ready=False)),
        )
    }


def test_services_that_publish_pods_before_they_are_ready() -> None:
    state = mesh(
        pod("b", "10.0.0.2", labels=WEB, status={"conditions": []}), service_manifest("web", selector=WEB, publishNotReadyAddresses=True)
    )
    assert [endpoint.ready for each in state.services.values() for endpoint in each.endpoints] == [True]


def test_services_without_selector_have_no_endpoints_and_external_names_are_left_out() -> None:
    state = mesh(pod("a", "10.0.0.1"), service_manifest("web", selector={}), service_manifest("out", type="ExternalName"))
    assert [(each.name, each.endpoints) for each in state.services.values()] == [("web", ())]


def test_policies_have_the_scope_that_their_place_gives_them() -> None:
    state = mesh(
        pod("a", "10.0.0.1", labels=WEB),
        pod("b", "10.0.0.2", labels=WEB, namespace="elsewhere"),
        authorization("ns"),
        authorization("mesh", namespace="istio-system"),
        authorization("here", selector=selecting(app="web")),
        authorization("not", selector=selecting(app="other")),
        authorization("everywhere", namespace="istio-system", selector=selecting(app="web")),
        authorization("waypoint", targetRefs=[{"kind": "Gateway", "name": "w"}]),
    )
    assert {policy.name: policy.scope for policy in state.policies.values()} == {
        "ns": Scope.NAMESPACE,
        "mesh": Scope.GLOBAL,
        "here": Scope.SELECTOR,
        "not": Scope.SELECTOR,
        "everywhere": Scope.SELECTOR,
    }
    everywhere = "AuthorizationPolicy/istio-system/everywhere"
    assert state.workloads["uid-a"].policies == ("AuthorizationPolicy/default/here", everywhere)
    assert state.workloads["uid-b"].policies == (everywhere,)


def test_peer_authentication_becomes_a_policy_that_workloads_list() -> None:
    state = mesh(pod("a", "10.0.0.1"), authentication("x", "STRICT"))
    assert state.workloads["uid-a"].policies == ("PeerAuthentication/default/x",)
    assert state.captures["uid-a"].strict
    assert not plaintext_allowed(state, "uid-a")


def test_what_is_attached_to_pods_that_are_alike_is_told_by_their_namespace_and_their_labels() -> None:
    places = [(where, app, turn) for where in ("a", "b") for app in ("x", "y") for turn in (1, 2)]
    pods = [
        pod(f"{where}-{app}-{turn}", f"10.0.0.{at}", namespace=where, labels={"app": app}) for at, (where, app, turn) in enumerate(places)
    ]
    only_x = authorization("only-x", namespace="a", selector=selecting(app="x"))
    state = mesh(*pods, only_x, authentication("s", "STRICT", namespace="b"))
    assert {each.name for each in state.captures.values() if each.strict} == {"b-x-1", "b-x-2", "b-y-1", "b-y-2"}
    listing = {each.name for each in state.workloads.values() if "AuthorizationPolicy/a/only-x" in each.policies}
    assert listing == {"a-x-1", "a-x-2"}


def test_a_refused_policy_denies_what_it_could_have_selected() -> None:
    pods = (pod("a", "10.0.0.1", labels=WEB), pod("b", "10.0.0.2"), pod("c", "10.0.0.3", labels=WEB, namespace="elsewhere"))

    def denied(refused: object) -> list[str]:
        state = with_refused(*pods, refused=refused)
        return [uid for uid in sorted(state.workloads) if not plaintext_allowed(state, uid)]

    assert denied(authorization("x", rules=BROKEN, selector=selecting(app="web"))) == ["uid-a"]
    assert denied(authorization("x", rules=BROKEN)) == ["uid-a", "uid-b"]
    assert denied(authorization("x", rules=BROKEN, namespace="istio-system", selector=selecting(app="web"))) == ["uid-a", "uid-c"]
    assert denied(authorization("x", rules=BROKEN, namespace="istio-system")) == ["uid-a", "uid-b", "uid-c"]
    assert denied(authentication("x", "STRCIT", namespace="elsewhere")) == ["uid-c"]


def test_a_denial_by_a_refused_policy_says_object_field_and_cause() -> None:
    state = with_refused(pod("a", "10.0.0.1"), refused=authorization("x", rules=BROKEN))
    verdict = index_of(state).decide(state.workloads["uid-a"], Connection("10.0.0.9", None, "10.0.0.1", 80))
    assert verdict.text == (
        "denied by AuthorizationPolicy default/x, rules[0]: refused, so everything that it may apply to is denied: "
        'AuthorizationPolicy default/x: spec.rules[0].from[0].source.prinicpals: unknown field (did you mean "principals"?)'
    )


@pytest.mark.parametrize(
    ("refused", "strict"),
    [
        (authentication("x", "STRCIT"), ["uid-a", "uid-b"]),
        (authentication("x", "STRCIT", selector=selecting(app="web")), ["uid-a"]),
        (authentication("x", "STRCIT", namespace="istio-system"), ["uid-a", "uid-b", "uid-c"]),
        (authentication("x", "STRCIT", namespace="istio-system", selector=selecting(app="web")), []),
        (authorization("x", rules=BROKEN), []),
    ],
)
def test_a_refused_peer_authentication_is_strict_in_its_scope(refused: object, strict: list[str]) -> None:
    pods = (pod("a", "10.0.0.1", labels=WEB), pod("b", "10.0.0.2"), pod("c", "10.0.0.3", namespace="elsewhere"))
    state = with_refused(*pods, refused=refused)
    assert [uid for uid, capture in sorted(state.captures.items()) if capture.strict] == strict


def test_a_difference_turns_one_state_into_the_other() -> None:
    old = mesh(
        AMBIENT,
        pod("a", "10.0.0.1"),
        pod("b", "10.0.0.2"),
        service_manifest("web"),
        service_manifest("old"),
        authorization("p"),
        authorization("q"),
    )
    new = mesh(
        AMBIENT,
        pod("a", "10.0.0.9"),
        pod("c", "10.0.0.3"),
        service_manifest("web"),
        service_manifest("new"),
        authorization("q", action="DENY"),
    )
    found = diff(old, new)
    assert [each.uid for each in found.workloads] == ["uid-a", "uid-c"]
    assert [each.name for each in found.services] == ["new"]
    assert [each.name for each in found.policies] == ["q"]
    assert (found.removed_workloads, found.removed_services) == (("uid-b",), ("default/old.default.svc.cluster.local",))
    assert found.removed_policies == ("AuthorizationPolicy/default/p",)


def test_no_difference_is_an_empty_delta() -> None:
    state = mesh(AMBIENT, pod("a", "10.0.0.1"), service_manifest("web"), authorization("p"))
    assert diff(state, replace(state)) == Delta()


def test_a_pod_that_waits_for_its_address_is_known_but_no_workload() -> None:
    state = mesh(AMBIENT, pod("a"), pod("done", status={"phase": "Succeeded"}), pod("none", labels={"istio.io/dataplane-mode": "none"}))
    assert list(state.awaited) == ["uid-a"]
    assert state.workloads == {}
    assert not state.captures["uid-a"].wanted


def test_an_address_that_the_node_knows_makes_it_what_its_object_will_make_it() -> None:
    before, after = mesh(AMBIENT, pod("a"), pod("b", "10.0.0.2")), mesh(AMBIENT, pod("a", "10.0.0.1"), pod("b", "10.0.0.2"))
    known = with_addresses(before, {"uid-a": ("10.0.0.1",)})
    assert (known.workloads, known.captures, known.awaited) == (after.workloads, after.captures, {})
    assert known.workloads["uid-a"].protocol is Protocol.HBONE
    assert before.workloads.keys() == {"uid-b"}


def test_a_new_sandbox_has_its_new_address_before_the_object_says_so() -> None:
    known = with_addresses(mesh(AMBIENT, pod("a", "10.0.0.1")), {"uid-a": ("10.0.0.7",)})
    assert known.workloads["uid-a"].addresses == known.captures["uid-a"].addresses == ("10.0.0.7",)


def test_addresses_of_pods_outside_of_the_mesh_change_nothing() -> None:
    state = mesh(pod("a", "10.0.0.1"), pod("b"))
    assert with_addresses(state, {"uid-a": ("10.0.0.7",), "uid-b": ("10.0.0.8",), "uid-c": ("10.0.0.9",)}) == state


def test_namespaces_in_which_nothing_is_meshed() -> None:
    plain, labelled = namespace("plain", ambient=False), namespace("mixed", ambient=False)
    pods = pod("x", "10.0.0.3", namespace="mixed", labels={"istio.io/dataplane-mode": "ambient"}), pod("y", namespace="unseen")
    assert mesh(AMBIENT, plain, labelled, namespace("kube-system"), *pods).outside == {"plain", "kube-system"}


def test_a_static_pod_has_a_second_uid() -> None:
    state = mesh(pod("a", "10.0.0.1", meta={"annotations": {"kubernetes.io/config.mirror": "0123abcd"}}), pod("b", "10.0.0.2"))
    assert [state.captures[uid].sandbox_uid for uid in ("uid-a", "uid-b")] == ["0123abcd", ""]
