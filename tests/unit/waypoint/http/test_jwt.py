"""The gate: which tokens pass, what a refused one is told, and what is done to the request."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from dataclasses import replace

import pytest

from tests.kit.tokens import jwks, sign
from waypoint.http.jwt import JwtGate, KeySets, key_set_source
from waypoint.http.messages import Headers, LocalReply, Request
from ztunnel.mesh.l7.security import Claims, JwtAuthentication, JwtLocation, JwtRule

NOW = 1_800_000_000.0
RULE = JwtRule("https://issuer", jwks=jwks("ES256", "RS256"))
PAYLOAD: dict[str, object] = {"iss": "https://issuer", "sub": "alice", "aud": ["shop"], "exp": NOW + 60, "scope": "read write"}


def gate(*rules: JwtRule, sets: KeySets | None = None, reason: str = "") -> JwtGate:
    return JwtGate([JwtAuthentication("x", "default", rules, reason)], sets or KeySets())


def request(token: bytes | None = None, *lines: tuple[bytes, bytes], path: bytes = b"/a?b=c", method: bytes = b"GET") -> Request:
    headers: Headers = [] if token is None else [(b"authorization", b"Bearer " + token)]
    return Request(method, path, b"shop", [*headers, *lines])


def token(**more: object) -> bytes:
    return sign({**PAYLOAD, **more})


def refusal(answer: object) -> LocalReply:
    assert isinstance(answer, LocalReply)
    return answer


def test_no_token_passes() -> None:
    assert gate(RULE).check(request(), NOW) is None
    assert gate(RULE).check(request(None, (b"authorization", b"Basic eDp5")), NOW) is None
    assert gate().is_idle
    assert not gate(RULE).is_idle


def test_a_good_token_is_its_claims_and_goes_no_further() -> None:
    asked = request(token(), (b"x", b"y"))
    claims = gate(RULE).check(asked, NOW)
    assert isinstance(claims, Claims)
    assert (claims.principal, claims.audiences, claims.values["scope"]) == ("https://issuer/alice", ("shop",), ["read", "write"])
    assert asked.headers == [(b"x", b"y")]


@pytest.mark.parametrize(
    ("rule", "more", "status", "text"),
    [
        (RULE, {"exp": NOW - 61}, 401, "Jwt is expired"),
        (RULE, {"exp": NOW - 59}, 0, ""),
        (RULE, {"nbf": NOW + 61}, 401, "Jwt not yet valid"),
        (RULE, {"nbf": NOW + 59}, 0, ""),
        (RULE, {"iss": "other"}, 401, "Jwt issuer is not configured"),
        (RULE, {"iss": ["https://issuer"]}, 401, "Jwt issuer is not configured"),
        (replace(RULE, audiences=("cart", "shop")), {}, 0, ""),
        (replace(RULE, audiences=("https://shop/",)), {}, 0, ""),
        (replace(RULE, audiences=("cart",)), {}, 403, "Audiences in Jwt are not allowed"),
        (replace(RULE, audiences=("cart",)), {"aud": None}, 403, "Audiences in Jwt are not allowed"),
        (replace(RULE, jwks=jwks("HS256")), {}, 401, "Jwt verification fails"),
        (replace(RULE, jwks="{}"), {}, 401, 'Jwks does not have "keys"'),
        (replace(RULE, jwks="", jwks_uri="https://keys"), {}, 401, "Jwks remote fetch is failed"),
        (RULE, {"exp": "soon"}, 401, "Jwt payload [exp] field is not an integer"),
        (RULE, {"exp": -1}, 401, "Jwt payload [exp] field is not an integer"),
        (RULE, {"sub": 5}, 401, "Jwt payload [sub] field is not a string"),
    ],
)
def test_each_reason(rule: JwtRule, more: dict[str, object], status: int, text: str) -> None:
    answer = gate(rule).check(request(token(**more)), NOW)
    if not status:
        assert isinstance(answer, Claims)
        return
    reply = refusal(answer)
    assert (reply.status, reply.flag) == (status, "UAEX")
    assert reply.body.startswith(text.encode())
    assert reply.details == "jwt_authn_access_denied{" + "_".join(reply.body.decode().split()) + "}"
    assert dict(reply.headers)[b"www-authenticate"] == b'Bearer realm="http://shop/a", error="invalid_token"'


def test_a_forged_signature_is_refused_and_a_realm_cannot_break_out() -> None:
    forged = token()[:-6] + b"AAAAAA"
    reply = refusal(gate(RULE).check(request(forged, path=b'/"\x80'), NOW))
    assert reply.body == b"Jwt verification fails"
    assert dict(reply.headers)[b"www-authenticate"].startswith(b'Bearer realm="http://shop/%22%80", ')


def test_one_of_several_rules_must_accept() -> None:
    other = JwtRule("other", jwks=jwks("RS256"))
    assert isinstance(gate(other, RULE).check(request(token()), NOW), Claims)
    assert refusal(gate(other, RULE).check(request(token(exp=1)), NOW)).body == b"Jwt is expired"
    assert refusal(gate(other, RULE).check(request(token(iss="third")), NOW)).body == b"Jwt issuer is not configured"


def test_a_bad_token_beside_a_good_one_is_refused() -> None:
    asked = request(token(), path=b"/a?access_token=" + token(exp=1))
    assert refusal(gate(RULE).check(asked, NOW)).body == b"Jwt is expired"
    many = request(None, *[(b"authorization", b"Bearer " + token(jti=number)) for number in range(9)])
    assert b"more often" in refusal(gate(RULE).check(many, NOW)).body


@pytest.mark.parametrize(
    ("location", "asked", "left"),
    [
        (JwtLocation(header="x-token"), request(None, (b"x-token", token())), ([], b"/a?b=c")),
        (JwtLocation(header="x-token", prefix="Tok "), request(None, (b"x-token", b"tok " + token())), ([], b"/a?b=c")),
        (JwtLocation(parameter="t"), request(path=b"/a?t=" + token() + b"&b=c"), ([], b"/a?b=c")),
        (JwtLocation(parameter="t"), request(path=b"/a?t=" + token()), ([], b"/a")),
        (JwtLocation(cookie="t"), request(None, (b"cookie", b"a=b; t=" + token())), ([(b"cookie", b"a=b")], b"/a?b=c")),
        (JwtLocation(cookie="t"), request(None, (b"cookie", b"t=" + token())), ([], b"/a?b=c")),
    ],
)
def test_places(location: JwtLocation, asked: Request, left: tuple[Headers, bytes]) -> None:
    kept = Request(asked.method, asked.path, asked.authority, list(asked.headers))
    assert isinstance(gate(replace(RULE, locations=(location,))).check(asked, NOW), Claims)
    assert (asked.headers, asked.path) == left
    before = (list(kept.headers), kept.path)
    assert isinstance(gate(replace(RULE, locations=(location,), forward_token=True)).check(kept, NOW), Claims)
    assert (kept.headers, kept.path) == before


def test_explicit_places_replace_the_usual_ones() -> None:
    assert gate(replace(RULE, locations=(JwtLocation(header="x-token"),))).check(request(token(exp=1)), NOW) is None


def test_claims_and_payload_in_headers_cannot_be_forged() -> None:
    claims = (
        ("x-sub", ("sub",)),
        ("x-deep", ("a", "b")),
        ("x-on", ("on",)),
        ("x-list", ("aud",)),
        ("x-bad", ("bad",)),
        ("x-none", ("no",)),
    )
    rule = replace(RULE, payload_header="x-payload", claim_headers=claims)
    forged: list[tuple[bytes, bytes]] = [(name.encode(), b"forged") for name, _ in claims]
    asked = request(token(a={"b": 5}, on=True, bad="a\r\nb"), *forged, (b"x-payload", b"forged"), (b"y", b"z"))
    assert isinstance(gate(rule).check(asked, NOW), Claims)
    found = dict(asked.headers)
    payload = found.pop(b"x-payload")
    assert json.loads(urlsafe_b64decode(payload + b"=="))["sub"] == "alice"
    assert found == {b"y": b"z", b"x-sub": b"alice", b"x-deep": b"5", b"x-on": b"true"}
    anonymous = request(None, *forged)
    assert gate(rule).check(anonymous, NOW) is None
    assert anonymous.headers == []


def test_a_preflight_is_asked_for_no_token() -> None:
    lines = ((b"origin", b"http://a"), (b"access-control-request-method", b"PUT"))
    assert gate(RULE).check(request(b"rubbish", *lines, method=b"OPTIONS"), NOW) is None
    assert isinstance(gate(RULE).check(request(b"rubbish", *lines), NOW), LocalReply)


def test_fetched_keys_are_used_as_they_come_and_go() -> None:
    rule = replace(RULE, jwks="", jwks_uri="https://keys")
    sets = KeySets()
    asking = gate(rule, sets=sets)
    assert refusal(asking.check(request(token()), NOW)).body == b"Jwks remote fetch is failed"
    sets.put("https://keys", jwks())
    assert isinstance(asking.check(request(token()), NOW), Claims)
    sets.put("https://keys", jwks("HS256"))
    assert refusal(asking.check(request(token()), NOW)).body == b"Jwt verification fails"
    sets.put("https://keys", "rubbish")
    assert refusal(asking.check(request(token()), NOW)).body == b"Jwks remote fetch is failed"
    sets.put("https://keys", jwks())
    sets.keep([])
    assert refusal(asking.check(request(token()), NOW)).body == b"Jwks remote fetch is failed"


def test_where_keys_come_from() -> None:
    assert key_set_source(RULE) == ""
    assert key_set_source(JwtRule("i", jwks_uri="https://keys")) == "https://keys"
    assert key_set_source(JwtRule("https://i/")) == "https://i/.well-known/openid-configuration"


def test_a_remembered_token_is_still_judged() -> None:
    asking = gate(RULE)
    known = token()
    assert isinstance(asking.check(request(known), NOW), Claims)
    assert isinstance(asking.check(request(known), NOW), Claims)
    assert refusal(asking.check(request(known), NOW + 200)).body == b"Jwt is expired"


def test_of_a_refused_authentication_no_token_is_accepted() -> None:
    refused = gate(reason="spec.jwtRules: not a list")
    assert refused.check(request(), NOW) is None
    assert refusal(refused.check(request(token()), NOW)).status == 401
