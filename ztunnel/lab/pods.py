"""kubelet's part: one task per pod, from its network namespace to its last process.

A pod gets its namespace and addresses, its containers are started and restarted as restartPolicy says, readiness is asked again and
again, and after deletion everything ends: SIGTERM, the pod's grace, SIGKILL for whatever is left, the namespace closed, the address
free again, and only then the object is gone. The pod's status in the cluster is written here and nowhere else.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from ztunnel.lab import probes, topology
from ztunnel.lab.addresses import pod_address
from ztunnel.lab.images import command_of
from ztunnel.lab.objects import Key, is_deleting, key_of, uid_of
from ztunnel.lab.placement import is_host_network
from ztunnel.lab.processes import POD_VARIABLE, Order, Process, base_environment, kill_stragglers
from ztunnel.lab.site import NodeSite, Site, in_thread, trim_log
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.manifests.tree import Tree, branch, branches, integer, put, text, texts

log = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 10.0
STABLE_SECONDS = 10.0
"""A container that ran as long starts its next back-off from the beginning."""
FIRST_PROBE_SECONDS = 0.02
PROBE_SECONDS = 2.0
FAILURES_TO_UNREADY = 3
TEARDOWN_SECONDS = 10.0
_REFERENCE = re.compile(r"\$\$?\(([A-Za-z_][A-Za-z0-9_.-]*)\)")
"""Source: Kubernetes, "Define dependent environment variables"."""
_CAPABILITIES = {"NET_BIND_SERVICE": 10, "NET_ADMIN": 12, "NET_RAW": 13}
"""Those that a container can have back after `drop: [ALL]`."""


@dataclass(slots=True)
class ContainerRun:
    """One container's state, as `status.containerStatuses` will show it."""

    spec: Tree
    process: Process | None = None
    started: str = ""
    finished: str = ""
    code: int | None = None
    restarts: int = 0
    waiting: str = "ContainerCreating"
    is_ready: bool = False
    is_over: bool = False

    def status(self) -> Tree:
        """As the API shows it."""
        state: Tree
        if self.process is not None:
            state = {"running": {"startedAt": self.started}}
        elif self.is_over:
            reason = "Completed" if self.code == 0 else "Error"
            state = {"terminated": {"exitCode": self.code, "reason": reason, "startedAt": self.started, "finishedAt": self.finished}}
        else:
            state = {"waiting": {"reason": self.waiting}}
        shown: Tree = {
            "name": text(self.spec, "name"),
            "image": text(self.spec, "image"),
            "ready": self.is_ready,
            "restartCount": self.restarts,
            "started": self.process is not None,
            "state": state,
        }
        if self.restarts and self.code is not None:
            shown["lastState"] = {"terminated": {"exitCode": self.code, "finishedAt": self.finished}}
        return shown


@dataclass(slots=True)
class PodRun:
    """The life of one pod on its node."""

    site: Site
    node: NodeSite
    key: Key
    uid: str
    pod: Tree
    deleting: trio.Event = field(default_factory=trio.Event)
    netns: int = -1
    addresses: tuple[str, ...] = ()
    index: int = 0
    runs: list[ContainerRun] = field(default_factory=list)
    init_runs: list[ContainerRun] = field(default_factory=list)
    started: str = ""

    async def run(self) -> None:
        """Run a connected pod until it is deleted and nothing of it is left; one without a network only waits for its deletion."""
        if self.netns == -1:
            await self.deleting.wait()
        else:
            self.runs = [ContainerRun(container) for container in branches(self.pod, "spec", "containers")]
            self.init_runs = [ContainerRun(container) for container in branches(self.pod, "spec", "initContainers")]
            self.publish()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve)
                await self.deleting.wait()
                await self._stop()
                nursery.cancel_scope.cancel()
        await self._disconnect()
        self.site.cluster.finalize(self.key, self.uid)

    def order(self, container: Tree, argv: tuple[str, ...] | list[str], tty: bool = False) -> Order:
        """What to tell the launcher to run `argv` as that container would."""
        return Order(
            argv=argv,
            env=self._environment(container),
            netns=self.netns,
            hostname=text(self.pod, "spec", "hostname", default=self.key.name),
            resolv_conf=self.site.resolv_conf(self.key.namespace),
            cwd=text(container, "workingDir", default="/"),
            tty=tty,
            capabilities=_capabilities(container),
        )

    # The network

    def place(self) -> topology.PodPlan | None:
        """Take the pod's addresses; what to build for it, None for a pod in its node's own network, which is connected by this.

        Raises:
            LabError: the node is full.
        """
        node, versions = self.node, self.site.versions
        if is_host_network(self.pod):
            self.addresses = tuple(node.plan.address(version) for version in versions)
            self.connected(os.dup(node.fd))
            return None
        self.index = node.indexes.take()
        self.addresses = tuple(pod_address(node.plan.number, self.index, version) for version in versions)
        return self._plan()

    def connected(self, netns: int) -> None:
        """The pod has its network."""
        self.netns = netns
        self.started = self.site.cluster.mint.timestamp()
        if self.index:
            self._link().symlink_to(self.site.fd_path(netns))

    def failed(self, error: LocalError) -> None:
        """It cannot have one."""
        log.error("pod=%s/%s cannot be connected: %s", self.key.namespace, self.key.name, error)
        self.site.happened(self.uid, "FailedCreatePodSandBox", str(error))

    async def _disconnect(self) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + TEARDOWN_SECONDS):
            await in_thread(partial(kill_stragglers, self.uid))
            if self.index:
                self._link().unlink(missing_ok=True)
                (self.site.state / "status" / self.node.plan.name / self.uid).unlink(missing_ok=True)
                try:
                    async with self.node.lock:
                        await in_thread(partial(topology.remove_pod, self.node.fd, self._plan()))
                except LocalError as error:
                    log.error("pod=%s/%s cannot be cut off: %s", self.key.namespace, self.key.name, error)
                self.node.indexes.free(self.index)
            if self.netns != -1:
                os.close(self.netns)
                self.netns = -1
        self.site.log_path(self.key.namespace, self.key.name).unlink(missing_ok=True)

    def _plan(self) -> topology.PodPlan:
        return topology.PodPlan(f"veth{self.uid[:8]}", self.addresses)

    def _link(self) -> Path:
        return self.site.state / "netns" / self.uid

    # Containers

    async def _serve(self) -> None:
        for run in self.init_runs:
            await self._keep_running(run, "OnFailure" if self._policy() == "Always" else self._policy())
            if run.code != 0:
                for other in self.runs:
                    other.waiting, other.is_over, other.code = "PodInitializing", True, 1
                self.publish()
                return
        async with trio.open_nursery() as nursery:
            for run in self.runs:
                nursery.start_soon(self._keep_running, run, self._policy())
                nursery.start_soon(self._keep_asking, run)

    def _policy(self) -> str:
        return text(self.pod, "spec", "restartPolicy", default="Always")

    async def _keep_running(self, run: ContainerRun, policy: str) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while not self.deleting.is_set():
            began = trio.current_time()
            code = await self._run_once(run)
            if self.deleting.is_set():
                return
            if policy == "Never" or (policy == "OnFailure" and code == 0):
                run.is_over = True
                self.publish()
                return
            if trio.current_time() - began > STABLE_SECONDS:
                backoff = FIRST_BACKOFF_SECONDS
            run.waiting = "CrashLoopBackOff"
            self.site.happened(self.uid, "BackOff", f"container {text(run.spec, 'name')} exited with code {code}, restarting")
            self.publish()
            await trio.sleep(backoff * random.uniform(0.8, 1.2))
            backoff = min(2 * backoff, LONGEST_BACKOFF_SECONDS)
            run.restarts += 1

    async def _run_once(self, run: ContainerRun) -> int:
        argv = command_of(run.spec, self.site.cluster.rules.images, self.site.cluster.rules.tools)
        path = self.site.log_path(self.key.namespace, self.key.name)
        output = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            run.process = self.site.processes.start(self.order(run.spec, argv), nothing, output, output)
        finally:
            os.close(output)
            os.close(nothing)
        run.started = self.site.cluster.mint.timestamp()
        self.site.happened(self.uid, "Started", f"started container {text(run.spec, 'name')}")
        self.publish()
        await run.process.ended.wait()
        run.code = run.process.code
        run.process, run.is_ready = None, False
        run.finished = self.site.cluster.mint.timestamp()
        self.publish()
        return run.code or 0

    async def _stop(self) -> None:
        grace = float(integer(self.pod, "spec", "terminationGracePeriodSeconds", default=2))
        async with trio.open_nursery() as nursery:
            for run in (*self.init_runs, *self.runs):
                if run.process is not None:
                    nursery.start_soon(run.process.stop, grace)

    def _environment(self, container: Tree) -> dict[str, str]:
        known = {
            "metadata.name": self.key.name,
            "metadata.namespace": self.key.namespace,
            "metadata.uid": self.uid,
            "status.podIP": self.addresses[0],
            "status.hostIP": self.node.plan.address(self.site.versions[0]),
            "spec.nodeName": self.node.plan.name,
            "spec.serviceAccountName": text(self.pod, "spec", "serviceAccountName"),
        }
        environment = base_environment() | {
            "HOSTNAME": self.key.name,
            "POD_NAME": self.key.name,
            "POD_NAMESPACE": self.key.namespace,
            "NODE_NAME": self.node.plan.name,
        }
        for variable in branches(container, "env"):
            path = text(variable, "valueFrom", "fieldRef", "fieldPath")
            environment[text(variable, "name")] = known[path] if path else expanded(text(variable, "value"), environment)
        return environment | {POD_VARIABLE: self.uid}

    # Readiness and status

    async def _keep_asking(self, run: ContainerRun) -> None:
        pause, failures = FIRST_PROBE_SECONDS, 0
        while not run.is_over:
            process = run.process
            ready = process is not None and await probes.container_is_ready(self.netns, run.spec, self.addresses)
            failures = 0 if ready else failures + 1
            still_that = process is not None and process is run.process
            if ready != run.is_ready and still_that and (ready or failures >= FAILURES_TO_UNREADY):
                run.is_ready = ready
                self.publish()
            pause = PROBE_SECONDS if run.is_ready and not failures else min(1.5 * pause, PROBE_SECONDS / 4)
            trim_log(self.site.log_path(self.key.namespace, self.key.name))
            await trio.sleep(pause)

    def publish(self) -> None:
        """Write the pod's status as it is now."""
        self.site.cluster.update(self.key, self.uid, self._write_status)

    def _write_status(self, body: Tree) -> None:
        status = dict(branch(body, "status"))
        status["phase"] = self._phase()
        status["hostIP"] = self.node.plan.address(self.site.versions[0])
        status["podIP"] = self.addresses[0]
        status["podIPs"] = [{"ip": address} for address in self.addresses]
        status["startTime"] = self.started
        status["containerStatuses"] = [run.status() for run in self.runs]
        if self.init_runs:
            status["initContainerStatuses"] = [run.status() for run in self.init_runs]
        ready = bool(self.runs) and all(run.is_ready for run in self.runs)
        holds = {"PodScheduled": True, "Initialized": all(run.is_over and run.code == 0 for run in self.init_runs)}
        holds |= {"ContainersReady": ready, "Ready": ready}
        status["conditions"] = [{"type": name, "status": "True" if value else "False"} for name, value in holds.items()]
        put(body, status, "status")

    def _phase(self) -> str:
        if self.runs and all(run.is_over for run in self.runs):
            return "Succeeded" if all(run.code == 0 for run in self.runs) else "Failed"
        return "Running" if any(run.process is not None or run.restarts or run.code is not None for run in self.runs) else "Pending"


class Kubelet:
    """All pods' lives, by UID."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.runs: dict[str, PodRun] = {}

    def reconcile(self, nursery: trio.Nursery) -> None:
        """Begin the life of pods that were given a node, and the end of those that were deleted."""
        new: dict[str, list[PodRun]] = {}
        for pod in self._site.cluster.pods():
            key, uid = key_of(pod), uid_of(pod)
            run = self.runs.get(uid)
            if run is not None:
                if is_deleting(pod):
                    run.deleting.set()
            elif is_deleting(pod):
                self._site.cluster.finalize(key, uid)
            elif node := self._site.nodes.get(text(pod, "spec", "nodeName")):
                self.runs[uid] = PodRun(self._site, node, key, uid, pod)
                new.setdefault(node.plan.name, []).append(self.runs[uid])
        for name, runs in new.items():
            nursery.start_soon(self._begin, self._site.nodes[name], runs, nursery)

    async def _begin(self, node: NodeSite, runs: list[PodRun], nursery: trio.Nursery) -> None:
        """Connect new pods of one node, then run them: while the machine is busy with networks, their programs would only be in the way."""
        began = trio.current_time()
        planned = []
        for run in runs:
            try:
                if (plan := run.place()) is not None:
                    planned.append((run, plan))
            except LocalError as error:
                run.failed(error)
        try:
            await self._connect(node, planned)
        except LocalError:
            for each in planned:  # one by one, to find the one that fails
                try:
                    await self._connect(node, [each])
                except LocalError as error:
                    each[0].failed(error)
        self._site.timings[f"networks of {len(runs)} pods on {node.plan.name}"] = trio.current_time() - began
        for run in runs:
            nursery.start_soon(self._run, run)

    async def _connect(self, node: NodeSite, planned: list[tuple[PodRun, topology.PodPlan]]) -> None:
        if planned:
            async with node.lock:
                fds = await in_thread(partial(topology.make_pods, node.fd, node.plan, [plan for _, plan in planned]))
            for (run, _), fd in zip(planned, fds, strict=True):
                run.connected(fd)

    async def _run(self, run: PodRun) -> None:
        await run.run()
        del self.runs[run.uid]
        self._site.bell.ring()

    def run_of(self, uid: str) -> PodRun | None:
        """The life of the pod with that UID, if it has begun."""
        return self.runs.get(uid)


def expanded(value: str, environment: Mapping[str, str]) -> str:
    """A variable's value with those before it put in for `$(NAME)`; what is not known stays, and `$$(` is a plain `$(`."""
    return _REFERENCE.sub(lambda found: found[0][1:] if found[0].startswith("$$") else environment.get(found[1], found[0]), value)


def _capabilities(container: Tree) -> tuple[int, ...] | None:
    """What `securityContext.capabilities` leaves; without `drop: [ALL]`, everything."""
    capabilities = branch(container, "securityContext", "capabilities")
    if "ALL" not in texts(capabilities, "drop"):
        return None
    return tuple(_CAPABILITIES[name] for name in texts(capabilities, "add") if name in _CAPABILITIES)


def container_of(pod: Tree, name: str) -> Tree | None:
    """The container that `exec -c` means; the first without a name."""
    containers = branches(pod, "spec", "containers")
    return next((container for container in containers if not name or text(container, "name") == name), None)


def container_names(pod: Tree) -> list[str]:
    """The names of a pod's containers."""
    return texts({"names": [text(container, "name") for container in branches(pod, "spec", "containers")]}, "names")
