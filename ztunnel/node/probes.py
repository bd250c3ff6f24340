"""Keeps the node's rules for kubelet's probes in force: `probe_rules` with whom `kubelet` finds and the pods that are captured now.

A look several times a second costs a comparison; only a change is carried out, as one transaction. Connections that are under way keep
their source. When the agent ends the rules stay: probes go on while the next agent is awaited, and pods stay ready.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import trio
from pyroute2.netlink.nfnetlink.nftsocket import nft_table_msg

from ztunnel.mesh.errors import LocalError
from ztunnel.node import netns
from ztunnel.node.kubelet import Kubelet, KubeletFinder
from ztunnel.node.netlink import NETLINK_NETFILTER, KernelRefused, Netlink, attribute
from ztunnel.node.nft import table_question
from ztunnel.node.probe_rules import OBJECTS, TABLE, Owner, removal, replacement
from ztunnel.runtime.logs import fields

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
SEARCH_SECONDS = 2.0
"""Between two walks through /proc while kubelet is not found."""
CHECK_SECONDS = 5.0
"""Between two looks whether the table is still there."""


@dataclass(frozen=True, slots=True)
class _Applied:
    kubelet: Kubelet
    groups: str
    pods: frozenset[str]


class Probes:
    """Lets kubelet, and nobody else, reach captured pods past the mesh.

    Args:
        pods: the addresses of the pods that are captured now.
    """

    def __init__(self, finder: KubeletFinder, pods: Callable[[], frozenset[str]]) -> None:
        self._finder = finder
        self._pods = pods
        self._kubelet: Kubelet | None = None
        self._applied: _Applied | None = None
        self._search_at = self._check_at = float("-inf")
        self._told: Owner | None = None
        self.problem = ""
        """Why probes of strict pods fail; empty when they do not."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; "started" behind the first attempt."""
        await self._look()
        task_status.started()
        while True:
            await trio.sleep(POLL_SECONDS)
            await self._look()

    async def remove(self) -> None:
        """Take the rules away: the mesh leaves this node.

        Raises: LocalError.
        """
        if self._kubelet is not None:
            await _in_thread(self._remove, self._kubelet)

    async def _look(self) -> None:
        try:
            await self._follow()
            problem = ""
        except LocalError as error:
            self._applied = None
            problem = str(error)
        if problem and problem != self.problem:
            log.warning("kubelet's probes may fail", extra=fields(problem=problem))
        self.problem = problem

    async def _follow(self) -> None:
        now = trio.current_time()
        if self._kubelet is None or not self._finder.is_there(self._kubelet):
            if now < self._search_at:
                raise LocalError(self.problem or "kubelet has ended")
            self._search_at = now + SEARCH_SECONDS
            self._kubelet = await _in_thread(self._finder.find)
            if self._kubelet is None:
                raise LocalError("no process on this node is kubelet")
        wanted = _Applied(self._kubelet, self._finder.groups(self._kubelet), self._pods())
        if wanted == self._applied and now >= self._check_at:
            self._check_at = now + CHECK_SECONDS
            if not await _in_thread(self._is_in_force, wanted.kubelet):
                log.warning("the node's rules for probes have gone; they are made again")
                self._applied = None
        if wanted != self._applied:
            owner = await _in_thread(self._apply, wanted)
            self._applied, self._check_at = wanted, now + CHECK_SECONDS
            self._tell(owner)

    def _apply(self, wanted: _Applied) -> Owner:
        def inside() -> Owner:
            owner = self._finder.owner(wanted.kubelet)
            with Netlink(NETLINK_NETFILTER) as netlink:
                netlink.change(replacement(owner, wanted.pods))
            return owner

        return self._on_host(wanted.kubelet, inside)

    def _remove(self, kubelet: Kubelet) -> None:
        def inside() -> None:
            with Netlink(NETLINK_NETFILTER) as netlink:
                netlink.change(removal())

        self._on_host(kubelet, inside)

    def _is_in_force(self, kubelet: Kubelet) -> bool:
        def inside() -> bool:
            with Netlink(NETLINK_NETFILTER) as netlink:
                try:
                    (found,) = netlink.query(table_question(TABLE), nft_table_msg)
                except KernelRefused as error:
                    if error.errno == errno.ENOENT:
                        return False
                    raise
            return bool(attribute(found, "NFTA_TABLE_USE") == OBJECTS)

        return self._on_host(kubelet, inside)

    def _on_host(self, kubelet: Kubelet, fn: Callable[[], T]) -> T:
        network, cgroups = self._finder.open_namespaces(kubelet)
        try:
            return netns.run_inside(network, fn) if cgroups is None else netns.run_inside_with_cgroups(network, cgroups, fn)
        finally:
            os.close(network)
            if cgroups is not None:
                os.close(cgroups)

    def _tell(self, owner: Owner) -> None:
        if owner == self._told:
            return
        self._told = owner
        shown = fields(pid=self._kubelet.pid if self._kubelet else 0, uid=owner.uid, cgroup=owner.cgroup)
        if owner.cgroup is None:
            log.warning("every process of kubelet's user on this node counts as kubelet: it has no control group of version 2", extra=shown)
        else:
            log.info("kubelet's probes reach captured pods", extra=shown)


async def _in_thread(fn: Callable[[*Ts], T], *args: *Ts) -> T:
    # The functions given here enter namespaces on threads of their own only (netns.run_inside).
    return await trio.to_thread.run_sync(fn, *args)  # noqa: TID251
