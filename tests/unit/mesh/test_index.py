"""Look-ups after deltas: by UID, address, VIP, hostname; ties; memos; generations."""

from __future__ import annotations

from dataclasses import replace

from tests.kit import builders
from tests.kit.builders import allow, deny, identity, policy, principals, service, workload
from ztunnel.mesh.balance import Candidate
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.index import Index
from ztunnel.mesh.policy import Connection, VerdictReason
from ztunnel.mesh.rules import Action, Rule, Scope
from ztunnel.mesh.workloads import Endpoint, ServicePort

A = workload("a", "10.0.0.1", "fd00::1")
B = workload("b", "10.0.0.2")
WEB = service("web", "10.1.0.1", "fd01::1", behind=(A, B))
CALL = Connection("10.0.0.9", identity("shop", "alice"), "10.0.0.1", 8080)


def test_everything_is_found_by_its_keys() -> None:
    index = builders.index(A, B, WEB)
    assert index.workload("uid-a") is A
    assert index.workload_at("fd00::1") is A
    assert index.service("default/web.default.svc.cluster.local") is WEB
    assert index.service_at("fd01::1") is WEB
    assert index.service_named("web.default.svc.cluster.local") is WEB
    assert index.services_of("uid-a") == (WEB,)
    assert (index.workloads(), index.services(), index.policies()) == ([A, B], [WEB], [])


def test_what_is_not_there_is_not_found() -> None:
    index = Index()
    assert index.workload("uid-a") is None
    assert index.workload_at("10.0.0.1") is None
    assert index.service("x/y") is None
    assert index.service_at("10.1.0.1") is None
    assert index.service_named("web") is None
    assert index.services_of("uid-a") == ()


def test_changes_move_what_changed() -> None:
    index = builders.index(A, WEB)
    moved = replace(A, addresses=("10.0.0.7",))
    index.apply(Delta(workloads=(moved,), services=(replace(WEB, vips=("10.1.0.9",), endpoints=()),)))
    assert index.workload_at("10.0.0.1") is None
    assert index.workload_at("10.0.0.7") is moved
    assert index.service_at("10.1.0.1") is None
    assert index.service_at("10.1.0.9") is not None
    assert index.services_of("uid-a") == ()


def test_removals_remove() -> None:
    index = builders.index(A, WEB, deny("no"))
    index.apply(Delta(removed_workloads=("uid-a",), removed_services=(WEB.key,), removed_policies=(deny("no").key,)))
    assert (index.workloads(), index.services(), index.policies()) == ([], [], [])
    assert index.workload_at("10.0.0.1") is None
    assert index.service_at("10.1.0.1") is None
    assert index.policies_for(A) == ()


def test_a_key_removed_and_upserted_at_once_is_there() -> None:
    index = builders.index(A)
    index.apply(Delta(workloads=(replace(A, ready=False),), removed_workloads=("uid-a",)))
    assert index.workload("uid-a") == replace(A, ready=False)


def test_an_entry_does_not_take_the_address_of_a_pod() -> None:
    entry, pod = replace(workload("0", "10.0.0.1"), node=""), workload("a", "10.0.0.1", hbone=False, ready=False)
    assert entry.uid < pod.uid
    assert builders.index(entry, pod).workload_at("10.0.0.1") is pod


def test_an_entry_takes_neither_name_nor_address_of_a_service_of_another_namespace() -> None:
    entry = replace(WEB, namespace="a", name="thief", declared=True, endpoints=())
    index = builders.index(entry, A, B, WEB)
    assert entry.key < WEB.key
    assert index.service_at("10.1.0.1") is index.service_at("10.1.0.1", "elsewhere") is WEB
    assert index.service_named(WEB.hostname, "elsewhere") is WEB
    assert index.service_at("10.1.0.1", "a") is entry, "its own namespace may have it so"


def test_one_address_two_pods_the_tunnel_then_the_ready_one_wins() -> None:
    plain = workload("p", "10.0.0.1", hbone=False)
    leaving = workload("l", "10.0.0.1", ready=False)
    fresh = workload("m", "10.0.0.1")
    index = builders.index(plain, leaving, fresh)
    assert index.workload_at("10.0.0.1") is fresh
    index.apply(Delta(removed_workloads=(fresh.uid,)))
    assert index.workload_at("10.0.0.1") is leaving
    index.apply(Delta(removed_workloads=(leaving.uid,)))
    assert index.workload_at("10.0.0.1") is plain


def test_pods_in_the_nodes_network_are_not_found_by_its_address() -> None:
    index = builders.index(replace(A, host_network=True))
    assert index.workload_at("10.0.0.1") is None
    assert index.workload("uid-a") is not None


def test_one_vip_two_services_the_clients_namespace_wins() -> None:
    one, other = service("web", "10.1.0.1", namespace="one"), service("web", "10.1.0.1", namespace="other")
    index = builders.index(other, one)
    assert index.service_at("10.1.0.1") is one
    assert index.service_at("10.1.0.1", "other") is other
    assert index.service_at("10.1.0.1", "third") is one


def test_candidates_are_ready_known_addressed_and_have_the_port() -> None:
    unaddressed, unready = workload("u"), workload("r", "10.0.0.5")
    endpoints = (
        Endpoint("uid-a", ((80, 8080), (81, 8081))),
        Endpoint("uid-b", ((81, 9),)),
        Endpoint("uid-u", ((80, 1),)),
        Endpoint("uid-r", ((80, 1),), ready=False),
        Endpoint("uid-gone", ((80, 1),)),
    )
    web = replace(WEB, ports=(ServicePort(80, 0), ServicePort(81, 0)), endpoints=endpoints)
    index = builders.index(A, B, unaddressed, unready, web)
    assert index.candidates(web, 80) == (Candidate(A, 8080),)
    assert index.candidates(web, 81) == (Candidate(A, 8081), Candidate(B, 9))


def test_candidates_follow_changes() -> None:
    index = builders.index(A, B, WEB)
    assert index.candidates(WEB, 80) is index.candidates(WEB, 80)
    index.apply(Delta(removed_workloads=("uid-b",)))
    assert index.candidates(WEB, 80) == (Candidate(A, 8080),)


def test_memos_are_bounded() -> None:
    index = Index(max_memos=1)
    index.apply(Delta(workloads=(A,), services=(WEB,)))
    for _ in range(2):
        assert index.candidates(WEB, 80) == (Candidate(A, 8080),)
        assert index.candidates(WEB, 81) == ()
        assert len(index._candidates) == 1


def test_policies_of_selection_namespace_and_mesh() -> None:
    selected = policy("s", Action.DENY, namespace="istio-system", scope=Scope.SELECTOR)
    own, others = allow("own"), replace(allow("own"), namespace="elsewhere")
    whole = policy("all", Action.DENY, namespace="istio-system", scope=Scope.GLOBAL)
    index = builders.index(selected, own, others, whole)
    assert index.policies_for(A) == (own, whole)
    assert index.policies_for(replace(A, policies=(selected.key,))) == (selected, own, whole)


def test_a_policy_that_changes_scope_moves() -> None:
    index = builders.index(allow("own"))
    index.apply(Delta(policies=(replace(allow("own"), scope=Scope.GLOBAL),)))
    assert index.policies_for(replace(A, namespace="elsewhere")) == (replace(allow("own"), scope=Scope.GLOBAL),)
    assert len(index.policies_for(A)) == 1


def test_a_listed_policy_that_is_not_known_denies() -> None:
    selected = replace(A, policies=("AuthorizationPolicy/default/later",))
    index = builders.index(selected)
    verdict = index.decide(selected, CALL)
    assert not verdict.allowed
    assert verdict.policy == "AuthorizationPolicy default/later"
    index.apply(Delta(policies=(policy("later", Action.DENY, scope=Scope.SELECTOR),)))
    assert index.decide(selected, CALL).allowed


def test_verdicts_follow_changes() -> None:
    index = builders.index(A)
    assert index.decide(A, CALL).reason is VerdictReason.NO_ALLOW_POLICY
    index.apply(Delta(policies=(allow("some", principals(identity("lab", "bob"))),)))
    assert index.decide(A, CALL).reason is VerdictReason.NOT_ALLOWED
    assert index.decide(A, CALL).reason is VerdictReason.NOT_ALLOWED
    index.apply(Delta(policies=(policy("some", Action.ALLOW, Rule()),)))
    assert index.decide(A, CALL).reason is VerdictReason.ALLOWED


def test_generations_grow_with_what_they_stand_for() -> None:
    index = Index()

    def after(delta: Delta) -> tuple[int, int]:
        index.apply(delta)
        return index.generation, index.policies_generation

    assert after(Delta()) == (0, 0)
    assert after(Delta(workloads=(A,))) == (1, 0)
    assert after(Delta(workloads=(replace(A),))) == (1, 0), "an equal value changes nothing"
    assert after(Delta(services=(WEB,))) == (2, 0)
    assert after(Delta(policies=(deny("no"),))) == (3, 1)
    assert after(Delta(workloads=(replace(A, policies=("x",)),))) == (4, 2), "a workload is judged by other policies"
    assert after(Delta(removed_workloads=("uid-a",))) == (5, 3)
    assert after(Delta(removed_workloads=("uid-a",), removed_services=("x",), removed_policies=("y",))) == (5, 3)
