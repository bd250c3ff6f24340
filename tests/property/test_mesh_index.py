"""An index after any deltas answers as one that was given the final state at once, and so does what remembers its answers."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from ztunnel.hbone.connect import Authority
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.derive import MeshState, diff
from ztunnel.mesh.errors import BadConnect
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.inbound import Admissions
from ztunnel.mesh.index import Index
from ztunnel.mesh.rules import Action, Policy, Rule, Scope
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload

UIDS = ("u1", "u2", "u3")
ADDRESSES = ("10.0.0.1", "10.0.0.2", "fd00::1")
VIPS = ("10.1.0.1", "10.1.0.2")
NAMESPACES = ("default", "shop")
HOSTNAMES = ("web", "db")
POLICY_KEYS = tuple(f"AuthorizationPolicy/{namespace}/{name}" for namespace in NAMESPACES for name in "pq")

some = st.lists
WORKLOADS = st.builds(
    Workload,
    uid=st.sampled_from(UIDS),
    name=st.just("x"),
    namespace=st.sampled_from(NAMESPACES),
    identity=st.just(SpiffeId("td", "ns", "sa")),
    node=st.just("n"),
    addresses=some(st.sampled_from(ADDRESSES), max_size=2, unique=True).map(tuple),
    protocol=st.sampled_from(Protocol),
    ready=st.booleans(),
    host_network=st.booleans(),
    policies=some(st.sampled_from(POLICY_KEYS), max_size=2, unique=True).map(tuple),
)
ENDPOINTS = st.builds(Endpoint, st.sampled_from(UIDS), st.sampled_from(((), ((80, 8080),), ((80, 1), (81, 2)))), st.booleans())
SERVICES = st.builds(
    Service,
    name=st.just("x"),
    namespace=st.sampled_from(NAMESPACES),
    hostname=st.sampled_from(HOSTNAMES),
    vips=some(st.sampled_from(VIPS), max_size=2, unique=True).map(tuple),
    ports=st.just((ServicePort(80, 0), ServicePort(81, 0))),
    endpoints=some(ENDPOINTS, max_size=3, unique_by=lambda each: each.workload_uid).map(tuple),
)
POLICIES = st.builds(
    Policy,
    name=st.sampled_from("pq"),
    namespace=st.sampled_from(NAMESPACES),
    scope=st.sampled_from(Scope),
    action=st.sampled_from(Action),
    rules=st.sampled_from(((), (Rule(),))),
)
DELTAS = st.builds(
    Delta,
    workloads=some(WORKLOADS, max_size=3, unique_by=lambda each: each.uid).map(tuple),
    services=some(SERVICES, max_size=3, unique_by=lambda each: each.key).map(tuple),
    policies=some(POLICIES, max_size=3, unique_by=lambda each: each.key).map(tuple),
    removed_workloads=some(st.sampled_from(UIDS), max_size=1).map(tuple),
    removed_services=some(st.sampled_from([f"{n}/{h}" for n in NAMESPACES for h in HOSTNAMES]), max_size=1).map(tuple),
    removed_policies=some(st.sampled_from(POLICY_KEYS), max_size=1).map(tuple),
)


def answers(index: Index) -> list[object]:
    """Everything that one can ask."""
    workloads = index.workloads()
    return [
        workloads,
        index.services(),
        index.policies(),
        [index.workload(uid) for uid in UIDS],
        [index.workload_at(address) for address in ADDRESSES],
        [index.service_at(vip, namespace) for vip in VIPS for namespace in ("", *NAMESPACES)],
        [index.service_named(name, namespace) for name in HOSTNAMES for namespace in ("", *NAMESPACES)],
        [index.services_of(uid) for uid in UIDS],
        [index.candidates(service, port) for service in index.services() for port in (80, 81)],
        [index.policies_for(workload) for workload in workloads],
    ]


def applied(deltas: list[Delta]) -> Index:
    index = Index()
    for delta in deltas:
        index.apply(delta)
        answers(index)  # fills the memos, which must not outlive the next delta
    return index


def state_of(index: Index) -> MeshState:
    return MeshState(
        workloads={each.uid: each for each in index.workloads()},
        services={each.key: each for each in index.services()},
        policies={each.key: each for each in index.policies()},
    )


@given(st.lists(DELTAS, max_size=6))
def test_any_deltas_equal_a_full_relist(deltas: list[Delta]) -> None:
    index = applied(deltas)
    assert answers(index) == answers(applied([diff(MeshState(), state_of(index))]))


@given(st.lists(DELTAS, max_size=4), DELTAS)
def test_a_delta_applied_twice_changes_nothing_more(deltas: list[Delta], last: Delta) -> None:
    index = applied([*deltas, last])
    once = answers(index), state_of(index)
    index.apply(Delta(last.workloads, last.services, last.policies))
    assert (answers(index), state_of(index)) == once


@given(st.lists(DELTAS, max_size=4), st.lists(DELTAS, max_size=4))
def test_a_difference_leads_from_any_state_to_any_other(one: list[Delta], other: list[Delta]) -> None:
    index, wanted = applied(one), applied(other)
    index.apply(diff(state_of(index), state_of(wanted)))
    assert answers(index) == answers(wanted)


@given(st.lists(DELTAS, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_objects_in_a_relist_does_not_show(deltas: list[Delta], dice: Random) -> None:
    index = applied(deltas)
    parts = [Delta(workloads=(each,)) for each in index.workloads()]
    parts += [Delta(services=(each,)) for each in index.services()]
    parts += [Delta(policies=(each,)) for each in index.policies()]
    dice.shuffle(parts)
    assert answers(applied(parts)) == answers(index)


def told(admissions: Admissions) -> list[object]:
    """All that a peer can ask on one tunnel."""
    found: list[object] = []
    for host in (ADDRESSES[0], *HOSTNAMES):
        for port in (80, 8080):
            for service_host in ("", HOSTNAMES[1]):
                try:
                    answer = admissions.ask(Authority(host, port), service_host)
                except BadConnect as error:
                    found.append(str(error))
                else:
                    found.append((answer.workload, answer.authority, answer.endpoint, answer.service, answer.source_uid, answer.verdict))
    return found


@given(st.lists(DELTAS, max_size=6))
def test_a_tunnel_is_told_what_a_new_one_would_be(deltas: list[Delta]) -> None:
    index = Index()
    tunnels = [(index, uid, ADDRESSES[0], source, SpiffeId("td", "ns", "sa")) for uid in UIDS[:2] for source in ADDRESSES[1:]]
    asking = [(tunnel, Admissions(*tunnel)) for tunnel in tunnels]
    for delta in deltas:
        index.apply(delta)
        for tunnel, admissions in asking:
            assert told(admissions) == told(Admissions(*tunnel))
