"""VirtualService: Istio's routes, read into values; what they name (hosts, subsets, delegates) is resolved by `mesh.l7.virtual_services`.

Length: three kinds of routes with Istio's whole vocabulary of actions, each read in one small function.
Source: Istio API reference of VirtualService, and its validation (`pkg/config/validation`).
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass, replace

from ztunnel.mesh.addresses import parse_block
from ztunnel.mesh.l7.rate_limit import check_rate_limits
from ztunnel.mesh.l7.routes import (
    DEFAULT_RETRY,
    NO_EDITS,
    Cors,
    DirectResponse,
    Fault,
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
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import (
    boolean,
    choice,
    duration,
    header_name,
    header_value,
    integer,
    number,
    pattern,
    positive_duration,
)
from ztunnel.mesh.manifests.virtual_hosts import read_export_to, read_host
from ztunnel.mesh.rules import Cidr

MESH = "mesh"
"""The gateway that means the mesh itself."""
MAX_BODY = 1024 * 1024
_CLAIM = "@request.auth.claims"
_CLAIM_PART = re.compile(r"\[([^\[\]]+)\]")
_REDIRECTS = (301, 302, 303, 307, 308)
_GRPC = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED"),
    *("RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"),
    "UNAUTHENTICATED",
)
_ACTIONS = ("route", "redirect", "directResponse", "delegate")
_HTTP = (
    *(
        "name",
        "match",
        "rewrite",
        "timeout",
        "retries",
        "fault",
        "mirror",
        "mirrors",
        "mirrorPercentage",
        "mirrorPercent",
        "mirror_percent",
    ),
    *("corsPolicy", "headers", *_ACTIONS),
)
_MATCH = (
    *("name", "uri", "scheme", "method", "authority", "headers", "port", "sourceLabels", "gateways", "queryParams", "ignoreUriCase"),
    *("withoutHeaders", "sourceNamespace", "statPrefix"),
)
_L4_MATCH = ("destinationSubnets", "port", "sourceLabels", "gateways", "sourceNamespace", "sourceSubnet")


@dataclass(frozen=True, slots=True)
class Target:
    """A destination, as written."""

    host: str
    subset: str = ""
    port: int = 0


@dataclass(frozen=True, slots=True)
class WeightedTarget:
    """A share of a rule's requests or connections. `authority` comes from header edits of `Host`."""

    target: Target
    weight: int = 1
    request: HeaderEdits = NO_EDITS
    response: HeaderEdits = NO_EDITS
    authority: str = ""


@dataclass(frozen=True, slots=True)
class Where:
    """What a match says of the place rather than of the request."""

    port: int = 0
    gateways: tuple[str, ...] = ()
    source_labels: tuple[tuple[str, str], ...] = ()
    source_namespace: str = ""
    subnets: tuple[Cidr, ...] = ()
    """Of the destination; TCP and TLS only."""
    source_subnet: str = ""
    sni: tuple[str, ...] = ()


ANYWHERE = Where()


@dataclass(frozen=True, slots=True)
class HttpMatch:
    """One of a rule's matches."""

    request: RequestMatch
    where: Where = ANYWHERE


@dataclass(frozen=True, slots=True)
class HttpRule:
    """One of `spec.http`."""

    name: str = ""
    matches: tuple[HttpMatch, ...] = ()
    targets: tuple[WeightedTarget, ...] = ()
    redirect: Redirect | None = None
    direct: DirectResponse | None = None
    delegate: tuple[str, str] | None = None
    """(namespace, name)."""
    rewrite: Rewrite | None = None
    timeout: float | None = None
    retry: Retry | None = DEFAULT_RETRY
    retry_said: bool = False
    fault: Fault | None = None
    mirrors: tuple[tuple[Target, float], ...] = ()
    cors: Cors | None = None
    request: HeaderEdits = NO_EDITS
    response: HeaderEdits = NO_EDITS
    authority: str = ""
    """From header edits of `Host`."""


@dataclass(frozen=True, slots=True)
class L4Rule:
    """One of `spec.tcp` or `spec.tls`. No matches: all."""

    matches: tuple[Where, ...] = ()
    targets: tuple[WeightedTarget, ...] = ()


@dataclass(frozen=True, slots=True)
class VirtualServiceObject:
    """One VirtualService. `hosts` as written; without any it is a delegate."""

    metadata: Metadata
    hosts: tuple[str, ...] = ()
    gateways: tuple[str, ...] = (MESH,)
    http: tuple[HttpRule, ...] = ()
    tcp: tuple[L4Rule, ...] = ()
    tls: tuple[L4Rule, ...] = ()
    export_to: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What of it is not done as written, and why."""


def read_virtual_service(document: Field) -> VirtualServiceObject:
    """A VirtualService."""
    document.only(SPEC)
    check_rate_limits(document)
    spec = document.get("spec")
    spec.only(("hosts", "gateways", "http", "tls", "tcp", "exportTo"))
    notes: list[str] = []
    hosts = tuple(dict.fromkeys(read_host(item) for item in spec.get("hosts").items()))
    gateways = tuple(_gateway(item) for item in spec.get("gateways").items()) or (MESH,)
    if "*" in hosts and MESH in gateways:
        raise spec.get("hosts").error("* is for gateways, not for the mesh")
    found = VirtualServiceObject(
        metadata=read_metadata(document),
        hosts=hosts,
        gateways=gateways,
        http=tuple(_http(item, delegated=not hosts, notes=notes) for item in spec.get("http").items()),
        tcp=tuple(_l4(item, tls=False) for item in spec.get("tcp").items()),
        tls=tuple(_l4(item, tls=True) for item in spec.get("tls").items()),
        export_to=read_export_to(spec.get("exportTo")),
    )
    if not hosts and (found.tcp or found.tls or not spec.get("gateways").absent):
        raise spec.get("hosts").error("required: a delegate, which has none, has http routes only and no gateways")
    if not (found.http or found.tcp or found.tls):
        raise spec.error("no http, tcp or tls routes")
    return replace(found, notes=tuple(dict.fromkeys(notes)))


def _gateway(place: Field) -> str:
    text = place.text()
    namespace, slash, name = text.partition("/")
    if slash:
        place.instead(namespace).namespace()
    place.instead(name if slash else text).name()
    return text


# --------------------------------------------------------------------------------------------------------------- rules


def _http(place: Field, *, delegated: bool, notes: list[str]) -> HttpRule:
    place.only(_HTTP)
    said = [name for name in _ACTIONS if not place.get(name).absent]
    if len(said) != 1:
        raise place.error(f"exactly one of {', '.join(_ACTIONS)}")
    (action,) = said
    if delegated and action == "delegate":
        raise place.get("delegate").error("a delegate does not delegate again")
    for other in ("fault", "rewrite") if action in ("redirect", "directResponse") else ():
        if not place.get(other).absent:
            raise place.get(other).error(f"not with {action}")
    edits = _headers(place.get("headers"), notes)
    retries, timeout = place.get("retries"), place.get("timeout")
    return HttpRule(
        name=place.get("name").text(""),
        matches=tuple(_match(item) for item in place.get("match").items()),
        targets=_shared(place.get("route"), [_weighted(item, notes) for item in place.get("route").items()]),
        redirect=None if action != "redirect" else _redirect(place.get("redirect")),
        direct=None if action != "directResponse" else _direct(place.get("directResponse")),
        delegate=None if action != "delegate" else _delegate(place.get("delegate")),
        rewrite=None if place.get("rewrite").absent else _rewrite(place.get("rewrite")),
        timeout=None if timeout.absent else duration(timeout),
        retry=_retry(retries),
        retry_said=not retries.absent,
        fault=None if place.get("fault").absent else _fault(place.get("fault")),
        mirrors=_mirrors(place),
        cors=None if place.get("corsPolicy").absent else _cors(place.get("corsPolicy")),
        request=edits[0],
        response=edits[1],
        authority=edits[2],
    )


def _l4(place: Field, *, tls: bool) -> L4Rule:
    place.only(("match", "route"))
    matches = []
    for item in place.get("match").items():
        item.only((*_L4_MATCH, *(("sniHosts",) if tls else ())))
        matches.append(replace(_where(item), sni=tuple(read_host(each) for each in item.get("sniHosts").items())))
        if tls and not matches[-1].sni:
            raise item.get("sniHosts").error("required")
    if tls and not matches:
        raise place.get("match").error("required")
    targets: list[WeightedTarget] = []
    for item in place.get("route").items():
        item.only(("destination", "weight"))
        targets.append(WeightedTarget(_target(item.get("destination")), integer(item.get("weight"), 0, 2**31 - 1, 0)))
    if place.get("route").absent:
        raise place.get("route").error("required")
    return L4Rule(tuple(matches), _shared(place.get("route"), targets))


def _weighted(place: Field, notes: list[str]) -> WeightedTarget:
    place.only(("destination", "weight", "headers"))
    request, response, authority = _headers(place.get("headers"), notes)
    return WeightedTarget(_target(place.get("destination")), integer(place.get("weight"), 0, 2**31 - 1, 0), request, response, authority)


def _shared(place: Field, targets: list[WeightedTarget]) -> tuple[WeightedTarget, ...]:
    """A single one takes all, whatever its weight; of several those without weight get nothing."""
    if place.absent:
        return ()
    if not targets:
        raise place.error("at least one destination")
    if len(targets) == 1:
        return (replace(targets[0], weight=1),)
    if not any(each.weight for each in targets):
        raise place.error("all weights are 0")
    return tuple(each for each in targets if each.weight)


def _target(place: Field) -> Target:
    place.only(("host", "subset", "port"))
    port = place.get("port")
    port.only(("number",))
    return Target(read_host(place.get("host")), place.get("subset").name(""), 0 if port.absent else port.get("number").port())


def _delegate(place: Field) -> tuple[str, str]:
    place.only(("name", "namespace"))
    return place.get("namespace").namespace(""), place.get("name").name()


# ------------------------------------------------------------------------------------------------------------- matches


def _where(place: Field) -> Where:
    port, subnet = place.get("port"), place.get("sourceSubnet")
    subnets = []
    for item in place.get("destinationSubnets").items():
        block = parse_block(item.text())
        if block is None:
            raise item.wrong("not an address block")
        subnets.append(block)
    return Where(
        port=0 if port.absent else port.port(),
        gateways=tuple(_gateway(item) for item in place.get("gateways").items()),
        source_labels=tuple(sorted(place.get("sourceLabels").labels().items())),
        source_namespace=place.get("sourceNamespace").namespace(""),
        subnets=tuple(subnets),
        source_subnet=subnet.text(""),
    )


def _match(place: Field) -> HttpMatch:
    place.only(_MATCH)
    ignore_case = place.get("ignoreUriCase").boolean()
    special = [NamedMatch(f":{name}", _text(place.get(name))) for name in ("scheme", "authority") if not place.get(name).absent]
    headers = [_named_header(name, member, inverted=False) for name, member in place.get("headers").texts()]
    without = [_named_header(name, member, inverted=True) for name, member in place.get("withoutHeaders").texts()]
    method = place.get("method")
    request = RequestMatch(
        path=None if place.get("uri").absent else _uri(place.get("uri"), ignore_case=ignore_case),
        method=None if method.absent else _text(method),
        headers=(*special, *headers, *without),
        query=tuple(NamedMatch(name, _text(member, present=True)) for name, member in place.get("queryParams").texts()),
        name=place.get("name").text(""),
    )
    return HttpMatch(request, _where(place))


def _uri(place: Field, *, ignore_case: bool) -> PathMatch:
    match = _text(place)
    kind = {TextKind.EXACT: PathKind.EXACT, TextKind.PREFIX: PathKind.PREFIX}.get(match.kind, PathKind.REGEX)
    return PathMatch(kind, match.value, ignore_case and kind is not PathKind.REGEX)


def _named_header(name: str, place: Field, *, inverted: bool) -> NamedMatch:
    # `withoutHeaders: {x: {}}` and `headers: {x: {}}` ask for presence; `null` would be gone before it came here.
    match = _text(place, present=True)
    if name.startswith(_CLAIM):
        return NamedMatch("", match, inverted, _claim(place, name))
    return NamedMatch(header_name(place.instead(name)), match, inverted)


def _claim(place: Field, name: str) -> tuple[str, ...]:
    rest = name.removeprefix(_CLAIM)
    if rest.startswith("."):
        parts = tuple(rest[1:].split("."))
    else:
        parts = tuple(_CLAIM_PART.findall(rest)) if _CLAIM_PART.sub("", rest) == "" else ()
    if not parts or not all(parts):
        raise place.error(f"not a claim ({_CLAIM}.NAME or {_CLAIM}[NAME])")
    return parts


def _text(place: Field, *, present: bool = False) -> TextMatch:
    """A StringMatch.

    Args:
        present: an empty one, or the pattern `*`, asks for presence.
    """
    place.only(("exact", "prefix", "regex"))
    said = [name for name in ("exact", "prefix", "regex") if not place.get(name).absent]
    if not said and present:
        return TextMatch(TextKind.PRESENT)
    if len(said) != 1:
        raise place.error("exactly one of exact, prefix, regex")
    value = place.get(said[0])
    if said == ["regex"]:
        return TextMatch(TextKind.PRESENT) if present and value.value == "*" else TextMatch(TextKind.REGEX, pattern(value))
    text = "" if value.value == "" and said == ["exact"] and present else value.text()
    return TextMatch(TextKind.EXACT if said == ["exact"] else TextKind.PREFIX, text)


# ------------------------------------------------------------------------------------------------------------- actions


def _headers(place: Field, notes: list[str]) -> tuple[HeaderEdits, HeaderEdits, str]:
    """Edits of the request and of the response, and the authority that the request's set."""
    place.only(("request", "response"))
    request, authority = _edits(place.get("request"), notes)
    response, _ = _edits(place.get("response"), notes)
    return request, response, authority


def _edits(place: Field, notes: list[str]) -> tuple[HeaderEdits, str]:
    place.only(("set", "add", "remove"))
    authority = ""
    edits: dict[str, list[tuple[str, str]]] = {"set": [], "add": []}
    for action, listed in edits.items():
        for key, member in place.get(action).texts():
            name, value = header_name(member.instead(key)), header_value(member)
            if name in ("host", ":authority"):
                authority = value
            elif name.startswith(":"):
                notes.append(f"{member.path}: {name} cannot be edited and stays as it is")
            else:
                listed.append((name, value))
    removed = tuple(header_name(item) for item in place.get("remove").items())
    return HeaderEdits(tuple(edits["set"]), tuple(edits["add"]), removed), authority


def _redirect(place: Field) -> Redirect:
    place.only(("uri", "prefixRewrite", "authority", "port", "derivePort", "scheme", "redirectCode"))
    port, derived, code = place.get("port"), place.get("derivePort"), place.get("redirectCode")
    if not port.absent and not derived.absent:
        raise place.error("port or derivePort, not both")
    if not place.get("uri").absent and not place.get("prefixRewrite").absent:
        raise place.error("uri or prefixRewrite, not both")
    if not code.absent and code.value not in _REDIRECTS:
        raise code.wrong(f"not one of {', '.join(map(str, _REDIRECTS))}")
    derive = choice(derived, ("FROM_PROTOCOL_DEFAULT", "FROM_REQUEST_PORT"), "FROM_PROTOCOL_DEFAULT") if not derived.absent else "FROM_HOST"
    texts = {name: place.get(name) for name in ("uri", "prefixRewrite", "authority", "scheme")}
    return Redirect(
        status=integer(code, 301, 308, 301),
        scheme=None if texts["scheme"].absent else choice(texts["scheme"], ("http", "https")),
        authority=None if texts["authority"].absent else header_value(texts["authority"].instead(texts["authority"].text())),
        port=None if port.absent else port.port(),
        derive_port=derive if port.absent else "",
        path=None if texts["uri"].absent else _location(texts["uri"]),
        prefix=None if texts["prefixRewrite"].absent else _location(texts["prefixRewrite"]),
    )


def _location(place: Field) -> str:
    return header_value(place.instead(place.text()))


def _direct(place: Field) -> DirectResponse:
    place.only(("status", "body"))
    body = place.get("body")
    body.only(("string", "bytes"))
    content = b""
    if not body.get("string").absent and body.get("string").value != "":
        content = body.get("string").text().encode()
    elif not body.get("bytes").absent:
        content = _base64(body.get("bytes"))
    if len(content) > MAX_BODY:
        raise body.error(f"more than {MAX_BODY} bytes")
    return DirectResponse(integer(place.get("status"), 200, 599), content)


def _base64(place: Field) -> bytes:
    try:
        return base64.b64decode(place.text(), validate=True)
    except (binascii.Error, ValueError):
        raise place.error("not base64") from None


def _rewrite(place: Field) -> Rewrite:
    place.only(("uri", "authority", "uriRegexRewrite"))
    uri, authority, regex = place.get("uri"), place.get("authority"), place.get("uriRegexRewrite")
    if not uri.absent and not regex.absent:
        raise place.error("uri or uriRegexRewrite, not both")
    if uri.absent and authority.absent and regex.absent:
        raise place.error("empty: name at least one field")
    regex.only(("match", "rewrite"))
    return Rewrite(
        authority=None if authority.absent else _location(authority),
        prefix=None if uri.absent else _location(uri),
        regex=None if regex.absent else (pattern(regex.get("match")), header_value(regex.get("rewrite"))),
    )


def _fault(place: Field) -> Fault:
    place.only(("delay", "abort"))
    delay, abort = place.get("delay"), place.get("abort")
    if delay.absent and abort.absent:
        raise place.error("delay, abort or both")
    delay.only(("fixedDelay", "percentage", "percent"))
    abort.only(("httpStatus", "grpcStatus", "percentage"))
    status, grpc = abort.get("httpStatus"), abort.get("grpcStatus")
    if not abort.absent and status.absent == grpc.absent:
        raise abort.error("exactly one of httpStatus and grpcStatus")
    return Fault(
        delay=0.0 if delay.absent else positive_duration(delay.get("fixedDelay")),
        delay_share=_share(delay, 0.0),
        abort_status=0 if status.absent else integer(status, 200, 599),
        abort_grpc=None if grpc.absent else _GRPC.index(choice(grpc, _GRPC)),
        abort_share=_share(abort, 0.0),
    )


def _share(place: Field, default: float) -> float:
    """Of `percentage: {value}`, or the older `percent`."""
    percentage = place.get("percentage")
    percentage.only(("value",))
    if percentage.absent:
        return integer(place.get("percent"), 0, 100) / 100 if not place.get("percent").absent else default
    return number(percentage.get("value"), 0, 100, 0) / 100


def _mirrors(place: Field) -> tuple[tuple[Target, float], ...]:
    one, several, percent = place.get("mirror"), place.get("mirrors"), place.get("mirrorPercent")
    percent = place.get("mirror_percent") if percent.absent else percent
    percentage = place.get("mirrorPercentage")
    if not one.absent and not several.absent:
        raise several.error("mirror or mirrors, not both")
    found: list[tuple[Target, float]] = []
    if not one.absent:
        percentage.only(("value",))
        share = integer(percent, 0, 100, 100) / 100 if percentage.absent else number(percentage.get("value"), 0, 100, 0) / 100
        found.append((_target(one), share))
    elif not percentage.absent or not percent.absent:
        raise place.error("a percentage of mirrored requests without mirror")
    for item in several.items():
        item.only(("destination", "percentage"))
        found.append((_target(item.get("destination")), _share(item, 1.0)))
    return tuple(each for each in found if each[1])


def _cors(place: Field) -> Cors:
    place.only(
        (
            *("allowOrigin", "allowOrigins", "allowMethods", "allowHeaders", "exposeHeaders", "maxAge", "allowCredentials"),
            "unmatchedPreflights",
        )
    )
    texts = {name: tuple(item.text() for item in place.get(name).items()) for name in ("allowMethods", "allowHeaders", "exposeHeaders")}
    older = tuple(TextMatch(TextKind.EXACT, item.text()) for item in place.get("allowOrigin").items())
    age = place.get("maxAge")
    return Cors(
        origins=tuple(_text(item) for item in place.get("allowOrigins").items()) or older,
        methods=texts["allowMethods"],
        headers=texts["allowHeaders"],
        expose=texts["exposeHeaders"],
        max_age=None if age.absent else duration(age),
        credentials=boolean(place.get("allowCredentials"), False),
        forward_unmatched_preflights=choice(place.get("unmatchedPreflights"), ("UNSPECIFIED", "FORWARD", "IGNORE"), "FORWARD") != "IGNORE",
    )


def _retry(place: Field) -> Retry | None:
    if place.absent:
        return DEFAULT_RETRY
    place.only(("attempts", "perTryTimeout", "retryOn", "retryRemoteLocalities", "retryIgnorePreviousHosts", "backoff"))
    attempts = integer(place.get("attempts"), -(2**31), 2**31 - 1, 0)
    if attempts <= 0:
        return None
    on, codes = _retry_on(place.get("retryOn"))
    base = positive_duration(place.get("backoff"), 0.025)
    return Retry(
        attempts=attempts,
        on=on,
        status_codes=codes,
        per_try=duration(place.get("perTryTimeout"), 0.0),
        base=base,
        maximum=10 * base,
        remote_localities=place.get("retryRemoteLocalities").boolean(),
        avoid_previous_hosts=boolean(place.get("retryIgnorePreviousHosts"), True),
    )


def _retry_on(place: Field) -> tuple[tuple[RetryOn, ...], tuple[int, ...]]:
    if place.absent or place.value == "":
        return DEFAULT_RETRY.on, ()
    known = {each.value: each for each in RetryOn}
    on: dict[RetryOn, None] = {}
    codes: dict[int, None] = {}
    for word in place.text().split(","):
        text = word.strip()
        if text.isascii() and text.isdigit() and len(text) == 3 and 100 <= int(text) <= 599:
            codes[int(text)] = None
        elif text in known:
            on[known[text]] = None
        elif text:
            raise place.wrong(f"{text[:40]!r} is not a condition to retry on ({', '.join(known)}, or a status)")
    if codes:
        on[RetryOn.RETRIABLE_STATUS_CODES] = None
    return tuple(on), tuple(codes)
