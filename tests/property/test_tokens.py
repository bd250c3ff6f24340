"""Whatever a token or a key set is made of: a refusal in words, or nothing; never anything else."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.tokens import b64, jwks, sign
from waypoint.http.jws import read_key_set
from waypoint.http.jwt import JwtGate, KeySets
from waypoint.http.messages import LocalReply, Request
from ztunnel.mesh.l7.security import Claims, JwtAuthentication, JwtRule

NAMES = ["iss", "sub", "aud", "exp", "alg", "kid"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["iss", "sub", "aud", "exp", "alg", "kid"]), inner, max_size=4)
    ),
    max_leaves=8,
)
SECTION = st.binary(max_size=12) | JSON.map(lambda value: b64(json.dumps(value).encode()).encode())
HEADERS = st.sampled_from([b64(b'{"alg":"HS256"}').encode(), b64(b'{"alg":"ES256","kid":"a"}').encode()])
TOKENS = st.binary(max_size=40) | st.lists(SECTION | HEADERS, min_size=2, max_size=4).map(b".".join)
RULES = (JwtRule("i", jwks=jwks("HS256", "ES256"), claim_headers=(("x", ("sub", "aud")),)), JwtRule("j", jwks="{}"))


@given(TOKENS)
def test_a_hostile_token_is_refused_in_words(token: bytes) -> None:
    gate = JwtGate([JwtAuthentication("x", "default", RULES)], KeySets())
    answer = gate.check(Request(b"GET", b"/?access_token=" + token, b"a", [(b"authorization", b"Bearer " + token)]), 1e9)
    assert answer is None or (isinstance(answer, LocalReply) and answer.status in (401, 403) and bool(answer.body))


@given(JSON)
def test_any_payload_with_a_good_signature_is_claims_or_a_refusal(payload: object) -> None:
    signed = sign({**(payload if isinstance(payload, dict) else {"x": payload}), "iss": "i"}, "HS256")
    gate = JwtGate([JwtAuthentication("x", "default", RULES)], KeySets())
    request = Request(b"GET", b"/", b"a", [(b"authorization", b"Bearer " + signed)])
    answer = gate.check(request, 1e9)
    assert isinstance(answer, Claims | LocalReply)
    assert all(b"\n" not in value for _, value in request.headers)


@given(JSON | st.dictionaries(st.just("keys"), st.lists(st.dictionaries(st.sampled_from(["kty", "n", "e", "k", "x", "y", "crv"]), JSON))))
def test_any_key_set_is_read_or_refused(value: object) -> None:
    try:
        keys = len(read_key_set(json.dumps(value)).keys)
    except ValueError as error:
        keys = str(error).count("Jwks")
    assert keys
