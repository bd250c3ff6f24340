"""Which network namespace is a pod's. A mix-up would give one pod another's identity, so doubt is a refusal.

`NetnsFinder` is the seam; `DirectoryFinder` is told by files, `find_on_node.NodeFinder` by CNI events, the container runtime and /proc.
Source: istio/istio#61211 (a pod enrolled in a foreign namespace); cni/pkg/nodeagent/podcgroupns_linux.go (the address must be there).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns, routes
from ztunnel.node.netns import NetnsError, NetnsId


class NetnsRefused(LocalError):
    """A namespace was found for the pod, but it cannot be the pod's; the text says why."""


class NetnsFinder(Protocol):
    """Knows the namespaces of the pods on this node."""

    def open(self, uid: str, addresses: Sequence[str]) -> int:
        """A file descriptor of the pod's namespace, the caller's to close; verified to hold one of `addresses`. May block.

        Raises: NetnsError when there is none (yet); NetnsRefused when the one found cannot be the pod's.
        """
        ...

    def identity(self, uid: str) -> NetnsId | None:
        """Which namespace is the pod's now, None when none is (any more). Asked often: a look-up, no search."""
        ...


class DirectoryFinder:
    """Finds the namespace of pod `uid` at `<directory>/<uid>`: a bind mount of it, or a symbolic link to one."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._hosts = host_namespaces()

    def open(self, uid: str, addresses: Sequence[str]) -> int:
        """See `NetnsFinder.open`."""
        fd = netns.open_path(self._path(uid))
        try:
            refuse_foreign(fd, uid, addresses, self._hosts)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def identity(self, uid: str) -> NetnsId | None:
        """See `NetnsFinder.identity`."""
        return netns.identity_at(self._path(uid))

    def _path(self, uid: str) -> str:
        if not uid or uid.startswith(".") or "/" in uid or "\0" in uid:
            raise NetnsError(f"{uid!r} is no pod uid")
        return os.path.join(self._directory, uid)


def refuse_foreign(netns_fd: int, uid: str, addresses: Sequence[str], hosts: frozenset[NetnsId]) -> None:
    """Accept only a namespace that holds an address of the pod and is not one of `hosts`.

    Raises: NetnsRefused with the reason.
    """
    if netns.identity(netns_fd) in hosts:
        raise NetnsRefused(f"the namespace found for pod {uid} is the host's own")
    if not addresses:
        raise NetnsRefused(f"pod {uid} has no address yet by which its namespace could be known")
    held = netns.run_inside(netns_fd, routes.addresses)
    if held.isdisjoint(addresses):
        raise NetnsRefused(f"the namespace found for pod {uid} holds none of its addresses ({', '.join(addresses)})")


def host_namespaces(proc: str = "/proc") -> frozenset[NetnsId]:
    """The agent's own namespace, and that of process 1 where it may be seen (it may not in a sandbox).

    Args:
        proc: the host's /proc, wherever it is mounted.
    """
    own = netns.open_current()
    try:
        found = {netns.identity(own)}
    finally:
        os.close(own)
    first = netns.identity_at(f"{proc}/1/ns/net")
    return frozenset(found if first is None else found | {first})
