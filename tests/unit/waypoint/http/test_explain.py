"""Explanations: each decision in its order with its reasons, and the same verdict as the guard's."""

from __future__ import annotations

import json

import pytest

from tests.kit.builders import Json, authorization, mesh, namespace, pod, service_manifest
from tests.kit.tokens import jwks, sign
from waypoint.http.explain import Explanation, explain
from waypoint.http.jwt import KeySets
from waypoint.questions import QuestionError, question_of, read_question, show
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.config import ProxyConfig
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, parse

NOW = 1_800_000_000.0
WEB = {"kind": "Service", "name": "web", "group": ""}


def policy(name: str, *rules: object, action: str = "ALLOW", **spec: object) -> Json:
    return {**authorization(name), "spec": {"targetRefs": [WEB], "action": action, "rules": list(rules), **spec}}


def config(*bodies: Json) -> ProxyConfig:
    everything = [
        namespace("default"),
        service_manifest("web", "10.96.0.1", selector={"app": "web"}, ports=[{"port": 80, "name": "http"}, {"port": 90, "name": "tcp"}]),
        pod("web-1", "10.0.0.2", labels={"app": "web"}),
        *bodies,
    ]
    objects = {key(each): each for each in (parse(body, "test") for body in everything)}
    bound = Bound(frozenset({"default/web.default.svc.cluster.local"}), frozenset({"uid-web-1"}))
    return derive_proxy(objects, mesh(*everything), MeshOptions(), ObjectKey("Gateway", "default", "waypoint"), bound)


def explained(served: ProxyConfig, target: str, *headers: str, method: str = "GET", account: str = "shop/cart") -> Explanation:
    question = read_question(question_of(target, method, headers, account, "10.0.0.9"), "cluster.local")
    return explain(served, question.address, question.request, question.client, KeySets(), NOW)


def details(found: Explanation, decision: str) -> tuple[str, ...]:
    return next(step.details for step in found.steps if step.decision == decision)


def test_a_request_that_nothing_forbids() -> None:
    found = explained(config(), "http://web/a/../b?x=1")
    assert found.outcome == "taken by default"
    assert [(step.decision, step.text) for step in found.steps] == [
        ("destination", "Service default/web, port 80 (HTTP)"),
        ("path", "/a/../b?x=1 becomes /b?x=1 (BASE)"),
        ("authorization", "no policy denies it and no ALLOW policy applies"),
        ("route", "taken by default"),
    ]
    assert details(found, "route")[0] == "100% to inbound-vip|80|http|web.default.svc.cluster.local: 1 of 1 endpoints ready"


@pytest.mark.parametrize("target", ["http://10.96.0.1", "web.default.svc.cluster.local:80", "http://web"])
def test_a_service_by_any_of_its_names(target: str) -> None:
    assert explained(config(), target).steps[0].text == "Service default/web, port 80 (HTTP)"


def test_other_destinations() -> None:
    assert explained(config(), "http://nowhere").outcome == "answered 400 by the proxy: this proxy serves nothing at nowhere:80"
    assert explained(config(), "http://10.0.0.2:8080").outcome.startswith("a pod that is addressed by itself has no routes")
    assert explained(config(), "http://web:90").outcome == "bytes are carried as they are"
    assert explained(config(), "http://web/%00").outcome.startswith("answered 400 by the proxy: /%00 cannot be normalised")


RULES: list[tuple[object, str]] = [
    ({}, "matches"),
    ({"from": [{"source": {"namespaces": ["shop"]}}]}, "matches"),
    ({"from": [{"source": {"namespaces": ["lab", "x*"]}}]}, 'no: from: namespace "shop" is none of lab, x*'),
    ({"from": [{"source": {"notNamespaces": ["sh*"]}}]}, 'no: from: namespace "shop" is one of sh*'),
    (
        {"from": [{"source": {"principals": ["a"]}}, {"source": {"ipBlocks": ["10.1.0.0/16"]}}]},
        'no: from: none of 2: principal "cluster.local/ns/shop/sa/cart" is none of a / address "10.0.0.9" is none of 10.1.0.0/16',
    ),
    ({"from": [{"source": {"requestPrincipals": ["*"]}}]}, "no: from: token's principal (none) is none of *"),
    ({"from": [{"source": {"serviceAccounts": ["lab/x"]}}]}, 'no: from: service account "shop/cart" is none of lab/x'),
    ({"to": [{"operation": {"methods": ["PUT", "POST"]}}]}, 'no: to: method "GET" is none of PUT, POST'),
    ({"to": [{"operation": {"paths": ["/a", "/b/{*}"]}}]}, 'no: to: path "/x" against /a, /b/{*}'),
    ({"to": [{"operation": {"ports": ["81"]}}]}, 'no: to: port "80" is none of 81'),
    ({"to": [{"operation": {"hosts": ["a", "b", "c", "d", "e"]}}]}, 'no: to: host "web" is none of a, b, c, d and 1 more'),
    ({"when": [{"key": "request.headers[x]", "values": ["y"]}]}, "no: when: request.headers[x] (none) is none of y"),
    ({"when": [{"key": "source.ip", "notValues": ["10.0.0.0/8"]}]}, 'no: when: source.ip "10.0.0.9" is one of 10.0.0.0/8'),
    ({"when": [{"key": "request.auth.claims[role]", "values": ["admin"]}]}, "no: when: request.auth.claims[role] (none) is none of admin"),
]


@pytest.mark.parametrize(("rule", "told"), RULES, ids=[told for _, told in RULES])
def test_each_rule_says_what_of_it_does_not_match(rule: object, told: str) -> None:
    found = explained(config(policy("p", rule)), "http://web/x")
    assert details(found, "authorization") == (f"ALLOW default/p rules[0]: {told}",)
    assert found.outcome.startswith("taken by" if told == "matches" else "answered 403 by the proxy: ALLOW policies apply and none matches")


def test_a_denial_ends_the_explanation() -> None:
    denies = policy("no", {"to": [{"operation": {"paths": ["/admin*"]}}]}, action="DENY")
    found = explained(config(denies, policy("none", action="DENY")), "http://web/admin/x")
    assert found.outcome == "answered 403 by the proxy: denied by AuthorizationPolicy default/no, rules[0]"
    assert details(found, "authorization") == ("DENY default/no rules[0]: matches", "DENY default/none: no rules, so it never matches")
    assert found.steps[-1].decision == "authorization"


def test_custom_policies_are_asked_or_cannot_be() -> None:
    asks = policy("ask", {}, action="CUSTOM", provider={"name": "opa"})
    found = explained(config(asks), "http://web")
    assert "has no external authorizer of this name" in found.outcome
    other = policy("ask", {"to": [{"operation": {"methods": ["PUT"]}}]}, action="CUSTOM", provider={"name": "opa"})
    assert [step.text for step in explained(config(other), "http://web").steps][2] == "no CUSTOM policy matches"


def test_tokens() -> None:
    authentication: Json = {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": {"name": "jwt", "namespace": "default"},
        "spec": {"targetRefs": [WEB], "jwtRules": [{"issuer": "i", "jwks": jwks()}]},
    }
    served = config(authentication, policy("users", {"from": [{"source": {"requestPrincipals": ["i/alice"]}}]}))
    bearer = f"authorization: Bearer {sign({'iss': 'i', 'sub': 'alice'}).decode()}"
    assert explained(served, "http://web", bearer).outcome == "taken by default"
    assert explained(served, "http://web").outcome.startswith("answered 403")
    expired = f"authorization: Bearer {sign({'iss': 'i', 'exp': 1}).decode()}"
    assert explained(served, "http://web", expired).outcome == "answered 401 by the proxy: Jwt is expired"


def test_answers_for_people() -> None:
    found = explained(config(policy("no", {}, action="DENY")), "http://web")
    told = json.dumps({"outcome": found.outcome, "steps": [{**step_of(step)} for step in found.steps]}).encode()
    lines = show(told).splitlines()
    assert lines[0] == found.outcome
    assert "authorization: denied by AuthorizationPolicy default/no, rules[0] (403)" in lines
    assert "  DENY default/no rules[0]: matches" in lines


def step_of(step: object) -> dict[str, object]:
    return {name: getattr(step, name) for name in ("decision", "text", "details", "status")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("http://", "GET", (), "", ""), "names no host"),
        (("http://a:x", "GET", (), "", ""), "is no URL"),
        (("http://a", "GET", ("x",), "", ""), "is no header"),
        (("http://a", "GET", (), "no slash", ""), "is not NAMESPACE/ACCOUNT"),
        (("http://a", "GET", (), "", "x"), "is no IP address"),
    ],
)
def test_questions_that_cannot_be_asked(arguments: tuple[str, str, tuple[str, ...], str, str], message: str) -> None:
    with pytest.raises(QuestionError, match=message):
        read_question(question_of(*arguments), "cluster.local")


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"address": "a", "port": 0}', b'{"address": 5, "port": 80}'])
def test_bodies_that_are_no_question(body: bytes) -> None:
    with pytest.raises(QuestionError):
        read_question(body, "cluster.local")
