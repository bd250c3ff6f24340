"""A canned `AdminView`: one row of each kind, for the control API's and the command line's tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from ztunnel.admin.views import (
    CertificateRow,
    ConnectionRow,
    PodRow,
    PolicyRow,
    Problem,
    ServiceRow,
    Status,
    TunnelRow,
    WorkloadRow,
)

CART = "spiffe://cluster.local/ns/shop/sa/cart"
WEB = "spiffe://cluster.local/ns/web/sa/web"

POD = PodRow("shop", "cart-1", "u-1", ("10.1.0.2", "fd00::2"), True, True, True, True, CART, "", "the namespace is labelled")
LOST_POD = PodRow("web", "web-1", "u-2", ("10.1.0.3",), True, True, False, False, WEB, "its rules are gone", "the pod is labelled")
CERTIFICATE = CertificateRow(CART, "Valid", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", 43199, "1f", "")
FAILING = CertificateRow(WEB, "Unavailable", "", "", 0, "", "the authority is away")
PROBLEM = Problem("manifest", "AuthorizationPolicy shop/deny", "policy.yaml", "spec.action", "not one of ALLOW, DENY")


@dataclass
class CannedView:
    """Healthy by default; give it problems to see them."""

    pods: tuple[PodRow, ...] = (POD,)
    certificate_rows: tuple[CertificateRow, ...] = (CERTIFICATE,)
    problems: tuple[Problem, ...] = ()
    pending: tuple[str, ...] = ()
    node: str = "node-1"
    tunnel_rows: tuple[TunnelRow, ...] = field(
        default_factory=lambda: (TunnelRow("t1", "outbound", "shop/cart-1", "10.1.1.2:15008", WEB, 2, 10, 2048, 4000.5, "own", "open"),)
    )

    def status(self) -> Status:
        return Status(
            node=self.node,
            agent_version="0.1.0",
            trust_domain="cluster.local",
            age_seconds=61.0,
            ready=not self.pending,
            pending=self.pending,
            worker="running",
            worker_restarts=0,
            pods=self.pods,
            certificates=self.certificate_rows,
            problems=self.problems,
        )

    def workloads(self) -> tuple[WorkloadRow, ...]:
        return (
            WorkloadRow("shop", "cart-1", "u-1", ("10.1.0.2",), "node-1", "HBONE", CART, True, "cart", ()),
            WorkloadRow("web", "web-1", "u-2", ("10.1.0.3",), "node-2", "TCP", WEB, False, "web", ("AuthorizationPolicy/web/deny",)),
        )

    def services(self) -> tuple[ServiceRow, ...]:
        return (ServiceRow("shop", "cart", "cart.shop.svc.cluster.local", ("10.96.0.1",), ("80→8080",), 2, 1),)

    def policies(self) -> tuple[PolicyRow, ...]:
        return (PolicyRow("shop", "deny", "AuthorizationPolicy", "DENY", "NAMESPACE", 1, False, ""),)

    def certificates(self) -> tuple[CertificateRow, ...]:
        return self.certificate_rows

    async def connections(self) -> tuple[ConnectionRow, ...]:
        return (
            ConnectionRow(
                "c1",
                "outbound",
                "HBONE",
                "shop/cart-1",
                "10.1.0.2:4000",
                CART,
                "10.96.0.1:80",
                "10.1.1.2:8080",
                "cart.shop.svc.cluster.local",
                WEB,
                5,
                1500,
                3.25,
                "",
                "open",
            ),
        )

    async def tunnels(self) -> tuple[TunnelRow, ...]:
        return self.tunnel_rows
