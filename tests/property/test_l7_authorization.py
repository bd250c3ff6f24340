"""The compiled guard against a tiny evaluator that was written from the algebra's description; normalisation, whatever the path."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from waypoint.http.authorization import Guard
from waypoint.http.messages import Client, Request
from waypoint.http.paths import normalize
from ztunnel.mesh.addresses import parse_block
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.config import PathNormalization
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import Claims, Condition, L7Action, L7Policy, L7Rule, Operation, Source
from ztunnel.mesh.rules import Cidr, ServiceAccountMatch

NAMES = ["a", "b", "ab"]
PATHS = ["/a", "/ab", "/a/b", "/b"]
IDENTITIES = st.builds(SpiffeId, st.just("td"), st.sampled_from(NAMES), st.sampled_from(NAMES))
ADDRESSES = ["10.0.0.1", "10.1.0.1", "fd00::1"]
BLOCKS = [parse_block(text) for text in ("10.0.0.0/16", "10.0.0.0/8", "fd00::/8", "10.1.0.1")]


def texts(values: list[str]) -> st.SearchStrategy[tuple[TextMatch, ...]]:
    @st.composite
    def one(draw: st.DrawFn) -> TextMatch:
        kind, value = draw(st.sampled_from([each for each in TextKind if each is not TextKind.REGEX])), draw(st.sampled_from(values))
        cut = draw(st.integers(1, len(value)))
        cuts = {TextKind.PRESENT: "", TextKind.PREFIX: value[:cut], TextKind.SUFFIX: value[-cut:], TextKind.EXACT: value}
        return TextMatch(kind, cuts[kind])

    return st.lists(one(), min_size=1, max_size=2).map(tuple)


PRINCIPALS = texts(["td/ns/a/sa/a", "td/ns/b/sa/ab"])
CIDRS = st.lists(st.sampled_from([block for block in BLOCKS if block]), min_size=1, max_size=2).map(tuple)
SOURCE: dict[str, st.SearchStrategy[object]] = {
    "principals": PRINCIPALS,
    "namespaces": texts(NAMES),
    "service_accounts": st.lists(st.builds(ServiceAccountMatch, st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1).map(tuple),
    "ips": CIDRS,
    "request_principals": texts(["i/a", "i/b"]),
}
OPERATION: dict[str, st.SearchStrategy[object]] = {
    "hosts": texts(NAMES),
    "ports": st.lists(st.sampled_from([80, 81]), min_size=1).map(tuple),
    "methods": texts(["GET", "PUT"]),
    "paths": texts(PATHS),
}


@st.composite
def parts(draw: st.DrawFn, empty: Source | Operation, fields: dict[str, st.SearchStrategy[object]]) -> Source | Operation:
    part = empty
    for field in draw(st.lists(st.sampled_from([*fields]), min_size=1, max_size=2, unique=True)):
        part = replace(part, **{draw(st.sampled_from([field, f"not_{field}"])): draw(fields[field])})  # type: ignore[arg-type]  # by name
    return part


CONDITIONS = st.builds(
    Condition, st.just("request.headers"), st.just(("x",)), st.just(()) | texts(NAMES), st.just(()) | texts(NAMES)
) | st.builds(Condition, st.just("source.namespace"), st.just(()), texts(NAMES), st.just(()))
RULES = st.builds(
    L7Rule,
    st.lists(parts(Source(), SOURCE), max_size=2).map(tuple),
    st.lists(parts(Operation(), OPERATION), max_size=2).map(tuple),
    st.lists(CONDITIONS, max_size=1).map(tuple),
)
POLICIES = st.lists(
    st.builds(
        L7Policy,
        name=st.sampled_from(NAMES),
        namespace=st.just("ns"),
        action=st.sampled_from([L7Action.ALLOW, L7Action.DENY]),
        rules=st.lists(RULES, max_size=4).map(tuple),
    ),
    max_size=4,
)
CLIENTS = st.builds(Client, st.none() | IDENTITIES, st.sampled_from(ADDRESSES), service_port=st.sampled_from([80, 81]))
REQUESTS = st.builds(
    lambda method, path, host, header: Request(method, path, host, [] if header is None else [(b"x", header)]),
    st.sampled_from([b"GET", b"PUT"]),
    st.sampled_from([path.encode() for path in PATHS] + [b"/a?/b"]),
    st.sampled_from([b"a", b"AB"]),
    st.none() | st.sampled_from([b"a", b"ab"]),
)
CLAIMS = st.none() | st.builds(Claims, st.just("i"), st.sampled_from(["", "a", "b"]))


# The reference: slow, obvious, and sharing no code with what it judges.


def text_matches(match: TextMatch, value: str) -> bool:
    if value == "":
        return False
    return {
        TextKind.EXACT: value == match.value,
        TextKind.PREFIX: value.startswith(match.value),
        TextKind.SUFFIX: value.endswith(match.value),
        TextKind.PRESENT: True,
    }[match.kind]


def values_of(request: Request, client: Client, claims: Claims | None) -> dict[str, object]:
    identity = client.identity
    return {
        "principals": identity.principal if identity else "",
        "namespaces": identity.namespace if identity else "",
        "service_accounts": ServiceAccountMatch(identity.namespace, identity.service_account) if identity else None,
        "ips": client.address,
        "request_principals": f"{claims.issuer}/{claims.subject}" if claims and claims.subject else "",
        "hosts": request.authority.decode().lower(),
        "ports": client.service_port,
        "methods": request.method.decode(),
        "paths": request.path.decode().split("?")[0],
    }


def is_one_of(wanted: object, value: object) -> bool:
    assert isinstance(wanted, tuple)
    for each in wanted:
        if isinstance(each, TextMatch):
            assert isinstance(value, str)
            if text_matches(each, value):
                return True
        elif isinstance(each, Cidr):
            network = ip_network(f"{each.network}/{each.prefix}")
            address = ip_address(str(value))
            if network.version == address.version and address in network:
                return True
        elif each == value:
            return True
    return False


def part_matches(part: Source | Operation, values: dict[str, object]) -> bool:
    for name, value in values.items():
        wanted, unwanted = getattr(part, name, ()), getattr(part, f"not_{name}", ())
        if (wanted and not is_one_of(wanted, value)) or (unwanted and is_one_of(unwanted, value)):
            return False
    return True


def rule_matches(rule: L7Rule, request: Request, client: Client, claims: Claims | None) -> bool:
    values = values_of(request, client, claims)
    for condition in rule.conditions:
        header = dict(request.headers).get(b"x", b"").decode()
        value = header if condition.key == "request.headers" else values["namespaces"]
        if condition.values and not is_one_of(condition.values, value):
            return False
        if condition.not_values and is_one_of(condition.not_values, value):
            return False
    return (not rule.sources or any(part_matches(part, values) for part in rule.sources)) and (
        not rule.operations or any(part_matches(part, values) for part in rule.operations)
    )


@given(POLICIES, REQUESTS, CLIENTS, CLAIMS)
def test_the_guard_decides_as_the_algebra_says(policies: list[L7Policy], request: Request, client: Client, claims: Claims | None) -> None:
    def first(action: L7Action) -> tuple[str, int] | None:
        for policy in policies:
            for index, rule in enumerate(policy.rules):
                if policy.action is action and rule_matches(rule, request, client, claims):
                    return policy.key, index
        return None

    verdict = Guard(policies).decide(request, client, claims)
    denied, allowed = first(L7Action.DENY), first(L7Action.ALLOW)
    expects_allow = any(policy.action is L7Action.ALLOW for policy in policies)
    assert verdict.allowed is (denied is None and (allowed is not None or not expects_allow))
    if denied or allowed:
        assert (verdict.policy, verdict.rule) == (denied or allowed)


@given(st.binary(max_size=40) | st.text("/.%2eEfF5cC\\a?#", max_size=20).map(str.encode), st.sampled_from(PathNormalization))
def test_a_normalised_path_is_stable_and_has_no_way_up(path: bytes, how: PathNormalization) -> None:
    once = normalize(path, how)
    if once is None or how is PathNormalization.NONE:
        return
    whole = once.partition(b"?")[0]
    assert not {b".", b".."} & set(whole.split(b"/"))
    assert b"\\" not in whole
    assert how is PathNormalization.BASE or b"//" not in whole
    if b"%" not in whole:
        assert normalize(once, how) == once
