"""Rows made of the mesh's own values."""

from __future__ import annotations

from ztunnel.admin.views import PolicyRow, ServiceRow, WorkloadRow, policy_row, service_row, timestamp, workload_row
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.rules import Action, Policy, Rule, Scope
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload


def test_workload() -> None:
    workload = Workload(
        uid="u",
        name="cart-1",
        namespace="shop",
        identity=SpiffeId("cluster.local", "shop", "cart"),
        node="n",
        addresses=("10.0.0.1",),
        protocol=Protocol.HBONE,
        canonical_name="cart",
    )
    identity = "spiffe://cluster.local/ns/shop/sa/cart"
    assert workload_row(workload) == WorkloadRow("shop", "cart-1", "u", ("10.0.0.1",), "n", "HBONE", identity, True, "cart", ())


def test_service() -> None:
    service = Service(
        name="cart",
        namespace="shop",
        hostname="cart.shop.svc.cluster.local",
        vips=(),
        ports=(ServicePort(80, 8080), ServicePort(81, 0)),
        endpoints=(Endpoint("a", ((80, 8080),)), Endpoint("b", ((80, 8080),), ready=False)),
    )
    assert service_row(service) == ServiceRow("shop", "cart", "cart.shop.svc.cluster.local", (), ("80→8080", "81→named"), 2, 1)


def test_policy() -> None:
    policy = Policy("deny", "shop", Scope.NAMESPACE, Action.DENY, (Rule(),), reason="refused")
    assert policy_row(policy) == PolicyRow("shop", "deny", "AuthorizationPolicy", "DENY", "NAMESPACE", 1, False, "refused")


def test_times() -> None:
    assert timestamp(1_800_000_000.9) == "2027-01-15T08:00:00Z"
    assert timestamp(0) == ""
