"""The certificate authority as a program: builds the object graph and runs it. Composition root of `ztunnel ca`.

Start: a root, then the pods, then callers are let in. End (SIGTERM, SIGINT): not ready, no further connections, what is under way is
answered within seconds; agents come again to another replica.
"""

from __future__ import annotations

import logging
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from os import environ

import trio

import ztunnel
from ztunnel.admin.listen import open_ports
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.scrape import Scrape
from ztunnel.ca.authority import Authority
from ztunnel.ca.cluster import NAMESPACE_KIND, POD_KIND, ApiTokens, ConfigMaps, NamespaceStore, PodStore, SecretStore
from ztunnel.ca.csr_protocol import PATH
from ztunnel.ca.issuance import Reason, Rules
from ztunnel.ca.keeper import FilePublisher, FileStore, GivenRoots, OwnRoots, Publisher, RootKeeper, StateStore
from ztunnel.ca.pods import PodTable
from ztunnel.ca.root import Root
from ztunnel.ca.service import CertificateService, Limits, TokenReviewer
from ztunnel.ca.static import FilePods, FileTokens
from ztunnel.ca.succession import Periods
from ztunnel.ca_settings import CaServerSettings
from ztunnel.kube.client import KubeClient
from ztunnel.kube.config import load
from ztunnel.kube.discovery import Discovery
from ztunnel.kube.reflector import Reflector
from ztunnel.rpc.server import Bounds, RpcServer
from ztunnel.rpc.tls import server_context
from ztunnel.runtime import logs
from ztunnel.runtime.confine import hide_memory
from ztunnel.runtime.http import HttpServer
from ztunnel.runtime.metrics import AuthorityMetrics

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0

_ROOT = "root"
_PODS = "pods"
_CALLERS = "callers"


def run(settings: CaServerSettings) -> int:
    """Runs the authority until it is told to end. Returns the exit status.

    Raises:
        MeshError: something that it cannot start without is not to be had; the text says what.
    """
    logs.configure(settings.log.format.value, settings.log.level.value)
    hide_memory()
    trio.run(_main, settings)
    return 0


@dataclass(slots=True)
class _Signing:
    """What signs now, and the server certificate that follows from it."""

    settings: CaServerSettings
    metrics: AuthorityMetrics
    authority: Authority | None = None
    there: trio.Event = field(default_factory=trio.Event)
    _context: ssl.SSLContext | None = None
    _renew: float = 0.0
    _expiry: float = 0.0

    def changed(self, root: Root) -> None:
        """The sink of the keeper."""
        self.authority = Authority(root, self.settings.leaf_hours)
        self._expiry, self._renew = root.certificate.not_valid_after_utc.timestamp(), 0.0
        self.metrics.roots.set(root.roots_pem.count(b"-----BEGIN CERTIFICATE-----"))
        self.there.set()

    def context(self) -> ssl.SSLContext:
        """For the next connection: a certificate by the root of now, renewed at half of its life."""
        now = time.time()
        assert self.authority is not None, "nobody is let in before there is a root"
        if self._context is None or now >= self._renew:
            self._context = server_context(*self.authority.server(self.settings.listen.names, now))
            self._renew = now + self.settings.leaf_hours * 1800
        return self._context

    @property
    def works(self) -> bool:
        """Whether what signs is valid now."""
        return self.authority is not None and time.time() < self._expiry

    def expiry(self) -> dict[tuple[str, ...], float]:
        """For the gauge."""
        return {(): self._expiry - time.time() if self.authority is not None else -1.0}


@dataclass(slots=True)
class _World:
    """What stands behind the authority: a cluster, or files."""

    reviewer: TokenReviewer
    table: PodTable
    store: StateStore
    publisher: Publisher
    followers: list[Callable[[], Awaitable[None]]]


@asynccontextmanager
async def _world(settings: CaServerSettings) -> AsyncIterator[_World]:
    files, table = settings.files, PodTable()
    if files.callers is not None and files.pods is not None:
        pods = FilePods(files.pods, table)
        yield _World(FileTokens(files.callers), table, FileStore(files.state), FilePublisher(files.bundle), [pods.run])
        return
    access = load(environ, settings.kubernetes.kubeconfig)
    namespace = settings.kubernetes.namespace or access.namespace
    async with KubeClient(access, program="ztunnel-ca") as client:
        discovery = Discovery(client)
        followers: list[Callable[[], Awaitable[None]]] = [Reflector(client, discovery, POD_KIND, PodStore(table)).run]
        wanted = set(settings.publish.namespaces) or {namespace}
        names: Callable[[], set[str]] = partial(set, wanted)
        if "*" in wanted:
            everywhere = NamespaceStore()
            followers.append(Reflector(client, discovery, NAMESPACE_KIND, everywhere).run)
            names = partial(getattr, everywhere, "names")
        yield _World(
            ApiTokens(client, settings.kubernetes.audience),
            table,
            SecretStore(client, namespace, settings.root.secret),
            ConfigMaps(client, settings.publish.config_map, names),
            followers,
        )


async def _main(settings: CaServerSettings) -> None:
    metrics = AuthorityMetrics(ztunnel.__version__)
    signing = _Signing(settings, metrics)
    metrics.root_expiry.watch(signing.expiry)
    async with _world(settings) as world:
        metrics.pods.watch(lambda: {(): float(len(world.table)) if world.table.synced else -1.0})
        readiness = Readiness((_ROOT, _CALLERS))
        readiness.watch(_ROOT, lambda: signing.works)
        readiness.watch(_PODS, lambda: world.table.synced)
        keeper = RootKeeper(_source(settings, world), world.publisher, time.time, signing.changed, settings.poll_seconds)
        server = _server(settings, world, signing, metrics)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                await _open_admin(settings, metrics, readiness, nursery)
                for follower in world.followers:
                    nursery.start_soon(follower)
                await nursery.start(keeper.run)
                nursery.start_soon(_let_in, settings, signing, server, readiness)
                async for _ in signals:
                    break
                readiness.lost(_CALLERS)
                log.info("ending")
                with trio.move_on_after(DRAIN_SECONDS):
                    await server.drain()
                nursery.cancel_scope.cancel()


async def _let_in(settings: CaServerSettings, signing: _Signing, server: RpcServer, readiness: Readiness) -> None:
    """Callers, as soon as there is a root to show them."""
    await signing.there.wait()
    readiness.done(_ROOT)
    listeners = await open_ports(settings.listen.address, settings.listen.port, "listen.port")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, listeners)
        readiness.done(_CALLERS)
        log.info("ready", extra=logs.fields(port=listeners[0].socket.getsockname()[1]))


async def _open_admin(settings: CaServerSettings, metrics: AuthorityMetrics, readiness: Readiness, nursery: trio.Nursery) -> None:
    admin = settings.admin
    for handler, port, name in (
        (Scrape(metrics).handle, admin.metrics_port, "admin.metrics_port"),
        (readiness.handle, admin.readiness_port, "admin.readiness_port"),
    ):
        server = HttpServer(handler, on_bug=partial(metrics.bugs.add, 1), on_limit=partial(metrics.limit_hits.add, 1, "admin_connections"))
        await nursery.start(server.run, await open_ports(admin.address, port, name))


def _source(settings: CaServerSettings, world: _World) -> OwnRoots | GivenRoots:
    if settings.root.given is not None:
        return GivenRoots(settings.root.given, settings.trust_domain)
    periods = Periods(spread=settings.root.spread_hours * 3600, leaf=settings.leaf_hours * 3600)
    return OwnRoots(world.store, settings.trust_domain, periods)


def _server(settings: CaServerSettings, world: _World, signing: _Signing, metrics: AuthorityMetrics) -> RpcServer:
    limits = settings.limits
    pairs = [account.split("/") for account in settings.agents]
    service = CertificateService(
        world.reviewer,
        world.table,
        Rules(settings.trust_domain, frozenset((namespace, name) for namespace, name in pairs)),
        lambda: signing.authority,
        partial(_count, metrics),
        (time.time, time.monotonic),
        Limits((limits.per_address, limits.per_address_burst), (limits.per_node, limits.per_node_burst)),
    )
    return RpcServer(
        {PATH: service.create_certificate},
        signing.context,
        Bounds(connections=limits.connections),
        on_bug=partial(metrics.bugs.add, 1),
        on_limit=partial(metrics.limit_hits.add, 1, "connections"),
    )


def _count(metrics: AuthorityMetrics, reason: Reason) -> None:
    metrics.requests.add(1, reason.value)
