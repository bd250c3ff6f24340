"""AuthorizationPolicy for L7: every field, what is refused, and what happens to attributes that cannot be checked."""

from __future__ import annotations

import pytest

from tests.kit.builders import authorization
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import Condition, L7Action, L7Policy, L7Rule, Operation, Source
from ztunnel.mesh.manifests.authorization import read_authorization_policy
from ztunnel.mesh.manifests.authorization_l7 import NEVER, is_template, refused_l7_policy
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.rules import Cidr, ServiceAccountMatch

TARGETS = [{"kind": "Service", "name": "reviews", "group": ""}]
NET = Cidr(32, "10.0.0.0", 8)


def exact(*values: str) -> tuple[TextMatch, ...]:
    return tuple(TextMatch(TextKind.EXACT, value) for value in values)


def read(spec: dict[str, object] | None = None, meta: dict[str, object] | None = None) -> L7Policy:
    body = {**authorization("x", meta=meta), "spec": {"targetRefs": TARGETS, **(spec or {})}}
    found = read_authorization_policy(Field("AuthorizationPolicy default/x", "", body)).layer7
    assert found is not None
    return found


def one(rule: object, action: str = "ALLOW") -> L7Policy:
    return read({"action": action, "rules": [rule]})


def test_nothing_said_is_an_allow_that_allows_nothing() -> None:
    assert read() == L7Policy("x", "default", L7Action.ALLOW)


def test_every_field_of_a_source() -> None:
    names = ["principals", "requestPrincipals", "namespaces", "trustDomains", "ipBlocks", "remoteIpBlocks"]
    fields = ["principals", "request_principals", "namespaces", "trust_domains", "ips", "remote_ips"]
    for name, field in zip(names, fields, strict=True):
        given, wanted = (["10.0.0.0/8"], (NET,)) if name.endswith("Blocks") else (["a*", "*b", "*", "c"], TEXTS)
        negated = f"not{name[0].upper()}{name[1:]}"
        found = one({"from": [{"source": {name: given}}, {"source": {negated: given}}]})
        assert found.rules == (L7Rule(sources=(Source(**{field: wanted}), Source(**{f"not_{field}": wanted}))),)  # type: ignore[arg-type]  # by name


TEXTS = (TextMatch(TextKind.PREFIX, "a"), TextMatch(TextKind.SUFFIX, "b"), TextMatch(TextKind.PRESENT), TextMatch(TextKind.EXACT, "c"))


def test_service_accounts_are_of_the_policys_namespace_unless_they_say_otherwise() -> None:
    found = one({"from": [{"source": {"serviceAccounts": ["shop/cart", "own"], "notServiceAccounts": ["lab/x"]}}]})
    accounts = (ServiceAccountMatch("shop", "cart"), ServiceAccountMatch("default", "own"))
    assert found.rules == (L7Rule((Source(service_accounts=accounts, not_service_accounts=(ServiceAccountMatch("lab", "x"),)),)),)


def test_every_field_of_an_operation() -> None:
    found = one(
        {
            "to": [
                {
                    "operation": {
                        "hosts": ["Shop.Example:80"],
                        "ports": ["80", 81],
                        "methods": ["GET"],
                        "paths": ["/a*", "/b/{*}/c", "/d"],
                        "notHosts": ["*.x"],
                        "notPorts": ["82"],
                        "notMethods": ["PUT"],
                        "notPaths": ["/e/{**}", "*f"],
                    }
                }
            ]
        }
    )
    assert found.rules[0].operations == (
        Operation(
            hosts=(TextMatch(TextKind.EXACT, "shop.example:80", ignore_case=True),),
            not_hosts=(TextMatch(TextKind.SUFFIX, ".x", ignore_case=True),),
            ports=(80, 81),
            not_ports=(82,),
            methods=exact("GET"),
            not_methods=exact("PUT"),
            paths=(TextMatch(TextKind.PREFIX, "/a"), *exact("/d")),
            not_paths=(TextMatch(TextKind.SUFFIX, "f"),),
            path_templates=("/b/{*}/c",),
            not_path_templates=("/e/{**}",),
        ),
    )


@pytest.mark.parametrize(
    ("key", "value", "condition"),
    [
        ("source.ip", "10.0.0.0/8", Condition("source.ip", cidrs=(NET,))),
        ("remote.ip", "10.0.0.0/8", Condition("remote.ip", cidrs=(NET,))),
        ("destination.ip", "10.0.0.0/8", Condition("destination.ip", cidrs=(NET,))),
        ("source.namespace", "a", Condition("source.namespace", values=exact("a"))),
        ("source.principal", "a/b", Condition("source.principal", values=exact("a/b"))),
        ("source.trustDomain", "a", Condition("source.trustDomain", values=exact("a"))),
        ("source.serviceAccount", "b", Condition("source.serviceAccount", values=exact("default/b"))),
        ("destination.port", "80", Condition("destination.port", values=exact("80"))),
        ("connection.sni", "a.b", Condition("connection.sni", values=exact("a.b"))),
        ("request.headers[X-User]", "a", Condition("request.headers", ("x-user",), exact("a"))),
        ("request.headers[:method]", "GET", Condition("request.headers", (":method",), exact("GET"))),
        ("request.auth.principal", "i/s", Condition("request.auth.principal", values=exact("i/s"))),
        ("request.auth.audiences", "a", Condition("request.auth.audiences", values=exact("a"))),
        ("request.auth.presenter", "a", Condition("request.auth.presenter", values=exact("a"))),
        ("request.auth.claims[a]", "b", Condition("request.auth.claims", ("a",), exact("b"))),
        ("request.auth.claims[a][b]", "c", Condition("request.auth.claims", ("a", "b"), exact("c"))),
    ],
)
def test_every_condition(key: str, value: str, condition: Condition) -> None:
    found = one({"when": [{"key": key, "values": [value]}]})
    assert found.rules == (L7Rule(conditions=(condition,)),)
    negated = one({"when": [{"key": key, "notValues": [value]}]}).rules[0].conditions[0]
    assert negated == Condition(condition.key, condition.path, not_values=condition.values, not_cidrs=condition.cidrs)


def test_custom_names_its_provider_and_dry_run_is_read() -> None:
    meta: dict[str, object] = {"annotations": {"istio.io/dry-run": "true"}}
    found = read({"action": "CUSTOM", "provider": {"name": "opa"}, "rules": [{}]}, meta)
    assert (found.action, found.provider, found.dry_run) == (L7Action.CUSTOM, "opa", True)


PATHS = {"to": [{"operation": {"paths": ["/x"]}}]}
TOKEN = {"from": [{"source": {"requestPrincipals": ["*"]}}]}
PORT_OR_PATH = {"to": [{"operation": {"ports": ["80"], "methods": ["GET"]}}], "when": [{"key": "request.headers[x]", "values": ["y"]}]}


@pytest.mark.parametrize(
    ("action", "rule", "left"),
    [
        ("ALLOW", PATHS, NEVER),
        ("ALLOW", PORT_OR_PATH, NEVER),
        ("DENY", PATHS, L7Rule()),
        ("DENY", PORT_OR_PATH, L7Rule(operations=(Operation(ports=(80,)),))),
        ("AUDIT", TOKEN, L7Rule()),
        ("DENY", {"from": [{"source": {"namespaces": ["a"]}}, {"source": {"remoteIpBlocks": ["10.0.0.1"]}}]}, L7Rule()),
        ("DENY", {"when": [{"key": "connection.sni", "values": ["a"]}, {"key": "remote.ip", "values": ["10.0.0.1"]}]}, None),
    ],
)
def test_on_a_tcp_port_attributes_of_requests_do_not_exist(action: str, rule: object, left: L7Rule | None) -> None:
    wanted = L7Rule(conditions=(Condition("connection.sni", values=exact("a")),)) if left is None else left
    found = one(rule, action)
    assert found.tcp_rules == (wanted,)
    assert NEVER not in found.rules
    assert not found.reason


def test_what_no_proxy_knows_shrinks_an_allow_and_grows_a_deny() -> None:
    rule = {**PATHS, "when": [{"key": "experimental.envoy.filters.network.mysql_proxy[db.table]", "values": ["[x]"]}]}
    assert one(rule).rules == (NEVER,)
    assert one(rule).reason.startswith("spec.rules[0] never matches")
    assert one(rule, "DENY").rules == (L7Rule(operations=(Operation(paths=exact("/x")),)),)
    assert one(rule, "DENY").reason.startswith("spec.rules[0] matches more than written")


def test_custom_is_asked_before_tokens_are_looked_at() -> None:
    rule = {**PATHS, **TOKEN, "when": [{"key": "request.auth.claims[a]", "values": ["b"]}]}
    found = read({"action": "CUSTOM", "provider": {"name": "opa"}, "rules": [rule]})
    assert found.rules == (L7Rule(operations=(Operation(paths=exact("/x")),)),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"action": "allow"}, 'spec.action: not one of ALLOW, DENY, AUDIT, CUSTOM: "allow"'),
        ({"action": "CUSTOM"}, "spec.provider.name: required"),
        ({"action": "CUSTOM", "provider": {"nome": "x"}}, "spec.provider.nome: unknown field"),
        ({"provider": {"name": "x"}}, "spec.provider: only CUSTOM policies have a provider"),
        ({"rulez": []}, "spec.rulez: unknown field"),
        ({"rules": [{}] * 513}, "spec.rules: more than 512 items"),
        ({"rules": [None]}, "spec.rules[0]: a rule without content"),
        ({"rules": [{"from": []}]}, "spec.rules[0].from: an empty list"),
        ({"rules": [{"from": [{}]}]}, "spec.rules[0].from[0].source: required"),
        ({"rules": [{"from": [{"source": {}}]}]}, "spec.rules[0].from[0].source: empty: name at least one field"),
        ({"rules": [{"from": [{"source": {"principal": ["x"]}}]}]}, 'principal: unknown field (did you mean "principals"?)'),
        (
            {"rules": [{"from": [{"source": {"serviceAccounts": ["x"], "namespaces": ["y"]}}]}]},
            "source.namespaces: not together with serviceAccounts",
        ),
        ({"rules": [{"from": [{"source": {"serviceAccounts": ["x"] * 17}}]}]}, "serviceAccounts: more than 16 service accounts"),
        ({"rules": [{"to": [{"operation": {"methods": ["G*T"]}}]}]}, "methods[0]: * may only be the first or the last character"),
        ({"rules": [{"to": [{"operation": {"paths": ["/{*}x"]}}]}]}, "paths[0]: not a path template"),
        ({"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}, "ports[0]: not a port number"),
        ({"rules": [{"when": [{"key": "request.headers"}]}]}, "spec.rules[0].when[0]: needs values or notValues"),
        ({"rules": [{"when": [{"key": "request.headers", "values": ["x"]}]}]}, "when[0].key: unknown condition"),
        ({"rules": [{"when": [{"key": "request.headers[a][b]", "values": ["x"]}]}]}, "when[0].key: not the name of a header"),
        ({"rules": [{"when": [{"key": "request.headers[a b]", "values": ["x"]}]}]}, "when[0].key: not the name of a header"),
        ({"rules": [{"when": [{"key": "source.ip", "values": []}]}]}, "when[0].values: an empty list"),
    ],
)
def test_what_could_widen_access_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read(spec)
    assert message in str(caught.value)


def test_a_refused_policy_denies_everything() -> None:
    refused = refused_l7_policy("x", "default", "why")
    assert (refused.action, refused.rules, refused.tcp_rules) == (L7Action.DENY, (L7Rule(),), (L7Rule(),))
    assert refused.reason == "refused, so everything is denied: why"


def test_templates_have_whole_segments() -> None:
    assert [text for text in ("/{*}", "/a/{**}", "/{*}/b/{**}", "/a/{**}/") if not is_template(text)] == []
    wrong = ("{*}", "/a{*}", "/{**}/{*}", "/{***}", "/{*", "/a/{x}", "/*/{*}", "/{**}/{**}")
    assert [text for text in wrong if is_template(text)] == []
