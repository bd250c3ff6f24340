"""Why a request would be answered as it would be: each decision of a proxy in its order, with its reasons. Pure, and made of the very
functions that decide.

What depends on chance or on others is told as such: the weights of a split, an external authorizer's word, the state of endpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from waypoint.http.authorization import Ask, Guard
from waypoint.http.jwt import JwtGate, KeySets
from waypoint.http.matching import Found, RouteTable
from waypoint.http.messages import Client, LocalReply, Request
from waypoint.http.paths import normalize
from waypoint.http.reasons import why_not
from waypoint.http.rules import Facts
from ztunnel.mesh.l7.config import ProxyConfig, ServedPort, ServedService, ServedWorkload
from ztunnel.mesh.l7.security import Claims, L7Action, L7Policy

MAX_RULES = 16
"""Of one policy that are told of."""


@dataclass(frozen=True, slots=True)
class Step:
    """One decision. `status`: the answer's, if it ends here."""

    decision: str
    text: str
    details: tuple[str, ...] = ()
    status: int = 0


@dataclass(frozen=True, slots=True)
class Explanation:
    """All of them, and what they come to."""

    outcome: str
    steps: tuple[Step, ...]


def explain(config: ProxyConfig, address: str, request: Request, client: Client, key_sets: KeySets, now: float) -> Explanation:
    """What would become of a request to `address` (of a service or pod, or a service's host name) and `client.service_port`.

    Args:
        request: is edited as it would be on its way.
        now: seconds since the epoch, for tokens.
    """
    steps: list[Step] = []
    for step in _Walk(config, address, request, client, key_sets).steps(now):
        steps.append(step)
        if step.status:
            break
    last = steps[-1]
    return Explanation(f"answered {last.status} by the proxy: {last.text}" if last.status else last.text, tuple(steps))


class _Walk:
    """One request's way."""

    def __init__(self, config: ProxyConfig, address: str, request: Request, client: Client, key_sets: KeySets) -> None:
        self._config = config
        self._address = address
        self._request = request
        self._client = client
        self._key_sets = key_sets

    def steps(self, now: float) -> Iterator[Step]:
        served, port = self._served()
        if served is None:
            text = f"this proxy serves nothing at {self._address}:{self._client.service_port}"
            yield Step("destination", text, self._places(), 400)
            return
        name = f"{served.kind} {served.namespace}/{served.name}" if isinstance(served, ServedService) else f"pod {served.uid}"
        protocol = "AUTO" if port is None else port.protocol.name
        yield Step("destination", f"{name}, port {self._client.service_port} ({protocol})")
        yield self._path()
        policies = [self._config.policies[key] for key in served.policies if key in self._config.policies]
        guard = Guard(policies, self._config.providers)
        yield from self._custom(guard)
        yield from self._tokens(served, now)
        yield from self._authorization(guard, policies, self._request.claims)
        if port is not None:
            yield self._route(port)
        else:
            yield Step("route", "a pod that is addressed by itself has no routes: the request goes there")

    def _served(self) -> tuple[ServedService | ServedWorkload | None, ServedPort | None]:
        for service in self._config.services:
            if self._address in (*service.vips, service.hostname, service.name):
                port = next((each for each in service.ports if each.port == self._client.service_port), None)
                if port is not None:
                    return service, port
        return next((each for each in self._config.workloads if self._address in each.addresses), None), None

    def _places(self) -> tuple[str, ...]:
        return tuple(f"{each.hostname}:{port.port}" for each in self._config.services for port in each.ports)[:MAX_RULES]

    def _path(self) -> Step:
        before, how = self._request.path, self._config.options.path_normalization
        path = normalize(before, how)
        if path is None:
            return Step("path", f"{_text(before)} cannot be normalised ({how.value})", status=400)
        self._request.path = self._request.original_path = path
        return Step("path", _text(path) if path == before else f"{_text(before)} becomes {_text(path)} ({how.value})")

    def _custom(self, guard: Guard) -> Iterator[Step]:
        if not guard.asks:
            return
        asked = guard.custom(self._request, self._client)
        if asked is None:
            yield Step("external authorization", "no CUSTOM policy matches")
        elif isinstance(asked, Ask):
            names = ", ".join(provider.name for provider in asked.providers)
            yield Step("external authorization", f"{names} would be asked, because of {', '.join(asked.policies)}")
        else:
            yield Step("external authorization", asked.text, status=403)

    def _tokens(self, served: ServedService | ServedWorkload, now: float) -> Iterator[Step]:
        authentications = [self._config.authentications[key] for key in served.jwt if key in self._config.authentications]
        if not authentications:
            return
        answer = JwtGate(authentications, self._key_sets).check(self._request, now)
        issuers = tuple(
            f"RequestAuthentication {each.key}: {each.reason or rule.issuer}" for each in authentications for rule in each.rules
        )
        if isinstance(answer, LocalReply):
            yield Step("token", answer.body.decode("utf-8", "replace"), issuers, answer.status)
        elif answer is None:
            yield Step("token", "there is none, so the request has no principal of its own", issuers)
        else:
            self._request.claims = answer
            yield Step("token", f"accepted: {answer.principal}", issuers)

    def _authorization(self, guard: Guard, policies: list[L7Policy], claims: Claims | None) -> Iterator[Step]:
        verdict = guard.decide(self._request, self._client, claims)
        facts = Facts(self._request, self._client, claims)
        told = [line for policy in policies if policy.action is not L7Action.CUSTOM for line in _policy(policy, facts)]
        yield Step("authorization", verdict.text, tuple(told), 0 if verdict.allowed else 403)

    def _route(self, port: ServedPort) -> Step:
        if not port.routes:
            names = tuple(f"{route.name}: {', '.join(each.cluster for each in route.backends)}" for route in port.tcp_routes)
            return Step("route", "bytes are carried as they are", names)
        found = RouteTable(port.routes).find(self._request, self._client)
        if found is None:
            return Step("route", "no route matches", tuple(route.name for route in port.routes[:MAX_RULES]), 404)
        return self._taken(found)

    def _taken(self, found: Found) -> Step:
        route = found.route
        name = f"{route.name}{f' of {route.origin}' if route.origin else ''}"
        details: list[str] = []
        if route.rate_limits:
            details.append("a rate limit may answer 429")
        if route.fault is not None:
            details.append(
                f"a fault is injected: {route.fault.delay:g} s in {route.fault.delay_share:.0%}, abort in {route.fault.abort_share:.0%}"
            )
        if found.redirect is not None:
            reply = found.redirect.answer(self._request, self._client)
            location = dict(reply.headers).get(b"location", b"")
            return Step("route", f"{name} redirects to {_text(location)}", tuple(details), reply.status)
        if route.direct is not None:
            return Step("route", f"{name} answers itself", tuple(details), route.direct.status)
        total = sum(backend.weight for backend in route.backends)
        if not total:
            return Step("route", f"{name} has no backend", tuple(details), 500)
        for backend in route.backends:
            cluster = self._config.clusters.get(backend.cluster)
            share = f"{backend.weight / total:.0%} to {backend.cluster or backend.status}"
            if cluster is None:
                details.append(f"{share}: answered {backend.status or 503}, there is no such cluster")
            elif cluster.refused:
                details.append(f"{share}: answered 503, {cluster.refused}")
            else:
                ready = sum(endpoint.healthy for endpoint in cluster.endpoints)
                details.append(f"{share}: {ready} of {len(cluster.endpoints)} endpoints ready")
        if route.timeout:
            details.append(f"within {route.timeout:g} s")
        if route.retry is not None and route.retry.attempts:
            details.append(f"tried up to {route.retry.attempts} times more on {', '.join(each.value for each in route.retry.on)}")
        return Step("route", f"taken by {name}", tuple(details))


def _policy(policy: L7Policy, facts: Facts) -> list[str]:
    kind = f"{policy.action.value}{' (dry-run)' if policy.dry_run else ''} {policy.key}"
    if not policy.rules:
        return [f"{kind}: no rules, so it never matches"]
    lines = []
    for index, rule in enumerate(policy.rules[:MAX_RULES]):
        reason = why_not(rule, facts)
        lines.append(f"{kind} rules[{index}]: {f'no: {reason}' if reason else 'matches'}")
    if len(policy.rules) > MAX_RULES:
        lines.append(f"{kind}: and {len(policy.rules) - MAX_RULES} more rules")
    return lines


def _text(value: bytes) -> str:
    return value[:300].decode("ascii", "backslashreplace")
