"""The lab's one background process: API server, scheduler, kubelet, kube-proxy and keeper of the node agents.

`python -m ztunnel.lab.controller --state DIR …` leaves the host's namespaces, builds the nodes, and serves the command line on a Unix
socket until it is told to end or killed; in both cases the kernel frees everything that it made. This module is the composition:
who is built from what, and the one reconciling loop. What each part does stands in its own module.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import time
import uuid
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import trio

from ztunnel.lab import isolation, kubeproxy, placement, topology
from ztunnel.lab.addresses import DNS_VIPS, FAMILIES, MAX_NODES, pod_network
from ztunnel.lab.admission import Offered, Rules
from ztunnel.lab.agents import Agent, RedirectionReports
from ztunnel.lab.api import Api
from ztunnel.lab.cluster import Cluster, Mint
from ztunnel.lab.gateway_controller import GatewayController
from ztunnel.lab.gateways import Installation
from ztunnel.lab.images import python_path
from ztunnel.lab.objects import is_deleting, key_of, uid_of
from ztunnel.lab.pods import Kubelet
from ztunnel.lab.processes import Processes
from ztunnel.lab.server import Server
from ztunnel.lab.site import NodeSite, Site, in_thread, replace_file
from ztunnel.lab.wire import PROCESS_FILE, encode, socket_path
from ztunnel.mesh.errors import LocalError, leaves
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.tree import Tree, integer, put, text

log = logging.getLogger(__name__)

DIRECTORIES = ("manifests", "netns", "status", "nodes", "ca", "pods", "resolv", "scratch")
DRAIN_SECONDS = 3.0
TOOL_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


class Controller:
    """The object graph of one lab."""

    def __init__(self, site: Site, has_mesh: bool) -> None:
        self.site = site
        self.kubelet = Kubelet(site)
        self.agents = {name: Agent(site, node) for name, node in site.nodes.items()} if has_mesh else {}
        self.ended = trio.Event()
        self.installation = Installation(site.state, python_path(os.environ))
        self.gateways = GatewayController(site, self.installation.pod_spec)
        self.forwards: tuple[placement.Forward, ...] = ()
        site.cluster.listeners.append(self._persist)

    async def run(self, ready: int) -> None:
        """Serve until `ended`; says so on descriptor `ready` once the socket answers."""
        for agent in self.agents.values():
            agent.prepare()
        self.installation.prepare()
        for node in self.site.nodes:
            (self.site.state / "status" / node).mkdir(parents=True, exist_ok=True)
        self._populate()
        server = Server(Api(self.site, self.kubelet, self.agents, self), socket_path(self.site.state))
        async with trio.open_nursery() as nursery:
            await nursery.start(self.site.processes.run)
            await nursery.start(server.run)
            nursery.start_soon(self._reconcile)
            nursery.start_soon(self._program_services)
            nursery.start_soon(self._run_gateways)
            nursery.start_soon(self._obey_signals)
            if self.agents:
                nursery.start_soon(RedirectionReports(self.site).run)
            for agent in self.agents.values():
                nursery.start_soon(agent.run)
            _tell(ready, "ok")
            await self.ended.wait()
            await self._end()
            nursery.cancel_scope.cancel()

    def are_gateways_current(self) -> bool:
        """Whether what follows from gateways is there, and all statuses are written."""
        return self.gateways.is_current()

    def are_services_current(self) -> bool:
        """Whether every node forwards to the endpoints that there are now."""
        return self.forwards == self._wanted_forwards()

    async def _end(self) -> None:
        """End everything that runs, gracefully while DRAIN_SECONDS last; the kernel ends the rest with this process."""
        with trio.move_on_after(DRAIN_SECONDS):
            async with trio.open_nursery() as nursery:
                for agent in self.agents.values():
                    nursery.start_soon(agent.stop, signal.SIGTERM)
                for run in self.kubelet.runs.values():
                    run.deleting.set()
            while self.kubelet.runs:
                await self.site.bell.next().wait()

    async def _run_gateways(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.gateways.run)
            await self.ended.wait()  # else gateways would be kept while their pods are being ended
            nursery.cancel_scope.cancel()

    async def _obey_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as arrivals:
            async for _ in arrivals:
                self.ended.set()

    def _populate(self) -> None:
        cluster = self.site.cluster
        cluster.bootstrap()
        self.gateways.bootstrap()
        for node in self.site.nodes.values():
            addresses = [{"type": "InternalIP", "address": node.plan.address(version)} for version in self.site.versions]
            cluster.create(
                {
                    "apiVersion": "v1",
                    "kind": "Node",
                    "metadata": {"name": node.plan.name},
                    "spec": {"podCIDRs": [pod_network(node.plan.number, version) for version in self.site.versions]},
                    "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
                }
            )
        cluster.apply([Offered("the lab itself", body) for body in _dns(self.site)])

    async def _reconcile(self) -> None:
        """Deployments make pods, pods get nodes, nodes run pods; again after every change."""
        async with trio.open_nursery() as nursery:
            while True:
                changed = self.site.bell.next()
                if not self.ended.is_set():  # else deployments would replace the pods that are being ended
                    for deployment in self.site.cluster.select("Deployment"):
                        self._roll_out(deployment)
                    self._schedule()
                    self.kubelet.reconcile(nursery)
                await changed.wait()

    def _roll_out(self, deployment: Tree) -> None:
        cluster = self.site.cluster
        step = placement.rollout(deployment, cluster.select("Pod", text(deployment, "metadata", "namespace")))
        for _ in range(step.create):
            cluster.create(placement.deployment_pod(deployment, uuid.uuid4().hex))
        for key in step.remove:
            cluster.delete(key)
        counted: Tree = {
            "observedGeneration": integer(deployment, "metadata", "generation"),
            "replicas": step.replicas,
            "updatedReplicas": step.updated,
            "readyReplicas": step.ready,
            "availableReplicas": step.ready,
        }
        cluster.update(key_of(deployment), uid_of(deployment), lambda body: put(body, counted, "status"))

    def _schedule(self) -> None:
        cluster, nodes = self.site.cluster, list(self.site.nodes)
        for pod in cluster.pods():
            if not text(pod, "spec", "nodeName") and not is_deleting(pod):
                node = placement.choose_node(nodes, cluster.pods())
                cluster.update(key_of(pod), uid_of(pod), partial(_assign, node=node))

    def _wanted_forwards(self) -> tuple[placement.Forward, ...]:
        return placement.forwards(self.site.cluster.select("Service"), self.site.cluster.pods())

    async def _program_services(self) -> None:
        programmed = False
        while True:
            changed = self.site.bell.next()
            wanted = self._wanted_forwards()
            if wanted != self.forwards or not programmed:
                requests = await in_thread(partial(kubeproxy.transaction, wanted))
                for node in self.site.nodes.values():
                    await in_thread(partial(kubeproxy.program, node.fd, requests))
                self.forwards, programmed = wanted, True
                self.site.bell.ring()
                continue
            await changed.wait()

    def _persist(self, event: str, body: Tree) -> None:
        """Keep `manifests/`, which the agents watch, equal to the cluster; and wake everybody."""
        self.site.bell.ring()
        kind, namespace, name = key_of(body)
        if kind == "Node":
            return
        file_name = f"{kind}_{namespace}_{name}".lower()
        path = self.site.state / "manifests" / f"{file_name if len(file_name) < 200 else uid_of(body)}.json"
        if event == "DELETED":
            path.unlink(missing_ok=True)
        else:
            replace_file(path, encode(body).decode(), self.site.state / "scratch")


def _assign(body: Tree, node: str) -> None:
    put(body, node, "spec", "nodeName")


def _dns(site: Site) -> list[Tree]:
    """The cluster's resolver, as an ordinary pod and service."""
    addresses = [DNS_VIPS[version] for version in site.versions]
    command = [sys.executable, "-m", "ztunnel.lab.resolver", "--manifests", str(site.state / "manifests")]
    ports = [{"containerPort": 53, "name": "dns", "protocol": "UDP"}, {"containerPort": 53, "name": "dns-tcp", "protocol": "TCP"}]
    container = {"name": "coredns", "command": command, "ports": ports, "env": [{"name": "PYTHONPATH", "value": python_path(os.environ)}]}
    labels = {"k8s-app": "kube-dns"}
    service_ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    service = {"selector": labels, "clusterIP": addresses[0], "clusterIPs": addresses, "ports": service_ports}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"}, "spec": service},
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "coredns", "namespace": "kube-system", "labels": labels},
            "spec": {"containers": [container]},
        },
    ]


def _tell(ready: int, words: str) -> None:
    os.write(ready, words.encode() + b"\n")
    os.close(ready)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--nodes", type=int, choices=range(1, MAX_NODES + 1), default=2, metavar=f"1..{MAX_NODES}")
    parser.add_argument("--ip-family", choices=FAMILIES, default="ipv4")
    parser.add_argument("--image", action="append", default=[], metavar="IMAGE=COMMAND")
    parser.add_argument("--no-mesh", action="store_true")
    parser.add_argument("--ready", type=int, required=True, metavar="FD")
    return parser.parse_args()


async def _build(options: argparse.Namespace) -> Controller:
    versions = FAMILIES[options.ip_family]
    began = time.perf_counter()
    fabric = await in_thread(topology.make_fabric)
    plans = [topology.NodePlan(f"node-{number}", number) for number in range(1, options.nodes + 1)]
    nodes = {plan.name: NodeSite(plan, await in_thread(partial(topology.make_node, fabric, plan, plans, versions))) for plan in plans}
    tools = {name: path for name in ("nginx",) if (path := shutil.which(name, path=TOOL_PATH))}
    images = dict(pair.split("=", 1) for pair in options.image)
    mint = Mint(lambda: str(uuid.uuid4()), lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    rules = Rules(images, tools, parse)
    cluster = Cluster(rules, versions, mint)
    site = Site(options.state, cluster, Processes(), nodes, versions, isolation.host_process().pid, fabric)
    controller = Controller(site, not options.no_mesh)
    site.timings["fabric and nodes"] = time.perf_counter() - began
    return controller


async def _serve(options: argparse.Namespace) -> None:
    controller = await _build(options)
    await controller.run(options.ready)


def main() -> None:
    """Become a lab's controller."""
    options = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.captureWarnings(True)
    try:
        isolation.enter_namespaces()
        for name in DIRECTORIES:
            (options.state / name).mkdir()
        process = isolation.host_process()
        (options.state / PROCESS_FILE).write_bytes(encode({"pid": process.pid, "start_time": process.start_time}))
        trio.run(_serve, options)
    except* LocalError as errors:
        for error in leaves(errors):
            log.error("%s", error)
            _tell(options.ready, str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
