"""What manifests add up to depends on which they are, not on their order."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.builders import (
    Json,
    authentication,
    authorization,
    gateway,
    index_of,
    labelled,
    namespace,
    pod,
    selecting,
    service_account,
    service_manifest,
)
from ztunnel.mesh.derive import Derivation, MeshOptions, MeshState, derive
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject, key, parse
from ztunnel.mesh.policy import Connection
from ztunnel.mesh.refused import stand_in
from ztunnel.mesh.routing import RefusalReason, Route, resolve

NAMES = st.sampled_from(["a", "b", "c"])
SPACES = st.sampled_from(["default", "shop", "istio-system"])
LABELS = st.sampled_from([{}, {"app": "x"}, {"app": "y"}, {"app": "x", "istio.io/dataplane-mode": "none"}])
USES: st.SearchStrategy[dict[str, str]] = st.sampled_from(
    [
        {},
        {"istio.io/use-waypoint": "a"},
        {"istio.io/use-waypoint": "b", "istio.io/use-waypoint-namespace": "shop"},
        {"istio.io/use-waypoint": "none"},
        {"gateway.networking.k8s.io/gateway-name": "a"},
    ]
)
SELECTORS = st.sampled_from([selecting(app="x"), selecting(app="y")])
ADDRESSES = st.lists(st.sampled_from(["10.0.0.1", "10.0.0.2", "fd00::1"]), max_size=2, unique=True)


@st.composite
def bodies(draw: st.DrawFn, *, only_pods: bool = False) -> Json:
    name, space = draw(NAMES), draw(SPACES)
    match 1 if only_pods else draw(st.integers(0, 7)):
        case 0:
            return labelled(namespace(space, ambient=draw(st.booleans())), labels=draw(USES))
        case 1:
            meta = {"uid": draw(NAMES), "labels": {**draw(LABELS), **draw(USES)}}
            account = {"serviceAccountName": draw(NAMES)}
            return pod(name, *draw(ADDRESSES), namespace=space, labels=draw(LABELS), meta=meta, spec=account)
        case 2:
            made = service_manifest(name, *draw(st.sampled_from([(), ("10.1.0.1",)])), namespace=space, selector=draw(LABELS))
            return labelled(made, labels=draw(USES))
        case 6:
            return labelled(service_account(name, space), labels=draw(USES))
        case 7:
            where = draw(st.sampled_from([(), ("10.1.0.1",), ("10.9.9.9",), ("a.default.svc.cluster.local",)]))
            traffic = draw(st.sampled_from([None, "all", "workload", "none", "nonsense"]))
            return gateway(name, *where, namespace=space, traffic=traffic)
        case 3:
            rules = draw(st.sampled_from([[], [{}], [{"from": [{"source": {"namespaces": ["shop"]}}]}], [{"form": []}]]))
            selector = {"selector": draw(SELECTORS)} if draw(st.booleans()) else {}
            spec = {"action": draw(st.sampled_from(["ALLOW", "DENY"])), "rules": rules, **selector}
            return {**authorization(name, namespace=space), "spec": spec}
        case 4:
            return authentication(name, draw(st.sampled_from(["STRICT", "PERMISSIVE", "UNSET", "STRCIT"])), namespace=space)
        case _:
            ports = {80: {"mode": draw(st.sampled_from(["STRICT", "DISABLE"]))}}
            mode = draw(st.sampled_from(["STRICT", "PERMISSIVE", None]))
            return authentication(name, mode, namespace=space, selector=draw(SELECTORS), portLevelMtls=ports)


def read(body: object) -> KubeObject:
    try:
        return parse(body, "test")
    except ManifestError as error:
        found = stand_in(body, error)
        assert found is not None
        return found


def state(objects: list[KubeObject]) -> MeshState:
    return derive({key(each): each for each in objects}, MeshOptions())


@st.composite
def meshes(draw: st.DrawFn) -> list[KubeObject]:
    objects = {key(each): each for each in (read(body) for body in draw(st.lists(bodies(), max_size=12)))}
    return list(objects.values())


@given(meshes(), st.randoms(use_true_random=False))
def test_order_does_not_show(objects: list[KubeObject], dice: Random) -> None:
    shuffled = list(objects)
    dice.shuffle(shuffled)
    one, other = state(objects), state(shuffled)
    assert one == other
    assert list(one.workloads) == list(other.workloads)


@given(meshes())
def test_a_state_refers_only_to_what_it_holds(objects: list[KubeObject]) -> None:
    found = state(objects)
    assert {policy for workload in found.workloads.values() for policy in workload.policies} <= found.policies.keys()
    assert {endpoint.workload_uid for service in found.services.values() for endpoint in service.endpoints} <= found.workloads.keys()
    assert found.workloads.keys() <= found.captures.keys()
    assert all(key == policy.key for key, policy in found.policies.items())


@given(meshes())
def test_nothing_goes_past_a_waypoint_that_is_asked_for(objects: list[KubeObject]) -> None:
    found = state(objects)
    index = index_of(found)
    for source in found.workloads.values():
        for service in found.services.values():
            for vip in service.vips:
                routed = resolve(index, source, (vip, 80), lambda _: 0, lambda _: 0)
                addressed = index.service_at(vip, source.namespace)
                assert addressed is not None
                if addressed.waypoint is None or index.is_waypoint(addressed.waypoint, source):
                    continue
                if isinstance(routed, Route):
                    assert routed.waypoint == addressed.waypoint.name
                else:
                    assert routed.reason is RefusalReason.WAYPOINT_NOT_READY


@given(meshes(), st.sampled_from([80, 81]))
def test_strict_means_that_no_plaintext_is_allowed(objects: list[KubeObject], port: int) -> None:
    found = state(objects)
    index = index_of(found)
    for uid, workload in found.workloads.items():
        if found.captures[uid].strict:
            assert not index.decide(workload, Connection("10.9.9.9", None, workload.addresses[0], port)).allowed


STEPS = st.lists(st.tuples(bodies(), st.just(False)), max_size=8)
STEPS_OF_PODS = st.lists(st.tuples(bodies(only_pods=True), st.booleans()), max_size=4)


@given(st.tuples(STEPS, st.lists(STEPS_OF_PODS, max_size=4), STEPS, STEPS_OF_PODS))
def test_step_by_step_is_as_at_once(
    steps: tuple[list[tuple[Json, bool]], list[list[tuple[Json, bool]]], list[tuple[Json, bool]], list[tuple[Json, bool]]],
) -> None:
    derivation = Derivation(MeshOptions())
    objects: dict[ObjectKey, KubeObject] = {}
    for step in (steps[0], *steps[1], steps[2], steps[3]):
        changes = {key(each): None if goes else each for each, goes in ((read(body), goes) for body, goes in step)}
        objects = {object_key: each for object_key, each in {**objects, **changes}.items() if each is not None}
        assert derivation.update(changes) == derive(objects, MeshOptions())
