"""Which process is kubelet, and how the kernel knows its sockets: by user and control group.

Any process may have the name. Kubelet is the oldest of root's that has it, is in the host's network and in no pod; the oldest of other
users' only where root has none (a kubelet without root).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns
from ztunnel.node.cgroups import pod_of
from ztunnel.node.netns import NetnsId
from ztunnel.node.probe_rules import Owner
from ztunnel.node.processes import ProcessFiles

NAMES = frozenset(("kubelet", "kubelite", "k3s-server", "k3s-agent", "k3s"))
"""kubelite is MicroK8s'. K3s runs kubelet in its own process."""


@dataclass(frozen=True, slots=True, order=True)
class Kubelet:
    """A process; the smallest is the likeliest."""

    is_unprivileged: bool
    started: int
    pid: int


class KubeletFinder:
    """Looks through a /proc and a tree of control groups, which may be the host's, mounted somewhere else."""

    def __init__(self, proc_directory: str, cgroup_directory: str, hosts: frozenset[NetnsId]) -> None:
        self._files = ProcessFiles(proc_directory)
        self._cgroups = cgroup_directory
        self._hosts = hosts

    def find(self) -> Kubelet | None:
        """The process, or None when there is none. Walks through all of /proc: some tens of milliseconds on a busy node.

        Raises: LocalError when the directory cannot be listed.
        """
        return min(self._candidates(), default=None)

    def is_there(self, kubelet: Kubelet) -> bool:
        """Whether it still runs."""
        return self._files.started(kubelet.pid) == kubelet.started

    def groups(self, kubelet: Kubelet) -> str:
        """Its control groups in the words of /proc, to see whether it was moved."""
        return self._files.read(kubelet.pid, "cgroup")

    def open_namespaces(self, kubelet: Kubelet) -> tuple[int, int | None]:
        """Descriptors of its network namespace and of its control group namespace, the caller's to close.

        Returns: None for the second when it is our own, or there are none.
        Raises: NetnsError.
        """
        network = netns.open_path(self._files.network(kubelet.pid))
        path = f"{self._files.directory}/{kubelet.pid}/ns/cgroup"
        try:
            if netns.identity_at(path) == netns.identity_at("/proc/self/ns/cgroup"):
                return network, None
            return network, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return network, None

    def owner(self, kubelet: Kubelet) -> Owner:
        """How its sockets are known. To be called by a thread that is in its control group namespace: paths count from there.

        Raises: LocalError when it has ended.
        """
        uid = self._user(kubelet.pid)
        if uid is None:
            raise LocalError(f"kubelet, process {kubelet.pid}, has ended")
        path = next((line.removeprefix("0::") for line in self.groups(kubelet).splitlines() if line.startswith("0::")), "")
        parts = [part for part in path.split("/") if part]
        if not parts or ".." in parts:
            return Owner(uid, None)
        for root in (self._cgroups, os.path.join(self._cgroups, "unified")):
            try:
                return Owner(uid, os.stat(os.path.join(root, *parts)).st_ino, len(parts))
            except OSError:
                continue
        return Owner(uid, None)

    def _candidates(self) -> Iterator[Kubelet]:
        files = self._files
        for pid in files.pids():
            if files.read(pid, "comm").rstrip("\n") not in NAMES or netns.identity_at(files.network(pid)) not in self._hosts:
                continue
            started, uid = files.started(pid), self._user(pid)
            if started is not None and uid is not None and pod_of(files.read(pid, "cgroup")) is None:
                yield Kubelet(uid != 0, started, pid)

    def _user(self, pid: int) -> int | None:
        try:
            return os.stat(f"{self._files.directory}/{pid}").st_uid
        except OSError:
            return None
