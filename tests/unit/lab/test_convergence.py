"""What an agent must see, and how its socket is asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import trio

from ztunnel.lab.convergence import View, expected, seen_by, state_of
from ztunnel.mesh.manifests.tree import Tree

OBJECTS: list[Tree] = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}},
    {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "web",
            "namespace": "shop",
            "uid": "u1",
            "labels": {"app": "web"},
            "annotations": {"ambient.istio.io/redirection": "enabled"},
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "c"}]},
        "status": {
            "phase": "Running",
            "podIP": "10.0.0.1",
            "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    },
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop", "labels": {"istio.io/use-waypoint": "proxy"}},
        "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "web"}, "ports": [{"port": 80}]},
    },
    {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "deny", "namespace": "shop"}, "spec": {}},
    {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "ignored"}},
]
REFUSED = "shop/proxy (refused: not ready)"
WANTED = View(
    frozenset({("u1", "HBONE", True, (), "")}), frozenset({("shop", "web", ("10.96.0.1",), 1, REFUSED)}), frozenset({("shop", "deny")})
)


def test_what_follows_from_the_objects() -> None:
    state = state_of(OBJECTS)
    assert expected(state) == WANTED
    assert state.captures["u1"].wanted


async def _serve(path: Path, answers: dict[str, bytes], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen(8)
        task_status.started()
        while True:
            connection, _ = await listener.accept()
            with connection:
                target = (await connection.recv(4096)).split()[1].decode()
                await connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + answers[target])


@pytest.mark.parametrize("broken", [b"", b"[]", b"{"])
async def test_an_agent_is_asked_and_may_answer_nonsense(tmp_path: Path, broken: bytes) -> None:
    rows: dict[str, list[Tree]] = {
        "/v1/workloads": [{"uid": "u1", "protocol": "HBONE", "ready": True, "policies": []}],
        "/v1/services": [{"namespace": "shop", "name": "web", "vips": ["10.96.0.1"], "ready_endpoints": 1, "waypoint": REFUSED}],
        "/v1/policies": [{"namespace": "shop", "name": "deny"}],
    }
    answers = {target: json.dumps({"items": items}).encode() for target, items in rows.items()}
    path = tmp_path / "agent.sock"
    assert await seen_by(path) is None
    async with trio.open_nursery() as nursery:
        await nursery.start(_serve, path, answers)
        assert await seen_by(path) == WANTED
        answers["/v1/policies"] = broken
        assert await seen_by(path) is None
        nursery.cancel_scope.cancel()
