"""What the listings and gauges say of an agent's parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.agents import Desk
from tests.kit.builders import authorization, namespace, pod, service_manifest
from tests.kit.polling import eventually_async
from ztunnel.dataplane.channel import Activity, Answer, Flows, Query
from ztunnel.dataplane.flow import ConnectionState, Direction, FlowNews, FlowPath, TunnelState
from ztunnel.sources.objects import Refusal

SHOP = namespace("shop")
CART = pod("cart", "10.0.0.1", namespace="shop", spec={"serviceAccountName": "cart"})
OUTSIDE = pod("outside", "10.0.0.3", namespace="default")
POLICY = authorization("p", namespace="shop", action="DENY")
SERVICE = service_manifest("web", "10.96.0.1", namespace="shop")
CART_ID = "spiffe://cluster.local/ns/shop/sa/cart"
REFUSAL = Refusal("a.yaml", "AuthorizationPolicy shop/p", "spec.action", "not one of ALLOW, DENY")
CONNECTION = ConnectionState(
    "c1",
    Direction.INBOUND,
    "HBONE",
    "uid-cart",
    "10.0.0.9:1",
    CART_ID,
    "10.0.0.1:80",
    "10.0.0.1:80",
    "",
    CART_ID,
    1,
    2,
    3.14159,
    "",
    "open",
)
TUNNEL = TunnelState("t1", Direction.OUTBOUND, "uid-gone", "10.0.0.2:15008", CART_ID, 2, 10, 20, 4.0004, "own", "open")
PATH = FlowPath(Direction.INBOUND, "uid-cart", ("10.0.0.1", 80), "", mutual_tls=False)
NEWS = (FlowNews(PATH, 1, opened=1),)


@pytest.fixture(name="desk")
def fixture_desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_status_of_a_node_with_a_pod_that_cannot_be_captured(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART, OUTSIDE, refusals=(REFUSAL,))
        desk.now += 61
        status = desk.overview.status()
    assert (status.node, status.agent_version, status.trust_domain, status.age_seconds) == ("node", "1.2.3", "cluster.local", 61)
    assert (status.ready, status.pending, status.worker, status.worker_restarts) == (False, ("mesh",), "running", 0)
    assert [(row.namespace, row.name, row.labelled, row.captured) for row in status.pods] == [
        ("default", "outside", False, False),
        ("shop", "cart", True, False),
    ]
    assert [(row.identity, row.state, row.error) for row in status.certificates] == [(CART_ID, "Valid", "")]
    assert status.certificates[0].seconds_left > 86000
    manifest, problem = status.problems
    assert (manifest.object, manifest.reason) == ("AuthorizationPolicy shop/p", "not one of ALLOW, DENY")
    assert problem.object == "Pod shop/cart"


async def test_a_pod_that_leaves_the_mesh_is_listed_until_it_is_let_go(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART)
        # Its object is gone; the enroller has not been told yet.
        desk.agent.state = replace(desk.agent.state, captures={})
        (row,) = desk.overview.pods()
        assert (row.name, row.reason, row.addresses) == ("cart", "leaving the mesh", ())


async def test_a_pod_flows_while_it_has_connections_and_for_a_while_after(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART)

        def flows() -> bool:
            return desk.overview.pods()[0].flowing

        assert not flows()
        await desk.says(Flows(NEWS))
        assert flows()
        desk.now += 299
        assert flows()
        desk.now += 2
        assert not flows()


async def test_the_mesh_is_listed_in_order(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART, OUTSIDE, POLICY, SERVICE)
    assert [(row.namespace, row.name, row.protocol) for row in desk.overview.workloads()] == [
        ("default", "outside", "TCP"),
        ("shop", "cart", "HBONE"),
    ]
    assert [row.name for row in desk.overview.services()] == ["web"]
    assert [row.name for row in desk.overview.policies()] == ["p"]


async def test_connections_and_tunnels_are_asked_of_the_worker(desk: Desk) -> None:
    async with desk.running() as nursery:
        await desk.becomes(SHOP, CART)
        await desk.heard()
        got: list[object] = []

        async def ask() -> None:
            got.extend(await desk.overview.connections())
            got.extend(await desk.overview.tunnels())

        nursery.start_soon(ask)
        for _ in range(2):
            (question,) = await desk.heard()
            assert isinstance(question, Query)
            later = replace(CONNECTION, id="c2", source="10.0.0.8:1")
            await desk.says(Answer(question.id, (CONNECTION, later), (TUNNEL,)))
        await eventually_async(lambda: len(got) == 3)
    second, first, tunnel = got
    assert [second.id, first.id, tunnel.id] == ["c2", "c1", "t1"]  # type: ignore[attr-defined]  # rows
    assert (first.pod, first.direction, first.age_seconds) == ("shop/cart", "inbound", 3.142)  # type: ignore[attr-defined]  # a row
    assert (first.bytes_sent, first.bytes_received, first.state) == (2, 1, "open")  # type: ignore[attr-defined]  # a row
    assert (tunnel.pod, tunnel.age_seconds) == ("uid-gone", 4.0)  # type: ignore[attr-defined]  # a row


async def test_without_a_worker_there_is_nothing_and_status_says_so(desk: Desk) -> None:
    assert await desk.overview.connections() == ()
    assert await desk.overview.tunnels() == ()
    status = desk.overview.status()
    assert status.worker == "restarting"
    assert [problem.kind for problem in status.problems] == ["worker"]
    desk.overview.is_draining = True
    assert desk.overview.status().worker == "draining"


async def test_gauges_are_read_when_somebody_looks(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART, refusals=(REFUSAL,))
        await desk.says(Activity({}))
        page = desk.metrics.exposition("")[1].decode()
    lines = dict(line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("ztunnel_"))
    assert float(lines["ztunnel_enrolled_pods"]) == 0
    assert float(lines["ztunnel_refused_manifests"]) == 1
    assert float(lines["ztunnel_redirection_repairs_total"]) == 0
    assert float(lines[f'ztunnel_certificates_expiry_seconds{{identity="{CART_ID}"}}']) > 86000
