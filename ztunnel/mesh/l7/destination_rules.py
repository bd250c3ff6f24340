"""Which DestinationRule holds for a destination, and what it comes to for one port and subset.

Looked up in the waypoint's namespace, the service's, the root namespace: the first that has a rule for the host decides, an exact host
before wildcards. Several rules for one host add their subsets up; the oldest that has a traffic policy gives it.
Source: Istio `pilot/pkg/model/push_context.go` (destinationRule), `pilot/pkg/networking/util` (MergeTrafficPolicy).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ztunnel.mesh.l7.destinations import Destination
from ztunnel.mesh.manifests.destination_rule import DestinationRuleObject, Subset, TrafficPolicy
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.virtual_hosts import ByHost, expand, is_visible, specificity

NOTHING_SAID = TrafficPolicy()


class DestinationRules:
    """The rules of a set of objects, as one proxy sees them."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject], namespace: str, root_namespace: str, domain: str) -> None:
        """
        Args:
            namespace: the proxy's.
        """
        self._namespace = namespace
        self._root = root_namespace
        self._by_namespace: dict[str, ByHost[DestinationRuleObject]] = {}
        rules = (each for each in objects.values() if isinstance(each, DestinationRuleObject) and not each.selective)
        for rule in sorted(rules, key=lambda each: (each.metadata.created, each.metadata.namespace, each.metadata.name)):
            # Of a refused document that does not even say its namespace, nobody knows whom it was for.
            own = rule.metadata.namespace or root_namespace
            self._by_namespace.setdefault(own, ByHost()).add(expand(rule.host, own, domain), rule)
        self._found: dict[str, list[DestinationRuleObject]] = {}

    def rules(self, destination: Destination) -> list[DestinationRuleObject]:
        """The rules that hold for a destination, the oldest first."""
        key = destination.service.key
        if key not in self._found:
            self._found[key] = self._find(destination)
        return self._found[key]

    def subset(self, destination: Destination, name: str) -> Subset | None:
        """The subset of a destination with this name."""
        return next((subset for rule in self.rules(destination) for subset in rule.subsets if subset.name == name), None)

    def policy(self, destination: Destination, port: int, subset: str = "") -> TrafficPolicy:
        """What holds for one port of a destination, or of a subset of it."""
        rules = self.rules(destination)
        general = next((rule.policy for rule in rules if rule.policy is not None and not rule.stand_in), None)
        found = _overlay(NOTHING_SAID, general, port)
        named = self.subset(destination, subset) if subset else None
        found = _overlay(found, named.policy, port) if named else found
        refused = found.refused or next((rule.policy.refused for rule in rules if rule.stand_in and rule.policy), "")
        return replace(found, refused=refused)

    def _find(self, destination: Destination) -> list[DestinationRuleObject]:
        for namespace in dict.fromkeys((self._namespace, destination.namespace, self._root)):
            rules = self._by_namespace.get(namespace)
            covering = rules.covering(destination.hostname) if rules else []
            visible = [(host, rule) for host, rule in covering if is_visible(rule.export_to, namespace, self._namespace)]
            if visible:
                best = min((host for host, _ in visible), key=specificity)
                return [rule for host, rule in visible if host == best or rule.stand_in]
        return []


def _overlay(below: TrafficPolicy, above: TrafficPolicy | None, port: int) -> TrafficPolicy:
    """Block by block; settings of the port take the place of all that stands beside them."""
    if above is None:
        return below
    if port in above.ports:
        chosen = above.ports[port]
        return replace(chosen, refused=chosen.refused or below.refused)
    return TrafficPolicy(
        balancing=above.balancing or below.balancing,
        pool=above.pool or below.pool,
        outlier=above.outlier or below.outlier,
        tls=above.tls or below.tls,
        proxy_protocol=above.proxy_protocol or below.proxy_protocol,
        retry_budget=above.retry_budget or below.retry_budget,
        refused=above.refused or below.refused,
    )


def rule_notes(rules: Iterable[DestinationRuleObject]) -> list[str]:
    """What of some rules is not done."""
    return [note for rule in rules for note in rule.notes]
