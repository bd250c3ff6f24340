"""Authorization policies as values: what `policy.decide` evaluates and what a source delivers.

The algebra is Istio's: a policy is an OR of rules, a rule an AND of clauses, a clause an OR of matches, a match an AND over
its fields; within a field, (no positive value, or one of them matches) and no negative value matches.
Edge cases (Istio ztunnel `rbac.rs`): no rules never matches (so ALLOW without rules denies all); a rule without clauses matches
everything; a clause without matches is true; a match with all fields empty never matches.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    """What a policy does with what it matches."""

    ALLOW = "ALLOW"
    DENY = "DENY"


class Scope(Enum):
    """Where a policy applies. GLOBAL: the root namespace without a selector."""

    GLOBAL = "GLOBAL"
    NAMESPACE = "NAMESPACE"
    SELECTOR = "SELECTOR"


class StringKind(Enum):
    """How a text is compared."""

    EXACT = "exact"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    PRESENCE = "presence"


@dataclass(frozen=True, slots=True)
class StringMatch:
    """`*` is PRESENCE, `*x` SUFFIX, `x*` PREFIX, anything else EXACT."""

    kind: StringKind
    value: str = ""


@dataclass(frozen=True, slots=True)
class Cidr:
    """An address block, canonical: `network` is the text of its first address, `bits` 32 or 128."""

    bits: int
    network: str
    prefix: int


@dataclass(frozen=True, slots=True)
class ServiceAccountMatch:
    """One service account, in any trust domain."""

    namespace: str
    service_account: str


@dataclass(frozen=True, slots=True)
class Match:
    """An AND over fields; see the module's text for what an empty field and an empty match mean."""

    namespaces: tuple[StringMatch, ...] = ()
    not_namespaces: tuple[StringMatch, ...] = ()
    principals: tuple[StringMatch, ...] = ()
    not_principals: tuple[StringMatch, ...] = ()
    service_accounts: tuple[ServiceAccountMatch, ...] = ()
    not_service_accounts: tuple[ServiceAccountMatch, ...] = ()
    source_ips: tuple[Cidr, ...] = ()
    not_source_ips: tuple[Cidr, ...] = ()
    destination_ips: tuple[Cidr, ...] = ()
    not_destination_ips: tuple[Cidr, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Clause:
    """An OR of matches."""

    matches: tuple[Match, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """An AND of clauses."""

    clauses: tuple[Clause, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy, from an AuthorizationPolicy or translated from a PeerAuthentication.

    `kind` names the Kubernetes kind that it came from, so that a verdict can name the object that a person can edit.
    `reason` is shown with a denial when the policy exists for a reason of its own (a refused manifest).
    """

    name: str
    namespace: str
    scope: Scope
    action: Action
    rules: tuple[Rule, ...] = ()
    kind: str = "AuthorizationPolicy"
    dry_run: bool = False
    reason: str = ""

    @property
    def key(self) -> str:
        """`kind/namespace/name`: unique, and what a delta removes it by and a workload lists in `policies`."""
        return f"{self.kind}/{self.namespace}/{self.name}"
