"""Which PeerAuthentication counts for a workload, and the policy that enforces it.

The most specific one that sets a mode: one that selects the workload, its namespace's, the mesh's (root namespace), else
PERMISSIVE. Of several at one level the oldest counts. It becomes a DENY policy against peers without an identity, which only those
workloads list that it counts for: a namespace's PERMISSIVE must be able to lift the mesh's STRICT.
Source: Istio `pilot/pkg/serviceregistry/ambient/policies.go`; ztunnel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ztunnel.mesh.denials import NOT_AUTHENTICATED
from ztunnel.mesh.manifests.authentication import Mode, PeerAuthenticationObject
from ztunnel.mesh.rules import Action, Clause, Match, Policy, Rule, Scope


@dataclass(frozen=True, slots=True)
class Effective:
    """What counts for one workload."""

    policy: Policy | None
    """None when plaintext is welcome on every port."""
    strict: bool
    """Plaintext is refused on every port."""


PERMISSIVE = Effective(None, strict=False)


class Authentication:
    """All PeerAuthentications, arranged for the question which one counts."""

    def __init__(self, objects: Iterable[PeerAuthenticationObject], root_namespace: str) -> None:
        self._root = root_namespace
        self._whole: dict[str, PeerAuthenticationObject] = {}
        self._selecting: dict[str, list[PeerAuthenticationObject]] = {}
        for each in sorted(objects, key=lambda each: (each.metadata.created, each.metadata.name)):
            if each.selector is None:
                self._whole.setdefault(each.metadata.namespace, each)
            else:
                self._selecting.setdefault(each.metadata.namespace, []).append(each)

    def policies(self) -> list[Policy]:
        """Every policy that `effective` may answer with."""
        answers = [self._inherited(namespace) for namespace in self._whole]
        answers += [self._refined(each) for selecting in self._selecting.values() for each in selecting]
        return list({answer.policy.key: answer.policy for answer in answers if answer.policy is not None}.values())

    def effective(self, namespace: str, labels: Mapping[str, str]) -> Effective:
        """What counts for a workload with these labels."""
        for each in self._selecting.get(namespace, ()):
            if selects(each.selector or {}, labels):
                return self._refined(each)
        return self._inherited(namespace)

    def _inherited(self, namespace: str) -> Effective:
        for level in (namespace, self._root):
            whole = self._whole.get(level)
            if whole is not None and whole.mode is not Mode.UNSET:
                return _enforced(whole, whole.mode, ())
        return PERMISSIVE

    def _refined(self, selecting: PeerAuthenticationObject) -> Effective:
        inherited = self._inherited(selecting.metadata.namespace)
        mode = selecting.mode
        if mode is Mode.UNSET:
            mode = Mode.STRICT if inherited.strict else Mode.PERMISSIVE
        exceptions = tuple(sorted(port for port, level in selecting.ports.items() if level not in (Mode.UNSET, mode)))
        if selecting.mode is Mode.UNSET and not exceptions:
            return inherited
        return _enforced(selecting, mode, exceptions)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether labels have every pair of a selector. An empty selector selects everything."""
    return all(labels.get(key) == value for key, value in selector.items())


def _enforced(source: PeerAuthenticationObject, mode: Mode, exceptions: tuple[int, ...]) -> Effective:
    strict = mode is Mode.STRICT
    clauses = [NOT_AUTHENTICATED]
    if exceptions:
        match = Match(not_destination_ports=exceptions) if strict else Match(destination_ports=exceptions)
        clauses.append(Clause((match,)))
    elif not strict:
        return PERMISSIVE
    name, namespace = source.metadata.name, source.metadata.namespace
    policy = Policy(
        name, namespace, Scope.SELECTOR, Action.DENY, (Rule(tuple(clauses)),), "PeerAuthentication", reason="plaintext is refused here"
    )
    return Effective(policy, strict and not exceptions)
