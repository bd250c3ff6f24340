"""The node agent: builds the object graph, runs it, and ends it in the right order.

Composition root of `ztunnel run`. Start: certificates and data plane, then the mesh as the source tells it (which enrols the pods),
then ready. End (SIGTERM, SIGINT): not ready, stop accepting, let connections finish until the drain deadline, leave the rules in the
pods, so that nothing leaves them in plaintext until the next agent has taken over. A second signal ends at once.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import trio

import ztunnel
from ztunnel import worker
from ztunnel.admin.api import ControlApi
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.server import AdminServer
from ztunnel.admission import Admission
from ztunnel.agent import Agent
from ztunnel.ca.authority import Authority
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.root import open_root
from ztunnel.ca.rotation import Rotation
from ztunnel.cni.conflist import TYPE
from ztunnel.cni.endpoint import Bounds as CniBounds
from ztunnel.cni.endpoint import Endpoint
from ztunnel.cni.install import Host, Installer
from ztunnel.dataplane import kernel_tls
from ztunnel.dataplane.channel import Configure
from ztunnel.departure import Departure
from ztunnel.flows import FlowReporter
from ztunnel.kube.client import KubeClient, closing
from ztunnel.kube.config import ACCOUNT_DIRECTORY, load
from ztunnel.kube.reflector import Phase
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.index import Index
from ztunnel.node.announcements import Announcements
from ztunnel.node.enrolment import EnrolmentSettings as EnrollerSettings
from ztunnel.node.find import DirectoryFinder, NetnsFinder, host_namespaces
from ztunnel.node.find_on_node import NodeFinder
from ztunnel.node.kubelet import KubeletFinder
from ztunnel.node.pods import Enroller
from ztunnel.node.probes import Probes
from ztunnel.node.status_files import StatusFiles
from ztunnel.overview import Overview, Watched
from ztunnel.plane import DataPlane, Listener
from ztunnel.rpc.client import target_of
from ztunnel.runtime import logs
from ztunnel.runtime.confine import hide_memory
from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.memory import settle
from ztunnel.runtime.metrics import Metrics
from ztunnel.runtime.scheduling import be_patient
from ztunnel.runtime.workers import Running, spawn_process, spawn_thread
from ztunnel.settings import NetnsSearch, PodsSettings, RecordLayer, RedirectionStatus, SameNode, Settings, WaypointFallback
from ztunnel.sources.files import FileLimits, FileSource
from ztunnel.sources.kubernetes import KubernetesSource
from ztunnel.sources.objects import Source

log = logging.getLogger(__name__)

_DATA_PLANE = "data plane"
_MESH = "mesh"
_CNI = "cni"
_GATE_SPARE_SECONDS = 10.0
"""For an ADD to say why it was not done in time."""
_LEAVING_SECONDS = 0.1
"""Between two looks whether connections live, when the mesh leaves this node."""


def run(settings: Settings) -> int:
    """Runs the agent until it is told to end. Returns the exit status.

    Raises:
        MeshError: something that it cannot start without is not to be had; the text says what.
    """
    logs.configure(settings.log.format.value, settings.log.level.value)
    _raise_descriptor_limit()
    hide_memory()
    trio.run(_main, settings)
    return 0


@dataclass(slots=True)
class _Parts:
    """The object graph."""

    agent: Agent
    plane: DataPlane
    rotation: Rotation
    authority: RemoteAuthority | None
    enroller: Enroller
    source: Source
    kube: KubeClient | None
    announcements: Announcements | None
    metrics: Metrics
    overview: Overview
    readiness: Readiness
    admin: AdminServer
    status_files: StatusFiles | None
    cni: _Cni | None
    probes: Probes | None
    departure: Departure | None

    @property
    def is_leaving(self) -> bool:
        """Whether no other agent follows."""
        return self.departure is not None and self.departure.is_final


@dataclass(slots=True)
class _Cni:
    """What new pods wait for."""

    admission: Admission
    endpoint: Endpoint
    installer: Installer | None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """From here on new pods wait for us; before, and after a signal, the list says who may start. The plugin comes behind that."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.admission.run)
            await nursery.start(self.endpoint.run)
            if self.installer is not None:
                await nursery.start(self.installer.run)
            task_status.started()


def _build(settings: Settings) -> _Parts:
    index = Index()
    metrics = Metrics(ztunnel.__version__, settings.limits.metric_series)
    spawn = partial(spawn_thread, serve=worker.serve) if settings.workers == 0 else _spawner(settings)
    plane = DataPlane(_configure(settings), index, spawn, max(1, settings.workers))
    agent = Agent(settings.node, index, plane)
    remote = _remote_authority(settings)
    rotation = Rotation(remote or _embedded_authority(settings), agent.certificate_changed, time.time)
    finder = _finder(settings.pods)
    enroller = _enroller(settings, plane, finder)
    cni = _cni(settings, Admission(agent, enroller, finder, settings.cni), metrics) if isinstance(finder, NodeFinder) else None
    reporter = FlowReporter(metrics, agent.workload, time.monotonic)
    kube = _kube_client(settings)
    source = _source(settings, kube)
    if kube is not None and isinstance(source, KubernetesSource):
        _watch_kube(metrics, kube, source)
    agent.rotation, agent.enroller = rotation, enroller
    plane.identity_of = agent.identity_of
    plane.make_sockets = enroller.make_sockets
    plane.listener = Listener(reporter.take, partial(_count_limits, metrics), reporter.worker_died)
    agent.on_gone = reporter.forget
    readiness = Readiness((_DATA_PLANE, _MESH))
    readiness.watch(_DATA_PLANE, lambda: plane.serving > 0)
    watched = Watched(
        settings.node,
        ztunnel.__version__,
        settings.trust_domain,
        settings.workers == 0,
        index,
        agent,
        plane,
        rotation,
        enroller,
        reporter,
        readiness,
    )
    overview = Overview(watched, time.monotonic, time.time)
    overview.watch(metrics)
    probes = _probes(settings, enroller)
    if probes is not None:
        overview.more_problems["probes"] = lambda: probes.problem
    if cni is not None and (installer := cni.installer) is not None:
        readiness.watch(_CNI, lambda: not installer.problem)
        overview.more_problems[_CNI] = lambda: installer.problem
    api = ControlApi(overview, settings.node)
    return _Parts(
        agent=agent,
        plane=plane,
        rotation=rotation,
        authority=remote,
        enroller=enroller,
        source=source,
        kube=kube,
        announcements=Announcements(kube, settings.node, agent.local_captures, enroller.status) if kube is not None else None,
        metrics=metrics,
        overview=overview,
        readiness=readiness,
        admin=AdminServer(api, readiness, metrics, settings.admin, settings.limits.admin_connections),
        status_files=StatusFiles(settings.pods.status_directory, enroller.status) if settings.pods.status_directory else None,
        cni=cni,
        probes=probes,
        departure=Departure(kube, settings.daemon_set) if kube is not None and settings.daemon_set is not None else None,
    )


def _embedded_authority(settings: Settings) -> Authority:
    return Authority(open_root(settings.ca.directory, settings.trust_domain, time.time()), settings.ca.leaf_hours)


def _remote_authority(settings: Settings) -> RemoteAuthority | None:
    if settings.ca.address is None:
        return None
    target = target_of(settings.ca.address, settings.ca.server_name or "")
    return RemoteAuthority(target, settings.ca.roots_file, settings.ca.token_file, settings.cluster, int(settings.ca.leaf_hours * 3600))


def _enroller(settings: Settings, plane: DataPlane, finder: NetnsFinder) -> Enroller:
    enrolment = EnrollerSettings(
        grace_seconds=settings.enrolment.grace_seconds,
        linger_seconds=settings.enrolment.linger_seconds,
        drift_seconds=settings.enrolment.drift_seconds,
    )
    return Enroller(finder, plane, enrolment)


def _finder(pods: PodsSettings) -> NetnsFinder:
    if pods.find is NetnsSearch.DIRECTORY:
        return DirectoryFinder(str(pods.netns_directory))
    return NodeFinder(str(pods.runtime_directory), str(pods.proc_directory))


def _probes(settings: Settings, enroller: Enroller) -> Probes | None:
    if not settings.probes.enabled:
        return None
    proc = str(settings.pods.proc_directory)
    return Probes(KubeletFinder(proc, str(settings.probes.cgroup_directory), host_namespaces(proc)), enroller.captured_addresses)


def _cni(settings: Settings, admission: Admission, metrics: Metrics) -> _Cni | None:
    cni = settings.cni
    if not cni.enabled:
        return None
    bounds = CniBounds(gate_seconds=cni.add_seconds + _GATE_SPARE_SECONDS)
    endpoint = Endpoint(
        cni.socket,
        admission.gate,
        bounds,
        on_answer=lambda command, answer: metrics.cni_requests.add(1, command, answer),
        on_limit=lambda: metrics.limit_hits.add(1, "cni_requests"),
        on_bug=lambda: metrics.bugs.add(1),
    )
    if cni.plugin is None:
        return _Cni(admission, endpoint, None)
    entry: dict[str, object] = {"type": TYPE, "socket": str(cni.socket), "known": str(cni.known_file)}
    entry["waitSeconds"] = math.ceil(bounds.longest_seconds)
    with suppress(OSError):  # not in a cluster
        entry["ownNamespace"] = (ACCOUNT_DIRECTORY / "namespace").read_text().strip()
    return _Cni(admission, endpoint, Installer(Host(cni.plugin, cni.bin_directory, cni.conf_directory), entry))


async def _main(settings: Settings) -> None:
    parts = _build(settings)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with closing(parts.kube), trio.open_nursery() as nursery:
            await nursery.start(parts.admin.run)
            await nursery.start(parts.plane.run)
            parts.readiness.done(_DATA_PLANE)
            await nursery.start(parts.rotation.run)
            if parts.authority is not None:
                await nursery.start(parts.authority.follow_roots, parts.rotation.hasten)
            await _follow_mesh(settings, parts, signals, nursery)
            await _drain(settings, parts, signals)
            nursery.cancel_scope.cancel()


async def _follow_mesh(settings: Settings, parts: _Parts, signals: AsyncIterator[int], lasting: trio.Nursery) -> None:
    """Serves until the first signal. When this returns nothing enrols pods any more: a drain is not undone by a change of the mesh.

    The source goes on in `lasting`: a policy that comes during a drain ends the connections that it denies.
    """
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.enroller.run)
        await nursery.start(parts.agent.run)
        if parts.probes is not None:
            await nursery.start(parts.probes.run)
        if parts.departure is not None:
            nursery.start_soon(parts.departure.follow)
        # Not waited for here: an API server that is away must not keep us from ending.
        nursery.start_soon(_learn_mesh, settings, parts, nursery, lasting)
        await _next_signal(signals)
        parts.readiness.lost(_DATA_PLANE)
        parts.overview.is_draining = True
        if (settings.cni.remove_at_exit or parts.is_leaving) and parts.cni is not None and parts.cni.installer is not None:
            parts.cni.installer.remove()
        nursery.cancel_scope.cancel()


async def _learn_mesh(settings: Settings, parts: _Parts, nursery: trio.Nursery, lasting: trio.Nursery) -> None:
    """Brings up what needs to know the mesh, as soon as it is known."""
    await lasting.start(partial(parts.source.run, parts.agent.mesh_changed))
    # Behind the first look at the mesh: pods that were captured all the time must not be called pending, or peers would send them
    # plaintext until the next word.
    if parts.status_files is not None:
        await nursery.start(parts.status_files.run)
    if parts.announcements is not None:
        await nursery.start(parts.announcements.run)
    if parts.cni is not None:
        await nursery.start(parts.cni.run)
    parts.readiness.done(_MESH)
    settle()
    log.info("ready", extra=logs.fields(node=settings.node, pods=len(parts.agent.local_captures())))


async def _drain(settings: Settings, parts: _Parts, signals: AsyncIterator[int]) -> None:
    log.info("draining", extra=logs.fields(seconds=settings.drain_seconds))
    async with trio.open_nursery() as nursery:

        async def drain() -> None:
            if parts.is_leaving:
                await _leave(settings, parts)
            # Our copies go first: a listener that anybody holds would let connections queue where nobody accepts.
            parts.plane.close()
            await parts.enroller.close(remove=False)
            log.info("drained", extra=logs.fields(cut=await parts.plane.drain(settings.drain_seconds)))
            nursery.cancel_scope.cancel()

        nursery.start_soon(drain)
        await _next_signal(signals)
        log.warning("second signal: leaving at once")
        nursery.cancel_scope.cancel()


async def _leave(settings: Settings, parts: _Parts) -> None:
    """The mesh leaves this node: what is new passes us by, what is carried has the time of a drain, then no rule stays."""
    log.warning("leaving this node, whose pods are no longer in the mesh")
    await parts.enroller.reconcile([])
    with trio.move_on_after(settings.drain_seconds):
        if parts.announcements is not None:
            await parts.announcements.annotate_once()  # other nodes must not tunnel to us any more
        while any(parts.plane.active(pod.uid) for pod in parts.enroller.status()):  # noqa: ASYNC110 - nobody tells of a worker's last one
            await trio.sleep(_LEAVING_SECONDS)
    await parts.enroller.close(remove=True)
    if parts.probes is not None:
        try:
            await parts.probes.remove()
        except LocalError as error:
            log.error("cannot remove the node's rules for probes", extra=logs.fields(problem=error))


async def _next_signal(signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        return


def _kube_client(settings: Settings) -> KubeClient | None:
    if not settings.sources.kubernetes:
        return None
    return KubeClient(
        load(os.environ, settings.sources.kubeconfig, settings.sources.context or ""), program=f"ztunnel-agent/{settings.node}"
    )


def _watch_kube(metrics: Metrics, kube: KubeClient, source: KubernetesSource) -> None:
    each = source.reflectors
    done = (Phase.FOLLOWING, Phase.ABSENT)
    metrics.kube_requests.watch(lambda: {(verb, str(code)): float(count) for (verb, code), count in kube.requests.items()})
    metrics.kube_events.watch(lambda: {(str(one.kind),): float(one.counts.events) for one in each})
    metrics.kube_failures.watch(lambda: {(str(one.kind),): float(one.counts.failures) for one in each})
    metrics.kube_following.watch(lambda: {(str(one.kind),): float(one.phase in done and not one.problem) for one in each})


def _source(settings: Settings, kube: KubeClient | None) -> Source:
    default = RedirectionStatus.LABELS if kube is None else RedirectionStatus.ANNOTATION
    options = MeshOptions(
        trust_domain=settings.trust_domain,
        root_namespace=settings.root_namespace,
        cluster=settings.cluster,
        cluster_domain=settings.cluster_domain,
        hbone_needs_annotation=(settings.sources.redirection_status or default) is RedirectionStatus.ANNOTATION,
        waypoint_fails_open=settings.waypoint.fallback is WaypointFallback.L4,
    )
    if kube is not None:
        return KubernetesSource(kube, options)
    assert settings.sources.files is not None, "the settings say one of both"
    limits = FileLimits(settings.limits.manifest_bytes, settings.limits.manifest_files, settings.limits.manifest_documents)
    return FileSource(settings.sources.files, options, limits, settings.sources.poll_seconds)


def _configure(settings: Settings) -> Configure:
    return Configure(
        prefix="",
        own_records=settings.tunnel.records is not RecordLayer.OPENSSL,
        kernel_records=settings.tunnel.records is RecordLayer.KERNEL and _kernel_does_tls(),
        optimistic_data=settings.tunnel.optimistic_data,
        same_node_plaintext=settings.tunnel.same_node is SameNode.PLAINTEXT,
        idle_seconds=settings.tunnel.idle_seconds,
        max_streams=settings.tunnel.max_streams,
        tunnels_per_peer=settings.limits.tunnels_per_peer,
        handshake_seconds=settings.deadlines.handshake_seconds,
        connect_seconds=settings.deadlines.connect_seconds,
        response_seconds=settings.deadlines.connect_response_seconds,
        report_seconds=settings.tunnel.report_seconds,
        max_connections=settings.limits.connections,
        max_handshakes_per_pod=settings.limits.handshakes_per_pod,
        ping_seconds=settings.tunnel.ping_seconds,
        ping_timeout_seconds=settings.tunnel.ping_timeout_seconds,
    )


def _kernel_does_tls() -> bool:
    # Here and not in a worker: it is the same for all of them, it takes sockets, which they may not make, and the kernel loads its
    # module only for somebody with privileges.
    try:
        kernel_tls.rehearse()
    except kernel_tls.KernelRefused as error:
        log.warning("kernel TLS is not used: tunnels have our own records", extra=logs.fields(error=error))
        return False
    log.info("kernel TLS is used")
    return True


def _count_limits(metrics: Metrics, limits: dict[str, int], bugs: int) -> None:
    for limit, hits in limits.items():
        metrics.limit_hits.add(hits, limit)
    if bugs:
        metrics.bugs.add(bugs)


def _spawner(settings: Settings) -> Callable[[socket.socket], Awaitable[Running]]:
    """From here on this process makes way for its workers."""
    launcher = Launcher()
    be_patient()
    return partial(spawn_process, launcher=launcher, log_format=settings.log.format.value, log_level=settings.log.level.value)


def _raise_descriptor_limit() -> None:
    """Every connection takes descriptors; the soft limit is often 1,024 for historical reasons (select)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
