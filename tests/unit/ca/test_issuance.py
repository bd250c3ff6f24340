"""Who may have which certificate, and who may not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.citadel import AGENT, RULES, pods
from ztunnel.ca.allowance import Allowance
from ztunnel.ca.issuance import Caller, Grant, Reason, Refusal, decide
from ztunnel.ca.pods import PodPlace, PodTable
from ztunnel.mesh.identity import SpiffeId

CART = Caller("shop", "cart", "cart-0", "uid-cart-0")


def refused(caller: Caller, impersonated: str, table: PodTable | None = None) -> Reason:
    with pytest.raises(Refusal) as caught:
        decide(caller, impersonated, pods() if table is None else table, RULES)
    return caught.value.reason


def test_an_agent_gets_what_runs_on_its_node() -> None:
    grant = decide(AGENT, "spiffe://cluster.local/ns/shop/sa/cart", pods(), RULES)
    assert grant == Grant(SpiffeId("cluster.local", "shop", "cart"), "node-1")


def test_anybody_gets_a_certificate_of_its_own() -> None:
    assert decide(CART, "", pods(), RULES) == Grant(SpiffeId("cluster.local", "shop", "cart"), "node-1")
    assert decide(AGENT, "", pods(), RULES).identity.service_account == "ztunnel"


@pytest.mark.parametrize(
    ("caller", "impersonated", "reason"),
    [
        (AGENT, "spiffe://cluster.local/ns/shop/sa/bank", Reason.NOT_ON_NODE),
        (AGENT, "spiffe://cluster.local/ns/other/sa/cart", Reason.NOT_ON_NODE),
        (AGENT, "spiffe://cluster.local/ns/shop/sa/nobody", Reason.NOT_ON_NODE),
        (AGENT, "spiffe://elsewhere/ns/shop/sa/cart", Reason.BAD_IDENTITY),
        (AGENT, "cluster.local/ns/shop/sa/cart", Reason.BAD_IDENTITY),
        (AGENT, "spiffe://cluster.local/ns/shop/sa/cart/", Reason.BAD_IDENTITY),
        (CART, "spiffe://cluster.local/ns/shop/sa/cart", Reason.NOT_AN_AGENT),
        (CART, "spiffe://cluster.local/ns/shop/sa/bank", Reason.NOT_AN_AGENT),
        (replace(AGENT, namespace="shop"), "spiffe://cluster.local/ns/shop/sa/cart", Reason.NO_POD),
        (replace(AGENT, pod="", pod_uid=""), "spiffe://cluster.local/ns/shop/sa/cart", Reason.NO_POD),
        (replace(AGENT, pod_uid=""), "spiffe://cluster.local/ns/shop/sa/cart", Reason.NO_POD),
        (replace(AGENT, pod_uid="of a pod of the same name before"), "spiffe://cluster.local/ns/shop/sa/cart", Reason.NO_POD),
        (replace(CART, service_account="bank"), "", Reason.NO_POD),
        (replace(CART, pod="bank-0", pod_uid="uid-cart-0"), "", Reason.NO_POD),
    ],
)
def test_nobody_gets_anything_else(caller: Caller, impersonated: str, reason: Reason) -> None:
    assert refused(caller, impersonated) is reason


def test_without_knowing_the_pods_nobody_gets_anything() -> None:
    table = PodTable()
    assert refused(AGENT, "", table) is Reason.NOT_SYNCED
    table.replace([])
    assert refused(AGENT, "", table) is Reason.NO_POD


def test_pods_come_move_and_go() -> None:
    table = pods()
    table.put(PodPlace("shop", "bank-1", "uid-bank-1", "", "bank"))
    assert not table.runs_on("", "shop", "bank")
    assert table.node_of("shop", "bank-1", "uid-bank-1") is None
    table.put(PodPlace("shop", "bank-1", "uid-bank-1", "node-1", "bank"))
    assert table.runs_on("node-1", "shop", "bank")
    table.put(PodPlace("shop", "bank-2", "uid-bank-2", "node-1", "bank"))
    table.put(PodPlace("shop", "bank-2", "uid-bank-2", "node-1", "bank"))
    table.remove("shop", "bank-1")
    assert table.runs_on("node-1", "shop", "bank")
    table.remove("shop", "bank-2")
    table.remove("shop", "bank-2")
    assert not table.runs_on("node-1", "shop", "bank")
    assert table.runs_on("node-2", "shop", "bank")
    assert len(table) == 4


def test_an_allowance_is_spent_and_comes_back() -> None:
    allowance = Allowance(per_second=2.0, burst=3.0)
    assert [allowance.take("a", 100.0) for _ in range(5)] == [True, True, True, False, False]
    assert allowance.take("b", 100.0)
    assert [allowance.take("a", 100.5) for _ in range(2)] == [True, False]
    assert [allowance.take("a", 1000.0) for _ in range(4)] == [True, True, True, False]
    assert not allowance.take("a", 900.0)


def test_an_allowance_remembers_so_many_names_and_no_more() -> None:
    allowance = Allowance(per_second=0.0, burst=1.0, names=2)
    assert [allowance.take(name, 0.0) for name in ("a", "b", "b", "c", "b", "a")] == [True, True, False, True, False, True]
