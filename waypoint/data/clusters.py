"""Clusters at work in one worker: which endpoint takes a request (`waypoint.upstream`), and the connections to each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from waypoint.data.pools import Dialler, Http1Pool
from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.l7.clusters import Cluster, Endpoint

SWEEP_SECONDS: Final = 5.0
MAX_OWN: Final = 4096
"""Ports of pods that are addressed by themselves and have connections."""


class ClusterHere:
    """One cluster and its connections."""

    __slots__ = ("_dialler", "_loop", "_next", "_pools", "cluster")

    def __init__(self, loop: Loop, dialler: Dialler, cluster: Cluster) -> None:
        self._loop = loop
        self._dialler = dialler
        self.cluster = cluster
        self._pools: dict[Endpoint, Http1Pool] = {}
        self._next = 0

    def update(self, cluster: Cluster) -> None:
        """Endpoints that stay keep their connections."""
        self.cluster = cluster
        kept = set(cluster.endpoints)
        for endpoint in [each for each in self._pools if each not in kept]:
            self._pools.pop(endpoint).retire()
        for pool in self._pools.values():
            pool.update(cluster)

    def pick(self) -> Endpoint | None:
        """The endpoint of a request."""
        endpoints = self.cluster.endpoints
        for _ in range(len(endpoints)):
            self._next = (self._next + 1) % len(endpoints)
            if endpoints[self._next].healthy:
                return endpoints[self._next]
        return None

    def pool(self, endpoint: Endpoint) -> Http1Pool:
        """The connections to an endpoint."""
        pool = self._pools.get(endpoint)
        if pool is None:
            pool = self._pools[endpoint] = Http1Pool(self._loop, self._dialler, self.cluster, endpoint)
        return pool

    def open(self, endpoint: Endpoint, receiver: Receiver) -> Transport:
        """A connection of its own, for bytes.

        Raises:
            MeshError: it cannot even be tried.
        """
        return self._dialler.open(self.cluster, endpoint, receiver)

    def sweep(self, now: float) -> None:
        """Lets go of what has been idle for too long."""
        for pool in self._pools.values():
            pool.sweep(now)

    def retire(self) -> None:
        """The cluster is gone: what is under way ends in its time."""
        for pool in self._pools.values():
            pool.retire()
        self._pools.clear()


class Clusters:
    """All clusters, by key."""

    def __init__(self, loop: Loop, dialler: Dialler) -> None:
        self._loop = loop
        self._dialler = dialler
        self._clusters: dict[str, ClusterHere] = {}
        self._own: dict[str, ClusterHere] = {}
        loop.call_later(SWEEP_SECONDS, self._sweep)

    def get(self, key: str) -> ClusterHere | None:
        """A cluster of the configuration of the moment."""
        return self._clusters.get(key)

    def update(self, clusters: Mapping[str, Cluster]) -> None:
        """The configuration has changed."""
        for key in [key for key in self._clusters if key not in clusters]:
            self._clusters.pop(key).retire()
        for key, cluster in clusters.items():
            here = self._clusters.get(key)
            if here is None:
                self._clusters[key] = ClusterHere(self._loop, self._dialler, cluster)
            elif here.cluster != cluster:
                here.update(cluster)

    def own(self, cluster: Cluster) -> ClusterHere:
        """One that is not in the configuration: a pod that is addressed by itself."""
        here = self._own.get(cluster.key)
        if here is None:
            if len(self._own) >= MAX_OWN:
                self._own.pop(next(iter(self._own))).retire()
            here = self._own[cluster.key] = ClusterHere(self._loop, self._dialler, cluster)
        elif here.cluster is not cluster and here.cluster != cluster:
            here.update(cluster)
        return here

    def _sweep(self) -> None:
        now = self._loop.now
        for cluster in (*self._clusters.values(), *self._own.values()):
            cluster.sweep(now)
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
