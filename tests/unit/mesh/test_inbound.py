"""What a CONNECT request's authority may name, and what a tunnel's requests are told."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.kit import builders
from tests.kit.builders import allow, deny, identity, policy, principals, service, workload
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import BadConnect
from ztunnel.mesh.inbound import Admission, Admissions, InboundTarget, resolve_inbound, service_for
from ztunnel.mesh.index import Index
from ztunnel.mesh.rules import Action, Match, Rule, Scope
from ztunnel.mesh.workloads import Endpoint, ServicePort

LOCAL = workload("a", "10.0.0.1", "fd00::1")
WEB = service("web", "10.1.0.1", ports={80: 8080, 81: 8081}, behind=(LOCAL,))
INDEX = builders.index(LOCAL, WEB)


@dataclass(frozen=True)
class Authority:
    host: str
    port: int


def test_the_tunnels_own_address() -> None:
    assert resolve_inbound(INDEX, LOCAL, "10.0.0.1", Authority("10.0.0.1", 8080)) == InboundTarget("10.0.0.1", 8080, WEB)
    assert resolve_inbound(INDEX, LOCAL, "fd00::1", Authority("FD00:0::1", 9)) == InboundTarget("fd00::1", 9, None)
    assert resolve_inbound(INDEX, LOCAL, "10.0.0.1", Authority("::ffff:10.0.0.1", 9)).address == "10.0.0.1"


def test_a_hostname_is_translated_to_this_workloads_port() -> None:
    assert resolve_inbound(INDEX, LOCAL, "10.0.0.1", Authority("Web.default.svc.cluster.local", 80)) == InboundTarget("10.0.0.1", 8080, WEB)


def test_a_hostname_falls_back_to_the_services_target_port() -> None:
    other = replace(service("other", "10.1.0.2", ports={}), ports=(ServicePort(70, 0), ServicePort(80, 7070)))
    partly = replace(other, name="partly", hostname="partly", endpoints=(Endpoint("uid-x", ()), Endpoint("uid-a", ((70, 1),))))
    index = builders.index(LOCAL, other, partly)
    assert resolve_inbound(index, LOCAL, "10.0.0.1", Authority(other.hostname, 80)).port == 7070
    assert resolve_inbound(index, LOCAL, "10.0.0.1", Authority("partly", 80)).port == 7070


@pytest.mark.parametrize(
    ("host", "port", "status"),
    [
        ("10.0.0.2", 8080, 400),
        ("fd00::1", 8080, 400),
        ("10.1.0.1", 80, 400),
        ("unknown.default.svc.cluster.local", 80, 503),
        ("web.default.svc.cluster.local", 82, 503),
        ("10.0.0.1", 15001, 503),
        ("10.0.0.1", 15006, 503),
        ("10.0.0.1", 15008, 503),
    ],
)
def test_anything_else_is_refused(host: str, port: int, status: int) -> None:
    with pytest.raises(BadConnect) as caught:
        resolve_inbound(INDEX, LOCAL, "10.0.0.1", Authority(host, port))
    assert caught.value.status == status


def test_a_named_port_without_a_number_here_is_refused() -> None:
    index = builders.index(LOCAL, replace(WEB, ports=(ServicePort(80, 0),), endpoints=()))
    with pytest.raises(BadConnect, match="has no number for port 80"):
        resolve_inbound(index, LOCAL, "10.0.0.1", Authority(WEB.hostname, 80))


def test_a_hostname_in_two_namespaces_is_the_local_one() -> None:
    there = replace(service("web", behind=(LOCAL,), ports={80: 1}), namespace="aaa")
    index = builders.index(LOCAL, WEB, there)
    assert resolve_inbound(index, LOCAL, "10.0.0.1", Authority(WEB.hostname, 80)).service is WEB


def test_the_service_behind_a_port() -> None:
    more = service("zzz", "10.1.0.2", ports={80: 8080, 90: 9090}, behind=(workload("b"), LOCAL))
    index = builders.index(LOCAL, WEB, more)
    assert service_for(index, LOCAL, 8080) is WEB
    assert service_for(index, LOCAL, 9090) is more
    assert service_for(index, LOCAL, 1) is None
    assert service_for(index, LOCAL, 8080, more.hostname) is more, "the client says which one"
    assert service_for(index, LOCAL, 8080, "elsewhere.default.svc.cluster.local") is WEB, "but only one of the workload's own"


# What is remembered

PEER = workload("peer", "10.0.0.9", account="peer")
PEERS = allow("peers", principals(PEER.identity))
SELECTED = policy("selected", Action.DENY, Rule(), scope=Scope.SELECTOR)


def tunnel(index: Index) -> Admissions:
    """One from PEER to LOCAL."""
    return Admissions(index, LOCAL.uid, "10.0.0.1", "10.0.0.9", PEER.identity)


def ask(admissions: Admissions, port: int = 8080) -> Admission:
    return admissions.ask(Authority("10.0.0.1", port))


def test_the_same_request_is_told_the_same_until_the_mesh_changes() -> None:
    index = builders.index(LOCAL, PEER, WEB)
    admissions = tunnel(index)
    told = ask(admissions)
    assert (told.endpoint, told.service, told.source_uid, told.workload) == (("10.0.0.1", 8080), WEB, PEER.uid, LOCAL)
    assert told.verdict.allowed
    assert ask(admissions) is told
    index.apply(Delta(workloads=(LOCAL,)))
    assert ask(admissions) is told, "nothing has changed"
    index.apply(Delta(workloads=(workload("c", "10.0.0.3"),)))
    assert ask(admissions) is not told


def test_requests_that_differ_are_told_apart() -> None:
    more = service("zzz", "10.1.0.2", ports={80: 8080}, behind=(LOCAL,))
    index = builders.index(LOCAL, WEB, more, deny("not-there", Match(destination_ports=(8081,))))
    admissions = tunnel(index)
    assert ask(admissions).verdict.allowed
    assert not ask(admissions, 8081).verdict.allowed
    assert admissions.ask(Authority("10.0.0.1", 8080), more.hostname).service is more
    assert admissions.ask(Authority(WEB.hostname, 81)).endpoint == ("10.0.0.1", 8081)
    assert ask(admissions).service is WEB


CHANGES = {
    "a policy comes": Delta(policies=(deny("no-peers", principals(PEER.identity)),)),
    "a policy's trust domain": Delta(policies=(allow("peers", principals(replace(PEER.identity, trust_domain="other.domain"))),)),
    "another policy instead": Delta(removed_policies=(PEERS.key,), policies=(allow("others", principals(identity(account="other"))),)),
    "the workload's labels": Delta(workloads=(replace(LOCAL, policies=(SELECTED.key,)),)),
    "an unknown policy selects": Delta(workloads=(replace(LOCAL, policies=("AuthorizationPolicy/default/unknown",)),)),
    "the workload's namespace": Delta(workloads=(replace(LOCAL, namespace="guarded"),)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_verdict_does_not_outlive_its_policies(what: str) -> None:
    guard = policy("guard", Action.ALLOW, namespace="guarded")
    index = builders.index(LOCAL, PEER, PEERS, guard, SELECTED)
    admissions = tunnel(index)
    assert ask(admissions).verdict.allowed
    index.apply(CHANGES[what])
    assert not ask(admissions).verdict.allowed


def test_a_refusal_does_not_outlive_its_policy() -> None:
    guard = deny("no-peers", principals(PEER.identity))
    index = builders.index(LOCAL, PEER, guard)
    admissions = tunnel(index)
    assert not ask(admissions).verdict.allowed
    index.apply(Delta(removed_policies=(guard.key,)))
    assert ask(admissions).verdict.allowed


def test_the_peers_workload_is_remembered_no_longer_than_it_has_the_address() -> None:
    index = builders.index(LOCAL, PEER)
    admissions = tunnel(index)
    assert ask(admissions).source_uid == PEER.uid
    index.apply(Delta(removed_workloads=(PEER.uid,), workloads=(workload("next", "10.0.0.9", account="next"),)))
    assert ask(admissions).source_uid == "", "whoever has it now has another identity than the tunnel's"


def test_what_cannot_be_told_is_asked_again() -> None:
    index = builders.index(LOCAL)
    admissions = tunnel(index)
    with pytest.raises(BadConnect, match="unknown service"):
        admissions.ask(Authority(WEB.hostname, 80))
    index.apply(Delta(services=(WEB,)))
    assert admissions.ask(Authority(WEB.hostname, 80)).service is WEB
    index.apply(Delta(removed_workloads=(LOCAL.uid,)))
    with pytest.raises(BadConnect, match="local workload"):
        admissions.ask(Authority(WEB.hostname, 80))


def test_a_peer_that_asks_for_everything_takes_no_more_room() -> None:
    admissions = tunnel(builders.index(LOCAL))
    for port in range(1, 1000):
        assert ask(admissions, port).endpoint[1] == port
        assert len(admissions._known) <= 64
