"""Answers the control API's questions from the agent's parts. Implements `admin.views.AdminView`; reads, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ztunnel.admin.readiness import Readiness
from ztunnel.admin.views import (
    CertificateRow,
    ConnectionRow,
    PodRow,
    PolicyRow,
    Problem,
    ServiceRow,
    Status,
    TunnelRow,
    WorkloadRow,
    policy_row,
    service_row,
    timestamp,
    workload_row,
)
from ztunnel.agent import Agent
from ztunnel.ca.rotation import CertificateState, Rotation
from ztunnel.dataplane.channel import Answer
from ztunnel.dataplane.flow import Direction
from ztunnel.flows import FlowReporter
from ztunnel.mesh.index import Index
from ztunnel.node.enrolment import PodStatus
from ztunnel.node.pods import Enroller
from ztunnel.plane import DataPlane, WorkerAway
from ztunnel.runtime.metrics import Metrics

_FLOWING_SECONDS = 300.0
"""A pod without a connection for this long counts as not flowing."""


@dataclass(frozen=True, slots=True)
class Watched:
    """The parts that are asked."""

    node: str
    version: str
    trust_domain: str
    in_process: bool
    index: Index
    agent: Agent
    plane: DataPlane
    rotation: Rotation
    enroller: Enroller
    reporter: FlowReporter
    readiness: Readiness


class Overview:
    """See `AdminView`.

    Args:
        clock: monotonic seconds, the one of the flow reporter. wall: seconds since the epoch.
    """

    def __init__(self, watched: Watched, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        self._on = watched
        self._clock = clock
        self._wall = wall
        self._began = clock()
        self.is_draining = False
        self.more_problems: dict[str, Callable[[], str]] = {}
        """What else may be wrong, by its kind; empty when it is not."""

    def status(self) -> Status:
        """The agent in one look."""
        on = self._on
        return Status(
            node=on.node,
            agent_version=on.version,
            trust_domain=on.trust_domain,
            age_seconds=self._clock() - self._began,
            ready=on.readiness.ready,
            pending=on.readiness.pending,
            worker=self._worker_state(),
            worker_restarts=on.plane.restarts,
            pods=self.pods(),
            certificates=self.certificates(),
            problems=tuple(sorted(self._problems())),
        )

    def pods(self) -> tuple[PodRow, ...]:
        """Every pod of this node: wanted in the mesh, still leaving it, or not concerned."""
        enrolled = {status.uid: status for status in self._on.enroller.status()}
        rows = [
            self._pod_row(
                (capture.namespace, capture.name, uid), capture.addresses, capture.identity.uri, enrolled.pop(uid, None), capture.reason
            )
            for uid, capture in ((capture.uid, capture) for capture in self._on.agent.local_captures())
        ]
        rows += [
            self._pod_row((status.namespace, status.name, uid), (), "", status, "leaving the mesh") for uid, status in enrolled.items()
        ]
        return tuple(sorted(rows))

    def workloads(self) -> tuple[WorkloadRow, ...]:
        """The whole mesh."""
        return tuple(sorted(workload_row(workload) for workload in self._on.index.workloads()))

    def services(self) -> tuple[ServiceRow, ...]:
        """The whole mesh."""
        return tuple(sorted(service_row(service) for service in self._on.index.services()))

    def policies(self) -> tuple[PolicyRow, ...]:
        """The whole mesh."""
        return tuple(sorted(policy_row(policy) for policy in self._on.index.policies()))

    def certificates(self) -> tuple[CertificateRow, ...]:
        """Of the identities that this node needs."""
        now = self._wall()
        return tuple(
            CertificateRow(
                identity=status.identity.uri,
                state=status.state.value,
                not_before=timestamp(status.not_before),
                not_after=timestamp(status.not_after),
                seconds_left=max(0, int(status.not_after - now)),
                serial=f"{status.serial:x}",
                error=status.error,
            )
            for status in self._on.rotation.status()
        )

    async def connections(self) -> tuple[ConnectionRow, ...]:
        """Live ones; none while the data plane is away, which `status` says."""
        rows = (
            ConnectionRow(
                id=state.id,
                direction=state.direction.value,
                protocol=state.protocol,
                pod=self._pod_name(state.pod_uid),
                source=state.source,
                source_identity=state.source_identity,
                destination=state.destination,
                target=state.target,
                service=state.service,
                peer_identity=state.peer_identity,
                bytes_sent=state.down_bytes if state.direction is Direction.INBOUND else state.up_bytes,
                bytes_received=state.up_bytes if state.direction is Direction.INBOUND else state.down_bytes,
                age_seconds=round(state.age_seconds, 3),
                policy=state.policy,
                state=state.state,
                waypoint=state.waypoint,
            )
            for state in (await self._ask()).connections
        )
        return tuple(sorted(rows, key=lambda row: (row.pod, row.direction, row.source, row.id)))

    async def tunnels(self) -> tuple[TunnelRow, ...]:
        """Live ones."""
        rows = (
            TunnelRow(
                id=state.id,
                direction=state.direction.value,
                pod=self._pod_name(state.pod_uid),
                peer=state.peer,
                peer_identity=state.peer_identity,
                streams=state.streams,
                bytes_sent=state.bytes_sent,
                bytes_received=state.bytes_received,
                age_seconds=round(state.age_seconds, 3),
                records=state.records,
                state=state.state,
            )
            for state in (await self._ask()).tunnels
        )
        return tuple(sorted(rows, key=lambda row: (row.pod, row.direction, row.peer, row.id)))

    def watch(self, metrics: Metrics) -> None:
        """Gives the gauges that are read at each scrape."""
        on = self._on
        metrics.enrolled_pods.watch(lambda: {(): float(sum(status.captured for status in on.enroller.status()))})
        metrics.certificates_expiry.watch(self._expiries)
        metrics.refused_manifests.watch(lambda: {(): float(len(on.agent.refusals))})
        metrics.redirection_repairs.watch(lambda: {(): float(on.enroller.counters().healed)})

    def _expiries(self) -> Mapping[tuple[str, ...], float]:
        now = self._wall()
        return {(status.identity.uri,): status.not_after - now if status.not_after else -1.0 for status in self._on.rotation.status()}

    def _worker_state(self) -> str:
        if self.is_draining:
            return "draining"
        serving, all_of_them = self._on.plane.serving, len(self._on.plane.links)
        if serving < all_of_them:
            return f"restarting ({serving} of {all_of_them} running)" if serving else "restarting"
        return "in-process" if self._on.in_process else "running"

    def _pod_row(
        self, name: tuple[str, str, str], addresses: tuple[str, ...], identity: str, status: PodStatus | None, reason: str
    ) -> PodRow:
        namespace, pod, uid = name
        seen = self._on.reporter.last_seen.get(uid)
        flowing = self._on.plane.active(uid) > 0 or (seen is not None and self._clock() - seen < _FLOWING_SECONDS)
        return PodRow(
            namespace=namespace,
            name=pod,
            uid=uid,
            addresses=addresses,
            labelled=status is not None and status.labelled,
            enrolled=status is not None and status.enrolled,
            captured=status is not None and status.captured,
            flowing=flowing,
            identity=identity,
            problem=status.problem if status is not None else "",
            reason=reason,
        )

    def _pod_name(self, uid: str) -> str:
        workload = self._on.agent.workload(uid)
        return f"{workload.namespace}/{workload.name}" if workload is not None else uid

    async def _ask(self) -> Answer:
        try:
            return await self._on.plane.ask()
        except WorkerAway:
            return Answer(0, (), ())

    def _problems(self) -> Iterator[Problem]:
        for refusal in self._on.agent.refusals:
            yield Problem("manifest", refusal.object, refusal.file, refusal.field, refusal.reason)
        for certificate in self._on.rotation.status():
            if certificate.state in (CertificateState.FAILING, CertificateState.UNAVAILABLE):
                yield Problem("certificate", certificate.identity.uri, "", "", certificate.error)
        for pod in self._on.enroller.status():
            if pod.problem:
                yield Problem("pod", f"Pod {pod.namespace}/{pod.name}", "", "", pod.problem)
        for kind, problem in self.more_problems.items():
            if text := problem():
                yield Problem(kind, "", "", "", text)
        if not self._on.plane.serving:
            yield Problem("worker", "", "", "", "the data plane is being restarted: no connection is carried")
