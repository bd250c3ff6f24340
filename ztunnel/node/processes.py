"""The network namespaces of pods as their processes show them: a search of /proc for UIDs in control groups.

Nothing that is found here is believed alone: `find_on_node` also wants the pod's address in the namespace. Opening a process'
namespace takes CAP_SYS_PTRACE; processes that may not be looked at are passed over.
Source: proc(5); Istio cni/pkg/nodeagent/podcgroupns_linux.go (oldest process, host's namespace passed over).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns
from ztunnel.node.cgroups import pod_of
from ztunnel.node.netns import NetnsId

_MOST_BYTES = 64 << 10
"""Of a file of /proc; those that are read here have hundreds."""
_START_FIELD = 19
"""Of those behind the name in /proc/[pid]/stat: `starttime`, in clock ticks since boot."""


@dataclass(frozen=True, slots=True, order=True)
class Process:
    """A process of a pod; the order is by age, oldest first."""

    started: int
    pid: int
    namespace: NetnsId
    pod: str
    """Its UID, see `cgroups.plain_uid`."""


class ProcessFiles:
    """What a /proc says of one process at a time; the /proc may be the host's, mounted somewhere else."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def pids(self) -> list[int]:
        """Every process.

        Raises: LocalError when the directory cannot be listed.
        """
        try:
            names = os.listdir(self.directory)
        except OSError as error:
            raise LocalError(f"cannot list processes in {self.directory}: {error.strerror}") from error
        return [int(name) for name in names if name.isdecimal()]

    def read(self, pid: int, what: str) -> str:
        """A file of a process; empty when it has ended."""
        try:
            with open(f"{self.directory}/{pid}/{what}", "rb") as file:
                return file.read(_MOST_BYTES).decode("utf-8", "replace")
        except OSError:
            return ""

    def started(self, pid: int) -> int | None:
        """When it started, in clock ticks since boot: with its number, that is a process. None when it has ended."""
        # The name stands in parentheses and may hold anything, also parentheses.
        fields = self.read(pid, "stat").rpartition(")")[2].split()
        try:
            return int(fields[_START_FIELD])
        except (IndexError, ValueError):
            return None

    def network(self, pid: int) -> str:
        """The path of its network namespace."""
        return f"{self.directory}/{pid}/ns/net"


class Processes:
    """Finds the processes of pods in a /proc."""

    def __init__(self, directory: str) -> None:
        self._files = ProcessFiles(directory)

    def of_pods(self, hosts: frozenset[NetnsId]) -> dict[str, list[Process]]:
        """Those that are in a pod and not in the host's network, by the pod's plain UID, oldest first.

        Args:
            hosts: the namespaces that are the host's.
        Raises: LocalError when the directory cannot be listed.
        """
        found: dict[str, list[Process]] = {}
        for process in self._walk(hosts):
            found.setdefault(process.pod, []).append(process)
        for processes in found.values():
            processes.sort()
        return found

    def open(self, process: Process) -> int | None:
        """A descriptor of its network namespace, the caller's to close; None if it has ended or moved since it was found."""
        try:
            fd = netns.open_path(self._files.network(process.pid))
        except netns.NetnsError:
            return None
        # After opening: what was opened is the namespace of the process that was found, and not of another with its number.
        if netns.identity(fd) != process.namespace or self._files.started(process.pid) != process.started:
            os.close(fd)
            return None
        return fd

    def is_there(self, process: Process) -> bool:
        """Whether it still lives, in the namespace in which it was found."""
        return (
            netns.identity_at(self._files.network(process.pid)) == process.namespace and self._files.started(process.pid) == process.started
        )

    def _walk(self, hosts: frozenset[NetnsId]) -> Iterator[Process]:
        host = self._files.read(1, "cgroup")
        for pid in self._files.pids():
            namespace = netns.identity_at(self._files.network(pid))
            if namespace is None or namespace in hosts:
                continue
            pod = pod_of(self._files.read(pid, "cgroup"), host)
            started = self._files.started(pid)
            if pod is not None and started is not None:
                yield Process(started, pid, namespace, pod)
