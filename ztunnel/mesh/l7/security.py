"""Authorization and authentication of requests as values: what an AuthorizationPolicy, a RequestAuthentication and MeshConfig's
providers say to an L7 proxy. Semantics: Istio's (a rule: one of `sources` and one of `operations` and all `conditions`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ztunnel.mesh.l7.routes import TextMatch
from ztunnel.mesh.rules import Cidr, ServiceAccountMatch


class L7Action(Enum):
    """What a policy does with what it matches. CUSTOM asks an external authorizer."""

    ALLOW = "ALLOW"
    DENY = "DENY"
    AUDIT = "AUDIT"
    CUSTOM = "CUSTOM"


@dataclass(frozen=True, slots=True)
class Source:
    """Who asks: an AND over the fields that are not empty; within one an OR."""

    principals: tuple[TextMatch, ...] = ()
    not_principals: tuple[TextMatch, ...] = ()
    request_principals: tuple[TextMatch, ...] = ()
    not_request_principals: tuple[TextMatch, ...] = ()
    namespaces: tuple[TextMatch, ...] = ()
    not_namespaces: tuple[TextMatch, ...] = ()
    trust_domains: tuple[TextMatch, ...] = ()
    not_trust_domains: tuple[TextMatch, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()
    ips: tuple[Cidr, ...] = ()
    not_ips: tuple[Cidr, ...] = ()
    remote_ips: tuple[Cidr, ...] = ()
    not_remote_ips: tuple[Cidr, ...] = ()


@dataclass(frozen=True, slots=True)
class Operation:
    """What is asked for: as `Source`. `ports` are service ports (a gateway's: its own)."""

    hosts: tuple[TextMatch, ...] = ()
    not_hosts: tuple[TextMatch, ...] = ()
    ports: tuple[int, ...] = ()
    not_ports: tuple[int, ...] = ()
    methods: tuple[TextMatch, ...] = ()
    not_methods: tuple[TextMatch, ...] = ()
    paths: tuple[TextMatch, ...] = ()
    """Of the path without its query. `path_templates` (`{*}` one segment, `{**}` any rest) are alternatives to them."""
    not_paths: tuple[TextMatch, ...] = ()
    path_templates: tuple[str, ...] = ()
    not_path_templates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Condition:
    """One `when`: `key` as in the manifest (`request.headers`, `request.auth.claims`, `source.ip`, …), `path` what stands in brackets.

    Blocks (`cidrs`) for the keys that hold addresses, texts for the others; ports are texts.
    """

    key: str
    path: tuple[str, ...] = ()
    values: tuple[TextMatch, ...] = ()
    not_values: tuple[TextMatch, ...] = ()
    cidrs: tuple[Cidr, ...] = ()
    not_cidrs: tuple[Cidr, ...] = ()


@dataclass(frozen=True, slots=True)
class L7Rule:
    """Empty lists match everything."""

    sources: tuple[Source, ...] = ()
    operations: tuple[Operation, ...] = ()
    conditions: tuple[Condition, ...] = ()
    never: bool = False
    """Keeps the place of a rule that cannot be enforced and so never matches."""


@dataclass(frozen=True, slots=True)
class L7Policy:
    """One AuthorizationPolicy. No rules: never matches (ALLOW without rules denies all). `tcp_rules` is what is left of the rules for
    a TCP port, where attributes of requests do not exist (ALLOW loses such rules, DENY and AUDIT only the attributes)."""

    name: str
    namespace: str
    action: L7Action
    rules: tuple[L7Rule, ...] = ()
    tcp_rules: tuple[L7Rule, ...] = ()
    provider: str = ""
    dry_run: bool = False
    reason: str = ""
    """What of it is not enforced as written, or that it stands for a refused manifest, and why. For the operator."""

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class JwtLocation:
    """Where a token is looked for: exactly one is not empty."""

    header: str = ""
    prefix: str = ""
    """In front of the token in the header's value."""
    parameter: str = ""
    cookie: str = ""


@dataclass(frozen=True, slots=True)
class JwtRule:
    """One issuer. `jwks` (JSON text) or `jwks_uri`; neither: found through `<issuer>/.well-known/openid-configuration`."""

    issuer: str
    audiences: tuple[str, ...] = ()
    jwks: str = ""
    jwks_uri: str = ""
    locations: tuple[JwtLocation, ...] = (JwtLocation(header="authorization", prefix="Bearer "), JwtLocation(parameter="access_token"))
    forward_token: bool = False
    payload_header: str = ""
    claim_headers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(header, path of the claim)."""
    timeout: float = 5.0
    space_delimited: tuple[str, ...] = ("scope", "permission")


@dataclass(frozen=True, slots=True)
class JwtAuthentication:
    """One RequestAuthentication. `reason` not empty: it was refused, so every token is (401)."""

    name: str
    namespace: str
    rules: tuple[JwtRule, ...] = ()
    reason: str = ""

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


class AuthorizerKind(Enum):
    """How an external authorizer is spoken to."""

    HTTP = "envoyExtAuthzHttp"
    GRPC = "envoyExtAuthzGrpc"


@dataclass(frozen=True, slots=True)
class ExtensionProvider:
    """An external authorizer of MeshConfig.extensionProviders. `cluster`: a key of `ProxyConfig.clusters`; empty: `problem` says why."""

    name: str
    kind: AuthorizerKind
    cluster: str
    authority: str = ""
    path_prefix: str = ""
    timeout: float = 600.0
    fail_open: bool = False
    status_on_error: int = 403
    include_headers: tuple[TextMatch, ...] = ()
    add_headers: tuple[tuple[str, str], ...] = ()
    headers_upstream: tuple[TextMatch, ...] = ()
    """Of the authorizer's answer, those that go on to the application when it allows."""
    headers_downstream_deny: tuple[TextMatch, ...] = ()
    headers_downstream_allow: tuple[TextMatch, ...] = ()
    body_bytes: int = 0
    """Of the request's body sent along; 0 none."""
    body_partial: bool = False
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Claims:
    """A verified token: what is known of the user. `values` is the payload, JSON values."""

    issuer: str
    subject: str
    audiences: tuple[str, ...] = ()
    presenter: str = ""
    values: dict[str, object] = field(default_factory=dict)

    @property
    def principal(self) -> str:
        """`issuer/subject`."""
        return f"{self.issuer}/{self.subject}"
