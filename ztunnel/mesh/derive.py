"""From Kubernetes objects to the mesh: workloads, services, policies and which pods to capture. Pure, and a function of the
set of objects only: the order in which they arrived does not show in the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ztunnel.mesh.attached import Attached
from ztunnel.mesh.authentication import selects
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.enrolment import MODE_LABEL, NO_ADDRESS, enrolment
from ztunnel.mesh.entries import Entries, Selected, service_entry_ports
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.manifests.authentication import PeerAuthenticationObject
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.core import Namespace, Pod, ServiceAccountObject, ServiceObject
from ztunnel.mesh.manifests.gateway import GatewayClassObject, GatewayObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject, ReadObject
from ztunnel.mesh.manifests.service_entry import EntryEndpoint, ServiceEntryObject, WorkloadEntryObject
from ztunnel.mesh.rules import Policy
from ztunnel.mesh.waypoints import Level, Traffic, Waypoints
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload

REDIRECTION = "ambient.istio.io/redirection"
"""Annotation by which a node says that a pod is captured (`enabled`)."""
_MIRROR = "kubernetes.io/config.mirror"
_CANONICAL_NAME = ("service.istio.io/canonical-name", "app.kubernetes.io/name", "app")
_CANONICAL_REVISION = ("service.istio.io/canonical-revision", "app.kubernetes.io/version", "version")
_ANY_ADDRESS = ("an address",)
_CRON_JOB = re.compile(r"(.+)-\d{8,10}")


@dataclass(frozen=True, slots=True)
class MeshOptions:
    """What the manifests do not say."""

    trust_domain: str = "cluster.local"
    root_namespace: str = "istio-system"
    """Policies without a selector in this namespace apply to the whole mesh."""
    cluster: str = "Kubernetes"
    cluster_domain: str = "cluster.local"
    excluded_namespaces: frozenset[str] = frozenset(("kube-system",))
    """Their pods are never captured, whatever their labels say."""
    hbone_needs_annotation: bool = False
    """True: a pod is dialled through HBONE only once its node has annotated it as captured (a cluster with an API server that can
    be told). False: as soon as it is wanted (files, where there is nobody to annotate)."""
    waypoint_fails_open: bool = False
    """Connections go on without a waypoint that is missing or not ready, as in Istio, instead of being refused."""


@dataclass(frozen=True, slots=True)
class Capture:
    """Whether one pod's traffic is to be captured, and why."""

    uid: str
    name: str
    namespace: str
    node: str
    addresses: tuple[str, ...]
    identity: SpiffeId
    wanted: bool
    strict: bool
    """Plaintext to this pod is refused on every port (its effective PeerAuthentication is STRICT without exceptions)."""
    reason: str
    sandbox_uid: str = ""
    """Of a static pod: the UID that kubelet, CNI and control groups know it by. `uid` is that of its mirror in the API server."""
    redirection: str = ""
    """What its annotation says."""


@dataclass(frozen=True, slots=True)
class MeshState:
    """All that is known, by key. The mappings are not changed after construction."""

    workloads: dict[str, Workload] = field(default_factory=dict)
    """By pod UID."""
    services: dict[str, Service] = field(default_factory=dict)
    """By `Service.key`."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """By `Policy.key`."""
    captures: dict[str, Capture] = field(default_factory=dict)
    """By pod UID."""
    awaited: dict[str, Workload] = field(default_factory=dict)
    """By UID, the pods that are captured as soon as they have an address; what they will be then, without one."""
    outside: frozenset[str] = frozenset()
    """Namespaces none of whose pods is in the mesh, nor a new one would be unless its own label says so."""


OF_USE: tuple[type[ReadObject], ...] = (
    Namespace,
    Pod,
    ServiceObject,
    ServiceAccountObject,
    AuthorizationPolicyObject,
    PeerAuthenticationObject,
    GatewayObject,
    GatewayClassObject,
    ServiceEntryObject,
    WorkloadEntryObject,
)
"""What a mesh is derived from; other kinds change nothing here."""

_Value = TypeVar("_Value")


def derive(objects: Mapping[ObjectKey, KubeObject], options: MeshOptions) -> MeshState:
    """What a set of objects adds up to."""
    return Derivation(options).update(objects)


class Derivation:
    """`derive` of a set of objects that changes. The same result as of the whole set, but a change of pods costs what those pods cost.

    Attributes:
        state: of the present set.
    """

    def __init__(self, options: MeshOptions) -> None:
        self._options = options
        self._objects: dict[ObjectKey, KubeObject] = {}
        self._pods: dict[str, Pod] = {}
        """By UID."""
        self._labels: dict[str, dict[str, str]] = {}
        """Of namespaces."""
        self._services: dict[str, list[ServiceObject]] = {}
        """By namespace."""
        self._attached = Attached([], options.root_namespace, options.trust_domain)
        self._by_label = _ByLabel()
        self._entries = Entries([])
        self._has_twins = False
        """Two pods say the same UID. Then which of them counts depends on all of them."""
        self.state = MeshState()
        self._whole()

    def update(self, changes: Mapping[ObjectKey, KubeObject | None]) -> MeshState:
        """The state after these objects came, changed or (None) went."""
        pods: list[tuple[Pod | None, Pod | None]] = []
        others = False
        for key, new in changes.items():
            old = self._objects.get(key)
            if new is None:
                self._objects.pop(key, None)
            else:
                self._objects[key] = new
            if isinstance(old, Pod | None) and isinstance(new, Pod | None) and key.namespace not in self._entries.selecting:
                pods.append((old, new))
            else:
                others = True
        if others or self._has_twins or (pods and not self._pods_changed(pods)):
            self._whole()
        return self.state

    def _whole(self) -> None:
        listed = [value for _, value in sorted(self._objects.items(), key=lambda item: item[0])]
        self._labels = {each.metadata.name: each.metadata.labels for each in listed if isinstance(each, Namespace)}
        pods = [each for each in reversed(listed) if isinstance(each, Pod)]
        self._pods = {each.metadata.uid: each for each in pods}
        self._has_twins = len(self._pods) != len(pods)
        self._attached = Attached(listed, self._options.root_namespace, self._options.trust_domain)
        self._by_label = _ByLabel()
        self._entries = Entries(listed)
        self._services = {}
        for each in listed:
            if isinstance(each, ServiceObject) and not each.ignored:
                self._services.setdefault(each.metadata.namespace, []).append(each)
        state = MeshState(policies=self._attached.policies, outside=_outside(self._labels, pods, self._options))
        for _, pod in sorted(self._pods.items()):
            self._add(pod, state)
        for each in (one for own in self._services.values() for one in own):
            self._put_service(each, state)
        self._put_entries(state)
        self.state = state

    def _put_entries(self, state: MeshState) -> None:
        for workload in self._entries.workloads(self._attached.waypoints, self._options):
            state.workloads.setdefault(workload.uid, workload)
        for service in self._entries.services(self._selected_pods, self._attached.waypoints, self._options):
            # A Service of Kubernetes' is before an entry that claims its name.
            state.services.setdefault(service.key, service)

    def _selected_pods(self, namespace: str, selector: Mapping[str, str]) -> list[Selected]:
        pods = self._by_label.selected(namespace, selector)
        return [(pod.metadata.uid, _is_ready(pod), EntryEndpoint("", False, pod.ports)) for pod in pods]

    def _pods_changed(self, changes: list[tuple[Pod | None, Pod | None]]) -> bool:
        """Bring the state up to a change of pods alone. False: that needs a look at the whole."""
        former = self.state
        state = replace(
            former,
            workloads=dict(former.workloads),
            services=dict(former.services),
            captures=dict(former.captures),
            awaited=dict(former.awaited),
        )
        touched = [pod for change in changes for pod in change if pod is not None]
        for old, _ in changes:
            if old is not None:
                self._remove(old, state)
        for _, new in changes:
            if new is None:
                continue
            if new.metadata.uid in self._pods:
                return False
            self._pods[new.metadata.uid] = new
            self._add(new, state)
        for service in self._selecting(touched):
            self._put_service(service, state)
        if any(pod.metadata.labels.get(MODE_LABEL) for pod in touched):
            state = replace(state, outside=_outside(self._labels, self._pods.values(), self._options))
        self.state = state
        return True

    def _selecting(self, pods: Iterable[Pod]) -> Iterator[ServiceObject]:
        """The services of which one of these pods is, or was, an endpoint."""
        labels: dict[str, list[dict[str, str]]] = {}
        for pod in pods:
            own = labels.setdefault(pod.metadata.namespace, [])
            if pod.metadata.labels not in own:
                own.append(pod.metadata.labels)
        for namespace, candidates in labels.items():
            for service in self._services.get(namespace, ()):
                if any(selects(service.selector, each) for each in candidates):
                    yield service

    def _add(self, pod: Pod, state: MeshState) -> None:
        uid, options, attached = pod.metadata.uid, self._options, self._attached
        capture = _capture(pod, _enrolment(pod, self._labels, options), attached, options)
        state.captures[uid] = capture
        if _is_running(pod):
            self._by_label.add(pod)
            state.workloads[uid] = _workload(pod, capture, attached, options)
        elif not (capture.wanted or pod.addresses) and _enrolment(replace(pod, addresses=_ANY_ADDRESS), self._labels, options)[0]:
            state.awaited[uid] = _workload(pod, replace(capture, wanted=True), attached, options)

    def _remove(self, pod: Pod, state: MeshState) -> None:
        uid = pod.metadata.uid
        self._by_label.remove(pod)
        for each in (self._pods, state.captures, state.workloads, state.awaited):
            each.pop(uid, None)

    def _put_service(self, item: ServiceObject, state: MeshState) -> None:
        pods = self._by_label.selected(item.metadata.namespace, item.selector)
        service = _service(item, pods, self._attached.waypoints, self._options)
        entries = self._entries.selected(item.metadata.namespace, item.selector)
        if entries:
            more = tuple(Endpoint(uid, service_entry_ports(item.ports, each), ready) for uid, ready, each in entries)
            service = replace(service, endpoints=service.endpoints + more)
        state.services[service.key] = service


def _is_running(pod: Pod) -> bool:
    return bool(pod.addresses) and not pod.terminal


def with_addresses(state: MeshState, addresses: Mapping[str, tuple[str, ...]]) -> MeshState:
    """The state as it will be when these pods' addresses, which their node knows already, are in their objects.

    Args:
        addresses: by UID. Pods that are unknown, or not in the mesh, change nothing.
    """
    workloads, captures, awaited = dict(state.workloads), dict(state.captures), dict(state.awaited)
    for uid, own in addresses.items():
        known = awaited.pop(uid, None) or (workloads.get(uid) if uid in captures and captures[uid].wanted else None)
        if known is not None:
            workloads[uid] = replace(known, addresses=own)
            reason = captures[uid].reason.removesuffix(NO_ADDRESS)
            captures[uid] = replace(captures[uid], addresses=own, wanted=True, reason=reason)
    return replace(state, workloads=workloads, captures=captures, awaited=awaited)


def _enrolment(pod: Pod, labels: Mapping[str, Mapping[str, str]], options: MeshOptions) -> tuple[bool, str]:
    return enrolment(pod, labels.get(pod.metadata.namespace, {}), options.excluded_namespaces)


def _outside(labels: Mapping[str, Mapping[str, str]], pods: Iterable[Pod], options: MeshOptions) -> frozenset[str]:
    mixed = {pod.metadata.namespace for pod in pods if pod.metadata.labels.get(MODE_LABEL) == "ambient"}
    plain = {name for name, own in labels.items() if name not in mixed and own.get(MODE_LABEL) != "ambient"}
    return frozenset(plain | options.excluded_namespaces)


class _ByLabel:
    """Pods by each of their labels: with thousands of pods and services, trying each selector on each pod takes seconds."""

    def __init__(self) -> None:
        self._pods: dict[tuple[str, str, str], dict[str, Pod]] = {}

    def add(self, pod: Pod) -> None:
        for key, value in pod.metadata.labels.items():
            self._pods.setdefault((pod.metadata.namespace, key, value), {})[pod.metadata.uid] = pod

    def remove(self, pod: Pod) -> None:
        for key, value in pod.metadata.labels.items():
            place = (pod.metadata.namespace, key, value)
            own = self._pods.get(place, {})
            own.pop(pod.metadata.uid, None)
            if not own:
                self._pods.pop(place, None)

    def selected(self, namespace: str, selector: Mapping[str, str]) -> list[Pod]:
        """The pods of a namespace that a service's selector selects; without a selector, none. In order of their UIDs."""
        found = [self._pods.get((namespace, key, value), {}) for key, value in selector.items()]
        candidates = min(found, key=len, default={})
        return [pod for _, pod in sorted(candidates.items()) if selects(selector, pod.metadata.labels)]


def _capture(pod: Pod, enrolled: tuple[bool, str], attached: Attached, options: MeshOptions) -> Capture:
    wanted, reason = enrolled
    return Capture(
        uid=pod.metadata.uid,
        name=pod.metadata.name,
        namespace=pod.metadata.namespace,
        node=pod.node,
        addresses=pod.addresses,
        identity=SpiffeId(options.trust_domain, pod.metadata.namespace, pod.service_account),
        wanted=wanted,
        strict=attached.to(pod)[1],
        reason=reason,
        sandbox_uid=pod.metadata.annotations.get(_MIRROR, ""),
        redirection=pod.metadata.annotations.get(REDIRECTION, ""),
    )


def _workload(pod: Pod, capture: Capture, attached: Attached, options: MeshOptions) -> Workload:
    metadata = pod.metadata
    announced = metadata.annotations.get(REDIRECTION) == "enabled" or not options.hbone_needs_annotation
    workload_type, workload_name = _origin(pod)
    binding = attached.waypoints.for_pod(metadata, pod.service_account)
    gateway = attached.waypoints.by_key.get(binding.wanted) if binding else None
    return Workload(
        uid=metadata.uid,
        name=metadata.name,
        namespace=metadata.namespace,
        identity=capture.identity,
        node=pod.node,
        addresses=pod.addresses,
        protocol=Protocol.HBONE if capture.wanted and announced else Protocol.TCP,
        ready=_is_ready(pod),
        host_network=pod.host_network,
        cluster=options.cluster,
        canonical_name=_first_label(pod, _CANONICAL_NAME, workload_name),
        canonical_revision=_first_label(pod, _CANONICAL_REVISION, "latest"),
        workload_type=workload_type,
        workload_name=workload_name,
        policies=attached.to(pod)[0],
        waypoint=binding.reference(capture.identity, fails_open=options.waypoint_fails_open) if binding else None,
        waypoint_always=binding is not None
        and binding.level is Level.SERVICE_ACCOUNT
        and (gateway is None or gateway.traffic is Traffic.ALL),
        sandwich=attached.waypoints.sandwich_of(metadata),
    )


def _is_ready(pod: Pod) -> bool:
    return pod.ready and not pod.metadata.deleting


def _origin(pod: Pod) -> tuple[str, str]:
    """The type and name of what made a pod. Source: Istio `pkg/kube/controllers` (deployment and cron job by name pattern)."""
    if pod.metadata.owner is None:
        return "pod", pod.metadata.name
    kind, name = pod.metadata.owner
    template = pod.metadata.labels.get("pod-template-hash", "")
    if kind == "ReplicaSet" and template and name.endswith(f"-{template}"):
        return "deployment", name.removesuffix(f"-{template}")
    if kind == "Job":
        scheduled = _CRON_JOB.fullmatch(name)
        return ("cronjob", scheduled[1]) if scheduled else ("job", name)
    return "pod", name


def _first_label(pod: Pod, names: Iterable[str], default: str) -> str:
    return next((pod.metadata.labels[name] for name in names if pod.metadata.labels.get(name)), default)


def _service(item: ServiceObject, pods: Iterable[Pod], waypoints: Waypoints, options: MeshOptions) -> Service:
    metadata = item.metadata
    binding = waypoints.for_service(metadata, headless=not item.vips)
    nobody = SpiffeId(options.trust_domain, metadata.namespace, "default")
    return Service(
        name=metadata.name,
        namespace=metadata.namespace,
        hostname=f"{metadata.name}.{metadata.namespace}.svc.{options.cluster_domain}",
        vips=item.vips,
        ports=tuple(ServicePort(each.port, each.target if isinstance(each.target, int) else 0, each.name) for each in item.ports),
        endpoints=tuple(Endpoint(pod.metadata.uid, _numbers(item, pod), item.publish_not_ready or _is_ready(pod)) for pod in pods),
        waypoint=binding.reference(nobody, fails_open=options.waypoint_fails_open) if binding else None,
        canary=binding.canary.reference() if binding and binding.canary else None,
        canary_weight=binding.canary_weight if binding else 0,
        # `kubernetes`, for one: what is behind it somebody else says, in EndpointSlices of their own, and kube-proxy knows.
        passthrough=not item.selector,
    )


def _numbers(item: ServiceObject, pod: Pod) -> tuple[tuple[int, int], ...]:
    """(service port, this pod's port) for those ports that the pod has: a named one may be missing in some pods."""
    pairs = ((each.port, pod.ports.get(each.target) if isinstance(each.target, str) else each.target) for each in item.ports)
    return tuple((port, number) for port, number in pairs if number is not None)


def diff(old: MeshState, new: MeshState) -> Delta:
    """What turns an index that holds `old` into one that holds `new`. Captures are not part of it: the node reads them whole."""
    return Delta(
        workloads=_upserts(old.workloads, new.workloads),
        services=_upserts(old.services, new.services),
        policies=_upserts(old.policies, new.policies),
        removed_workloads=_removals(old.workloads, new.workloads),
        removed_services=_removals(old.services, new.services),
        removed_policies=_removals(old.policies, new.policies),
    )


def _upserts(old: Mapping[str, _Value], new: Mapping[str, _Value]) -> tuple[_Value, ...]:
    # Most are the very same objects, of which only the identity is asked.
    changed = [(key, value) for key, value in new.items() if (former := old.get(key)) is not value and former != value]
    return tuple(value for _, value in sorted(changed, key=lambda item: item[0]))


def _removals(old: Mapping[str, _Value], new: Mapping[str, _Value]) -> tuple[str, ...]:
    return tuple(sorted(old.keys() - new.keys()))
