"""What the controller's parts share: the state directory, the nodes, the cluster's objects, the processes, and a bell for changes."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio

from ztunnel.lab.addresses import DNS_VIPS, PodIndexes
from ztunnel.lab.cluster import Cluster
from ztunnel.lab.processes import Processes
from ztunnel.lab.topology import NodePlan

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_EVENTS = 500
MAX_LOG_BYTES = 64 << 20


class Bell:
    """Wakes whoever waits for any change; a ring that nobody awaits is not lost to a task that looks before it waits."""

    def __init__(self) -> None:
        self._event = trio.Event()

    def ring(self) -> None:
        """Something changed."""
        event, self._event = self._event, trio.Event()
        event.set()

    def next(self) -> trio.Event:
        """The event of the next ring: take it before looking, await it after."""
        return self._event


@dataclass(slots=True)
class NodeSite:
    """One node: its namespace, the pod addresses in use, and a lock for changes of its links."""

    plan: NodePlan
    fd: int
    indexes: PodIndexes = field(default_factory=PodIndexes)
    lock: trio.Lock = field(default_factory=trio.Lock)


@dataclass(frozen=True, slots=True)
class Happening:
    """One line of `describe`'s events."""

    when: str
    uid: str
    reason: str
    message: str


@dataclass(slots=True)
class Site:
    """The lab, as its parts see it."""

    state: Path
    cluster: Cluster
    processes: Processes
    nodes: Mapping[str, NodeSite]
    versions: tuple[int, ...]
    host_pid: int
    """The controller's process, as the host numbers it."""
    fabric: int
    """The namespace with the bridge that all nodes hang on."""
    bell: Bell = field(default_factory=Bell)
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds that the steps of building took, for `up -v`."""
    happenings: deque[Happening] = field(default_factory=lambda: deque(maxlen=MAX_EVENTS))

    def happened(self, uid: str, reason: str, message: str) -> None:
        """Note an event of an object, for `describe` and the log."""
        self.happenings.append(Happening(self.cluster.mint.timestamp(), uid, reason, message))
        log.info("event reason=%s uid=%s message=%s", reason, uid, message)

    def fd_path(self, fd: int) -> str:
        """How other processes may open one of our file descriptors."""
        return f"/proc/{self.host_pid}/fd/{fd}"

    def log_path(self, namespace: str, name: str) -> Path:
        """Where a pod's output goes."""
        return self.state / "pods" / f"{namespace}_{name}.log"

    def resolv_conf(self, namespace: str) -> str:
        """A namespace's resolv.conf, made when it is first asked for; it stands alone in its directory."""
        path = self.state / "resolv" / namespace / "resolv.conf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            domains = f"{namespace}.svc.cluster.local svc.cluster.local cluster.local"
            path.write_text(f"nameserver {DNS_VIPS[self.versions[0]]}\nsearch {domains}\noptions ndots:5 timeout:2 attempts:2\n")
        return str(path)


def replace_file(path: Path, text: str, scratch: Path) -> None:
    """Write a file so that readers see the old or the new one: written in `scratch` on the same file system, then renamed."""
    temporary = scratch / f"{path.name}.{os.getpid()}"
    temporary.write_text(text)
    temporary.rename(path)


def trim_log(path: Path) -> None:
    """Cut a log that has grown too large to nothing; whoever writes it appends, and goes on from there."""
    try:
        if path.stat().st_size > MAX_LOG_BYTES:
            os.truncate(path, 0)
    except FileNotFoundError:
        return


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking work beside the loop. Work that enters a namespace does so in a thread of its own (`netns.run_inside`)."""
    return await trio.to_thread.run_sync(work)  # noqa: TID251 - see the sentence above: trio's own thread never enters one
