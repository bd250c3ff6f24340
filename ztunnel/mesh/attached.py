"""What is attached to pods: the policies that each of them lists, and the waypoints. Pure.

A function of the objects that it is made of, none of which changes: what is asked again is answered from memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from ztunnel.mesh.authentication import Authentication, selects
from ztunnel.mesh.manifests.authentication import PeerAuthenticationObject
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject
from ztunnel.mesh.manifests.core import Pod
from ztunnel.mesh.manifests.parse import KubeObject, RefusedPolicy
from ztunnel.mesh.refused import refused_policy
from ztunnel.mesh.rules import Policy, Scope
from ztunnel.mesh.waypoints import Waypoints

_MAX_ALIKE = 4096
"""Sets of labels for which it is remembered what is attached to pods that have them."""


class Attached:
    """The policies, and which of them each pod lists; the waypoints."""

    def __init__(self, listed: Iterable[KubeObject], root_namespace: str, trust_domain: str) -> None:
        objects = list(listed)
        self.waypoints = Waypoints.of(objects, trust_domain)
        self.policies: dict[str, Policy] = {}
        self._selecting: dict[str | None, list[tuple[dict[str, str], Policy]]] = {}
        """By namespace; under None those that select in every namespace."""
        self._strict_in: set[str | None] = set()
        """Namespaces, or None for all, where a refused PeerAuthentication makes everything strict."""
        authentications: list[PeerAuthenticationObject] = []
        for each in objects:
            match each:
                case AuthorizationPolicyObject(waypoint=False):
                    policy = _authorization(each, root_namespace)
                    self._add(policy, each.selector, None if policy.namespace == root_namespace else policy.namespace)
                case RefusedPolicy(targets=()) if each.key.kind != "RequestAuthentication":
                    policy = refused_policy(each, root_namespace)
                    everywhere = policy.namespace == root_namespace and policy.kind == "AuthorizationPolicy"
                    self._add(policy, each.selector, None if everywhere else policy.namespace)
                    if policy.kind == "PeerAuthentication" and policy.scope is not Scope.SELECTOR:
                        self._strict_in.add(None if policy.scope is Scope.GLOBAL else policy.namespace)
                case PeerAuthenticationObject():
                    authentications.append(each)
                case _:
                    pass
        self._to: dict[tuple[str, frozenset[tuple[str, str]]], tuple[tuple[str, ...], bool]] = {}
        """What `to` has said. Nothing of this object changes, and pods of one template have the same labels."""
        self._authentication = Authentication(authentications, root_namespace)
        for policy in self._authentication.policies():
            self.policies[policy.key] = policy

    def to(self, pod: Pod) -> tuple[tuple[str, ...], bool]:
        """The keys of the policies that select a pod, with the one that enforces its PeerAuthentication, and whether plaintext to it is
        refused on every port."""
        alike = (pod.metadata.namespace, frozenset(pod.metadata.labels.items()))
        found = self._to.get(alike)
        if found is None:
            if len(self._to) >= _MAX_ALIKE:
                self._to.clear()
            found = self._to[alike] = self._judge(pod)
        return found

    def _judge(self, pod: Pod) -> tuple[tuple[str, ...], bool]:
        namespace = pod.metadata.namespace
        selected = self._selected(pod)
        effective = self._authentication.effective(namespace, pod.metadata.labels)
        chosen = [policy.key for policy in selected]
        if effective.policy is not None:
            chosen.append(effective.policy.key)
        strict = (
            effective.strict
            or not self._strict_in.isdisjoint((None, namespace))
            or any(policy.kind == "PeerAuthentication" for policy in selected)
        )
        return tuple(sorted(chosen)), strict

    def _add(self, policy: Policy, selector: dict[str, str] | None, where: str | None) -> None:
        self.policies[policy.key] = policy
        if policy.scope is Scope.SELECTOR:
            self._selecting.setdefault(where, []).append((selector or {}, policy))

    def _selected(self, pod: Pod) -> list[Policy]:
        candidates = (*self._selecting.get(pod.metadata.namespace, ()), *self._selecting.get(None, ()))
        return [policy for selector, policy in candidates if selects(selector, pod.metadata.labels)]


def _authorization(item: AuthorizationPolicyObject, root_namespace: str) -> Policy:
    metadata = item.metadata
    if item.selector is not None:
        scope = Scope.SELECTOR
    else:
        scope = Scope.GLOBAL if metadata.namespace == root_namespace else Scope.NAMESPACE
    return Policy(metadata.name, metadata.namespace, scope, item.action, item.rules, dry_run=item.dry_run, reason=item.note)
