"""Nodes' taints at a real API server, from a node's first boot to its second."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.kit.kube_api import ApiServer, Json, User
from tests.kit.polling import eventually_async
from tests.kit.reflected import QUICK, access
from ztunnel.controller.taints import READY_IN, TAINT, Taints
from ztunnel.kube.client import KubeClient

WAIT = 60
NODES = "/api/v1/nodes"
RIGHTS = [
    {"apiGroups": [""], "resources": ["nodes"], "verbs": ["list", "watch", "patch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]},
]
OTHER = {"key": "example.com/other", "value": "x", "effect": "PreferNoSchedule"}
OTHERS = [OTHER["key"], "node.kubernetes.io/not-ready"]
"""The second is the API server's own."""


class Cluster:
    """One node and its agent, whose kubelet is the test."""

    def __init__(self, api: ApiServer, name: str) -> None:
        self.api, self.name, self.namespace = api, name, f"agents-{name}"
        api.namespace(self.namespace)
        taints = [{"key": TAINT, "effect": "NoExecute"}, OTHER]
        api.request("POST", NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": {"taints": taints}})
        self.boot("boot-1")
        api.pod(self.namespace, "agent", node=name, address="10.0.0.1", labels={"app": "agent"})
        self.agent("c1", ready=False)

    def boot(self, identity: str) -> None:
        self.api.request("PATCH", f"{NODES}/{self.name}/status", {"status": {"nodeInfo": {"bootID": identity}}})

    def agent(self, container: str, *, ready: bool) -> None:
        statuses = [{"name": "main", "containerID": container, "ready": ready, "restartCount": 0, "image": "x", "imageID": "x"}]
        conditions = [{"type": "Ready", "status": str(ready)}]
        body = {"status": {"containerStatuses": statuses, "conditions": conditions}}
        self.api.request("PATCH", f"/api/v1/namespaces/{self.namespace}/pods/agent/status", body)

    @property
    def node(self) -> tuple[list[str], str]:
        """The keys of its taints, and what it was ready in."""
        body = self.api.request("GET", f"{NODES}/{self.name}")
        spec, metadata = body["spec"], body["metadata"]
        assert isinstance(spec, dict)
        assert isinstance(metadata, dict)
        annotations: Json = metadata.get("annotations", {})
        return sorted(each["key"] for each in spec.get("taints", [])), str(annotations.get(READY_IN, ""))


@asynccontextmanager
async def working(cluster: Cluster, user: User | None = None) -> AsyncIterator[Taints]:
    async with KubeClient(access(cluster.api, user)) as client, trio.open_nursery() as nursery:
        taints = Taints(client, cluster.namespace, "app=agent", QUICK, calm_seconds=0.1, busy_seconds=0.05)
        nursery.start_soon(taints.follow)
        nursery.start_soon(taints.work)
        yield taints
        nursery.cancel_scope.cancel()


async def test_a_node_is_open_once_its_agent_is_ready_and_closed_when_it_boots_again(kube_api: ApiServer) -> None:
    cluster = Cluster(kube_api, "taints-1")
    user = kube_api.user("taints")
    kube_api.allow(user, RIGHTS)
    async with working(cluster, user) as taints:
        await eventually_async(lambda: "taints-1" in taints.nodes, within=WAIT)
        assert cluster.node == ([TAINT, *OTHERS], "")
        cluster.agent("c1", ready=True)
        await eventually_async(lambda: cluster.node == (OTHERS, "boot-1 c1"), within=WAIT)
        cluster.agent("c2", ready=True)
        await eventually_async(lambda: cluster.node == (OTHERS, "boot-1 c2"), within=WAIT)
        cluster.boot("boot-2")  # kubelet has not looked at its pods yet
        await eventually_async(lambda: TAINT in cluster.node[0], within=WAIT)
        cluster.agent("c3", ready=False)
        cluster.agent("c3", ready=True)
        await eventually_async(lambda: cluster.node == (OTHERS, "boot-2 c3"), within=WAIT)


@pytest.mark.parametrize("missing", ["patch nodes", "list pods"])
async def test_a_right_that_is_missing_is_named(kube_api: ApiServer, missing: str, caplog: pytest.LogCaptureFixture) -> None:
    verb, resource = missing.split()
    cluster = Cluster(kube_api, f"taints-without-{verb}")
    user = kube_api.user(f"taints-without-{verb}")
    rules = [
        {**rule, "verbs": [each for each in rule["verbs"] if rule["resources"] != [resource] or each != verb] or ["get"]} for rule in RIGHTS
    ]
    kube_api.allow(user, rules)
    cluster.agent("c1", ready=True)
    async with working(cluster, user):
        await eventually_async(lambda: any(missing in str(record.__dict__) for record in caplog.records), within=WAIT)
    assert TAINT in cluster.node[0]
