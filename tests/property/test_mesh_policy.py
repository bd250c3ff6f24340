"""The verdict against a tiny evaluator that was written from the algebra's description, and properties of any verdict."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.builders import index, workload
from ztunnel.mesh.addresses import parse_block
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.policy import Connection, VerdictReason, decide
from ztunnel.mesh.rules import Action, Cidr, Clause, Match, Policy, Rule, Scope, ServiceAccountMatch, StringKind, StringMatch

NAMES = st.sampled_from(["a", "b", "ab", "shop"])
IDENTITIES = st.builds(SpiffeId, st.sampled_from(["cluster.local", "td"]), NAMES, NAMES)
ADDRESSES = st.sampled_from(["10.0.0.1", "10.0.0.2", "10.1.0.1", "fd00::1", "fd00::2", "::a00:1"])
PORTS = st.sampled_from([80, 81, 8080])


@st.composite
def blocks(draw: st.DrawFn) -> Cidr:
    address = draw(ADDRESSES)
    block = parse_block(f"{address}/{draw(st.integers(0, 128 if ':' in address else 32))}")
    assert block is not None
    return block


def strings(values: st.SearchStrategy[str]) -> st.SearchStrategy[StringMatch]:
    @st.composite
    def one(draw: st.DrawFn) -> StringMatch:
        kind, value = draw(st.sampled_from(StringKind)), draw(values)
        cut = draw(st.integers(1, len(value)))
        cuts = {StringKind.PRESENCE: "", StringKind.PREFIX: value[:cut], StringKind.SUFFIX: value[-cut:], StringKind.EXACT: value}
        return StringMatch(kind, cuts[kind])

    return one()


PRINCIPALS = IDENTITIES.map(lambda identity: identity.principal)
ACCOUNTS = st.builds(ServiceAccountMatch, NAMES, NAMES)
FIELDS: dict[str, st.SearchStrategy[object]] = {
    "namespaces": strings(NAMES),
    "principals": strings(PRINCIPALS),
    "service_accounts": ACCOUNTS,
    "source_ips": blocks(),
    "destination_ips": blocks(),
    "destination_ports": PORTS,
}


@st.composite
def matches(draw: st.DrawFn) -> Match:
    """A match with up to three fields: with more, hardly any connection would match."""
    match = Match()
    for field in draw(st.lists(st.sampled_from([*FIELDS]), max_size=3, unique=True)):
        name = draw(st.sampled_from([field, f"not_{field}"]))
        values = tuple(draw(st.lists(FIELDS[field], min_size=1, max_size=2)))
        match = replace(match, **{name: values})  # type: ignore[arg-type]  # one field by name
    return match


MATCHES = matches()
CLAUSES = st.lists(MATCHES, max_size=2).map(lambda matches: Clause(tuple(matches)))
RULES = st.lists(CLAUSES, max_size=2).map(lambda clauses: Rule(tuple(clauses)))
POLICIES = st.builds(
    Policy,
    name=NAMES,
    namespace=st.just("default"),
    scope=st.just(Scope.NAMESPACE),
    action=st.sampled_from(Action),
    rules=st.lists(RULES, max_size=2).map(tuple),
    dry_run=st.booleans(),
)
CONNECTIONS = st.builds(Connection, ADDRESSES, st.none() | IDENTITIES, ADDRESSES, PORTS)


# The reference: slow, obvious, and sharing no code with what it judges.


def text_matches(pattern: StringMatch, value: str | None) -> bool:
    if value is None:
        return False
    return {
        StringKind.EXACT: value == pattern.value,
        StringKind.PREFIX: value.startswith(pattern.value),
        StringKind.SUFFIX: value.endswith(pattern.value),
        StringKind.PRESENCE: value != "",
    }[pattern.kind]


def inside(block: Cidr, address: str) -> bool:
    return ip_address(address) in ip_network(f"{block.network}/{block.prefix}")


def match_matches(match: Match, call: Connection) -> bool:
    if match == Match():
        return False
    who = call.identity
    principal = None if who is None else f"{who.trust_domain}/ns/{who.namespace}/sa/{who.service_account}"
    namespace = None if who is None else who.namespace
    account = None if who is None else ServiceAccountMatch(who.namespace, who.service_account)
    pairs = [
        ([text_matches(each, principal) for each in match.principals], [text_matches(each, principal) for each in match.not_principals]),
        ([text_matches(each, namespace) for each in match.namespaces], [text_matches(each, namespace) for each in match.not_namespaces]),
        ([each == account for each in match.service_accounts], [each == account for each in match.not_service_accounts]),
        ([inside(each, call.source_ip) for each in match.source_ips], [inside(each, call.source_ip) for each in match.not_source_ips]),
        (
            [inside(each, call.destination_ip) for each in match.destination_ips],
            [inside(each, call.destination_ip) for each in match.not_destination_ips],
        ),
        (
            [each == call.destination_port for each in match.destination_ports],
            [each == call.destination_port for each in match.not_destination_ports],
        ),
    ]
    return all((not wanted or any(wanted)) and not any(unwanted) for wanted, unwanted in pairs)


def clause_matches(clause: Clause, call: Connection) -> bool:
    return not clause.matches or any(match_matches(match, call) for match in clause.matches)


def first_match(policies: list[Policy], call: Connection) -> tuple[Policy, int] | None:
    for policy in policies:
        for place, rule in enumerate(policy.rules):
            if all(clause_matches(clause, call) for clause in rule.clauses):
                return policy, place
    return None


def policy_matches(policy: Policy, call: Connection) -> bool:
    return first_match([policy], call) is not None


def allowed(policies: list[Policy], call: Connection) -> bool:
    enforced = [policy for policy in policies if not policy.dry_run]
    if any(policy_matches(policy, call) for policy in enforced if policy.action is Action.DENY):
        return False
    allows = [policy for policy in enforced if policy.action is Action.ALLOW]
    return not allows or any(policy_matches(policy, call) for policy in allows)


@given(st.lists(POLICIES, max_size=4), CONNECTIONS)
def test_the_verdict_is_the_references(policies: list[Policy], call: Connection) -> None:
    assert decide(policies, call).allowed == allowed(policies, call)


@given(st.lists(POLICIES, max_size=12), CONNECTIONS)
def test_the_policy_that_is_named_is_the_first_that_matches(policies: list[Policy], call: Connection) -> None:
    """Rules are looked up by key; the reference tries all of them in order."""
    enforced = [replace(policy, name=f"p{place}") for place, policy in enumerate(policies) if not policy.dry_run]
    denies = [policy for policy in enforced if policy.action is Action.DENY]
    allows = [policy for policy in enforced if policy.action is Action.ALLOW]
    found = first_match(denies, call) or first_match(allows, call)
    verdict = decide(enforced, call)
    if found is not None:
        assert (verdict.policy, verdict.rule) == (f"AuthorizationPolicy default/{found[0].name}", found[1])
    else:
        assert (verdict.rule, len(verdict.tried)) == (None, len(allows))


@given(MATCHES, CONNECTIONS)
def test_a_single_match_is_the_references(match: Match, call: Connection) -> None:
    policy = Policy("x", "default", Scope.NAMESPACE, Action.ALLOW, (Rule((Clause((match,)),)),))
    assert decide([policy], call).allowed == match_matches(match, call)


@given(st.lists(POLICIES, max_size=3), POLICIES, CONNECTIONS, st.integers(0, 3))
def test_adding_a_deny_never_widens_access(policies: list[Policy], added: Policy, call: Connection, place: int) -> None:
    denying = replace(added, action=Action.DENY)
    more = [*policies[:place], denying, *policies[place:]]
    assert decide(policies, call).allowed or not decide(more, call).allowed


@given(st.lists(POLICIES, max_size=3), POLICIES, CONNECTIONS)
def test_a_dry_run_policy_changes_no_verdict(policies: list[Policy], added: Policy, call: Connection) -> None:
    with_it, without = decide([*policies, replace(added, dry_run=True)], call), decide(policies, call)
    assert replace(with_it, dry_run=without.dry_run) == without
    assert len(with_it.dry_run) == len(without.dry_run) + 1


@given(st.lists(POLICIES, max_size=3), POLICIES, CONNECTIONS)
def test_a_dry_run_foretells_what_enforcing_does(policies: list[Policy], added: Policy, call: Connection) -> None:
    foretold = decide([*policies, replace(added, dry_run=True)], call)
    enforced = decide([*policies, replace(added, dry_run=False)], call)
    if foretold.reason is not VerdictReason.DENIED and not (foretold.reason is VerdictReason.NOT_ALLOWED and added.action is Action.ALLOW):
        assert enforced.allowed == (foretold.allowed and not foretold.dry_run[-1].denies)


@given(st.lists(POLICIES, max_size=3), CONNECTIONS)
def test_order_decides_which_policy_is_named_but_not_the_verdict(policies: list[Policy], call: Connection) -> None:
    verdict, reverse = decide(policies, call), decide(policies[::-1], call)
    assert (verdict.allowed, verdict.reason) == (reverse.allowed, reverse.reason)


@given(st.lists(POLICIES, max_size=3, unique_by=lambda policy: policy.key), CONNECTIONS)
def test_the_index_decides_the_same(policies: list[Policy], call: Connection) -> None:
    local = workload("a", "10.0.0.1")
    built = index(local, *policies)
    assert built.decide(local, call) == built.decide(local, call) == decide(built.policies_for(local), call)
    assert built.decide(local, call).allowed == allowed(policies, call)
