"""What happens to requests, as values: matches, routes and all that they may do. What `waypoint` compiles.

Made by `mesh.l7.derive` from manifests, sent to worker processes as it is. Defaults of an API server and of Istio are already filled in:
whoever reads a value here asks nobody for a default. Durations are seconds, sizes bytes, shares of requests are in [0, 1].
Names, paths and values are text; compiling them to bytes and automata is the proxy's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# ------------------------------------------------------------------------------------------------------------ matching


class TextKind(Enum):
    """How a text is compared. REGEX is RE2, over the whole text."""

    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    REGEX = "regex"
    PRESENT = "present"


@dataclass(frozen=True, slots=True)
class TextMatch:
    """One comparison. `ignore_case` does not apply to REGEX."""

    kind: TextKind
    value: str = ""
    ignore_case: bool = False


class PathKind(Enum):
    """How the path (without its query) is compared. PREFIX is VirtualService's: plain text; SEGMENTS is Gateway API's PathPrefix: whole
    path elements. TEMPLATE: `{*}` one segment, `{**}` the rest."""

    EXACT = "exact"
    PREFIX = "prefix"
    SEGMENTS = "segments"
    REGEX = "regex"
    TEMPLATE = "template"


@dataclass(frozen=True, slots=True)
class PathMatch:
    """One comparison of the path."""

    kind: PathKind
    value: str
    ignore_case: bool = False


@dataclass(frozen=True, slots=True)
class NamedMatch:
    """A header or query parameter. `name` of a header is lower-case, `:scheme`, `:method`, `:authority` included.

    `inverted`: holds where the match does not; a missing header is then the empty text, except for PRESENT.
    `claim`: not empty for VirtualService's `@request.auth.claims`: the path of a JWT claim, and `name` is empty.
    """

    name: str
    match: TextMatch
    inverted: bool = False
    claim: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestMatch:
    """An AND; everything empty matches every request."""

    path: PathMatch | None = None
    method: TextMatch | None = None
    headers: tuple[NamedMatch, ...] = ()
    query: tuple[NamedMatch, ...] = ()
    port: int = 0
    """Service port; 0 any."""
    client_namespaces: tuple[str, ...] = ()
    """Consumer routes: only clients of these namespaces. Empty: everybody."""
    name: str = ""


# ---------------------------------------------------------------------------------------------------- what a route does


@dataclass(frozen=True, slots=True)
class HeaderEdits:
    """In this order: remove, set (overwrite), add (append a value). Names lower-case. Values may hold Envoy's `%VARIABLE%`s."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


NO_EDITS = HeaderEdits()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Of the request, before it goes on. At most one of `path`, `prefix`, `regex` is not None."""

    authority: str | None = None
    path: str | None = None
    """The whole path; the query is kept."""
    prefix: str | None = None
    """Replaces what a PREFIX, SEGMENTS or EXACT match matched."""
    regex: tuple[str, str] | None = None
    """(RE2 pattern, substitution with \\1)."""


@dataclass(frozen=True, slots=True)
class Redirect:
    """The proxy's own answer with `location`. None keeps what the request had."""

    status: int = 302
    scheme: str | None = None
    authority: str | None = None
    port: int | None = None
    """None: see `derive_port`. 80 and 443 are left out where they are the scheme's own."""
    derive_port: str = ""
    """FROM_PROTOCOL_DEFAULT, FROM_REQUEST_PORT, FROM_HOST (a VirtualService that says nothing: the port that Host has) or empty:
    Gateway API's rule (port of the scheme if one is given, else the listener's)."""
    path: str | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class DirectResponse:
    """The proxy's own answer."""

    status: int
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Fault:
    """Injected before the request goes on: first the delay, then the abort, each by its own dice."""

    delay: float = 0.0
    delay_share: float = 0.0
    abort_status: int = 0
    """HTTP status; 0 none."""
    abort_grpc: int | None = None
    abort_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Cors:
    """Cross-origin answers. `*` in `methods` and `headers` echoes what was asked for."""

    origins: tuple[TextMatch, ...] = ()
    methods: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    expose: tuple[str, ...] = ()
    max_age: float | None = None
    credentials: bool = False
    forward_unmatched_preflights: bool = True
    """False (Gateway API always): an unmatched preflight is answered 200 without CORS headers."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """A copy of a share of the requests, its answer thrown away."""

    cluster: str
    share: float = 1.0


class RetryOn(Enum):
    """Conditions, Envoy's names."""

    FIVE_XX = "5xx"
    GATEWAY_ERROR = "gateway-error"
    RESET = "reset"
    RESET_BEFORE_REQUEST = "reset-before-request"
    CONNECT_FAILURE = "connect-failure"
    REFUSED_STREAM = "refused-stream"
    RETRIABLE_4XX = "retriable-4xx"
    RETRIABLE_STATUS_CODES = "retriable-status-codes"
    RETRIABLE_HEADERS = "retriable-headers"
    ENVOY_RATELIMITED = "envoy-ratelimited"
    CANCELLED = "cancelled"
    DEADLINE_EXCEEDED = "deadline-exceeded"
    RESOURCE_EXHAUSTED = "resource-exhausted"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"


ISTIO_RETRY_ON = (
    RetryOn.CONNECT_FAILURE,
    RetryOn.REFUSED_STREAM,
    RetryOn.UNAVAILABLE,
    RetryOn.CANCELLED,
    RetryOn.RETRIABLE_STATUS_CODES,
)


@dataclass(frozen=True, slots=True)
class Retry:
    """`attempts` beyond the first try. Back-off before retry N: uniform in [0, min((2^N - 1)·base, maximum))."""

    attempts: int = 2
    on: tuple[RetryOn, ...] = ISTIO_RETRY_ON
    status_codes: tuple[int, ...] = ()
    per_try: float = 0.0
    """0: none."""
    base: float = 0.025
    maximum: float = 0.25
    remote_localities: bool = False
    avoid_previous_hosts: bool = True


DEFAULT_RETRY = Retry()
"""Istio's, where nothing is said of retries."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A token bucket in each worker: `burst` tokens at most, `tokens` more each `seconds`."""

    tokens: int
    seconds: float
    burst: int
    per_client: bool = False
    """A bucket for each client identity."""
    origin: str = ""
    """The object that it is on. Routes of one port with the same limit of the same object share its buckets; empty: each has its own."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A share of a route's requests. `cluster` is a key of `ProxyConfig.clusters`; where there is none, `status` is the answer."""

    cluster: str
    weight: int = 1
    status: int = 0
    """0: forward. 500 (Gateway API: invalid backend) or 503 (VirtualService: unknown cluster, flag NC)."""
    request: HeaderEdits = HeaderEdits()
    response: HeaderEdits = HeaderEdits()
    authority: str = ""
    """Overrides Host (a destination's own header edit); a route's rewrite wins."""


@dataclass(frozen=True, slots=True)
class Route:
    """What happens to requests that one of `matches` matches (none: all). Order is the caller's: the first that matches wins.

    Exactly one of `redirect`, `direct` and `backends` decides; no backends, or all of weight 0, is answered 500.
    """

    name: str
    """`NAMESPACE/NAME/rule-N` or the rule's own name, for access logs; `default` for a service without routes."""
    origin: str = ""
    """The object that it came from, as `ObjectKey` writes it."""
    matches: tuple[RequestMatch, ...] = ()
    backends: tuple[Backend, ...] = ()
    redirect: Redirect | None = None
    direct: DirectResponse | None = None
    rewrite: Rewrite | None = None
    request: HeaderEdits = HeaderEdits()
    response: HeaderEdits = HeaderEdits()
    mirrors: tuple[Mirror, ...] = ()
    cors: Cors | None = None
    fault: Fault | None = None
    timeout: float = 0.0
    """The whole request with its retries; 0: none."""
    retry: Retry | None = Retry()
    """None: no retries."""
    rate_limits: tuple[RateLimit, ...] = ()


@dataclass(frozen=True, slots=True)
class TcpRoute:
    """Weighted targets of a TCP port's connections. `backends` carry no header edits. No backends: closed."""

    name: str
    origin: str = ""
    backends: tuple[Backend, ...] = ()
    sni: tuple[str, ...] = ()
    """TLS passthrough of a gateway: server names, `*.` allowed in front. Empty: any."""
