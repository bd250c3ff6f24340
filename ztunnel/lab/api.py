"""The verbs that answer with one message: what each request of the command line does. Requests are trees that nobody has checked.

Not here: sockets and streams (server), what applying or deleting means (cluster).
"""

from __future__ import annotations

import math
import signal
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import trio

from ztunnel.lab import convergence
from ztunnel.lab.admission import Offered
from ztunnel.lab.agents import Agent
from ztunnel.lab.gateways import control_socket
from ztunnel.lab.objects import (
    KINDS,
    REDIRECTION,
    Key,
    LabError,
    Requirement,
    display,
    is_deleting,
    is_ready,
    is_terminal,
    key_of,
    labels_of,
    parse_selector,
    pod_addresses,
    uid_of,
)
from ztunnel.lab.placement import is_rolled_out, owner_name
from ztunnel.lab.pods import Kubelet, PodRun
from ztunnel.lab.site import Site
from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, flag, integer, strings, text
from ztunnel.mesh.waypoints import MANAGED

MAX_WAIT_SECONDS = 600.0
CONVERGENCE_SECONDS = 0.05
"""How often agents are asked again whether they have caught up."""
Verb = Callable[[Tree], Awaitable[object]]


class Lab(Protocol):
    """What the verbs need of the controller."""

    ended: trio.Event

    def are_services_current(self) -> bool:
        """Whether the nodes' forwarding is up to date."""

    def are_gateways_current(self) -> bool:
        """Whether what gateways need is there, and statuses are up to date."""


class Api:
    """The verbs."""

    def __init__(self, site: Site, kubelet: Kubelet, agents: Mapping[str, Agent], lab: Lab) -> None:
        self.site = site
        self.kubelet = kubelet
        self._agents = agents
        self._lab = lab
        self._verbs: dict[str, Verb] = {
            "apply": self._apply,
            "get": self._get,
            "delete": self._delete,
            "label": self._label,
            "scale": self._scale,
            "restart": self._restart,
            "events": self._events,
            "settle": self._settle,
            "status": self._status,
            "agent": self._agent,
            "logs": self._logs,
            "down": self._down,
        }

    async def answer(self, request: Tree) -> object:
        """The result of one request.

        Raises:
            LabError, ManifestError: refused.
        """
        verb = self._verbs.get(text(request, "verb"))
        if verb is None:
            raise LabError("BadRequest", f"no such verb: {text(request, 'verb')!r}")
        return await verb(request)

    async def _apply(self, request: Tree) -> object:
        offers = [Offered(text(entry, "source", default="-"), branch(entry, "body")) for entry in branches(request, "objects")]
        done = self.site.cluster.apply(offers, text(request, "namespace") or "default")
        return [
            {"kind": key.kind, "namespace": key.namespace, "name": key.name, "object": display(key), "verb": verb} for key, verb in done
        ]

    async def _get(self, request: Tree) -> object:
        kind, namespace, terms = selection(request)
        name = text(request, "name")
        if name:
            return [self.site.cluster.get(Key(kind, namespace or "", name))]
        return self.site.cluster.select(kind, namespace, terms)

    async def _delete(self, request: Tree) -> object:
        """Delete objects and wait until they are gone; what is not there is reported, after the others were deleted."""
        keys = [_key(entry) for entry in branches(request, "keys")]
        missing = [key for key in keys if self.site.cluster.find(key) is None]
        found = {key: uid_of(self.site.cluster.get(key)) for key in keys if key not in missing}
        for key in found:
            if self.site.cluster.find(key) is not None:  # else its namespace took it along
                self.site.cluster.delete(key)
        if at(request, "wait") is not False:
            await self._until(lambda: not [key for key, uid in found.items() if self._is_there(key, uid)], _seconds(request, 60.0))
        return {"deleted": [display(key) for key in found], "missing": [[KINDS[key.kind].resource, key.name] for key in missing]}

    def _is_there(self, key: Key, uid: str) -> bool:
        body = self.site.cluster.find(key)
        return body is not None and uid_of(body) == uid

    async def _label(self, request: Tree) -> object:
        changes = {name: value if isinstance(value, str) else None for name, value in branch(request, "changes").items()}
        return self.site.cluster.label(_key(request), changes, flag(request, "overwrite"))

    async def _scale(self, request: Tree) -> object:
        self.site.cluster.scale(text(request, "name"), text(request, "namespace"), integer(request, "replicas", default=-1))
        return True

    async def _restart(self, request: Tree) -> object:
        self.site.cluster.restart(text(request, "name"), text(request, "namespace"))
        return True

    async def _events(self, request: Tree) -> object:
        uid = text(request, "uid")
        return [{"when": each.when, "reason": each.reason, "message": each.message} for each in self.site.happenings if each.uid == uid]

    async def _settle(self, request: Tree) -> object:
        """Wait until everything runs as asked for; what is not yet so when the time is over."""
        missing = self.unsettled()
        with trio.move_on_after(_seconds(request, 60.0)):
            while missing := self.unsettled() or await self._not_converged():
                with trio.move_on_after(CONVERGENCE_SECONDS):
                    await self.site.bell.next().wait()
        return missing

    async def _status(self, _: Tree) -> object:
        site = self.site
        nodes = [
            {"name": name, "addresses": [node.plan.address(version) for version in site.versions]} for name, node in site.nodes.items()
        ]
        return {
            "state": str(site.state),
            "pid": site.host_pid,
            "ip_versions": list(site.versions),
            "nodes": nodes,
            "agents": [agent.status() for agent in self._agents.values()],
            "pods": len(site.cluster.pods()),
            "ready_pods": sum(is_ready(pod) for pod in site.cluster.pods()),
            "services": len(site.cluster.select("Service")),
            "unsettled": self.unsettled(),
            "timings": dict(site.timings),
        }

    async def _agent(self, request: Tree) -> object:
        agent = self._agents.get(text(request, "node"))
        if agent is None:
            known = ", ".join(self._agents) or "none: the lab was brought up with --no-mesh"
            raise LabError("NotFound", f"no agent on node {text(request, 'node')!r} (there are: {known})")
        match text(request, "action"):
            case "start":
                agent.start()
            case "stop":
                return await agent.stop(signal.SIGTERM)
            case "kill":
                return await agent.stop(signal.SIGKILL)
            case other:
                raise LabError("BadRequest", f"an agent can be started, stopped or killed, not {other!r}")
        return None

    async def _logs(self, request: Tree) -> object:
        """Where the output of a pod or a node's agent is written; the command line reads the file itself."""
        name, namespace = text(request, "name"), text(request, "namespace")
        node = self.node_of(namespace, name)
        if node:
            return {"path": str(self.site.state / "nodes" / node / "agent.log"), "uid": ""}
        run = self.run_of(namespace, name)
        return {"path": str(self.site.log_path(run.key.namespace, run.key.name)), "uid": run.uid}

    async def _down(self, _: Tree) -> object:
        self._lab.ended.set()
        return True

    def node_of(self, namespace: str, name: str) -> str:
        """The node that a command line means: `node/NAME`, or the bare name of a node that no pod of the namespace has; else empty.

        Raises:
            LabError: NotFound, for `node/NAME`.
        """
        kind, _, bare = name.rpartition("/")
        if kind in ("node", "nodes", "no"):
            if bare not in self.site.nodes:
                raise LabError("NotFound", f'nodes "{bare}" not found')
            return bare
        return name if name in self.site.nodes and self.site.cluster.find(Key("Pod", namespace, name)) is None else ""

    def run_of(self, namespace: str, name: str) -> PodRun:
        """The life of the pod that a command line means: a name, `pod/NAME`, or `deploy/NAME` for one of its pods.

        Raises:
            LabError: NotFound, or the pod has no network yet.
        """
        kind, _, bare = name.rpartition("/")
        pods = self.site.cluster.select("Pod", namespace)
        if kind in ("deploy", "deployment", "deployments"):
            self.site.cluster.get(Key("Deployment", namespace, bare))
            mine = sorted((pod for pod in pods if owner_name(pod) == bare and not is_deleting(pod)), key=lambda pod: not is_ready(pod))
            if not mine:
                raise LabError("NotFound", f'deployment "{bare}" has no pod')
            pod = mine[0]
        elif kind in ("", "pod", "pods", "po"):
            pod = self.site.cluster.get(Key("Pod", namespace, bare))
        else:
            raise LabError("BadRequest", f"{kind!r} has no pods; use POD, pod/POD, deploy/NAME or node/NODE")
        run = self.kubelet.run_of(uid_of(pod))
        if run is None or run.netns == -1:
            raise LabError("BadRequest", f"pod {text(pod, 'metadata', 'name')} has not started yet")
        return run

    def unsettled(self) -> list[str]:
        """What is not yet as the objects and labels ask for, in words."""
        pods = self.site.cluster.pods()
        found = [f"pod {_name(pod)} is being deleted" for pod in pods if is_deleting(pod)]
        found += [f"pod {_name(pod)} is not ready" for pod in pods if not is_ready(pod) and not is_terminal(pod) and not is_deleting(pod)]
        found += [f"deployment {_name(item)} is rolling out" for item in self.site.cluster.select("Deployment") if not is_rolled_out(item)]
        if not self._lab.are_services_current():
            found.append("services are not yet forwarded on every node")
        if not self._lab.are_gateways_current():
            found.append("gateways and statuses are not yet up to date")
        for agent in self._agents.values():
            if agent.is_wanted and not agent.is_ready:
                found.append(f"agent of {agent.name} is not ready")
        return found + self._not_enrolled(pods)

    def _not_enrolled(self, pods: list[Tree]) -> list[str]:
        """Pods whose capture is not what their labels ask for, on nodes whose agent runs."""
        working = {name for name, agent in self._agents.items() if agent.is_ready}
        if not working:
            return []
        captures = convergence.state_of(self.site.cluster).captures
        found = []
        for pod in pods:
            capture = captures.get(uid_of(pod))
            enabled = strings(pod, "metadata", "annotations").get(REDIRECTION) == "enabled"
            if capture is not None and capture.node in working and capture.wanted != enabled and is_ready(pod) and not is_deleting(pod):
                found.append(f"pod {_name(pod)} is not yet {'captured' if capture.wanted else 'released'}")
        return found

    async def _not_converged(self) -> list[str]:
        """Agents and gateways that do not see the mesh as it is now."""
        return await self._agents_behind() or await self._gateways_behind()

    async def _gateways_behind(self) -> list[str]:
        pods = [pod for pod in self.site.cluster.pods() if MANAGED in labels_of(pod) and is_ready(pod) and pod_addresses(pod)]
        wanted = convergence.Gateways(self.site.cluster) if pods else None
        return [
            f"gateway {_name(pod)} has not yet read the latest objects"
            for pod in pods
            if wanted is not None
            and await convergence.configured(control_socket(self.site.state, pod_addresses(pod)[0])) != wanted.expected(pod)
        ]

    async def _agents_behind(self) -> list[str]:
        wanted = convergence.expected(convergence.state_of(self.site.cluster))
        running = [agent for agent in self._agents.values() if agent.is_ready]
        return [
            f"agent of {agent.name} has not yet read the latest objects"
            for agent in running
            if await convergence.seen_by(agent.directory / "agent.sock") != wanted
        ]

    async def _until(self, is_done: Callable[[], bool], seconds: float) -> None:
        with trio.move_on_after(seconds):
            while True:
                changed = self.site.bell.next()
                if is_done():
                    return
                await changed.wait()


def selection(request: Tree) -> tuple[str, str | None, tuple[Requirement, ...]]:
    """Which objects a request is about: kind, namespace (None: all) and label terms.

    Raises:
        LabError: no such kind, or a selector that cannot be read.
    """
    kind = text(request, "kind")
    if kind not in KINDS:
        raise LabError("BadRequest", f"no such kind: {kind!r}")
    namespace = text(request, "namespace") if KINDS[kind].namespaced else ""
    return kind, namespace or (None if KINDS[kind].namespaced else ""), parse_selector(text(request, "selector"))


def matches(body: Tree, kind: str, namespace: str | None, terms: tuple[Requirement, ...]) -> bool:
    """Whether one object belongs to a selection."""
    key = key_of(body)
    return key.kind == kind and namespace in (None, key.namespace) and all(term.holds(labels_of(body)) for term in terms)


def _key(entry: Tree) -> Key:
    kind = text(entry, "kind")
    if kind not in KINDS:
        raise LabError("BadRequest", f"no such kind: {kind!r}")
    return Key(kind, text(entry, "namespace") if KINDS[kind].namespaced else "", text(entry, "name"))


def _seconds(request: Tree, default: float) -> float:
    found = at(request, "timeout")
    if isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found):
        return min(MAX_WAIT_SECONDS, max(0.0, float(found)))
    return default


def _name(body: Tree) -> str:
    key = key_of(body)
    return f"{key.namespace}/{key.name}"
