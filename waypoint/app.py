"""The L7 proxy: builds the object graph, runs it, and ends it in the right order.

Composition root of `waypoint run`. Start: workers and certificate, then the configuration that the mesh's manifests add up to, then
listening, then ready. End (SIGTERM, SIGINT): not ready, a while later stop accepting, let requests and connections finish until the
drain deadline. A second signal ends at once.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from waypoint import worker
from waypoint.control import Control
from waypoint.data.channel import ConfigureWaypoint
from waypoint.key_sets import KeySetFetcher
from waypoint.plane import Plane
from waypoint.resolver import Resolver
from waypoint.settings import Kind, Settings
from ztunnel import __version__
from ztunnel.admin.readiness import Readiness
from ztunnel.ca.authority import Authority
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.root import open_root
from ztunnel.ca.rotation import Rotation
from ztunnel.hbone.handshake import Credentials
from ztunnel.kube.client import KubeClient, closing
from ztunnel.kube.config import load
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.bound import bound_to
from ztunnel.mesh.l7.config import ProxyConfig
from ztunnel.mesh.l7.derive import derive_proxy
from ztunnel.mesh.l7.ingress import GatewayPods, derive_gateway
from ztunnel.mesh.manifests.mesh_config import MeshConfig
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.rpc.client import target_of
from ztunnel.runtime import logs
from ztunnel.runtime.confine import hide_memory
from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.metrics import Metrics
from ztunnel.runtime.scheduling import be_patient
from ztunnel.runtime.workers import Running, spawn_process, spawn_thread
from ztunnel.settings import RedirectionStatus
from ztunnel.sources.files import FileLimits, FileSource
from ztunnel.sources.kubernetes import KubernetesSource, proxy
from ztunnel.sources.mesh_config import mesh_config_of
from ztunnel.sources.objects import Refusal, Source

log = logging.getLogger(__name__)

_WORKERS = "workers"
_MESH = "mesh"
_CERTIFICATE = "certificate"
_HBONE = 0


def run(settings: Settings) -> int:
    """Runs the proxy until it is told to end. Returns the exit status.

    Raises:
        MeshError: something that it cannot start without is not to be had; the text says what.
    """
    logs.configure(settings.log.format.value, settings.log.level.value)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hide_memory()
    trio.run(_main, settings)
    return 0


class Follower:
    """Turns what the source says into the workers' configuration. `mesh_changed` is the source's sink."""

    def __init__(self, settings: Settings, plane: Plane, source: Source, key_sets: KeySetFetcher, resolver: Resolver) -> None:
        self._settings = settings
        self._key_sets = key_sets
        self._resolver = resolver
        self._problems: tuple[str, ...] = ()
        self._plane = plane
        self._source = source
        self._who = ObjectKey("Gateway", settings.namespace, settings.name)
        labels = tuple((name, value) for name, _, value in (label.partition("=") for label in settings.labels))
        self._pods = GatewayPods(settings.namespace, identity_of(settings).service_account, labels)
        self._options = mesh_options(settings)
        self.config: ProxyConfig | None = None
        self.refusals: tuple[Refusal, ...] = ()

    async def mesh_changed(self, state: MeshState, refusals: tuple[Refusal, ...]) -> None:
        """The mesh is this now."""
        for refusal in refusals:
            if refusal not in self.refusals:
                said = logs.fields(file=refusal.file, object=refusal.object, field=refusal.field, reason=refusal.reason)
                log.error("manifest refused", extra=said)
        self.refusals = refusals
        objects = self._source.objects
        mesh_config = mesh_config_of(objects, self._options.root_namespace)
        for problem in mesh_config.problems:
            if problem not in self._problems:
                log.error("part of the mesh's configuration cannot be used", extra=logs.fields(reason=problem))
        self._problems = mesh_config.problems
        config = self._derive(state, mesh_config)
        if config == self.config:
            self._plane.open_ports()
        else:
            self.config = config
            self._resolver.want(name for cluster in config.clusters.values() for name in cluster.names)
            self._key_sets.want(rule for each in config.authentications.values() for rule in each.rules)
            self._plane.serve(config)

    def _derive(self, state: MeshState, mesh_config: MeshConfig) -> ProxyConfig:
        objects, options, node = self._source.objects, self._options, self._settings.node
        if self._settings.kind is Kind.GATEWAY:
            return derive_gateway(objects, state, options, self._who, self._pods, node, mesh_config)
        return derive_proxy(objects, state, options, self._who, bound_to(objects, options, self._who), node, mesh_config)


def identity_of(settings: Settings) -> SpiffeId:
    """Who the proxy is."""
    account = settings.service_account or (f"{settings.name}-istio" if settings.kind is Kind.GATEWAY else settings.name)
    return SpiffeId(settings.trust_domain, settings.namespace, account)


@dataclass(slots=True)
class _Parts:
    """The object graph."""

    plane: Plane
    rotation: Rotation
    authority: RemoteAuthority | None
    source: Source
    kube: KubeClient | None
    follower: Follower
    key_sets: KeySetFetcher
    resolver: Resolver
    readiness: Readiness
    control: Control
    identity: SpiffeId


def _build(settings: Settings) -> _Parts:
    identity = identity_of(settings)
    spawn = partial(spawn_thread, serve=worker.serve) if settings.workers == 0 else _spawner(settings)
    plane = Plane(_configure(settings), settings.listen.address, spawn, max(1, settings.workers), settings.limits.metric_series)
    readiness = Readiness((_WORKERS, _MESH, _CERTIFICATE))
    readiness.watch(_WORKERS, lambda: plane.serving > 0)
    remote = _remote_authority(settings)
    authority = remote or Authority(open_root(settings.ca.directory, settings.trust_domain, time.time()), settings.ca.leaf_hours)
    rotation = Rotation(authority, partial(_certificate_changed, plane, readiness), time.time)
    limits = FileLimits(settings.limits.manifest_bytes, settings.limits.manifest_files, settings.limits.manifest_documents)
    kube = _kube_client(settings)
    source: Source
    if kube is not None:
        source = KubernetesSource(kube, mesh_options(settings), proxy(settings.namespace, settings.root_namespace))
    else:
        assert settings.sources.files is not None, "the settings say one of both"
        source = FileSource(settings.sources.files, mesh_options(settings), limits, settings.sources.poll_seconds)
    key_sets = KeySetFetcher(plane.key_set)
    resolver = Resolver(plane.resolved)
    plane.want_addresses = resolver.ask
    follower = Follower(settings, plane, source, key_sets, resolver)
    metrics = Metrics(__version__, settings.limits.metric_series)
    metrics.registry.register(plane.requests)
    return _Parts(
        plane=plane,
        rotation=rotation,
        authority=remote,
        source=source,
        kube=kube,
        follower=follower,
        key_sets=key_sets,
        resolver=resolver,
        readiness=readiness,
        control=Control(settings, plane, readiness, metrics, lambda: follower.config, lambda: follower.refusals),
        identity=identity,
    )


async def _certificate_changed(plane: Plane, readiness: Readiness, identity: SpiffeId, credentials: Credentials | None) -> None:
    """The sink of the rotation: without a certificate nothing can be served."""
    plane.certificate(identity, credentials)
    if credentials is None:
        readiness.lost(_CERTIFICATE)
    else:
        readiness.done(_CERTIFICATE)


async def _main(settings: Settings) -> None:
    parts = _build(settings)
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with closing(parts.kube), trio.open_nursery() as nursery:
            await nursery.start(parts.control.run)
            await nursery.start(parts.plane.run)
            parts.readiness.done(_WORKERS)
            await nursery.start(parts.rotation.run)
            if parts.authority is not None:
                await nursery.start(parts.authority.follow_roots, parts.rotation.hasten)
            await parts.rotation.want({parts.identity})
            nursery.start_soon(parts.key_sets.run)
            nursery.start_soon(parts.resolver.run)
            async with trio.open_nursery() as beginning:
                # Not waited for here: an API server that is away must not keep us from ending.
                beginning.start_soon(_learn_mesh, settings, parts, nursery)
                await _next_signal(signals)
                beginning.cancel_scope.cancel()
            parts.readiness.lost(_WORKERS)
            await _drain(settings, parts, signals)
            nursery.cancel_scope.cancel()


async def _learn_mesh(settings: Settings, parts: _Parts, lasting: trio.Nursery) -> None:
    """Listens as soon as it is known what is to be done."""
    await lasting.start(partial(parts.source.run, parts.follower.mesh_changed))
    port = parts.plane.listen(_HBONE, settings.listen.hbone_port) if settings.kind is Kind.WAYPOINT else None
    parts.readiness.done(_MESH)
    log.info("ready", extra=logs.fields(name=settings.name, namespace=settings.namespace, hbone_port=port))


async def _drain(settings: Settings, parts: _Parts, signals: AsyncIterator[int]) -> None:
    log.info("draining", extra=logs.fields(seconds=settings.drain_seconds))
    async with trio.open_nursery() as nursery:

        async def drain() -> None:
            await trio.sleep(settings.linger_seconds)
            # Our copies go first: a listener that anybody holds would let connections queue where nobody accepts.
            parts.plane.close()
            log.info("drained", extra=logs.fields(cut=await parts.plane.drain(settings.drain_seconds)))
            nursery.cancel_scope.cancel()

        nursery.start_soon(drain)
        await _next_signal(signals)
        log.warning("second signal: leaving at once")
        nursery.cancel_scope.cancel()


async def _next_signal(signals: AsyncIterator[int]) -> None:
    async for _ in signals:
        return


def mesh_options(settings: Settings) -> MeshOptions:
    """What the manifests do not say."""
    default = RedirectionStatus.ANNOTATION if settings.sources.kubernetes else RedirectionStatus.LABELS
    return MeshOptions(
        trust_domain=settings.trust_domain,
        root_namespace=settings.root_namespace,
        cluster=settings.cluster,
        cluster_domain=settings.cluster_domain,
        hbone_needs_annotation=(settings.sources.redirection_status or default) is RedirectionStatus.ANNOTATION,
    )


def _kube_client(settings: Settings) -> KubeClient | None:
    if not settings.sources.kubernetes:
        return None
    access = load(os.environ, settings.sources.kubeconfig, settings.sources.context or "")
    return KubeClient(access, program=f"waypoint/{settings.namespace}/{settings.name}")


def _remote_authority(settings: Settings) -> RemoteAuthority | None:
    if settings.ca.address is None:
        return None
    target = target_of(settings.ca.address, settings.ca.server_name or "")
    ca, seconds = settings.ca, int(settings.ca.leaf_hours * 3600)
    # For itself: only node agents may ask for others.
    return RemoteAuthority(target, ca.roots_file, ca.token_file, settings.cluster, seconds, impersonates=False)


def _configure(settings: Settings) -> ConfigureWaypoint:
    return ConfigureWaypoint(
        prefix="",
        hostname=socket.gethostname(),
        own_records=settings.tunnel.own_records,
        idle_seconds=settings.tunnel.idle_seconds,
        max_streams=settings.tunnel.max_streams,
        tunnels_per_endpoint=settings.limits.tunnels_per_endpoint,
        handshake_seconds=settings.tunnel.handshake_seconds,
        ping_seconds=settings.tunnel.ping_seconds,
        ping_timeout_seconds=settings.tunnel.ping_timeout_seconds,
        max_tunnels=settings.limits.tunnels,
        max_handshakes=settings.limits.handshakes,
        max_connections=settings.limits.connections,
    )


def _spawner(settings: Settings) -> Callable[[socket.socket], Awaitable[Running]]:
    """From here on this process makes way for its workers."""
    launcher = Launcher()
    be_patient()
    return partial(
        spawn_process, launcher=launcher, log_format=settings.log.format.value, log_level=settings.log.level.value, module="waypoint.worker"
    )
