"""BackendTLSPolicy and XBackendTrafficPolicy: Gateway API's policies for the way to a Service.

Source: Gateway API v1 (BackendTLSPolicy), v1alpha1 of `gateway.networking.x-k8s.io` (XBackendTrafficPolicy).
"""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.mesh.l7.clusters import RetryBudget
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.gateway import ObjectRef
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import choice, duration, hostname, integer

EXPERIMENTAL_GROUP = "gateway.networking.x-k8s.io"
MAX_TARGETS = 16


@dataclass(frozen=True, slots=True)
class BackendTarget:
    """An object of the policy's own namespace. `section` is the name of a port; empty: all."""

    group: str
    kind: str
    name: str
    section: str = ""


@dataclass(frozen=True, slots=True)
class BackendTlsPolicyObject:
    """One BackendTLSPolicy."""

    metadata: Metadata
    targets: tuple[BackendTarget, ...]
    """Of a stand-in, empty: every Service of its namespace."""
    hostname: str = ""
    roots: tuple[ObjectRef, ...] = ()
    system_roots: bool = False
    names: tuple[str, ...] = ()
    stand_in: str = ""
    """Not empty: it stands for a refused document, and why that was refused."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BackendTrafficPolicyObject:
    """One XBackendTrafficPolicy."""

    metadata: Metadata
    targets: tuple[BackendTarget, ...]
    retry_budget: RetryBudget | None = None
    notes: tuple[str, ...] = ()
    """What of it is not done, and why."""


def read_backend_tls_policy(document: Field) -> BackendTlsPolicyObject:
    """A BackendTLSPolicy."""
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(("targetRefs", "validation", "options"))
    validation = spec.get("validation")
    validation.only(("caCertificateRefs", "wellKnownCACertificates", "hostname", "subjectAltNames"))
    system, refs = validation.get("wellKnownCACertificates"), validation.get("caCertificateRefs")
    if system.absent == (not refs.items()):
        raise validation.error("exactly one of caCertificateRefs and wellKnownCACertificates")
    roots = []
    for item in refs.items(MAX_TARGETS):
        item.only(("group", "kind", "name"))
        roots.append(ObjectRef(_group(item.get("group")), item.get("kind").text(), metadata.namespace, item.get("name").name()))
    options = [key for key, _ in spec.get("options").texts()]
    return BackendTlsPolicyObject(
        metadata=metadata,
        targets=_targets(spec.get("targetRefs")),
        hostname=hostname(validation.get("hostname")),
        roots=tuple(roots),
        system_roots=not system.absent and choice(system, ("System",)) == "System",
        names=tuple(_alternative(item) for item in validation.get("subjectAltNames").items(MAX_TARGETS)),
        notes=tuple(f"spec.options: {key[:80]} means nothing here" for key in options),
    )


def read_backend_traffic_policy(document: Field) -> BackendTrafficPolicyObject:
    """An XBackendTrafficPolicy."""
    document.only(SPEC)
    spec = document.get("spec")
    spec.only(("targetRefs", "retryConstraint", "sessionPersistence"))
    constraint = spec.get("retryConstraint")
    constraint.only(("budget", "minRetryRate"))
    budget, rate = constraint.get("budget"), constraint.get("minRetryRate")
    budget.only(("percent", "interval"))
    rate.only(("count", "interval"))
    notes = []
    if not spec.get("sessionPersistence").absent:
        notes.append("spec.sessionPersistence: not supported; use a DestinationRule's consistentHash")
    seconds = duration(rate.get("interval"), 1.0) or 1.0
    least = integer(rate.get("count"), 0, 1_000_000, 10)
    if duration(budget.get("interval"), 10.0) != 10.0 or not rate.absent:
        notes.append("spec.retryConstraint: budgets are of the requests of the moment; minRetryRate counts as retries at once")
    return BackendTrafficPolicyObject(
        metadata=read_metadata(document),
        targets=_targets(spec.get("targetRefs")),
        retry_budget=None
        if constraint.absent
        else RetryBudget(integer(budget.get("percent"), 0, 100, 20) / 100, max(1, round(least / max(seconds, 1e-3)))),
        notes=tuple(notes),
    )


def _targets(place: Field) -> tuple[BackendTarget, ...]:
    found = []
    for item in place.items(MAX_TARGETS):
        item.only(("group", "kind", "name", "sectionName"))
        found.append(
            BackendTarget(_group(item.get("group")), item.get("kind").text(), item.get("name").name(), item.get("sectionName").name(""))
        )
    if not found:
        raise place.error("at least one")
    return tuple(found)


def _group(place: Field) -> str:
    group = "" if place.value == "" else place.text("")
    return "" if group == "core" else group


def _alternative(place: Field) -> str:
    place.only(("type", "hostname", "uri"))
    if choice(place.get("type"), ("Hostname", "URI")) == "URI":
        return place.get("uri").text()
    return hostname(place.get("hostname"))
