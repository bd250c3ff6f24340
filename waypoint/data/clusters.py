"""Clusters at work in one worker: which endpoint takes a request (`waypoint.upstream`), and the connections to each."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Final

from waypoint.data.dialler import Dialler
from waypoint.data.pools import HttpPool
from waypoint.http.messages import Client
from waypoint.upstream.cluster import ClusterAtWork
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.localities import Place
from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.l7.clusters import Cluster, Locality
from ztunnel.mesh.l7.config import ProxyConfig

MAX_OWN: Final = 4096
"""Ports of pods that are addressed by themselves and have connections."""


class ClusterHere:
    """One cluster and its connections."""

    __slots__ = ("_dialler", "_loop", "watches", "work")

    def __init__(self, loop: Loop, dialler: Dialler, work: ClusterAtWork) -> None:
        self._loop = loop
        self._dialler = dialler
        self.work = work
        self.watches = work.cluster.outlier is not None
        """Whether outcomes are of interest."""

    @property
    def cluster(self) -> Cluster:
        """Its configuration of the moment."""
        return self.work.cluster

    def update(self, cluster: Cluster) -> None:
        """Endpoints that stay keep their connections."""
        self.watches = cluster.outlier is not None
        retire(self.work.update(cluster, self._loop.now))
        for endpoint in self.work.endpoints:
            if isinstance(endpoint.pool, HttpPool):
                endpoint.pool.update(cluster, endpoint.endpoint)

    def pool(self, endpoint: EndpointAtWork) -> HttpPool:
        """The connections to an endpoint."""
        pool = endpoint.pool
        if isinstance(pool, HttpPool):
            return pool
        made = HttpPool(self._loop, self._dialler, self.work.cluster, endpoint.endpoint, self.work.breakers)
        endpoint.pool = made
        return made

    def open(self, endpoint: EndpointAtWork, receiver: Receiver, client: Client) -> Transport:
        """A connection of its own, for bytes.

        Raises:
            MeshError: it cannot even be tried.
        """
        return self._dialler.open(self.work.cluster, endpoint.endpoint, receiver, client=client)

    def sweep(self, now: float) -> None:
        """Lets go of what has been idle for too long, and lets ejected endpoints come back."""
        self.work.sweep(now)
        for endpoint in self.work.endpoints:
            if isinstance(endpoint.pool, HttpPool):
                endpoint.pool.sweep(now)

    def retire(self) -> None:
        """The cluster is gone: what is under way ends in its time."""
        retire(self.work.endpoints)


def retire(endpoints: Iterable[EndpointAtWork]) -> None:
    """Endpoints that are gone: their idle connections close now, the others after what they are doing."""
    for endpoint in endpoints:
        if isinstance(endpoint.pool, HttpPool):
            endpoint.pool.retire()
            endpoint.pool = None


class Clusters:
    """All clusters, by key."""

    def __init__(self, loop: Loop, dialler: Dialler, dice: random.Random) -> None:
        self._loop = loop
        self._dialler = dialler
        self._randrange = dice.randrange
        self._clusters: dict[str, ClusterHere] = {}
        self._own: dict[str, ClusterHere] = {}
        self._place = Place(Locality())
        self._resolved: dict[tuple[str, int], tuple[str, ...]] = {}

    def get(self, key: str) -> ClusterHere | None:
        """A cluster of the configuration of the moment."""
        return self._clusters.get(key)

    def update(self, config: ProxyConfig) -> None:
        """The configuration has changed."""
        clusters = config.clusters
        moved = (config.locality, config.node) != (self._place.locality, self._place.node)
        if moved:
            self._place = Place(config.locality, config.node)
        for key in [key for key in self._clusters if key not in clusters or moved]:
            self._clusters.pop(key).retire()
        for key, cluster in clusters.items():
            here = self._clusters.get(key)
            if here is None:
                self._clusters[key] = self._make(cluster)
            elif here.cluster != cluster:
                here.update(cluster)

    def own(self, cluster: Cluster) -> ClusterHere:
        """One that is not in the configuration: a pod that is addressed by itself."""
        here = self._own.get(cluster.key)
        if here is None:
            if len(self._own) >= MAX_OWN:
                self._own.pop(next(iter(self._own))).retire()
            here = self._own[cluster.key] = self._make(cluster)
        elif here.cluster is not cluster and here.cluster != cluster:
            here.update(cluster)
        return here

    def resolved(self, name: tuple[str, int], addresses: tuple[str, ...]) -> None:
        """What DNS says of a name that clusters use."""
        self._resolved[name] = addresses
        for here in self._clusters.values():
            if name in here.cluster.names:
                retire(here.work.resolved(name, addresses, self._loop.now))

    def sweep(self) -> None:
        """To be called every few seconds."""
        now = self._loop.now
        for here in (*self._clusters.values(), *self._own.values()):
            here.sweep(now)
        wanted = {name for here in self._clusters.values() for name in here.cluster.names}
        for name in [name for name in self._resolved if name not in wanted]:
            del self._resolved[name]

    def state(self) -> list[dict[str, object]]:
        """For operators: each cluster's endpoints and counters."""
        return [
            {
                "cluster": key,
                "requests": here.work.breakers.requests,
                "connections": here.work.breakers.connections,
                "pending": here.work.breakers.pending,
                "retries": here.work.breakers.retries,
                "endpoints": [
                    {"address": each.key, "active": each.active, "ejected": each.ejected, "weight": each.weight}
                    for each in here.work.endpoints
                ],
            }
            for key, here in self._clusters.items()
        ]

    def retire_all(self) -> None:
        """Idle connections close now, the others after what they are doing."""
        for here in (*self._clusters.values(), *self._own.values()):
            here.retire()

    def _make(self, cluster: Cluster) -> ClusterHere:
        work = ClusterAtWork(cluster, self._place, self._loop.now, self._randrange)
        for name in cluster.names:
            if name in self._resolved:
                work.resolved(name, self._resolved[name], self._loop.now)
        return ClusterHere(self._loop, self._dialler, work)
