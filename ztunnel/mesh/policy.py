"""The L4 authorization verdict: the one place that decides whether a connection may reach a workload.

Asked when a connection arrives and again, by the same code, for each live connection when policies change.
A policy is compiled once into closures over its non-empty fields, since most fields of most matches are empty, and rules are filed
under what a connection must have for them to match, so that a verdict costs the same with a thousand policies as with one.
Source: Istio ztunnel `rbac.rs`; the algebra is described in `rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final, NamedTuple

from ztunnel.mesh.addresses import block_bounds, number
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.rules import Action, Cidr, Match, Policy, Rule, ServiceAccountMatch, StringKind, StringMatch

NAMED_POLICIES: Final = 8
"""So many policies that did not match are named in a denial's text; it is written for each connection."""


@dataclass(slots=True, init=False)
class Connection:
    """What a verdict depends on.

    `source_ip` is the TCP peer's address (never what a header claims), `identity` None for plaintext, the destination what the
    connection will be given to: after HBONE, the target's own address and port. Addresses are canonical.
    """

    source_ip: str
    identity: SpiffeId | None
    destination_ip: str
    destination_port: int

    def __init__(self, source_ip: str, identity: SpiffeId | None, destination_ip: str, destination_port: int) -> None:
        self.source_ip = source_ip
        self.identity = identity
        self.destination_ip = destination_ip
        self.destination_port = destination_port


class VerdictReason(Enum):
    """Closed set: a metrics label."""

    NO_ALLOW_POLICY = "no_allow_policy"
    """Nothing denies, and no ALLOW policy applies: open."""
    ALLOWED = "allowed"
    DENIED = "denied"
    NOT_ALLOWED = "not_allowed"
    """ALLOW policies apply and none of them matches."""


@dataclass(frozen=True, slots=True)
class DryRun:
    """What one dry-run policy would do if it alone were enforced beside those that are."""

    policy: str
    denies: bool
    rule: int | None
    """Index of the rule that matched; None when none did."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether, by which policy and rule, and in words."""

    allowed: bool
    policy: str | None
    """`kind namespace/name` of the policy that decided; with NOT_ALLOWED the first of `tried`; None when no policy had a say."""
    reason: VerdictReason
    text: str
    """For the operator. Peers never see it."""
    rule: int | None = None
    tried: tuple[str, ...] = ()
    """For NOT_ALLOWED: the ALLOW policies that did not match."""
    dry_run: tuple[DryRun, ...] = ()


_Key = str | int | tuple[str, str]
"""A principal, namespace, port or account: something that a connection has and a rule asks for by name."""


class _Facts:
    """A connection in the form that compiled tests read."""

    __slots__ = ("account", "destination", "keys", "namespace", "port", "principal", "source")

    def __init__(self, identity: SpiffeId | None, source: tuple[int, int], destination: tuple[int, int], port: int) -> None:
        self.principal = ""
        self.namespace = ""
        self.account: tuple[str, str] | None = None
        self.source = source
        self.destination = destination
        self.port = port
        self.keys: tuple[_Key, ...]
        """All that a rule may be filed under that could match."""
        if identity is None:
            self.keys = (port,)
            return
        self.principal = identity.principal
        self.namespace = identity.namespace
        self.account = (identity.namespace, identity.service_account)
        self.keys = (self.principal, self.account, self.namespace, port)


_Test = Callable[[_Facts], bool]


class _Compiled:
    """A policy ready to be asked."""

    __slots__ = ("label", "policy", "rules")

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.label = f"{policy.kind} {policy.namespace}/{policy.name}"
        self.rules: tuple[_Test, ...] = tuple(_rule(rule) for rule in policy.rules)

    def matching_rule(self, facts: _Facts) -> int | None:
        """Index of the first rule that matches."""
        for index, test in enumerate(self.rules):
            if test(facts):
                return index
        return None


class _Filed(NamedTuple):
    """One rule of several policies, and its place among all of theirs."""

    place: int
    test: _Test
    verdict: Verdict
    """If it matches: written once, not for each connection."""


class _Rules:
    """The rules of several policies, found by a key without which they do not match. Those that have none are tried for everybody."""

    __slots__ = ("_by_key", "_for_all")

    def __init__(self, policies: Iterable[_Compiled]) -> None:
        self._by_key: dict[_Key, list[_Filed]] = {}
        self._for_all: list[_Filed] = []
        rules = [(policy, index) for policy in policies for index in range(len(policy.rules))]
        for place, (policy, index) in enumerate(rules):
            filed = _Filed(place, policy.rules[index], _verdict(policy, index))
            keys = _keys(policy.policy.rules[index])
            if keys is None:
                self._for_all.append(filed)
            else:
                for key in keys:
                    self._by_key.setdefault(key, []).append(filed)

    def first(self, facts: _Facts) -> _Filed | None:
        """The first rule that matches, in the order of the policies and of the rules in each."""
        best = next((filed for filed in self._for_all if filed.test(facts)), None) if self._for_all else None
        if self._by_key:
            for key in facts.keys:
                # A key may find what is filed under an equal text of another kind: that is tried, and does not match.
                for filed in self._by_key.get(key, ()):
                    if best is not None and filed.place > best.place:
                        break
                    if filed.test(facts):
                        best = filed
                        break
        return best


class PolicySet:
    """Policies that apply together, compiled: `decide` for those who ask more than once."""

    __slots__ = ("_allows", "_denies", "_dry_run", "_is_open", "_needs_addresses", "_otherwise")

    def __init__(self, policies: Iterable[Policy]) -> None:
        compiled = [_Compiled(policy) for policy in policies]
        self._dry_run = tuple(each for each in compiled if each.policy.dry_run)
        enforced = [each for each in compiled if not each.policy.dry_run]
        allows = tuple(each for each in enforced if each.policy.action is Action.ALLOW)
        self._denies = _Rules(each for each in enforced if each.policy.action is Action.DENY)
        self._allows = _Rules(allows)
        self._otherwise = _missed(allows) if allows else _OPEN
        # Parsing addresses costs more than the rest of a verdict, and few policies look at them.
        self._needs_addresses = any(_reads_addresses(each.policy) for each in compiled)
        self._is_open = not compiled

    def decide(self, connection: Connection) -> Verdict:
        """The verdict for one connection, as the function of this name."""
        if self._is_open:
            return _OPEN
        facts = _facts(connection, self._needs_addresses)
        verdict = self._enforced(facts)
        if not self._dry_run:
            return verdict
        return replace(verdict, dry_run=tuple(_would(policy, facts, verdict) for policy in self._dry_run))

    def _enforced(self, facts: _Facts) -> Verdict:
        matched = self._denies.first(facts) or self._allows.first(facts)
        return self._otherwise if matched is None else matched.verdict


_OPEN: Final = Verdict(True, None, VerdictReason.NO_ALLOW_POLICY, "no policy denies it and no ALLOW policy applies")


def decide(policies: Iterable[Policy], connection: Connection) -> Verdict:
    """The authorization verdict for one connection.

    Deny rules win over allow rules; with any allow policy present, no match means deny. Pure: same inputs, same verdict.
    `Index.decide` is the same verdict for a workload, from policies that it keeps compiled.

    Args:
        policies: those that apply to the destination workload (`Index.policies_for`); dry-run ones are evaluated, not enforced.
        connection: a plaintext connection has no identity, and such a peer matches no principal, namespace or account.
    Source: Istio AuthorizationPolicy, implicit enablement.
    """
    return PolicySet(policies).decide(connection)


def _reads_addresses(policy: Policy) -> bool:
    return any(
        match.source_ips or match.not_source_ips or match.destination_ips or match.not_destination_ips
        for rule in policy.rules
        for clause in rule.clauses
        for match in clause.matches
    )


def _facts(connection: Connection, with_addresses: bool) -> _Facts:
    source = number(connection.source_ip) if with_addresses else (0, 0)
    destination = number(connection.destination_ip) if with_addresses else (0, 0)
    return _Facts(connection.identity, source, destination, connection.destination_port)


def _verdict(policy: _Compiled, rule: int) -> Verdict:
    """Of a rule that matches."""
    if policy.policy.action is Action.ALLOW:
        return Verdict(True, policy.label, VerdictReason.ALLOWED, f"allowed by {policy.label}, rules[{rule}]", rule)
    text = f"denied by {policy.label}, rules[{rule}]"
    text = f"{text}: {policy.policy.reason}" if policy.policy.reason else text
    return Verdict(False, policy.label, VerdictReason.DENIED, text, rule)


def _missed(allows: tuple[_Compiled, ...]) -> Verdict:
    tried = tuple(policy.label for policy in allows)
    text = f"ALLOW policies apply and none matches; tried {', '.join(_noted(policy) for policy in allows[:NAMED_POLICIES])}"
    if len(allows) > NAMED_POLICIES:
        text += f" and {len(allows) - NAMED_POLICIES} more"
    return Verdict(False, tried[0], VerdictReason.NOT_ALLOWED, text, None, tried)


def _noted(policy: _Compiled) -> str:
    return f"{policy.label} ({policy.policy.reason})" if policy.policy.reason else policy.label


def _would(policy: _Compiled, facts: _Facts, verdict: Verdict) -> DryRun:
    rule = policy.matching_rule(facts)
    if policy.policy.action is Action.DENY:
        return DryRun(policy.label, rule is not None, rule)
    return DryRun(policy.label, rule is None and verdict.reason is not VerdictReason.ALLOWED, rule)


# Keys. A rule is filed under those of its narrowest clause: all of its clauses must match, so any of them will do.

_Ranked = tuple[int, Sequence[_Key]]
"""Keys, and how common they are among connections: the lower the number, the fewer connections have one."""


def _keys(rule: Rule) -> Iterable[_Key] | None:
    """Keys of which a connection has one if the rule matches it; None: it may have none."""
    narrowest: _Ranked | None = None
    for clause in rule.clauses:
        ranked = _keys_of_any(clause.matches)
        if ranked is not None and (narrowest is None or ranked[0] < narrowest[0]):
            narrowest = ranked
    return None if narrowest is None else dict.fromkeys(narrowest[1])


def _keys_of_any(matches: tuple[Match, ...]) -> _Ranked | None:
    """The keys of all matches together, ranked as the commonest kind among them. None: one has no key, or there is no match."""
    if len(matches) == 1:
        return _keys_of(matches[0])
    ranked = [_keys_of(match) for match in matches]
    known = [each for each in ranked if each is not None]
    if not known or len(known) < len(ranked):
        return None
    return max(rank for rank, _ in known), [key for _, keys in known for key in keys]


def _keys_of(match: Match) -> _Ranked | None:
    """What the narrowest of the match's fields asks for by name."""
    if names := _exact(match.principals):
        return 0, names
    if match.service_accounts:
        return 1, [(each.namespace, each.service_account) for each in match.service_accounts]
    if names := _exact(match.namespaces):
        return 2, names
    return (3, match.destination_ports) if match.destination_ports else None


def _exact(matches: tuple[StringMatch, ...]) -> list[str]:
    """What must be equal to one of the results; empty if it need not."""
    values = [match.value for match in matches if match.kind is StringKind.EXACT]
    return values if len(values) == len(matches) else []


# Compilation. Each function turns one level of the algebra into a test; a level with one member is that member's own test.


def _rule(rule: Rule) -> _Test:
    return _all(tuple(_any(tuple(_match(match) for match in clause.matches)) for clause in rule.clauses if clause.matches))


def _match(match: Match) -> _Test:
    tests: list[_Test] = []
    if match.principals:
        tests.append(_principals(match.principals))
    if match.not_principals:
        tests.append(_not(_principals(match.not_principals)))
    if match.namespaces:
        tests.append(_namespaces(match.namespaces))
    if match.not_namespaces:
        tests.append(_not(_namespaces(match.not_namespaces)))
    if match.service_accounts:
        tests.append(_accounts(match.service_accounts))
    if match.not_service_accounts:
        tests.append(_not(_accounts(match.not_service_accounts)))
    if match.source_ips:
        tests.append(_sources(match.source_ips))
    if match.not_source_ips:
        tests.append(_not(_sources(match.not_source_ips)))
    if match.destination_ips:
        tests.append(_destinations(match.destination_ips))
    if match.not_destination_ips:
        tests.append(_not(_destinations(match.not_destination_ips)))
    if match.destination_ports:
        tests.append(_ports(match.destination_ports))
    if match.not_destination_ports:
        tests.append(_not(_ports(match.not_destination_ports)))
    return _all(tuple(tests)) if tests else _never


def _always(_: _Facts) -> bool:
    return True


def _never(_: _Facts) -> bool:
    return False


def _all(tests: tuple[_Test, ...]) -> _Test:
    if not tests:
        return _always
    if len(tests) == 1:
        return tests[0]

    def every(facts: _Facts) -> bool:
        return all(test(facts) for test in tests)

    return every


def _any(tests: tuple[_Test, ...]) -> _Test:
    if len(tests) == 1:
        return tests[0]

    def some(facts: _Facts) -> bool:
        return any(test(facts) for test in tests)

    return some


def _not(test: _Test) -> _Test:
    return lambda facts: not test(facts)


@dataclass(frozen=True, slots=True)
class _Strings:
    """String matches sorted by how they are looked up. Nothing matches the empty string: it means that there is no identity."""

    exact: frozenset[str]
    prefixes: tuple[str, ...]
    suffixes: tuple[str, ...]
    presence: bool

    def match(self, value: str) -> bool:
        if not value:
            return False
        return self.presence or value in self.exact or value.startswith(self.prefixes) or value.endswith(self.suffixes)


def _strings(matches: tuple[StringMatch, ...]) -> _Strings:
    def of(kind: StringKind) -> tuple[str, ...]:
        return tuple(match.value for match in matches if match.kind is kind)

    return _Strings(frozenset(of(StringKind.EXACT)), of(StringKind.PREFIX), of(StringKind.SUFFIX), bool(of(StringKind.PRESENCE)))


def _principals(matches: tuple[StringMatch, ...]) -> _Test:
    strings = _strings(matches)
    return lambda facts: strings.match(facts.principal)


def _namespaces(matches: tuple[StringMatch, ...]) -> _Test:
    strings = _strings(matches)
    return lambda facts: strings.match(facts.namespace)


def _accounts(matches: tuple[ServiceAccountMatch, ...]) -> _Test:
    accounts = frozenset((match.namespace, match.service_account) for match in matches)
    return lambda facts: facts.account in accounts


def _sources(blocks: tuple[Cidr, ...]) -> _Test:
    bounds = tuple(block_bounds(block) for block in blocks)
    return lambda facts: _within(bounds, facts.source)


def _destinations(blocks: tuple[Cidr, ...]) -> _Test:
    bounds = tuple(block_bounds(block) for block in blocks)
    return lambda facts: _within(bounds, facts.destination)


def _within(bounds: tuple[tuple[int, int, int], ...], address: tuple[int, int]) -> bool:
    bits, value = address
    return any(bits == block_bits and first <= value <= last for block_bits, first, last in bounds)


def _ports(ports: tuple[int, ...]) -> _Test:
    wanted = frozenset(ports)
    return lambda facts: facts.port in wanted
