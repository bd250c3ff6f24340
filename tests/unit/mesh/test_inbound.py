"""What a CONNECT request's authority may name."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.kit import builders
from tests.kit.builders import service, workload
from ztunnel.mesh.errors import BadConnect
from ztunnel.mesh.inbound import InboundTarget, resolve_inbound, service_for
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
