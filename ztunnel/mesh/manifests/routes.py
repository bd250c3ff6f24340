"""HTTPRoute, GRPCRoute, TCPRoute and TLSRoute: Gateway API's routes, with what the API server would fill in filled in.

Read strictly: an unknown field is refused. What is known but cannot be done (an extension) is kept as its rule's `problem`, which the
route's status tells and which answers that rule's requests with 500.
Source: Gateway API v1 (types and their validation rules).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ztunnel.mesh.l7.rate_limit import check_rate_limits
from ztunnel.mesh.l7.routes import (
    DEFAULT_RETRY,
    NO_EDITS,
    Cors,
    HeaderEdits,
    NamedMatch,
    PathKind,
    PathMatch,
    Redirect,
    RequestMatch,
    Retry,
    RetryOn,
    Rewrite,
    TextKind,
    TextMatch,
)
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.references import BackendRef, ParentRef, read_backend, read_parents
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import (
    choice,
    duration,
    header_edits,
    header_name,
    hostname,
    integer,
    number,
    path,
    pattern,
    positive_duration,
)

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRY_ON = (RetryOn.CONNECT_FAILURE, RetryOn.REFUSED_STREAM, RetryOn.UNAVAILABLE, RetryOn.CANCELLED)
_GRPC_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,1023}")
_HTTP_FILTERS = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror", "RequestRedirect", "URLRewrite", "CORS")
_GRPC_FILTERS = ("RequestHeaderModifier", "ResponseHeaderModifier", "RequestMirror")


@dataclass(frozen=True, slots=True)
class MirrorRef:
    """A copy of a share of the requests."""

    backend: BackendRef
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class RouteRule:
    """One rule. Of TCPRoute and TLSRoute only `name` and `backends`."""

    name: str = ""
    matches: tuple[RequestMatch, ...] = ()
    backends: tuple[BackendRef, ...] = ()
    request: HeaderEdits = NO_EDITS
    response: HeaderEdits = NO_EDITS
    redirect: Redirect | None = None
    rewrite: Rewrite | None = None
    mirrors: tuple[MirrorRef, ...] = ()
    cors: Cors | None = None
    timeout: float = 0.0
    retry: Retry | None = DEFAULT_RETRY
    problem: str = ""
    """Not empty: it cannot be done, and why; its requests are answered 500."""


@dataclass(frozen=True, slots=True)
class RouteObject:
    """One route of Gateway API."""

    kind: str
    """HTTPRoute, GRPCRoute, TCPRoute or TLSRoute."""
    metadata: Metadata
    parents: tuple[ParentRef, ...]
    hostnames: tuple[str, ...]
    rules: tuple[RouteRule, ...]

    @property
    def is_http(self) -> bool:
        return self.kind in ("HTTPRoute", "GRPCRoute")


def read_http_route(document: Field) -> RouteObject:
    """An HTTPRoute."""
    return _route("HTTPRoute", document)


def read_grpc_route(document: Field) -> RouteObject:
    """A GRPCRoute."""
    return _route("GRPCRoute", document)


def read_tcp_route(document: Field) -> RouteObject:
    """A TCPRoute."""
    return _route("TCPRoute", document)


def read_tls_route(document: Field) -> RouteObject:
    """A TLSRoute."""
    return _route("TLSRoute", document)


def _route(kind: str, document: Field) -> RouteObject:
    document.only(SPEC)
    metadata = read_metadata(document)
    if kind in ("HTTPRoute", "GRPCRoute"):
        check_rate_limits(document)
    spec = document.get("spec")
    spec.only(("parentRefs", "useDefaultGateways", "rules", *(() if kind == "TCPRoute" else ("hostnames",))))
    defaults = spec.get("useDefaultGateways")
    if defaults.text("None") != "None":
        raise defaults.wrong("default Gateways are not supported: name the parents")
    rules = spec.get("rules")
    readers = {"HTTPRoute": _http_rule, "GRPCRoute": _grpc_rule}
    read = readers.get(kind, _tcp_rule)
    # Without rules an HTTPRoute has one that matches everything, and sends it nowhere (the API server's default).
    items = rules.items() if not rules.absent or kind != "HTTPRoute" else [rules.instead({})]
    return RouteObject(
        kind=kind,
        metadata=metadata,
        parents=read_parents(spec.get("parentRefs"), metadata.namespace),
        hostnames=tuple(dict.fromkeys(hostname(item) for item in spec.get("hostnames").items())),
        rules=tuple(read(item, metadata.namespace) for item in items),
    )


def _tcp_rule(place: Field, namespace: str) -> RouteRule:
    place.only(("name", "backendRefs"))
    return RouteRule(place.get("name").name(""), backends=_backends(place.get("backendRefs"), namespace, filters=False))


def _grpc_rule(place: Field, namespace: str) -> RouteRule:
    place.only(("name", "matches", "filters", "backendRefs", "sessionPersistence"))
    matches = tuple(_grpc_match(item) for item in place.get("matches").items())
    rule = RouteRule(
        name=place.get("name").name(""),
        matches=matches or (RequestMatch(),),
        backends=_backends(place.get("backendRefs"), namespace),
        problem=_session_persistence(place),
    )
    return _filtered(rule, place, namespace, _GRPC_FILTERS)


def _http_rule(place: Field, namespace: str) -> RouteRule:
    place.only(("name", "matches", "filters", "backendRefs", "timeouts", "retry", "sessionPersistence"))
    matches = tuple(_http_match(item) for item in place.get("matches").items())
    timeouts = place.get("timeouts")
    timeouts.only(("request", "backendRequest"))
    request, each_try = duration(timeouts.get("request"), 0.0), duration(timeouts.get("backendRequest"), 0.0)
    if request and each_try > request:
        raise timeouts.get("backendRequest").wrong("longer than the whole request may take")
    retry = _retry(place.get("retry"))
    if retry is not None:
        retry = replace(retry, per_try=each_try)
    rule = RouteRule(
        name=place.get("name").name(""),
        matches=matches or (RequestMatch(path=PathMatch(PathKind.SEGMENTS, "/")),),
        backends=_backends(place.get("backendRefs"), namespace),
        timeout=request or (each_try if retry is None else 0.0),
        retry=retry,
        problem=_session_persistence(place),
    )
    rule = _filtered(rule, place, namespace, _HTTP_FILTERS)
    if rule.redirect is not None and (rule.rewrite is not None or rule.backends):
        raise place.error("RequestRedirect goes neither with URLRewrite nor with backendRefs")
    replaced = (rule.redirect.prefix if rule.redirect else None, rule.rewrite.prefix if rule.rewrite else None)
    kinds = [each.path.kind if each.path else None for each in rule.matches]
    if replaced != (None, None) and kinds != [PathKind.SEGMENTS]:
        raise place.error("ReplacePrefixMatch needs exactly one match, by PathPrefix")
    return rule


def _session_persistence(place: Field) -> str:
    session = place.get("sessionPersistence")
    return "" if session.absent else f"{session.path}: not supported; use a DestinationRule's consistentHash"


def _backends(place: Field, namespace: str, *, filters: bool = True) -> tuple[BackendRef, ...]:
    return tuple(read_backend(item, namespace, filters=filters) for item in place.items())


# ------------------------------------------------------------------------------------------------------------- matches


def _http_match(place: Field) -> RequestMatch:
    place.only(("path", "headers", "queryParams", "method"))
    method = place.get("method")
    return RequestMatch(
        path=_path(place.get("path")),
        method=None if method.absent else TextMatch(TextKind.EXACT, choice(method, _METHODS)),
        headers=_named(place.get("headers"), headers=True),
        query=_named(place.get("queryParams"), headers=False),
    )


def _path(place: Field) -> PathMatch:
    place.only(("type", "value"))
    kind = choice(place.get("type"), ("Exact", "PathPrefix", "RegularExpression"), "PathPrefix")
    value = place.get("value") if not place.get("value").absent else place.get("value").instead("/")
    if kind == "RegularExpression":
        return PathMatch(PathKind.REGEX, pattern(value))
    if kind == "Exact":
        return PathMatch(PathKind.EXACT, path(value))
    return PathMatch(PathKind.SEGMENTS, path(value).rstrip("/") or "/")


def _named(place: Field, *, headers: bool) -> tuple[NamedMatch, ...]:
    found: dict[str, NamedMatch] = {}
    for item in place.items():
        item.only(("type", "name", "value"))
        kind = choice(item.get("type"), ("Exact", "RegularExpression"), "Exact")
        name = header_name(item.get("name")) if headers else item.get("name").text()
        value = item.get("value")
        match = TextMatch(TextKind.REGEX, pattern(value)) if kind == "RegularExpression" else TextMatch(TextKind.EXACT, value.text())
        found.setdefault(name, NamedMatch(name, match))
    return tuple(found.values())


def _grpc_match(place: Field) -> RequestMatch:
    place.only(("method", "headers"))
    method = place.get("method")
    return RequestMatch(path=None if method.absent else _grpc_path(method), headers=_named(place.get("headers"), headers=True))


def _grpc_path(place: Field) -> PathMatch:
    place.only(("type", "service", "method"))
    kind = choice(place.get("type"), ("Exact", "RegularExpression"), "Exact")
    service, method = place.get("service"), place.get("method")
    if service.absent and method.absent:
        raise place.error("names neither a service nor a method")
    if kind == "RegularExpression":
        parts = ["[^/]+" if each.absent else pattern(each) for each in (service, method)]
        return PathMatch(PathKind.REGEX, f"/{parts[0]}/{parts[1]}")
    for each in (service, method):
        if not each.absent and not _GRPC_NAME.fullmatch(each.text()):
            raise each.wrong("not a name of gRPC")
    if method.absent:
        return PathMatch(PathKind.PREFIX, f"/{service.text()}/")
    if service.absent:
        return PathMatch(PathKind.REGEX, f"/[^/]+/{re.escape(method.text())}")
    return PathMatch(PathKind.EXACT, f"/{service.text()}/{method.text()}")


# ------------------------------------------------------------------------------------------------------------- filters


def _filtered(rule: RouteRule, place: Field, namespace: str, known: tuple[str, ...]) -> RouteRule:
    seen: set[str] = set()
    for item in place.get("filters").items():
        kind = item.get("type").text()
        if kind not in known:
            rule = replace(rule, problem=rule.problem or f"{item.path}: filter {kind[:80]} is not supported")
            continue
        if kind in seen and kind != "RequestMirror":
            raise item.error(f"{kind} a second time")
        seen.add(kind)
        member = "cors" if kind == "CORS" else "urlRewrite" if kind == "URLRewrite" else kind[0].lower() + kind[1:]
        item.only(("type", member))
        what = item.get(member)
        if what.absent:
            raise what.error("required")
        match kind:
            case "RequestHeaderModifier":
                rule = replace(rule, request=header_edits(what))
            case "ResponseHeaderModifier":
                rule = replace(rule, response=header_edits(what))
            case "RequestMirror":
                rule = replace(rule, mirrors=(*rule.mirrors, _mirror(what, namespace)))
            case "RequestRedirect":
                rule = replace(rule, redirect=_redirect(what))
            case "URLRewrite":
                rule = replace(rule, rewrite=_rewrite(what))
            case _:
                rule = replace(rule, cors=_cors(what))
    return rule


def _replacement(place: Field) -> tuple[str | None, str | None]:
    """The whole path, or what replaces the matched prefix."""
    if place.absent:
        return None, None
    place.only(("type", "replaceFullPath", "replacePrefixMatch"))
    kind = choice(place.get("type"), ("ReplaceFullPath", "ReplacePrefixMatch"))
    chosen = place.get(kind[0].lower() + kind[1:])
    other = place.get("replacePrefixMatch" if kind == "ReplaceFullPath" else "replaceFullPath")
    if chosen.absent or not other.absent:
        raise place.error(f"{kind} wants {chosen.path} and nothing else")
    # An empty prefix is the root, as "/" is.
    value = "/" if chosen.value == "" and kind == "ReplacePrefixMatch" else path(chosen)
    return (value, None) if kind == "ReplaceFullPath" else (None, value)


def _redirect(place: Field) -> Redirect:
    place.only(("scheme", "hostname", "path", "port", "statusCode"))
    scheme, host, port, status = (place.get(name) for name in ("scheme", "hostname", "port", "statusCode"))
    full, prefix = _replacement(place.get("path"))
    if not status.absent and status.value not in _REDIRECTS:
        raise status.wrong(f"not one of {', '.join(map(str, _REDIRECTS))}")
    return Redirect(
        status=integer(status, 301, 308, 302),
        scheme=None if scheme.absent else choice(scheme, ("http", "https")),
        authority=None if host.absent else hostname(host),
        port=None if port.absent else port.port(),
        path=full,
        prefix=prefix,
    )


def _rewrite(place: Field) -> Rewrite:
    place.only(("hostname", "path"))
    host = place.get("hostname")
    full, prefix = _replacement(place.get("path"))
    return Rewrite(authority=None if host.absent else hostname(host), path=full, prefix=prefix)


def _mirror(place: Field, namespace: str) -> MirrorRef:
    place.only(("backendRef", "percent", "fraction"))
    percent, fraction = place.get("percent"), place.get("fraction")
    if not percent.absent and not fraction.absent:
        raise place.error("percent or fraction, not both")
    share = integer(percent, 0, 100, 100) / 100
    if not fraction.absent:
        fraction.only(("numerator", "denominator"))
        below = integer(fraction.get("denominator"), 1, 2**31 - 1, 100)
        share = integer(fraction.get("numerator"), 0, below) / below
    return MirrorRef(read_backend(place.get("backendRef"), namespace, weighted=False), share)


def _cors(place: Field) -> Cors:
    place.only(("allowOrigins", "allowCredentials", "allowMethods", "allowHeaders", "exposeHeaders", "maxAge"))
    texts = {name: tuple(item.text() for item in place.get(name).items()) for name in ("allowMethods", "allowHeaders", "exposeHeaders")}
    return Cors(
        origins=tuple(_origin(item) for item in place.get("allowOrigins").items()),
        methods=texts["allowMethods"],
        headers=texts["allowHeaders"],
        expose=texts["exposeHeaders"],
        max_age=number(place.get("maxAge"), 1, 2**31 - 1, 5),
        credentials=place.get("allowCredentials").boolean(),
        forward_unmatched_preflights=False,
    )


def _origin(place: Field) -> TextMatch:
    text = place.text()
    if "*" not in text or text == "*":
        return TextMatch(TextKind.EXACT, text)
    scheme, separator, rest = text.partition("://")
    if not separator or not rest.startswith("*.") or "*" in scheme + rest[1:]:
        raise place.wrong("not an origin (* may only stand for the first part of the host)")
    return TextMatch(TextKind.REGEX, f"{re.escape(scheme)}://[^/]+{re.escape(rest[1:])}")


def _retry(place: Field) -> Retry | None:
    if place.absent:
        return DEFAULT_RETRY
    place.only(("codes", "attempts", "backoff"))
    attempts = integer(place.get("attempts"), 0, 1000, 2)
    if attempts == 0:
        return None
    codes = tuple(dict.fromkeys(integer(item, 400, 599) for item in place.get("codes").items()))
    base = positive_duration(place.get("backoff"), 0.025)
    on = (*_RETRY_ON, RetryOn.RETRIABLE_STATUS_CODES) if codes else _RETRY_ON
    return Retry(attempts, on, codes, base=base, maximum=10 * base)
