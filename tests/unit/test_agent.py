"""What follows from a change of the mesh: for the worker, for certificates, for pods."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import trio

from tests.kit.agents import Desk
from tests.kit.builders import authorization, identity, namespace, pod
from tests.kit.polling import eventually_async
from ztunnel import agent as agent_module
from ztunnel.agent import Agent
from ztunnel.dataplane.channel import Certificate, Update, Withdraw
from ztunnel.mesh.derive import MeshState
from ztunnel.sources.objects import Refusal

SHOP = namespace("shop")
CART = pod("cart", "10.0.0.1", namespace="shop", spec={"serviceAccountName": "cart"})
ELSEWHERE = pod("far", "10.0.0.2", namespace="shop", spec={"nodeName": "other", "serviceAccountName": "far"})
OUTSIDE = pod("outside", "10.0.0.3", namespace="default")
PROBLEM = Refusal("a.yaml", "AuthorizationPolicy shop/p", "spec.action", "not one of ALLOW, DENY")


@pytest.fixture(name="desk")
def fixture_desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


async def test_the_worker_knows_the_mesh_and_has_the_certificate_before_a_pod_is_tried(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART, ELSEWHERE, OUTSIDE)
        update, certificate = await desk.heard()
        assert isinstance(update, Update)
        assert {workload.uid for workload in update.delta.workloads} == {"uid-cart", "uid-far", "uid-outside"}
        assert isinstance(certificate, Certificate)
        assert certificate.identity == identity("shop", "cart"), "only this node's pods need certificates"
        (status,) = desk.enroller.status()
        assert status.uid == "uid-cart"
        assert status.problem, "there is no namespace to be found"
        assert desk.agent.identity_of("uid-cart") == identity("shop", "cart")
        assert desk.agent.identity_of("uid-nobody") is None


async def test_nothing_new_is_nothing_to_tell(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART)
        await desk.heard()
        await desk.becomes(SHOP, CART)
        assert await desk.heard() == []


async def test_a_pod_that_is_deleted_loses_its_certificate_and_is_remembered_for_its_last_records(desk: Desk) -> None:
    gone: list[str] = []
    desk.agent.on_gone = gone.extend
    async with desk.running():
        await desk.becomes(SHOP, CART)
        await desk.heard()
        await desk.becomes(SHOP)
        await eventually_async(lambda: not desk.enroller.status())
        messages = await desk.heard()
        assert isinstance(messages[0], Update)
        assert messages[0].delta.removed_workloads == ("uid-cart",)
        await eventually_async(lambda: not desk.rotation.status())
        assert gone == ["uid-cart"]
        workload = desk.agent.workload("uid-cart")
        assert workload is not None
        assert workload.name == "cart"
        assert desk.index.workload("uid-cart") is None
        messages += await desk.heard()
        assert Withdraw(identity("shop", "cart")) in messages


async def test_those_who_left_are_remembered_within_bounds(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "_REMEMBERED", 2)
    pods = [pod(f"p{number}", f"10.0.1.{number}") for number in range(4)]
    async with desk.running():
        await desk.becomes(*pods)
        await desk.becomes()
        remembered = [number for number in range(4) if desk.agent.workload(f"uid-p{number}") is not None]
        assert len(remembered) == 2


async def test_a_change_after_the_first_does_not_wait_for_pods(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP)
        await desk.heard()
        # The certificates' lock is held: whoever waited for a capture would wait here.
        async with desk.rotation._one_at_a_time:
            with trio.fail_after(30):
                await desk.becomes(SHOP, CART, authorization("p", namespace="shop", action="DENY"))
            messages = await desk.heard()
            assert [type(each) for each in messages] == [Update]
        await eventually_async(desk.enroller.status)
        assert [type(each) for each in await desk.heard()] == [Certificate]


async def test_refusals_are_told_once_and_kept(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    async with desk.running():
        with caplog.at_level(logging.ERROR):
            for _ in range(2):
                await desk.becomes(SHOP, refusals=(PROBLEM,))
        assert len([record for record in caplog.records if record.message == "manifest refused"]) == 1
        assert desk.agent.refusals == (PROBLEM,)
        await desk.becomes(SHOP)
        assert len(desk.agent.refusals) == 0


async def test_composition_comes_first(desk: Desk) -> None:
    with pytest.raises(AssertionError, match="composition"):
        await Agent("node", desk.index, desk.plane).mesh_changed(MeshState(), ())
