"""Finds pods' network namespaces on a real node: told by CNI, else pinned by the container runtime, else by the pod's processes.

Each way's result must hold an address of the pod, must not be the host's, and must not be another pod's; two candidates are none.
Told by CNI, the pod's UID and its namespace come from the runtime itself. A pinned namespace is known by the pod's address alone, which any
pod that may change its network can take for its own: one in which only processes of other pods are is refused. Two that hold the address
leave the question to the third way, which knows the UID: the namespace of the oldest process in the pod's control group (the sandbox's,
which is there before any container).

Thread-safe: `open` runs on worker threads, everything else on the agent's.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns
from ztunnel.node.cgroups import plain_uid
from ztunnel.node.find import NetnsRefused, host_namespaces, refuse_foreign
from ztunnel.node.netns import NetnsError, NetnsId
from ztunnel.node.pinned import PinnedNamespaces
from ztunnel.node.processes import Process, Processes

AGAIN_SECONDS = 1.0
"""Between two walks through /proc for pods that were not found: a walk takes 0.1 ms of each process of the node."""
_MOST_WITNESSES = 8
"""Processes of a pod that are remembered, so that the end of one does not look like the end of the pod."""
_RUNTIME_DIRECTORIES = ("/var/run/netns/", "/run/netns/")
_PROC = "/proc/"


@dataclass(frozen=True, slots=True)
class _AtPath:
    path: str

    def namespace(self, processes: Processes) -> NetnsId | None:
        return netns.identity_at(self.path)


@dataclass(frozen=True, slots=True)
class _OfProcesses:
    witnesses: tuple[Process, ...]

    def namespace(self, processes: Processes) -> NetnsId | None:
        return next((each.namespace for each in self.witnesses if processes.is_there(each)), None)


_Place = _AtPath | _OfProcesses


class NodeFinder:
    """Implements `find.NetnsFinder`.

    Args:
        runtime_directory: where the container runtime pins namespaces, as this process sees it.
        proc_directory: the host's /proc, as this process sees it.
    """

    def __init__(self, runtime_directory: str, proc_directory: str) -> None:
        self._runtime_directory = runtime_directory
        self._proc_directory = proc_directory
        self._pinned = PinnedNamespaces(runtime_directory)
        self._processes = Processes(proc_directory)
        self._hosts = host_namespaces(proc_directory)
        self._announced: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        self._owners: dict[NetnsId, str] = {}
        self._prune_at = 64
        self._lock = threading.Lock()
        self._walked: dict[str, list[Process]] = {}
        self._walked_at = float("-inf")

    def announce(self, uid: str, path: str) -> NetnsId:
        """CNI says where a pod's namespace is; the next `open` looks there first.

        Args:
            path: as the host sees it.
        Raises: NetnsError when there is no namespace, as seen from here.
        """
        here = self._as_seen_here(path)
        fd = netns.open_path(here)
        try:
            found = netns.identity(fd)
        finally:
            os.close(fd)
        self._announced[uid] = here
        if self.identity(uid) != found:
            self._places.pop(uid, None)
        return found

    def open(self, uid: str, addresses: Sequence[str]) -> int:
        """See `NetnsFinder.open`."""
        self._prune()
        reasons: list[str] = []
        for way in (self._open_announced, self._open_pinned, self._open_by_process):
            try:
                found = way(uid, addresses)
            except LocalError as error:
                reasons.append(str(error))
                continue
            if found is not None:
                fd, place = found
                self._places[uid] = place
                self._owners[netns.identity(fd)] = uid
                return fd
        if reasons:
            raise NetnsRefused("; ".join(reasons))
        raise NetnsError(f"no namespace of pod {uid}: none in {self._runtime_directory} holds its address, and no process is in its cgroup")

    def identity(self, uid: str) -> NetnsId | None:
        """See `NetnsFinder.identity`."""
        place = self._places.get(uid)
        return None if place is None else place.namespace(self._processes)

    def _open_announced(self, uid: str, addresses: Sequence[str]) -> tuple[int, _Place] | None:
        path = self._announced.get(uid)
        if path is None:
            return None
        try:
            return self._open_path(path, uid, addresses)
        except NetnsError:
            # A new sandbox may have been made meanwhile; CNI will say so, if it still asks us.
            if netns.identity_at(path) is not None:
                raise
            return None

    def _open_pinned(self, uid: str, addresses: Sequence[str]) -> tuple[int, _Place] | None:
        candidates = self._pinned.holding(addresses)
        if len(candidates) > 1:
            names = ", ".join(each.path for each in candidates[:4])
            raise NetnsRefused(f"more than one namespace holds an address of pod {uid}: {names}")
        if not candidates:
            return None
        residents = self._pods_in(candidates[0].namespace)
        if residents and plain_uid(uid) not in residents:
            raise NetnsRefused(f"{candidates[0].path} holds an address of pod {uid}, but processes of other pods only")
        return self._open_path(candidates[0].path, uid, addresses)

    def _open_path(self, path: str, uid: str, addresses: Sequence[str]) -> tuple[int, _Place]:
        fd = netns.open_path(path)
        self._verify(fd, uid, addresses)
        return fd, _AtPath(path)

    def _open_by_process(self, uid: str, addresses: Sequence[str]) -> tuple[int, _Place] | None:
        oldest: dict[NetnsId, Process] = {}
        processes = self._of_pod(uid)
        for process in processes:
            oldest.setdefault(process.namespace, process)
        refusal: LocalError | None = None
        for process in oldest.values():
            fd = self._processes.open(process)
            if fd is None:
                continue
            try:
                self._verify(fd, uid, addresses)
            except LocalError as error:
                refusal = refusal or error
                continue
            if any(other.started == process.started for other in oldest.values() if other is not process):
                os.close(fd)
                raise NetnsRefused(f"processes of pod {uid} that started together are in different namespaces")
            return fd, _OfProcesses(tuple(each for each in processes if each.namespace == process.namespace)[:_MOST_WITNESSES])
        if refusal is not None:
            raise refusal
        return None

    def _of_pod(self, uid: str) -> list[Process]:
        """The processes of a pod, oldest first; from the last walk if that is a moment old."""
        with self._lock:
            return self._walk().get(plain_uid(uid), [])

    def _pods_in(self, namespace: NetnsId) -> set[str]:
        """The pods that have processes in a namespace, by plain UID. Those of a sandbox in a machine of its own are not seen."""
        with self._lock:
            return {uid for uid, processes in self._walk().items() if any(each.namespace == namespace for each in processes)}

    def _walk(self) -> dict[str, list[Process]]:
        if time.monotonic() - self._walked_at >= AGAIN_SECONDS:
            self._walked = self._processes.of_pods(self._hosts)
            self._walked_at = time.monotonic()
        return self._walked

    def _verify(self, fd: int, uid: str, addresses: Sequence[str]) -> None:
        """Closes the descriptor when it refuses."""
        try:
            refuse_foreign(fd, uid, addresses, self._hosts)
            owner = self._owners.get(netns.identity(fd), uid)
            if owner != uid and self.identity(owner) == netns.identity(fd):
                raise NetnsRefused(f"the namespace found for pod {uid} is that of pod {owner}")
        except BaseException:
            os.close(fd)
            raise

    def _as_seen_here(self, path: str) -> str:
        """The host's paths, where they are mounted for us."""
        for directory in _RUNTIME_DIRECTORIES:
            if path.startswith(directory):
                return os.path.join(self._runtime_directory, path.removeprefix(directory))
        return os.path.join(self._proc_directory, path.removeprefix(_PROC)) if path.startswith(_PROC) else path

    def _prune(self) -> None:
        """Pods come and go, what is remembered of them must not add up."""
        if len(self._places) + len(self._announced) < self._prune_at:
            return
        for uid in [uid for uid in list(self._places) if self.identity(uid) is None]:
            self._places.pop(uid, None)
        for uid, path in list(self._announced.items()):
            if netns.identity_at(path) is None:
                self._announced.pop(uid, None)
        for namespace, uid in list(self._owners.items()):
            if uid not in self._places:
                self._owners.pop(namespace, None)
        self._prune_at = 2 * (len(self._places) + len(self._announced)) + 64
