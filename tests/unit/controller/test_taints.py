"""Which nodes are tainted: what was ready, in which boot, and what of that can be believed."""

from __future__ import annotations

import pytest

from ztunnel.controller.taints import READY_IN, TAINT, AgentView, NodeView, Verdict, agent_view, change, verdict
from ztunnel.kube.client import Json

OURS: Json = {"key": TAINT, "effect": "NoSchedule"}
OTHER: Json = {"key": "node.kubernetes.io/disk-pressure", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}


def node(*taints: Json, boot: str = "boot-1", ready_in: str = "") -> NodeView:
    return NodeView("n", "7", boot, taints, ready_in)


def agent(container: str = "c1", *, ready: bool = True) -> AgentView:
    return AgentView("n", ready, container)


@pytest.mark.parametrize(
    ("what", "seen", "running", "wanted"),
    [
        ("new, with the taint, agent ready", node(OURS), agent(), Verdict(False, "boot-1 c1")),
        ("new, with the taint, agent starting", node(OURS), agent(ready=False), Verdict(True, "", settled=False)),
        ("new, with the taint, no container yet", node(OURS), agent(""), Verdict(True, "", settled=False)),
        ("new, with the taint, no agent", node(OURS), None, Verdict(True, "", settled=False)),
        ("there before the mesh", node(), agent(ready=False), Verdict(False, "")),
        ("where no agent is meant to run", node(boot="boot-2", ready_in="boot-1 c1"), None, Verdict(False, "boot-1 c1")),
        ("as it was", node(ready_in="boot-1 c1"), agent(), Verdict(False, "boot-1 c1")),
        ("agent started again", node(ready_in="boot-1 c1"), agent("c2"), Verdict(False, "boot-1 c2")),
        ("agent fails, node did not boot", node(ready_in="boot-1 c1"), agent(ready=False), Verdict(False, "boot-1 c1")),
        (
            "booted, pod's status is from before",
            node(boot="boot-2", ready_in="boot-1 c1"),
            agent(),
            Verdict(True, "boot-1 c1", settled=False),
        ),
        (
            "booted, agent starts",
            node(boot="boot-2", ready_in="boot-1 c1"),
            agent("c2", ready=False),
            Verdict(True, "boot-1 c1", settled=False),
        ),
        ("booted, agent ready", node(OURS, boot="boot-2", ready_in="boot-1 c1"), agent("c2"), Verdict(False, "boot-2 c2")),
        ("a node that says no boot", node(OURS, boot=""), agent(), Verdict(True, "", settled=False)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_verdicts(what: str, seen: NodeView, running: AgentView | None, wanted: Verdict) -> None:
    assert verdict(seen, running) == wanted


def test_a_change_touches_nothing_of_others() -> None:
    body = change(node(OTHER, OURS), Verdict(False, "boot-1 c1"))
    assert body == {"metadata": {"resourceVersion": "7", "annotations": {READY_IN: "boot-1 c1"}}, "spec": {"taints": [OTHER]}}
    body = change(node(OTHER), Verdict(True, ""))
    assert body is not None
    assert body["spec"] == {"taints": [OTHER, OURS]}
    body = change(node(OTHER), Verdict(False, "boot-1 c2"))
    assert body is not None
    assert "spec" not in body
    assert change(node(OTHER, ready_in="x y"), Verdict(False, "x y")) is None


def test_pods_as_the_api_has_them() -> None:
    running: Json = {
        "spec": {"nodeName": "n"},
        "status": {"conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [{"containerID": "containerd://1"}]},
    }
    assert agent_view(running) == AgentView("n", True, "containerd://1")
    assert agent_view({**running, "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}) == AgentView("n", False, "containerd://1")
    assert (
        agent_view({})
        == agent_view({"spec": [], "status": {"conditions": [1, {"type": 2}], "containerStatuses": 3}})
        == AgentView("", False, "")
    )
