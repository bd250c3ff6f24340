"""Everything that a decision looks up, by the key that it looks it up by.

Holds what deltas brought and nothing else; after any series of deltas it answers as an index that was given the final state at
once. Where several objects claim one address the winner is chosen by their values, never by their order of arrival.
One index per process, used from one thread.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from ztunnel.mesh.balance import Candidate
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.denials import unknown_policy
from ztunnel.mesh.policy import Connection, PolicySet, Verdict
from ztunnel.mesh.ports import INBOUND_HBONE
from ztunnel.mesh.rules import Policy, Scope
from ztunnel.mesh.workloads import Protocol, Service, WaypointRef, Workload

MAX_MEMOS: Final = 4096
"""Entries in each of the tables of derived answers; a table is emptied when it would exceed this, and fills again on demand."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_Listed = TypeVar("_Listed", Workload, Service, Policy)


class Index:
    """Workloads, services and policies, with the derived tables that make every look-up one dictionary access."""

    def __init__(self, max_memos: int = MAX_MEMOS) -> None:
        self.generation = 0
        """Grows with every delta that changes something."""
        self.policies_generation = 0
        """Grows when a verdict may have changed: a policy came, changed or left, or a workload is selected by others than before."""
        self._max_memos = max_memos
        self._workloads: dict[str, Workload] = {}
        self._services: dict[str, Service] = {}
        self._policies: dict[str, Policy] = {}
        self._by_address: dict[str, tuple[Workload, ...]] = {}
        self._by_vip: dict[str, tuple[Service, ...]] = {}
        self._by_hostname: dict[str, tuple[Service, ...]] = {}
        self._by_endpoint: dict[str, tuple[Service, ...]] = {}
        self._policies_at: dict[str | None, tuple[Policy, ...]] = {}
        self._compiled_for: dict[tuple[str, tuple[str, ...]], PolicySet] = {}
        self._candidates: dict[tuple[str, int], tuple[Candidate, ...]] = {}
        self._waypoints: dict[WaypointRef, tuple[Candidate, ...] | None] = {}

    def apply(self, delta: Delta) -> None:
        """Takes over what changed. Values equal to those held change nothing, not even the generations."""
        changed = self._apply_workloads(delta)
        changed = self._apply_services(delta) or changed
        if changed:
            self._candidates.clear()
            self._waypoints.clear()
        if self._apply_policies(delta):
            self._compiled_for.clear()
            self.policies_generation += 1
            changed = True
        if changed:
            self.generation += 1

    def workload(self, uid: str) -> Workload | None:
        return self._workloads.get(uid)

    def workload_at(self, address: str) -> Workload | None:
        """The workload that owns an address. Pods in the node's own network are not found: the address is the node's."""
        owners = self._by_address.get(address)
        return owners[0] if owners else None

    def service(self, key: str) -> Service | None:
        """By `Service.key`."""
        return self._services.get(key)

    def service_at(self, vip: str, namespace: str = "") -> Service | None:
        """The service with this virtual address; where several claim it, one of `namespace` first."""
        return _prefer(self._by_vip.get(vip), namespace)

    def service_named(self, hostname: str, namespace: str = "") -> Service | None:
        """The service with this full hostname; where several claim it, one of `namespace` first."""
        return _prefer(self._by_hostname.get(hostname), namespace)

    def services_of(self, uid: str) -> tuple[Service, ...]:
        """The services that have this workload as an endpoint, ready or not, by key."""
        return self._by_endpoint.get(uid, ())

    def candidates(self, service: Service, port: int) -> tuple[Candidate, ...]:
        """The endpoints that can serve one declared port of a service now: ready, known, with an address and a port number."""
        memo = (service.key, port)
        found = self._candidates.get(memo)
        if found is None:
            found = tuple(self._serving(service, port))
            self._remember(self._candidates, memo, found)
        return found

    def waypoint_candidates(self, waypoint: WaypointRef) -> tuple[Candidate, ...] | None:
        """The pods that serve a waypoint now, with the port of their tunnels; None when nobody is known at its names and addresses."""
        if waypoint in self._waypoints:
            return self._waypoints[waypoint]
        found = self._waypoint_at(waypoint)
        self._remember(self._waypoints, waypoint, found)
        return found

    def is_waypoint(self, waypoint: WaypointRef, workload: Workload) -> bool:
        """Whether a workload is one of a waypoint's pods, ready or not."""
        if not set(waypoint.addresses).isdisjoint(workload.addresses):
            return True
        return any(endpoint.workload_uid == workload.uid for service in self._waypoint_services(waypoint) for endpoint in service.endpoints)

    def _waypoint_services(self, waypoint: WaypointRef) -> Iterator[Service]:
        for hostname in waypoint.hostnames:
            if service := self.service_named(hostname):
                yield service
        for address in waypoint.addresses:
            if service := self.service_at(address):
                yield service

    def _waypoint_at(self, waypoint: WaypointRef) -> tuple[Candidate, ...] | None:
        for service in self._waypoint_services(waypoint):
            found = []
            for endpoint in service.endpoints:
                workload = self._workloads.get(endpoint.workload_uid)
                if workload is not None and endpoint.ready and workload.addresses:
                    # A foreign proxy's service need not say anything of tunnels: its node ends them.
                    port = INBOUND_HBONE if workload.protocol is Protocol.HBONE else dict(endpoint.ports).get(INBOUND_HBONE, INBOUND_HBONE)
                    found.append(Candidate(workload, port))
            return tuple(found)
        owners = (self.workload_at(address) for address in waypoint.addresses)
        known = tuple(Candidate(owner, INBOUND_HBONE) for owner in owners if owner is not None)
        return known or None

    def policies_for(self, workload: Workload) -> tuple[Policy, ...]:
        """Every policy that applies to connections to a workload: those that select it, its namespace's, the mesh's.

        A selected policy that is not here yields one that denies everything (`denials.unknown_policy`).
        """
        selecting = tuple(self._policies.get(key) or unknown_policy(key) for key in workload.policies)
        return selecting + self._policies_at.get(workload.namespace, ()) + self._policies_at.get(None, ())

    def decide(self, workload: Workload, connection: Connection) -> Verdict:
        """`policy.decide` for a connection to a workload, with its policies kept compiled from one connection to the next."""
        memo = (workload.namespace, workload.policies)
        compiled = self._compiled_for.get(memo)
        if compiled is None:
            compiled = PolicySet(self.policies_for(workload))
            self._remember(self._compiled_for, memo, compiled)
        return compiled.decide(connection)

    def workloads(self) -> list[Workload]:
        """All of them, by UID."""
        return [value for _, value in sorted(self._workloads.items())]

    def services(self) -> list[Service]:
        """All of them, by key."""
        return [value for _, value in sorted(self._services.items())]

    def policies(self) -> list[Policy]:
        """All of them, by key."""
        return [value for _, value in sorted(self._policies.items())]

    def _serving(self, service: Service, port: int) -> Iterator[Candidate]:
        for endpoint in service.endpoints:
            workload = self._workloads.get(endpoint.workload_uid)
            if workload is None or not endpoint.ready or not workload.addresses:
                continue
            for service_port, number in endpoint.ports:
                if service_port == port:
                    yield Candidate(workload, number)
                    break

    def _remember(self, table: dict[_Key, _Value], key: _Key, value: _Value) -> None:
        if len(table) >= self._max_memos:
            table.clear()
        table[key] = value

    def _apply_workloads(self, delta: Delta) -> bool:
        changed = False
        for uid, new in _changes(delta.removed_workloads, ((each.uid, each) for each in delta.workloads)):
            old = self._workloads.get(uid)
            if old == new:
                continue
            changed = True
            if (old.policies if old else ()) != (new.policies if new else ()):
                self.policies_generation += 1
            _replace(self._workloads, uid, new)
            _move(self._by_address, _addresses(old), _addresses(new), old, new)
        return changed

    def _apply_services(self, delta: Delta) -> bool:
        changed = False
        for key, new in _changes(delta.removed_services, ((each.key, each) for each in delta.services)):
            old = self._services.get(key)
            if old == new:
                continue
            changed = True
            _replace(self._services, key, new)
            _move(self._by_vip, _vips(old), _vips(new), old, new)
            _move(self._by_hostname, _hostnames(old), _hostnames(new), old, new)
            _move(self._by_endpoint, _endpoints(old), _endpoints(new), old, new)
        return changed

    def _apply_policies(self, delta: Delta) -> bool:
        changed = False
        for key, new in _changes(delta.removed_policies, ((each.key, each) for each in delta.policies)):
            old = self._policies.get(key)
            if old == new:
                continue
            changed = True
            _replace(self._policies, key, new)
            _move(self._policies_at, _places(old), _places(new), old, new)
        return changed


def _changes(removed: Iterable[str], values: Iterable[tuple[str, _Value]]) -> Iterator[tuple[str, _Value | None]]:
    """Removals before upserts, so that a key in both ends up present."""
    for key in removed:
        yield key, None
    yield from values


def _replace(table: dict[str, _Value], key: str, value: _Value | None) -> None:
    if value is None:
        table.pop(key, None)
    else:
        table[key] = value


def _move(table: dict[_Key, tuple[_Listed, ...]], before: set[_Key], after: set[_Key], old: _Listed | None, new: _Listed | None) -> None:
    """Takes `old` out of the entries `before` and puts `new` into those of `after`; entries stay sorted, empty ones go."""
    for key in before | after:
        listed = [value for value in table.get(key, ()) if value is not old]
        if new is not None and key in after:
            insort(listed, new, key=_rank)
        if listed:
            table[key] = tuple(listed)
        else:
            del table[key]


def _prefer(services: tuple[Service, ...] | None, namespace: str) -> Service | None:
    if not services:
        return None
    return next((service for service in services if service.namespace == namespace), services[0])


def _rank(value: Workload | Service | Policy) -> tuple[bool, bool, bool, str]:
    """The cluster's word before that of an entry's author: no namespace draws another's traffic to itself, or to its waypoint."""
    if isinstance(value, Workload):
        # Two pods claim one address while the first is on its way out: the one that can be reached safely, then the one that answers.
        return not value.node, value.protocol is not Protocol.HBONE, not value.ready, value.uid
    return isinstance(value, Service) and value.declared, False, False, value.key


def _addresses(workload: Workload | None) -> set[str]:
    return set() if workload is None or workload.host_network else set(workload.addresses)


def _vips(service: Service | None) -> set[str]:
    return set(service.vips) if service else set()


def _hostnames(service: Service | None) -> set[str]:
    return {service.hostname} if service else set()


def _endpoints(service: Service | None) -> set[str]:
    return {endpoint.workload_uid for endpoint in service.endpoints} if service else set()


def _places(policy: Policy | None) -> set[str | None]:
    """Where `policies_for` finds it: under its namespace, or under None for the whole mesh. Selected ones are found by key."""
    if policy is None or policy.scope is Scope.SELECTOR:
        return set()
    return {None} if policy.scope is Scope.GLOBAL else {policy.namespace}
