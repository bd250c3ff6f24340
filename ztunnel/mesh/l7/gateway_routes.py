"""Gateway API's routes at one port, as the routes of a proxy: merged over all objects and put into the order of precedence.

Source: Gateway API, HTTPRouteRule (precedence), HTTPBackendRef (weights, invalid backends); Istio `pilot/pkg/config/kube/gateway`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ztunnel.mesh.l7.attachments import Attached
from ztunnel.mesh.l7.grants import References, Unresolved
from ztunnel.mesh.l7.rate_limit import rate_limits
from ztunnel.mesh.l7.routes import Backend, DirectResponse, Mirror, PathKind, RequestMatch, Route, TcpRoute
from ztunnel.mesh.l7.upstreams import Upstreams
from ztunnel.mesh.manifests.references import BackendRef
from ztunnel.mesh.manifests.routes import RouteObject, RouteRule

INVALID_BACKEND = 500
_PATH_RANK = {PathKind.EXACT: 3, PathKind.SEGMENTS: 2, PathKind.PREFIX: 2, PathKind.REGEX: 1, PathKind.TEMPLATE: 1}


class GatewayRoutes:
    """Makes the routes of a proxy; the clusters that they name come into being on the way."""

    def __init__(self, references: References, upstreams: Upstreams) -> None:
        self._references = references
        self._upstreams = upstreams

    def http(self, attached: Sequence[Attached]) -> tuple[Route, ...]:
        """The routes of an HTTP port.

        Args:
            attached: the oldest first.
        """
        consumers = sorted({each.clients for each in attached if each.clients})
        routes: list[Route] = []
        for clients in consumers:
            routes += self.merged([each for each in attached if each.clients == clients])
            # A consumer's routes take the producer's place: what none of them matches is not found.
            routes.append(Route("consumer-without-match", matches=(RequestMatch(client_namespaces=clients),), direct=DirectResponse(404)))
        return (*routes, *self.merged([each for each in attached if not each.clients]))

    def tcp(self, attached: Sequence[Attached]) -> tuple[TcpRoute, ...]:
        """The oldest route's first rule, for connections have nothing else to be told apart by."""
        return tuple(self.connections(each.route) for each in attached if each.route.rules)[:1]

    def connections(self, route: RouteObject, sni: tuple[str, ...] = ()) -> TcpRoute:
        """The first rule of a TCPRoute or TLSRoute that has rules."""
        rule = route.rules[0]
        backends = tuple(self._backend(ref, route, tcp=True) for ref in rule.backends)
        return TcpRoute(_name(route, 0, rule), _origin(route), backends, sni)

    def merged(self, attached: Iterable[Attached]) -> list[Route]:
        """The routes of some objects in the order of precedence.

        Args:
            attached: the oldest first.
        """
        ranked = []
        for age, each in enumerate(attached):
            for index, rule in enumerate(each.route.rules):
                whole = self.rule(each.route, index)
                for number, match in enumerate(rule.matches):
                    narrowed = replace(match, client_namespaces=each.clients)
                    ranked.append((*_rank(match), age, index, number, replace(whole, matches=(narrowed,))))
        return [each[-1] for each in sorted(ranked, key=lambda each: each[:-1])]

    def rule(self, route: RouteObject, index: int) -> Route:
        """One rule, without its matches."""
        rule = route.rules[index]
        name, origin = _name(route, index, rule), _origin(route)
        if rule.problem:
            return Route(name, origin, direct=DirectResponse(INVALID_BACKEND))
        mirrors = []
        for each in rule.mirrors:
            found = self._references.backend(each.backend, route.kind, route.metadata.namespace)
            if not isinstance(found, Unresolved) and each.share:
                mirrors.append(Mirror(self._upstreams.key(*found), each.share))
        return Route(
            name=name,
            origin=origin,
            backends=tuple(self._backend(ref, route) for ref in rule.backends),
            redirect=rule.redirect,
            rewrite=rule.rewrite,
            request=rule.request,
            response=rule.response,
            mirrors=tuple(mirrors),
            cors=rule.cors,
            timeout=rule.timeout,
            retry=rule.retry,
            rate_limits=rate_limits(route.metadata.annotations, origin),
        )

    def _backend(self, ref: BackendRef, route: RouteObject, *, tcp: bool = False) -> Backend:
        found = self._references.backend(ref, route.kind, route.metadata.namespace)
        if isinstance(found, Unresolved) or ref.problem:
            return Backend("", ref.weight, INVALID_BACKEND)
        destination, port = found
        key = self._upstreams.key(destination, port, tcp=tcp)
        return Backend(key, ref.weight, request=ref.request, response=ref.response)


def _rank(match: RequestMatch) -> tuple[int, int, bool, int, int]:
    """Smaller wins. A prefix of everything is behind regular expressions, which it would otherwise shadow."""
    if match.path is None or (match.path.kind is not PathKind.REGEX and match.path.value == "/" and match.path.kind is not PathKind.EXACT):
        kind, length = 0, 0
    else:
        kind, length = _PATH_RANK[match.path.kind], len(match.path.value)
    return -kind, -length, match.method is None, -len(match.headers), -len(match.query)


def _name(route: RouteObject, index: int, rule: RouteRule) -> str:
    return rule.name or f"{route.metadata.namespace}/{route.metadata.name}/rule-{index}"


def _origin(route: RouteObject) -> str:
    return f"{route.kind} {route.metadata.namespace}/{route.metadata.name}"
