"""Addresses of hosts that requests name (services of wildcard hosts): asked of the supervisor, since a worker opens no resolver.

Bounds: hosts that are remembered, for how long, and how many may be waited for and how long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.l7.clusters import Cluster, Endpoint, Resolution

MAX_HOSTS: Final = 1024
MAX_WAITING: Final = 1024
"""Requests that wait, all hosts together."""
KEPT_SECONDS: Final = 60.0
FAILED_SECONDS: Final = 5.0
"""How long a host without addresses is not asked for again."""
PATIENCE_SECONDS: Final = 10.0

Done = Callable[[tuple[str, ...]], None]
"""Hears the addresses; none when the host cannot be resolved."""


class Names:
    """See the module."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._known: dict[str, tuple[float, tuple[str, ...]]] = {}
        """Until when, and the addresses."""
        self._waiting: dict[str, list[Done]] = {}
        self._waiters = 0
        self.ask: Callable[[str], None] = lambda _host: None
        """Asks the supervisor, which answers through `resolved`. Set by the worker."""

    def resolve(self, host: str, done: Done) -> None:
        """Calls `done` once, now or later."""
        known = self._known.get(host)
        if known is not None and known[0] > self._loop.now:
            done(known[1])
        elif self._waiters >= MAX_WAITING:
            done(())
        elif host in self._waiting:
            self._waiters += 1
            self._waiting[host].append(done)
        else:
            self._waiters += 1
            self._waiting[host] = [done]
            self._loop.call_later(PATIENCE_SECONDS, lambda: self._give_up(host))
            self.ask(host)

    def resolved(self, host: str, addresses: tuple[str, ...]) -> None:
        """What the supervisor has found; none: nothing."""
        former = self._known.pop(host, None)
        if not addresses and former is not None:
            # What was known stays while a name cannot be resolved.
            addresses = former[1]
        while len(self._known) >= MAX_HOSTS:
            del self._known[next(iter(self._known))]
        self._known[host] = (self._loop.now + (KEPT_SECONDS if addresses else FAILED_SECONDS), addresses)
        for done in self._take(host):
            done(addresses)

    def _give_up(self, host: str) -> None:
        for done in self._take(host):
            done(())

    def _take(self, host: str) -> list[Done]:
        waiting = self._waiting.pop(host, [])
        self._waiters -= len(waiting)
        return waiting


def serves(patterns: tuple[str, ...], host: str) -> bool:
    """Whether a host is one of those that a service stands for."""
    for pattern in patterns:
        if pattern == host or (pattern.startswith("*.") and host.endswith(pattern[1:]) and len(host) >= len(pattern)):
            return True
    return False


def cluster_of(cluster: Cluster, host: str, addresses: tuple[str, ...]) -> Cluster:
    """The cluster of one host of a service that stands for many."""
    endpoints = tuple(Endpoint(address, cluster.port) for address in addresses)
    return replace(cluster, key=f"{cluster.key}#{host}", resolution=Resolution.STATIC, names=(), endpoints=endpoints)
