"""AuthorizationPolicy: what is read, what is refused, and what L7 fields become without a waypoint."""

from __future__ import annotations

import re

import pytest

from tests.kit.builders import ANYBODY, authorization, exactly, selecting
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.security import L7Rule
from ztunnel.mesh.manifests.authorization import AuthorizationPolicyObject, is_true, read_authorization_policy
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.selectors import TargetRef
from ztunnel.mesh.rules import Action, Cidr, Clause, Match, Rule, ServiceAccountMatch, StringKind, StringMatch

NEVER = Rule((Clause((Match(),)),))
NET = Cidr(32, "10.0.0.0", 8)


def read(body: object) -> AuthorizationPolicyObject:
    return read_authorization_policy(Field("AuthorizationPolicy default/x", "", body))


def rules(*items: object, action: str = "ALLOW") -> AuthorizationPolicyObject:
    return read(authorization("x", action=action, rules=list(items)))


def refusal(body: object) -> str:
    with pytest.raises(ManifestError) as caught:
        read(body)
    return str(caught.value)


def test_nothing_said_is_an_allow_that_allows_nothing() -> None:
    bare = read({"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "x"}})
    assert (bare.action, bare.rules, bare.selector, bare.dry_run, bare.note, bare.waypoint) == (Action.ALLOW, (), None, False, "", False)


def test_a_rule_without_limits_matches_everything() -> None:
    assert rules({}).rules == (Rule(),)


def test_every_l4_field_of_from_and_to() -> None:
    found = rules(
        {
            "from": [
                {
                    "source": {
                        "principals": ["*", "cluster.local/ns/a/sa/b", "cluster.local/*", "*/sa/b"],
                        "notPrincipals": ["x"],
                        "namespaces": ["a", "a"],
                        "notNamespaces": ["b"],
                        "serviceAccounts": ["shop/cart", "own"],
                        "notServiceAccounts": ["lab/x"],
                        "ipBlocks": ["10.0.0.0/8"],
                        "notIpBlocks": ["10.1.2.3"],
                    }
                },
                {"source": {"namespaces": ["c"]}},
            ],
            "to": [{"operation": {"ports": ["80", 8080], "notPorts": ["81"]}}],
        }
    )
    prefix, suffix = StringMatch(StringKind.PREFIX, "cluster.local/"), StringMatch(StringKind.SUFFIX, "/sa/b")
    sources = (
        Match(
            principals=(*ANYBODY, *exactly("cluster.local/ns/a/sa/b"), prefix, suffix),
            not_principals=exactly("x"),
            namespaces=exactly("a"),
            not_namespaces=exactly("b"),
            service_accounts=(ServiceAccountMatch("shop", "cart"), ServiceAccountMatch("default", "own")),
            not_service_accounts=(ServiceAccountMatch("lab", "x"),),
            source_ips=(NET,),
            not_source_ips=(Cidr(32, "10.1.2.3", 32),),
        ),
        Match(namespaces=exactly("c")),
    )
    operations = (Match(destination_ports=(80, 8080), not_destination_ports=(81,)),)
    assert found.rules == (Rule((Clause(sources), Clause(operations))),)


@pytest.mark.parametrize(
    ("key", "value", "positive", "negative"),
    [
        ("source.principal", "a/b", Match(principals=exactly("a/b")), Match(not_principals=exactly("a/b"))),
        ("source.namespace", "a", Match(namespaces=exactly("a")), Match(not_namespaces=exactly("a"))),
        (
            "source.serviceAccount",
            "a/b",
            Match(service_accounts=(ServiceAccountMatch("a", "b"),)),
            Match(not_service_accounts=(ServiceAccountMatch("a", "b"),)),
        ),
        ("source.ip", "10.0.0.0/8", Match(source_ips=(NET,)), Match(not_source_ips=(NET,))),
        ("destination.ip", "10.0.0.0/8", Match(destination_ips=(NET,)), Match(not_destination_ips=(NET,))),
        ("destination.port", "80", Match(destination_ports=(80,)), Match(not_destination_ports=(80,))),
    ],
)
def test_every_l4_condition(key: str, value: str, positive: Match, negative: Match) -> None:
    found = rules({"when": [{"key": key, "values": [value]}, {"key": key, "notValues": [value]}]})
    assert found.rules == (Rule((Clause((positive,)), Clause((negative,)))),)


def test_selector_and_dry_run() -> None:
    body = authorization("x", meta={"annotations": {"istio.io/dry-run": "TRUE"}}, selector=selecting(app="web"))
    assert (read(body).selector, read(body).dry_run) == ({"app": "web"}, True)
    assert not read(authorization("x", meta={"annotations": {"istio.io/dry-run": "false"}})).dry_run
    assert 'annotations["istio.io/dry-run"]: not a boolean' in refusal(
        authorization("x", meta={"annotations": {"istio.io/dry-run": "maybe"}})
    )


def test_what_an_annotation_says() -> None:
    assert is_true(True)
    assert is_true("T")
    assert not is_true("no")
    assert not is_true(1)


def test_a_policy_for_a_waypoint_is_nothing_to_l4() -> None:
    body = authorization("x", targetRefs=[{"kind": "Gateway", "name": "w"}], action="AUDIT", rules=[{}])
    found = read(body)
    assert (found.waypoint, found.rules, found.targets) == (True, (), (TargetRef("Gateway", "w"),))
    assert found.layer7 is not None
    assert found.layer7.rules == (L7Rule(),)


L7 = [
    {"from": [{"source": {"requestPrincipals": ["*"]}}]},
    {"from": [{"source": {"remoteIpBlocks": ["10.0.0.0/8"]}}]},
    {"to": [{"operation": {"methods": ["GET"]}}]},
    {"to": [{"operation": {"notPaths": ["/admin"]}}]},
    {"when": [{"key": "request.headers[x]", "values": ["y"]}]},
    {"when": [{"key": "remote.ip", "notValues": ["10.0.0.1"]}]},
]


@pytest.mark.parametrize("rule", L7, ids=str)
def test_an_allow_rule_with_an_l7_field_never_matches_and_says_so(rule: dict[str, object]) -> None:
    found = rules({}, {**rule, "from": rule.get("from", [{"source": {"namespaces": ["a"]}}])})
    assert found.rules == (Rule(), NEVER)
    assert found.note.startswith("spec.rules[1] never matches without a waypoint: it needs spec.rules[1].")


@pytest.mark.parametrize("rule", L7, ids=str)
def test_a_deny_rule_of_l7_fields_only_is_refused(rule: dict[str, object]) -> None:
    text = refusal(authorization("x", action="DENY", rules=[rule]))
    assert re.search(r"spec\.rules\[0\]\.\S+: only a waypoint can check it, and nothing else limits spec\.rules\[0\]", text)


def test_a_deny_rule_keeps_what_l4_can_check() -> None:
    found = rules(
        {
            "from": [{"source": {"namespaces": ["a"], "requestPrincipals": ["*"]}}],
            "to": [{"operation": {"ports": ["80"], "paths": ["/x"]}}],
            "when": [{"key": "request.auth.claims[x]", "values": ["y"]}],
        },
        action="DENY",
    )
    assert found.rules == (Rule((Clause((Match(namespaces=exactly("a")),)), Clause((Match(destination_ports=(80,)),)))),)
    assert found.note.startswith("spec.rules[0] denies more than written without a waypoint: it ignores ")
    assert "spec.rules[0].to[0].operation.paths" in found.note


def test_one_alternative_of_l7_fields_only_lifts_a_deny_rules_whole_clause() -> None:
    found = rules(
        {"from": [{"source": {"namespaces": ["a"]}}], "to": [{"operation": {"ports": ["80"]}}, {"operation": {"paths": ["/x"]}}]},
        action="DENY",
    )
    assert found.rules == (Rule((Clause((Match(namespaces=exactly("a")),)),)),)


def test_notes_are_bounded() -> None:
    found = rules(*[{"to": [{"operation": {"paths": ["/x"]}}]}] * 7)
    assert found.note.count("never matches") == 4
    assert found.note.endswith("; and 3 more rules")


REFUSED = [
    ({"action": "AUDIT"}, "spec.action: AUDIT is not available at L4"),
    ({"action": "CUSTOM"}, "spec.action: CUSTOM is not available at L4"),
    ({"action": "deny"}, 'spec.action: not one of ALLOW, DENY: "deny"'),
    ({"provider": {"name": "x"}}, "spec.provider: only CUSTOM policies have a provider"),
    ({"rule": []}, 'spec.rule: unknown field (did you mean "rules"?)'),
    ({"selector": {"app": "x"}}, "spec.selector.app: unknown field"),
    ({"rules": None}, "spec.rules: no value"),
    ({"rules": {}}, "spec.rules: not a list"),
    ({"rules": [None]}, "spec.rules[0]: a rule without content"),
    ({"rules": ["x"]}, "spec.rules[0]: not a mapping"),
    ({"rules": [{"form": []}]}, 'spec.rules[0].form: unknown field (did you mean "from"?)'),
    ({"rules": [{"from": []}]}, "spec.rules[0].from: an empty list"),
    ({"rules": [{"from": None}]}, "spec.rules[0].from: no value"),
    ({"rules": [{"from": [{}]}]}, "spec.rules[0].from[0].source: required"),
    ({"rules": [{"from": [{"source": {}}]}]}, "spec.rules[0].from[0].source: empty: name at least one field"),
    ({"rules": [{"from": [{"sources": {}}]}]}, "spec.rules[0].from[0].sources: unknown field"),
    ({"rules": [{"to": [{"operation": {}}]}]}, "spec.rules[0].to[0].operation: empty"),
    ({"rules": [{"to": [{"operation": {"port": ["80"]}}]}]}, 'operation.port: unknown field (did you mean "ports"?)'),
    ({"rules": [{"to": [{"operation": {"ports": ["http"]}}]}]}, 'operation.ports[0]: not a port number (1-65535): "http"'),
    ({"rules": [{"to": [{"operation": {"ports": [True]}}]}]}, "operation.ports[0]: not a port number"),
    ({"rules": [{"to": [{"operation": {"ports": [float("nan")]}}]}]}, "operation.ports[0]: not a port number (1-65535): nan"),
    ({"rules": [{"when": [{"values": ["x"]}]}]}, "spec.rules[0].when[0].key: required"),
    ({"rules": [{"when": [{"key": "source.ip"}]}]}, "spec.rules[0].when[0]: needs values or notValues"),
    ({"rules": [{"when": [{"key": "source.ip", "values": []}]}]}, "when[0].values: an empty list"),
    ({"rules": [{"when": [{"key": "source.IP", "values": ["x"]}]}]}, 'when[0].key: unknown condition: "source.IP"'),
]


@pytest.mark.parametrize(("spec", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_could_widen_access_is_refused(spec: dict[str, object], message: str) -> None:
    text = refusal({**authorization("x"), "spec": spec})
    assert text.startswith("AuthorizationPolicy default/x: ")
    assert message in text


SOURCES = [
    ({"prinicpals": ["a"]}, 'source.prinicpals: unknown field (did you mean "principals"?)'),
    ({"principals": []}, "source.principals: an empty list"),
    ({"principals": None, "namespaces": ["a"]}, "source.principals: no value"),
    ({"principals": "a"}, "source.principals: not a list"),
    ({"principals": [""]}, "source.principals[0]: empty"),
    ({"principals": [None]}, "source.principals[0]: required"),
    ({"principals": ["spiffe://a/ns/b/sa/c"]}, "source.principals[0]: principals are written without spiffe://"),
    ({"principals": ["a*b"]}, "source.principals[0]: * may only be the first or the last character"),
    ({"namespaces": ["*a*"]}, "source.namespaces[0]: * may only be the first or the last character"),
    ({"namespaces": [7]}, "source.namespaces[0]: not text (quote it): 7"),
    ({"serviceAccounts": ["*"]}, "source.serviceAccounts[0]: a service account, without *"),
    ({"serviceAccounts": ["a/b/c"]}, "source.serviceAccounts[0]: not a name"),
    ({"serviceAccounts": ["/b"]}, "source.serviceAccounts[0]: empty"),
    ({"ipBlocks": ["10.0.0.0/8", "10.0.0.0/33"]}, 'source.ipBlocks[1]: not an address block: "10.0.0.0/33"'),
    ({"ipBlocks": [["10.0.0.0/8"]]}, "source.ipBlocks[0]: not text: a list"),
    ({"ipBlocks": ["10.0.0.0/8"] * 4097}, "source.ipBlocks: more than 4096 items"),
]


@pytest.mark.parametrize(("source", "message"), SOURCES, ids=[message for _, message in SOURCES])
def test_hostile_sources_are_refused(source: dict[str, object], message: str) -> None:
    assert f"spec.rules[0].from[0].{message}" in refusal(authorization("x", rules=[{"from": [{"source": source}]}]))


def test_unknown_members_of_the_document_are_refused() -> None:
    assert "rules: unknown field" in refusal({**authorization("x"), "rules": []})
