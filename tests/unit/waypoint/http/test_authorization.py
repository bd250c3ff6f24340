"""The L7 verdict: every field against requests that differ in it, the order of actions, texts and details."""

from __future__ import annotations

import pytest

from tests.kit.builders import authorization
from waypoint.http.authorization import Ask, Guard, Verdict
from waypoint.http.messages import Client, Headers, Request
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.security import AuthorizerKind, Claims, ExtensionProvider, L7Policy
from ztunnel.mesh.manifests.authorization import read_authorization_policy
from ztunnel.mesh.manifests.authorization_l7 import refused_l7_policy
from ztunnel.mesh.manifests.fields import Field

CART = SpiffeId("cluster.local", "shop", "cart")
CLAIMS = Claims("iss", "sub", ("a", "b"), "azp", {"role": "admin", "n": 5, "on": True, "groups": ["x", "y"], "deep": {"er": ["z"]}})


def policy(name: str = "x", rules: list[object] | None = None, action: str = "ALLOW", *, dry_run: bool = False, **spec: object) -> L7Policy:
    meta = {"annotations": {"istio.io/dry-run": "true"}} if dry_run else None
    target = [{"kind": "Service", "name": "s", "group": ""}]
    body = authorization(name, meta=meta)
    body["spec"] = {"targetRefs": target, "action": action, "rules": rules or [], **spec}
    found = read_authorization_policy(Field("test", "", body)).layer7
    assert found is not None
    return found


def client(identity: SpiffeId | None = CART, address: str = "10.0.0.1", port: int = 80) -> Client:
    return Client(identity, address, service_port=port, destination="10.9.0.1", sni="a.b")


def request(path: bytes = b"/a/b?q=1", method: bytes = b"GET", authority: bytes = b"Shop:80", headers: Headers | None = None) -> Request:
    return Request(method, path, authority, headers or [])


def decide(*policies: L7Policy, of: Request | None = None, by: Client | None = None, claims: Claims | None = CLAIMS) -> Verdict:
    return Guard(policies).decide(of or request(headers=HEADERS), by or client(), claims)


HEADERS: Headers = [(b"x-user", b"alice"), (b"x-forwarded-for", b"1.2.3.4, 5.6.7.8")]


def source(**fields: object) -> dict[str, object]:
    return {"from": [{"source": fields}]}


def operation(**fields: object) -> dict[str, object]:
    return {"to": [{"operation": fields}]}


def when(key: str, *values: str) -> dict[str, object]:
    return {"when": [{"key": key, "values": list(values)}]}


MATCHES: list[tuple[dict[str, object], dict[str, object]]] = [
    (source(principals=["cluster.local/ns/shop/sa/cart"]), source(principals=["cluster.local/ns/shop/sa/car"])),
    (source(principals=["cluster.local/ns/shop/*"]), source(principals=["cluster.local/ns/lab/*"])),
    (source(principals=["*/sa/cart"]), source(principals=["*/sa/x"])),
    (source(notPrincipals=["x"]), source(notPrincipals=["*"])),
    (source(namespaces=["lab", "shop"]), source(namespaces=["lab"])),
    (source(trustDomains=["cluster.local"]), source(trustDomains=["other"])),
    (source(serviceAccounts=["shop/cart"]), source(serviceAccounts=["cart"])),
    (source(notServiceAccounts=["lab/cart"]), source(notServiceAccounts=["shop/cart"])),
    (source(ipBlocks=["10.0.0.0/8"]), source(ipBlocks=["11.0.0.0/8", "fd00::/8"])),
    (source(remoteIpBlocks=["5.6.7.8"]), source(remoteIpBlocks=["1.2.3.4"])),
    (source(requestPrincipals=["iss/sub"]), source(requestPrincipals=["iss/su"])),
    (source(requestPrincipals=["*"]), source(notRequestPrincipals=["*"])),
    (operation(hosts=["SHOP:80"]), operation(hosts=["shop"])),
    (operation(hosts=["shop*"]), operation(notHosts=["*:80"])),
    (operation(ports=["80", "81"]), operation(notPorts=["80"])),
    (operation(methods=["PUT", "GET"]), operation(methods=["get"])),
    (operation(paths=["/a/b"]), operation(paths=["/a"])),
    (operation(paths=["/a/*"]), operation(paths=["/b/*"])),
    (operation(paths=["*/b"]), operation(paths=["*b?q=1"])),
    (operation(paths=["/{*}/b", "/x"]), operation(paths=["/{*}", "/x"])),
    (operation(notPaths=["/x"]), operation(notPaths=["/a/{**}"])),
    (when("request.headers[X-User]", "alice"), when("request.headers[x-user]", "Alice")),
    (when("request.headers[x-user]", "*"), when("request.headers[x-none]", "*")),
    (when("request.headers[:authority]", "Shop:80"), when("request.headers[:authority]", "shop:80")),
    (when("source.ip", "10.0.0.1"), when("source.ip", "10.0.0.2")),
    (when("remote.ip", "5.6.7.8"), when("remote.ip", "10.0.0.1")),
    (when("destination.ip", "10.9.0.1"), when("destination.ip", "10.9.0.2")),
    (when("destination.port", "80"), when("destination.port", "81")),
    (when("connection.sni", "a.b"), when("connection.sni", "a")),
    (when("source.namespace", "shop"), when("source.namespace", "lab")),
    (when("source.principal", "cluster.local/ns/shop/sa/cart"), when("source.principal", "x")),
    (when("source.trustDomain", "cluster.local"), when("source.trustDomain", "x")),
    (when("source.serviceAccount", "shop/cart"), when("source.serviceAccount", "lab/cart")),
    (when("request.auth.principal", "iss/sub"), when("request.auth.principal", "iss")),
    (when("request.auth.audiences", "b"), when("request.auth.audiences", "c")),
    (when("request.auth.presenter", "azp"), when("request.auth.presenter", "a")),
    (when("request.auth.claims[role]", "adm*"), when("request.auth.claims[role]", "user")),
    (when("request.auth.claims[groups]", "y"), when("request.auth.claims[groups]", "z")),
    (when("request.auth.claims[deep][er]", "z"), when("request.auth.claims[deep][er][est]", "z")),
    (when("request.auth.claims[n]", "5"), when("request.auth.claims[n]", "6")),
    (when("request.auth.claims[on]", "true"), when("request.auth.claims[on]", "false")),
    ({}, {"when": [{"key": "source.namespace", "notValues": ["shop"]}]}),
]


@pytest.mark.parametrize(("matching", "other"), MATCHES, ids=str)
def test_each_field_matches_what_it_says(matching: object, other: object) -> None:
    assert decide(policy(rules=[matching])).allowed
    assert not decide(policy(rules=[other])).allowed
    both = policy(rules=[other, matching], action="DENY")
    assert decide(both).matched == "ns[default]-policy[x]-rule[1]"
    assert decide(policy(rules=[other], action="DENY")).allowed


@pytest.mark.parametrize("rule", [matching for matching, _ in MATCHES if "from" in matching and "not" not in str(matching)], ids=str)
def test_who_has_no_identity_and_no_token_matches_no_source(rule: object) -> None:
    nobody = client(None, "9.9.9.9")
    assert not decide(policy(rules=[rule]), of=request(), by=nobody, claims=None).allowed


def test_fields_are_and_lists_are_or() -> None:
    rule = {
        **source(namespaces=["lab", "shop"], ipBlocks=["10.0.0.0/8"]),
        **operation(methods=["GET"], paths=["/a*"]),
        "when": [{"key": "request.headers[x-user]", "values": ["alice", "bob"]}, {"key": "source.namespace", "notValues": ["lab"]}],
    }
    guarded = policy(rules=[rule])
    assert decide(guarded).allowed
    assert not decide(guarded, by=client(address="11.0.0.1")).allowed
    assert not decide(guarded, of=request(method=b"PUT", headers=HEADERS)).allowed
    assert not decide(guarded, of=request()).allowed


def test_the_order_of_actions() -> None:
    allow, deny = policy("allow", [{}]), policy("deny", [operation(methods=["GET"])], "DENY")
    audit = policy("audit", [{}], "AUDIT")
    assert decide().allowed
    assert decide(policy("none", [], "DENY")).allowed
    nothing = decide(policy("nobody", []))
    assert (nothing.allowed, nothing.matched) == (False, "none")
    assert nothing.text == "ALLOW policies apply and none matches; tried AuthorizationPolicy default/nobody"
    allowed = decide(allow, audit)
    assert (allowed.allowed, allowed.policy, allowed.rule, allowed.audited) == (True, "default/allow", 0, ("default/audit",))
    denied = decide(allow, deny, audit)
    assert (denied.allowed, denied.policy, denied.audited) == (False, "default/deny", ("default/audit",))
    assert denied.text == "denied by AuthorizationPolicy default/deny, rules[0]"
    reply = denied.reply()
    assert (reply.status, reply.body, reply.flag, reply.details) == (
        403,
        b"RBAC: access denied",
        "",
        f"rbac_access_denied_matched_policy[{denied.matched}]",
    )


def test_dry_run_changes_nothing_and_says_what_it_would() -> None:
    found = decide(
        policy("a", [operation(methods=["PUT"])], dry_run=True),
        policy("b", [{}], dry_run=True),
        policy("c", [{}], "DENY", dry_run=True),
        policy("d", [operation(methods=["PUT"])], "DENY", dry_run=True),
        policy("e", [{}], "AUDIT", dry_run=True),
    )
    assert found.allowed
    shadows = [(each.policy, each.result, each.rule) for each in found.shadow]
    assert shadows == [
        ("default/a", "denied", None),
        ("default/b", "allowed", 0),
        ("default/c", "denied", 0),
        ("default/d", "allowed", None),
    ]


OPA = ExtensionProvider("opa", AuthorizerKind.HTTP, "outbound|opa")


def custom(name: str = "c", rules: list[object] | None = None, provider: str = "opa") -> L7Policy:
    return policy(name, rules or [{}], "CUSTOM", provider={"name": provider})


def test_custom_asks_the_providers_of_those_that_match() -> None:
    guard = Guard([custom(), custom("d"), custom("e", [operation(methods=["PUT"])], "other")], {"opa": OPA})
    asked = guard.custom(request(), client())
    assert isinstance(asked, Ask)
    assert (asked.providers, asked.policies) == ((OPA,), ("default/c", "default/d"))
    assert guard.decide(request(), client(), None).allowed
    assert Guard([custom(rules=[operation(methods=["PUT"])])]).custom(request(), client()) is None
    assert Guard([]).custom(request(), client()) is None


def test_custom_without_anybody_to_ask_denies() -> None:
    absent = Guard([custom(provider="none")], {"opa": OPA}).custom(request(), client())
    assert isinstance(absent, Verdict)
    assert absent.reply().details == "rbac_access_denied_matched_policy[ns[default]-policy[c]-rule[0]-deny-due-to-bad-CUSTOM-action]"
    assert "has no external authorizer of this name" in absent.text
    broken = ExtensionProvider("opa", AuthorizerKind.HTTP, "", problem="no such service")
    found = Guard([custom()], {"opa": broken}).custom(request(), client())
    assert isinstance(found, Verdict)
    assert found.text.endswith("no such service")


def test_a_refused_policy_denies_and_says_why_to_the_operator_only() -> None:
    denied = decide(policy("allow", [{}]), refused_l7_policy("bad", "default", "spec.rules: not a list"))
    assert not denied.allowed
    assert denied.text.endswith("refused, so everything is denied: spec.rules: not a list")
    assert denied.reply().body == b"RBAC: access denied"


@pytest.mark.parametrize(
    ("action", "rule", "allowed"),
    [
        ("ALLOW", {}, True),
        ("ALLOW", source(namespaces=["shop"]), True),
        ("ALLOW", operation(methods=["GET"]), False),
        ("DENY", operation(methods=["GET"]), False),
        ("DENY", {**operation(methods=["GET"]), **source(namespaces=["lab"])}, True),
        ("DENY", operation(ports=["81"]), True),
        ("CUSTOM", {}, False),
    ],
)
def test_connections(action: str, rule: object, allowed: bool) -> None:
    guarded = custom(rules=[rule]) if action == "CUSTOM" else policy(rules=[rule], action=action)
    assert Guard([guarded], {"opa": OPA}).decide_tcp(client()).allowed is allowed


def test_the_first_of_many_filed_rules_is_named() -> None:
    rules: list[object] = [operation(paths=[f"/r/{number}/*"]) for number in range(250)]
    rules += [source(namespaces=[f"n{number}"]) for number in range(250)]
    rules.append(operation(paths=["*7"]))
    found = decide(policy(rules=rules), of=request(b"/r/17/x7"))
    assert (found.rule, found.policy) == (17, "default/x")
    assert decide(policy(rules=rules), of=request(b"/x7")).rule == 500
    assert not decide(policy(rules=rules), of=request(b"/x8")).allowed


@pytest.mark.parametrize("forwarded", [b"", b"unknown", b"1.2.3.4,", b"\xff", b"1.2.3.4:80"])
def test_a_client_whose_address_is_unreadable_is_nowhere(forwarded: bytes) -> None:
    headers = [(b"x-forwarded-for", forwarded)]
    wanted = not forwarded
    assert decide(policy(rules=[source(remoteIpBlocks=["0.0.0.0/0"])]), of=request(headers=headers)).allowed is wanted
