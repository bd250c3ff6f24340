"""VirtualServices at one port, as the routes of a proxy.

In a waypoint those count that name `mesh`, and whose namespace is the service's or the waypoint's; several for one host add up, the more
particular host first, then the older one. A gateway asks for its own name instead of `mesh`.
Source: Istio `pilot/pkg/networking/core/route`, `pilot/pkg/networking/core/waypoint.go`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from ztunnel.mesh.addresses import block_bounds, number
from ztunnel.mesh.l7.delegates import expanded
from ztunnel.mesh.l7.destinations import Destination, Registry
from ztunnel.mesh.l7.rate_limit import rate_limits
from ztunnel.mesh.l7.routes import Backend, Mirror, PathKind, PathMatch, RequestMatch, Retry, Rewrite, Route, TcpRoute
from ztunnel.mesh.l7.upstreams import Upstreams
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.virtual_hosts import ByHost, expand, is_visible, specificity
from ztunnel.mesh.manifests.virtual_service import MESH, HttpRule, L4Rule, Target, VirtualServiceObject, WeightedTarget, Where
from ztunnel.mesh.rules import Cidr

UNKNOWN_DESTINATION = 503
_EVERYTHING = PathMatch(PathKind.PREFIX, "/")


@dataclass(frozen=True, slots=True)
class At:
    """Where routes are asked for: a port, and the names that match conditions know the gateway by (`mesh` for a waypoint)."""

    port: int
    gateways: tuple[str, ...] = (MESH,)
    vips: tuple[str, ...] = ()
    """TCP: the addresses that clients dial, for `destinationSubnets`."""
    hostname: str = ""
    """TLS: the service's, for `sniHosts`."""


class VirtualServices:
    """The VirtualServices of a set of objects, as one proxy sees them."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject], registry: Registry, upstreams: Upstreams, namespace: str) -> None:
        """
        Args:
            namespace: the proxy's.
        """
        self._registry = registry
        self._upstreams = upstreams
        self._namespace = namespace
        self._domain = registry.options.cluster_domain
        items = [each for each in objects.values() if isinstance(each, VirtualServiceObject) and each.hosts]
        self._items = sorted(items, key=lambda each: (each.metadata.created, each.metadata.namespace, each.metadata.name))
        self._rules = {id(each): expanded(each, objects)[0] for each in self._items}
        self._of_mesh: ByHost[VirtualServiceObject] = ByHost()
        for each in self._items:
            if MESH in each.gateways and is_visible(each.export_to, each.metadata.namespace, namespace):
                for host in each.hosts:
                    self._of_mesh.add(expand(host, each.metadata.namespace, self._domain), each)

    def of(self, destination: Destination) -> list[VirtualServiceObject]:
        """Those that are for a destination, in order."""
        namespaces = (destination.namespace, self._namespace)
        covering = [each for each in self._of_mesh.covering(destination.hostname) if each[1].metadata.namespace in namespaces]
        found = {id(item): item for _, item in sorted(covering, key=lambda each: specificity(each[0]))}
        return list(found.values())

    def visible(self) -> Iterator[VirtualServiceObject]:
        """All that the proxy may see, the oldest first; a gateway chooses among them by itself."""
        return (each for each in self._items if is_visible(each.export_to, each.metadata.namespace, self._namespace))

    def http(self, items: Iterable[VirtualServiceObject], at: At) -> tuple[Route, ...]:
        """The routes at a port; none when no rule is for it."""
        return tuple(route for item in items for route in self._http(item, at))

    def tcp(self, items: Iterable[VirtualServiceObject], at: At) -> tuple[TcpRoute, ...]:
        """The first rule for connections at a port, if there is one; `tls` is before `tcp`."""
        for item in items:
            for kind, rules in (("tls", item.tls), ("tcp", item.tcp)):
                for index, rule in enumerate(rules):
                    if _applies(rule, at, self._domain, item.metadata.namespace):
                        return (self.l4_route(item, kind, index, rule, at),)
        return ()

    def l4_route(self, item: VirtualServiceObject, kind: str, index: int, rule: L4Rule, at: At) -> TcpRoute:
        """One rule for connections."""
        backends = tuple(self._backend(each, item, at, tcp=True) for each in rule.targets)
        return TcpRoute(f"{item.metadata.namespace}/{item.metadata.name}/{kind}-{index}", _origin(item), backends)

    def is_at(self, where: Where, at: At) -> bool:
        """Whether a match can hold at a place."""
        return _is_at(where, at)

    def resolve(self, target: Target, item: VirtualServiceObject, port: int) -> tuple[Destination, int] | None:
        """The destination and port that a target means; None when there is none, or no such subset."""
        found = self._registry.named(expand(target.host, item.metadata.namespace, self._domain), item.metadata.namespace)
        if found is None or (target.subset and not self._upstreams.has_subset(found, target.subset)):
            return None
        chosen = target.port or (found.ports[0].number if len(found.ports) == 1 else port)
        return None if found.port(chosen) is None else (found, chosen)

    def _http(self, item: VirtualServiceObject, at: At) -> Iterator[Route]:
        for index, rule in enumerate(self._rules[id(item)]):
            matches = [_narrowed(each.request, each.where) for each in rule.matches if _is_at(each.where, at)]
            if rule.matches and not matches:
                continue
            if (rule.rewrite and rule.rewrite.prefix is not None) or (rule.redirect and rule.redirect.prefix is not None):
                # What replaces a prefix wants one: without a path in the match, that is the root.
                matches = [each if each.path else replace(each, path=_EVERYTHING) for each in matches or [RequestMatch()]]
            yield self._route(rule, item, index, tuple(matches), at)

    def _route(self, rule: HttpRule, item: VirtualServiceObject, index: int, matches: tuple[RequestMatch, ...], at: At) -> Route:
        mirrors = []
        for target, share in rule.mirrors:
            found = self.resolve(target, item, at.port)
            if found is not None:
                mirrors.append(Mirror(self._upstreams.key(*found, subset=target.subset), share))
        rewrite = rule.rewrite
        if rule.authority and (rewrite is None or rewrite.authority is None):
            rewrite = replace(rewrite or Rewrite(), authority=rule.authority)
        return Route(
            name=rule.name or f"{item.metadata.namespace}/{item.metadata.name}/rule-{index}",
            origin=_origin(item),
            matches=matches,
            backends=tuple(self._backend(each, item, at) for each in rule.targets),
            redirect=rule.redirect,
            direct=rule.direct,
            rewrite=rewrite,
            request=rule.request,
            response=rule.response,
            mirrors=tuple(mirrors),
            cors=rule.cors,
            fault=rule.fault,
            timeout=rule.timeout or 0.0,
            retry=_retry(rule),
            rate_limits=rate_limits(item.metadata.annotations, _origin(item)),
        )

    def _backend(self, share: WeightedTarget, item: VirtualServiceObject, at: At, *, tcp: bool = False) -> Backend:
        found = self.resolve(share.target, item, at.port)
        if found is None:
            return Backend("", share.weight, UNKNOWN_DESTINATION)
        key = self._upstreams.key(*found, tcp=tcp, subset=share.target.subset)
        return Backend(key, share.weight, request=share.request, response=share.response, authority=share.authority)


def _retry(rule: HttpRule) -> Retry | None:
    """A limit of each try that is no shorter than the whole request's is none."""
    if rule.retry is not None and rule.timeout and rule.retry.per_try >= rule.timeout:
        return replace(rule.retry, per_try=0.0)
    return rule.retry


def _is_at(where: Where, at: At) -> bool:
    """Whether a match can hold at a place. Labels of clients are not known to waypoints: such matches are left out, as in Istio."""
    return (
        not where.source_labels
        and (not where.port or where.port == at.port)
        and (not where.gateways or not set(at.gateways).isdisjoint(where.gateways))
    )


def _narrowed(request: RequestMatch, where: Where) -> RequestMatch:
    return replace(request, client_namespaces=(where.source_namespace,)) if where.source_namespace else request


def _applies(rule: L4Rule, at: At, domain: str, namespace: str) -> bool:
    return not rule.matches or any(
        _is_at(each, at)
        and not each.source_subnet
        and not each.source_namespace
        and (not each.subnets or any(_within(vip, each.subnets) for vip in at.vips))
        and (not each.sni or [expand(host, namespace, domain) for host in each.sni] == [at.hostname])
        for each in rule.matches
    )


def _within(address: str, blocks: Iterable[Cidr]) -> bool:
    bits, value = number(address)
    return any(bits == size and first <= value <= last for size, first, last in map(block_bounds, blocks))


def _origin(item: VirtualServiceObject) -> str:
    return f"VirtualService {item.metadata.namespace}/{item.metadata.name}"
