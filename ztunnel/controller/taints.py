"""Nodes on which no pod should start yet, because their agent is not ready: the taint for that is taken away, and put back after a reboot.

A node may come into a cluster with the taint (kubelet's `--register-with-taints`, or whatever makes the cluster's nodes). Once its agent is
ready, and with it the CNI plugin in force, the taint goes. A node that boots again gets it back until its agent is ready in that boot: what
was installed on its disk may have been written anew. Pods that are bound to it already start all the same; those the plugin holds up.

What was ready when is kept in an annotation of the node. A pod's status is older than its node's boot until kubelet has had a look: only
an agent's container that is another one than before counts. A node that never had a ready agent is not tainted by us, nor one on which no
agent is meant to run. Rights: list, watch and patch nodes; list pods in our namespace.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import trio

from ztunnel.kube.client import Json, KubeClient
from ztunnel.kube.discovery import Discovery, Kind
from ztunnel.kube.errors import Conflict, KubeError, NotFound
from ztunnel.kube.reflector import Name, Pace, Reflector
from ztunnel.kube.resources import NODES, PODS
from ztunnel.mesh.manifests.tree import at, branches, text
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

TAINT = "cni.ztunnel.io/agent-not-ready"
EFFECT = "NoSchedule"
READY_IN = "ztunnel.io/agent-ready-in"
"""Annotation: the boot, and the agent's container, in which the node was last ready."""
CALM_SECONDS, BUSY_SECONDS = 15.0, 2.0
"""Between two looks at the agents, when all nodes are as they should be, and when one is not."""
NODE_KIND = Kind("", "Node", ("v1",))


@dataclass(frozen=True, slots=True)
class NodeView:
    """What counts of a node."""

    name: str
    version: str
    boot: str
    taints: tuple[Json, ...]
    ready_in: str

    @property
    def is_tainted(self) -> bool:
        """Whether it carries our taint, with whatever effect."""
        return any(taint.get("key") == TAINT for taint in self.taints)


@dataclass(frozen=True, slots=True)
class AgentView:
    """What counts of an agent's pod."""

    node: str
    is_ready: bool
    container: str
    """Id of its container; empty while there is none."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a node should be like."""

    tainted: bool
    ready_in: str
    settled: bool = True
    """False: it is waited for, and should be looked at again soon."""


def verdict(node: NodeView, agent: AgentView | None) -> Verdict:
    """What a node should be like. Pure."""
    boot, _, container = node.ready_in.partition(" ")
    if agent is None or not node.boot:
        return Verdict(node.is_tainted, node.ready_in, not node.is_tainted)
    is_stale = bool(boot) and boot != node.boot and container == agent.container
    if agent.is_ready and agent.container and not is_stale:
        return Verdict(False, f"{node.boot} {agent.container}")
    rebooted = bool(boot) and boot != node.boot
    tainted = node.is_tainted or rebooted
    return Verdict(tainted, node.ready_in, not tainted)


def change(node: NodeView, wanted: Verdict) -> Json | None:
    """The patch that makes a node so, if nobody else has changed it since; None when it is. Pure."""
    if (node.is_tainted, node.ready_in) == (wanted.tainted, wanted.ready_in):
        return None
    body: Json = {"metadata": {"resourceVersion": node.version, "annotations": {READY_IN: wanted.ready_in}}}
    if node.is_tainted != wanted.tainted:
        others = [taint for taint in node.taints if taint.get("key") != TAINT]
        # A list of the API that is replaced whole, wherefore the version.
        body["spec"] = {"taints": [*others, {"key": TAINT, "effect": EFFECT}] if wanted.tainted else others}
    return body


@dataclass(slots=True)
class Taints:
    """The leader's work on nodes.

    Args:
        namespace: the agents'.
        selector: of their pods' labels.
    """

    client: KubeClient
    namespace: str
    selector: str
    pace: Pace = field(default_factory=Pace)
    calm_seconds: float = CALM_SECONDS
    busy_seconds: float = BUSY_SECONDS
    nodes: dict[str, NodeView] = field(default_factory=dict, init=False)
    _changed: trio.Event = field(default_factory=trio.Event, init=False)
    _problem: str = field(default="", init=False)

    async def follow(self) -> None:
        """Keeps `nodes` up to date, for ever; also who does not lead does."""
        await Reflector(self.client, Discovery(self.client), NODE_KIND, self, self.pace).run()

    async def work(self) -> None:
        """Looks at agents and nodes again and again, for ever."""
        while True:
            self._changed = trio.Event()
            with trio.move_on_after(self.calm_seconds if await self._look() else self.busy_seconds):
                await self._changed.wait()
                # Nodes change several times when they start.
                await trio.sleep(min(1.0, self.busy_seconds))

    # As kube.reflector.Store

    def read(self, body: Json) -> NodeView:
        """See `Store`."""
        taints = tuple(dict(each) for each in branches(body, "spec", "taints"))
        annotation = at(body, "metadata", "annotations", READY_IN)
        return NodeView(
            name=text(body, "metadata", "name"),
            version=text(body, "metadata", "resourceVersion"),
            boot=text(body, "status", "nodeInfo", "bootID"),
            taints=taints,
            ready_in=annotation if isinstance(annotation, str) else "",
        )

    def replaced(self, items: Mapping[Name, NodeView]) -> None:
        """See `Store`."""
        self.nodes = {name.name: node for name, node in items.items()}
        self._changed.set()

    def changed(self, name: Name, item: NodeView | None) -> None:
        """See `Store`."""
        former = self.nodes.pop(name.name, None)
        if item is not None:
            self.nodes[name.name] = item
        if _without_version(former) != _without_version(item):
            self._changed.set()

    async def _look(self) -> bool:
        """One look. True: nothing is waited for."""
        if not self.nodes:
            return True
        try:
            agents = await self._agents()
            settled = True
            for node in list(self.nodes.values()):
                wanted = verdict(node, agents.get(node.name))
                settled = settled and wanted.settled
                if (body := change(node, wanted)) is not None:
                    settled = await self._patch(node, wanted, body) and settled
        except KubeError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                log.error("cannot see to nodes' taints", extra=fields(problem=error))
            return False
        self._problem = ""
        return settled

    async def _agents(self) -> dict[str, AgentView]:
        params = {"labelSelector": self.selector, "resourceVersion": "0"}
        listed = await self.client.list(PODS, self.namespace, params)
        return {agent.node: agent for agent in map(agent_view, branches(listed, "items")) if agent.node}

    async def _patch(self, node: NodeView, wanted: Verdict, body: Json) -> bool:
        try:
            await self.client.patch(NODES, body, node.name)
        except (Conflict, NotFound):
            return False  # what it is now, the next look knows
        if node.is_tainted != wanted.tainted:
            log.info("node tainted" if wanted.tainted else "taint removed: the node's agent is ready", extra=fields(node=node.name))
        return True


def agent_view(pod: Json) -> AgentView:
    """An agent's pod, as the API has it. One that is being deleted is not ready."""
    conditions = {text(each, "type"): text(each, "status") for each in branches(pod, "status", "conditions")}
    containers: Iterable[str] = (text(each, "containerID") for each in branches(pod, "status", "containerStatuses"))
    is_going = at(pod, "metadata", "deletionTimestamp") is not None
    return AgentView(text(pod, "spec", "nodeName"), conditions.get("Ready") == "True" and not is_going, next(iter(containers), ""))


def _without_version(node: NodeView | None) -> tuple[object, ...] | None:
    return None if node is None else (node.name, node.boot, node.taints, node.ready_in)
