"""Which pod a runtime means, what is known of its sandbox, the list for when the agent is away. With a kernel: tests/netns/test_cni.py"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio

from tests.kit.agents import Desk
from tests.kit.builders import namespace, pod
from tests.kit.polling import eventually_async
from ztunnel.admission import Admission
from ztunnel.cni.request import Code, Command, PodName, Request
from ztunnel.node.find_on_node import NodeFinder
from ztunnel.settings import CniSettings

SHOP = namespace("shop")
PLAIN = namespace("plain", ambient=False)
CART = pod("cart", namespace="shop")
STATIC = pod("static-node", namespace="shop", meta={"annotations": {"kubernetes.io/config.mirror": "hash"}})
WAIT = 30


def request(
    name: str, *, command: Command = Command.ADD, of: str = "shop", uid: str = "", addresses: tuple[str, ...] = ("10.0.0.1",)
) -> Request:
    return Request(command, "c1", "/run/netns/none", PodName(of, name, uid), addresses)


@pytest.fixture(name="desk")
def fixture_desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


@pytest.fixture(name="known")
def fixture_known(tmp_path: Path) -> Path:
    return tmp_path / "state" / "known"


def admission(desk: Desk, known: Path, seconds: float = 0.1) -> Admission:
    finder = NodeFinder(str(known.parent / "netns"), str(known.parent / "proc"))
    return Admission(desk.agent, desk.enroller, finder, CniSettings(known_file=known, add_seconds=seconds))


def said(known: Path) -> list[str]:
    return known.read_text().splitlines()


async def test_who_is_not_to_be_captured_starts_at_once(desk: Desk, known: Path) -> None:
    ask = admission(desk, known).gate
    async with desk.running():
        await desk.becomes(SHOP, PLAIN, pod("free", namespace="plain"), pod("node", namespace="shop", spec={"hostNetwork": True}))
        assert await ask(request("free", of="plain", uid="uid-free")) is None
        assert await ask(request("free", of="plain")) is None, "a runtime that says no UID"
        assert await ask(request("node", uid="uid-node")) is None
        assert await ask(request("whatever", of="kube-system")) is None, "an excluded namespace needs no news"
        assert await ask(Request(Command.ADD, "c1", "/n", None, ())) is None
        for command in (Command.CHECK, Command.STATUS, Command.DEL, Command.GC):
            assert await ask(request("unheard", command=command)) is None


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (request("unheard", uid="uid-unheard"), "does not know pod shop/unheard yet"),
        (request("cart", uid="uid-of-the-next-cart"), "does not know pod shop/cart yet"),
        (request("static-node", uid="other"), "does not know pod shop/static-node yet"),
        (request("cart", uid="uid-cart", addresses=()), "gave the pod no address"),
        (request("cart", uid="uid-cart"), "cannot open namespace"),
        (request("cart"), "cannot open namespace"),
        (request("static-node", uid="hash"), "cannot open namespace"),
    ],
    ids=str,
)
async def test_who_must_wait(desk: Desk, known: Path, asked: Request, why: str) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART, STATIC)
        refusal = await admission(desk, known).gate(asked)
        assert refusal is not None
        assert refusal.code is (Code.BAD_CONFIGURATION if not asked.addresses else Code.TRY_LATER)
        assert why in refusal.text


async def test_a_pod_that_is_deleted_while_it_waits_does_not_start_in_plain(desk: Desk, known: Path) -> None:
    gate = admission(desk, known, seconds=WAIT).gate
    pinned = known.parent / "netns"
    pinned.mkdir(parents=True)
    (pinned / "cart").symlink_to("/proc/self/ns/net")
    asked = Request(Command.ADD, "c1", "/run/netns/cart", PodName("shop", "cart", "uid-cart"), ("10.0.0.1",))
    answers: list[object] = []

    async def ask() -> None:
        refusal = await gate(asked)
        answers.append(None if refusal is None else refusal.text)

    async with desk.running(), trio.open_nursery() as nursery:
        await desk.becomes(SHOP, CART)
        nursery.start_soon(ask)
        await eventually_async(lambda: "uid-cart" in desk.agent._sandboxes, within=30)
        await desk.becomes(SHOP)
    assert answers == ["pod shop/cart was deleted before it was captured"]


async def test_check_says_that_nothing_is_captured(desk: Desk, known: Path) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART)
        refusal = await admission(desk, known).gate(request("cart", command=Command.CHECK, uid="uid-cart"))
        assert refusal is not None
        assert refusal.text == "pod shop/cart: the pod is not being captured"


async def test_a_pod_that_is_heard_of_in_time_is_not_refused(desk: Desk, known: Path) -> None:
    async with desk.running():
        await desk.becomes(SHOP, PLAIN)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(desk.becomes, SHOP, PLAIN, pod("late", namespace="plain"))
            assert await admission(desk, known, seconds=WAIT).gate(request("late", of="plain", uid="uid-late")) is None


async def test_the_list_follows_the_mesh(desk: Desk, known: Path) -> None:
    async with desk.running(), trio.open_nursery() as nursery:
        far = pod("far", namespace="shop", spec={"nodeName": "other"})
        await desk.becomes(SHOP, PLAIN, CART, STATIC, far, pod("free", "10.0.0.9", namespace="plain"))
        await nursery.start(admission(desk, known).run)
        pods = ["allow pod uid-free", "refuse pod hash", "refuse pod uid-cart"]
        assert said(known)[1:-1] == [*pods, "allow namespace kube-system", "allow namespace plain"]
        assert os.stat(known).st_mode & 0o777 == 0o600
        await desk.becomes(SHOP, namespace("plain"), pod("free", "10.0.0.9", namespace="plain"))
        await eventually_async(lambda: "refuse pod uid-free" in said(known), within=WAIT)
        assert "allow namespace plain" not in said(known)
        nursery.cancel_scope.cancel()


async def test_a_list_that_cannot_be_written_does_not_stop_the_agent(desk: Desk, known: Path) -> None:
    known.parent.write_text("a file where a directory should be")
    async with desk.running(), trio.open_nursery() as nursery:
        await nursery.start(admission(desk, known).run)
        nursery.cancel_scope.cancel()


# What the agent makes of news of a sandbox


async def test_a_sandbox_makes_a_pod_a_workload_until_its_object_does(desk: Desk) -> None:
    agent = desk.agent
    async with desk.running():
        await desk.becomes(SHOP, CART)
        assert not agent.state.workloads
        agent.sandbox_made("uid-cart", ("10.0.0.1",))
        assert agent.state.workloads["uid-cart"].addresses == ("10.0.0.1",)
        assert desk.index.workload("uid-cart") is not None
        await eventually_async(lambda: [status.uid for status in desk.enroller.status()] == ["uid-cart"], within=WAIT)
        agent.sandbox_gone("uid-cart")
        assert not agent.state.workloads
        agent.sandbox_made("uid-cart", ("10.0.0.1",))
        await desk.becomes(SHOP, pod("cart", "10.0.0.1", namespace="shop"))
        agent.sandbox_gone("uid-cart")
        assert agent.state.workloads["uid-cart"].addresses == ("10.0.0.1",), "its object says so by itself"


async def test_an_object_with_another_address_is_later_news(desk: Desk) -> None:
    agent = desk.agent
    async with desk.running():
        await desk.becomes(SHOP, pod("cart", "10.0.0.1", namespace="shop"))
        agent.sandbox_made("uid-cart", ("10.0.0.2",))
        assert agent.state.workloads["uid-cart"].addresses == ("10.0.0.2",)
        await desk.becomes(SHOP, pod("cart", "10.0.0.1", namespace="shop", labels={"changed": "yes"}))
        assert agent.state.workloads["uid-cart"].addresses == ("10.0.0.2",), "the object speaks of the sandbox before"
        await desk.becomes(SHOP, pod("cart", "10.0.0.3", namespace="shop"))
        assert agent.state.workloads["uid-cart"].addresses == ("10.0.0.3",)


async def test_a_pod_that_is_deleted_takes_its_sandbox_along(desk: Desk) -> None:
    async with desk.running():
        await desk.becomes(SHOP, CART)
        desk.agent.sandbox_made("uid-cart", ("10.0.0.1",))
        await desk.becomes(SHOP)
        assert not desk.agent.state.workloads
        await desk.becomes(SHOP, CART)
        assert not desk.agent.state.workloads
