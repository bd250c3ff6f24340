"""Gateway API's policies for the way to a Service: TLS (BackendTLSPolicy) and how many retries there may be (XBackendTrafficPolicy)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.l7.clusters import RetryBudget, UpstreamTls
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.destinations import Destination
from ztunnel.mesh.manifests.backend_policies import BackendTarget, BackendTlsPolicyObject, BackendTrafficPolicyObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import NETWORKING_GROUP

_GROUPS = {"Service": "", "ServiceEntry": NETWORKING_GROUP}
_ROOT_KINDS = ("ConfigMap", "Secret")


class BackendTls:
    """The policies of a set of objects, by what they are for."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject]) -> None:
        self._objects = objects
        self._tls = sorted((each for each in objects.values() if isinstance(each, BackendTlsPolicyObject)), key=_age)
        self._traffic = sorted((each for each in objects.values() if isinstance(each, BackendTrafficPolicyObject)), key=_age)

    def settings(self, destination: Destination, port: int) -> tuple[UpstreamTls | None, str]:
        """TLS towards one port of a destination, or why nothing may go there; the most particular policy, then the oldest."""
        policy = self._policy(destination, port)
        if policy is None:
            return None, ""
        if policy.stand_in:
            return None, policy.stand_in
        roots, problem = self._roots(policy)
        if problem:
            return None, f"BackendTLSPolicy {policy.metadata.namespace}/{policy.metadata.name}: {problem}"
        return UpstreamTls(policy.hostname, roots, system_roots=policy.system_roots, names=policy.names), ""

    def retry_budget(self, destination: Destination) -> RetryBudget | None:
        """The budget of a destination; the oldest policy's."""
        for policy in self._traffic:
            if policy.metadata.namespace == destination.namespace and any(_names(each, destination) for each in policy.targets):
                return policy.retry_budget
        return None

    def conditions(self, policy: BackendTlsPolicyObject) -> tuple[Condition, ...]:
        """Accepted and ResolvedRefs of a BackendTLSPolicy."""
        kinds = [ref for ref in policy.roots if ref.kind not in _ROOT_KINDS or ref.group]
        _, problem = self._roots(policy)
        older = self._conflicting(policy)
        reason = "InvalidKind" if kinds else "InvalidCACertificateRef" if problem else "ResolvedRefs"
        if problem:
            accepted = Condition("Accepted", False, "NoValidCACertificate", problem)
        elif older:
            accepted = Condition("Accepted", False, "Conflicted", f"BackendTLSPolicy {older} is older and has the same target")
        else:
            accepted = Condition("Accepted", True, "Accepted", "; ".join(policy.notes))
        return accepted, Condition("ResolvedRefs", not problem, reason, problem)

    def _conflicting(self, policy: BackendTlsPolicyObject) -> str:
        for other in self._tls[: self._tls.index(policy)]:
            if other.metadata.namespace == policy.metadata.namespace and not set(policy.targets).isdisjoint(other.targets):
                return f"{other.metadata.namespace}/{other.metadata.name}"
        return ""

    def _policy(self, destination: Destination, port: int) -> BackendTlsPolicyObject | None:
        declared = destination.port(port)
        names = ("", declared.name) if declared and declared.name else ("",)
        found = list(self._matching(destination, names))
        # A port's own policy is before the Service's; among equals the oldest is first already.
        return min(found, key=lambda each: not each[0])[1] if found else None

    def _matching(self, destination: Destination, sections: tuple[str, ...]) -> Iterator[tuple[str, BackendTlsPolicyObject]]:
        for policy in self._tls:
            if policy.metadata.namespace != destination.namespace:
                continue
            if policy.stand_in and not policy.targets:
                yield "", policy
            for target in policy.targets:
                if _names(target, destination) and target.section in sections:
                    yield target.section, policy

    def _roots(self, policy: BackendTlsPolicyObject) -> tuple[bytes, str]:
        credentials = Credentials(self._objects, policy.metadata.namespace)
        found: list[bytes] = []
        problems: list[str] = []
        for ref in policy.roots:
            if ref.kind not in _ROOT_KINDS or ref.group:
                problems.append(f"a CA certificate of kind {ref.kind} is not supported")
                continue
            roots = credentials.roots(ref.kind, ref.name)
            if isinstance(roots, str):
                problems.append(roots)
            else:
                found.append(roots)
        return b"\n".join(found), "; ".join(problems)


def _names(target: BackendTarget, destination: Destination) -> bool:
    key = destination.key
    return (target.group, target.kind, target.name) == (_GROUPS.get(key.kind, ""), key.kind, key.name)


def _age(policy: BackendTlsPolicyObject | BackendTrafficPolicyObject) -> tuple[str, str, str]:
    return policy.metadata.created, policy.metadata.namespace, policy.metadata.name
