"""The controller as a program: builds the object graph and runs it. Composition root of `ztunnel controller`.

Every replica follows the cluster; the one that holds the Lease writes. End (SIGTERM, SIGINT): the Lease is given back, so that another
goes on at once.
"""

from __future__ import annotations

import logging
import signal
from functools import partial
from os import environ
from socket import gethostname

import trio

import ztunnel
from ztunnel.admin.listen import open_ports
from ztunnel.admin.readiness import Readiness
from ztunnel.admin.scrape import Scrape
from ztunnel.controller.election import Election, Periods
from ztunnel.controller.pods import ProxySettingsOfPods
from ztunnel.controller.reconciler import Reconciler
from ztunnel.controller.taints import Taints
from ztunnel.controller_settings import ControllerSettings
from ztunnel.kube.client import KubeClient
from ztunnel.kube.config import load
from ztunnel.mesh.derive import MeshOptions
from ztunnel.runtime import logs
from ztunnel.runtime.http import HttpServer
from ztunnel.runtime.metrics import ControllerMetrics

log = logging.getLogger(__name__)

_CLUSTER = "cluster"


def run(settings: ControllerSettings) -> int:
    """Runs the controller until it is told to end. Returns the exit status.

    Raises:
        MeshError: something that it cannot start without is not to be had; the text says what.
    """
    logs.configure(settings.log.format.value, settings.log.level.value)
    trio.run(_main, settings)
    return 0


async def _main(settings: ControllerSettings) -> None:
    access = load(environ, settings.kubernetes.kubeconfig)
    async with KubeClient(access, program="ztunnel-controller") as client:
        reconciler = Reconciler(client, _options(settings), _pods(settings).pod_spec)
        election = settings.election
        namespace = settings.kubernetes.namespace or access.namespace
        periods = Periods(lease=election.lease_seconds, renew=election.renew_seconds, retry=election.retry_seconds)
        replica = Election(client, namespace, election.lease, election.identity or gethostname(), periods)
        taints = Taints(client, namespace, settings.nodes.agents) if settings.nodes.taints else None
        readiness = Readiness(())
        readiness.watch(_CLUSTER, lambda: not reconciler.bodies.missing)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                await _open_admin(settings, _metrics(reconciler, replica), readiness, nursery)
                nursery.start_soon(reconciler.follow)
                if taints is not None:
                    nursery.start_soon(taints.follow)
                nursery.start_soon(replica.run, partial(_work, reconciler, taints))
                async for _ in signals:
                    break
                log.info("ending")
                nursery.cancel_scope.cancel()


async def _work(reconciler: Reconciler, taints: Taints | None) -> None:
    """The leader's."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reconciler.work)
        if taints is not None:
            nursery.start_soon(taints.work)


def _options(settings: ControllerSettings) -> MeshOptions:
    return MeshOptions(trust_domain=settings.trust_domain, cluster_domain=settings.cluster_domain, root_namespace=settings.root_namespace)


def _pods(settings: ControllerSettings) -> ProxySettingsOfPods:
    gateways = settings.gateways
    told = {
        "WAYPOINT_SOURCES_KUBERNETES": "true",
        "WAYPOINT_CA_ADDRESS": gateways.ca_address,
        "WAYPOINT_TRUST_DOMAIN": settings.trust_domain,
        "WAYPOINT_CLUSTER_DOMAIN": settings.cluster_domain,
        "WAYPOINT_ROOT_NAMESPACE": settings.root_namespace,
    }
    return ProxySettingsOfPods(
        image=gateways.image,
        pull_policy=gateways.pull_policy,
        environment=tuple({**told, **_pairs(gateways.environment)}.items()),
        roots_config_map=gateways.roots_config_map,
        requests=tuple(_pairs(gateways.requests).items()),
        limits=tuple(_pairs(gateways.limits).items()),
    )


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _metrics(reconciler: Reconciler, replica: Election) -> ControllerMetrics:
    metrics = ControllerMetrics(ztunnel.__version__)
    metrics.leader.watch(lambda: {(): float(replica.is_leader)})
    counts = reconciler.counts
    metrics.writes.watch(lambda: {("written",): float(counts.written), ("failed",): float(counts.failed)})
    metrics.looks.watch(lambda: {(): float(counts.looks)})
    return metrics


async def _open_admin(settings: ControllerSettings, metrics: ControllerMetrics, readiness: Readiness, nursery: trio.Nursery) -> None:
    admin = settings.admin
    for handler, port, name in (
        (Scrape(metrics).handle, admin.metrics_port, "admin.metrics_port"),
        (readiness.handle, admin.readiness_port, "admin.readiness_port"),
    ):
        server = HttpServer(handler, on_bug=partial(metrics.bugs.add, 1), on_limit=partial(metrics.limit_hits.add, 1, "admin_connections"))
        await nursery.start(server.run, await open_ports(admin.address, port, name))
