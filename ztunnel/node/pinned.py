"""The network namespaces that a container runtime keeps in a directory (/var/run/netns), and the addresses in each.

Entering a namespace to read its addresses takes a millisecond or two, and an agent that starts asks for every pod of its node: what
was read is kept, and read again only when nobody has the address that is asked for. Thread-safe.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns, routes
from ztunnel.node.netns import NetnsId

AGAIN_SECONDS = 1.0
"""A namespace that lacks an address is not looked into again sooner, however many pods ask."""
MOST_NAMESPACES = 4096
"""More than sixteen times the pods that Kubernetes allows on a node."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """A namespace in the directory."""

    path: str
    namespace: NetnsId
    addresses: frozenset[str]
    read_at: float


class PinnedNamespaces:
    """What lies in one directory; names that begin with a dot are not looked at."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._known: dict[str, Pinned] = {}
        self._lock = threading.Lock()

    def holding(self, addresses: Collection[str]) -> list[Pinned]:
        """The namespaces that hold one of these addresses now, by path. One namespace that is pinned twice is listed once.

        Raises: LocalError when the directory cannot be listed, or holds too much.
        """
        with self._lock:
            self._look()
            found = [each for each in self._known.values() if not each.addresses.isdisjoint(addresses)]
            # What was read may have changed since; and where nothing was found, an address may have been added.
            older_than = time.monotonic() - AGAIN_SECONDS
            for each in found or [each for each in self._known.values() if each.read_at <= older_than]:
                self._read(each.path)
            found = [each for each in self._known.values() if not each.addresses.isdisjoint(addresses)]
        return sorted({each.namespace: each for each in found}.values(), key=lambda each: each.path)

    def _look(self) -> None:
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise LocalError(f"cannot list {self._directory}: {error.strerror}") from error
        if len(names) > MOST_NAMESPACES:
            raise LocalError(f"{self._directory} holds more than {MOST_NAMESPACES} entries")
        paths = {os.path.join(self._directory, name) for name in names if not name.startswith(".")}
        for path in self._known.keys() - paths:
            del self._known[path]
        for path in paths:
            known = self._known.get(path)
            if known is None or netns.identity_at(path) != known.namespace:
                self._read(path)

    def _read(self, path: str) -> None:
        """Something that is no namespace, or is gone, is not known."""
        self._known.pop(path, None)
        try:
            fd = netns.open_path(path)
        except netns.NetnsError:
            return
        try:
            self._known[path] = Pinned(path, netns.identity(fd), netns.run_inside(fd, routes.addresses), time.monotonic())
        except LocalError:
            return
        finally:
            os.close(fd)
