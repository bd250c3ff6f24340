"""Signed tokens: vectors of the RFCs, each algorithm, and keys that must not verify anything."""

from __future__ import annotations

import json

import pytest

from tests.kit.tokens import KEYS, b64, public, sign
from waypoint.http.jws import Jws, TokenError, read_key_set

PAYLOAD = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
RFC7515 = [
    (
        {"kty": "oct", "k": "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"},
        f"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{PAYLOAD}.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
    ),
    (
        {
            "kty": "EC",
            "crv": "P-256",
            "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
            "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
        },
        f"eyJhbGciOiJFUzI1NiJ9.{PAYLOAD}.DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q",
    ),
]


def verify(token: bytes, *keys: object) -> None:
    read_key_set(json.dumps({"keys": keys})).verify(Jws(token))


@pytest.mark.parametrize(("key", "token"), RFC7515)
def test_vectors_of_rfc_7515(key: dict[str, str], token: str) -> None:
    verify(token.encode(), key)
    with pytest.raises(TokenError, match="Jwt verification fails"):
        verify(token[:-4].encode() + b"AAAA", key)


@pytest.mark.parametrize("algorithm", [*KEYS])
def test_each_algorithm(algorithm: str) -> None:
    token = sign({"iss": "i"}, algorithm)
    verify(token, public(algorithm))
    verify(token, public("HS256", kid="other"), public(algorithm))
    tampered = token.split(b".")
    tampered[1] = b64(b'{"iss":"j"}').encode()
    with pytest.raises(TokenError, match="Jwt verification fails"):
        verify(b".".join(tampered), public(algorithm))


@pytest.mark.parametrize(
    ("token_kid", "key", "text"),
    [
        ("a", {"kid": "a"}, ""),
        ("", {"kid": "a"}, ""),
        ("a", {}, ""),
        ("a", {"kid": "b"}, "Jwks doesn't have key to match kid or alg from Jwt"),
        ("a", {"alg": "RS512"}, "Jwks doesn't have key to match kid or alg from Jwt"),
        ("a", {"alg": "RS256"}, ""),
    ],
)
def test_keys_are_chosen_by_id_and_algorithm(token_kid: str, key: dict[str, str], text: str) -> None:
    token = sign({"iss": "i"}, "RS256", kid=token_kid)
    if text:
        with pytest.raises(TokenError, match=text):
            verify(token, public("RS256", **key))
    else:
        verify(token, public("RS256", **key))


def test_a_public_key_is_never_a_shared_secret() -> None:
    modulus = public("RS256")
    token = sign({"iss": "i"}, "HS256", secret=json.dumps(modulus).encode())
    with pytest.raises(TokenError, match="Jwt verification fails"):
        verify(token, modulus)


@pytest.mark.parametrize(
    ("token", "text"),
    [
        (b"", "not in the form of Header.Payload.Signature with two dots"),
        (b"a.b", "not in the form of"),
        (b"a.b.c.d", "not in the form of"),
        (b"a." * 20000, "not in the form of"),
        (b"!.e30.AA", "header is an invalid Base64url"),
        (b"e30=.e30.AA", "header is an invalid Base64url"),
        (b64(b"x").encode() + b".e30.AA", "header is an invalid JSON"),
        (b64(b"[]").encode() + b".e30.AA", "header is an invalid JSON"),
        (b64(b"[" * 5000).encode() + b".e30.AA", "header is an invalid JSON"),
        (b"e30.e30.AA", "[alg] field is required"),
        (b64(b'{"alg":"none"}').encode() + b".e30.AA", "[alg] is not supported"),
        (b64(b'{"alg":"ES256K"}').encode() + b".e30.AA", "[alg] is not supported"),
        (b64(b'{"alg":"RS256","kid":5}').encode() + b".e30.AA", "[kid] field is not a string"),
        (b64(b'{"alg":"RS256","crit":["x"]}').encode() + b".e30.AA", "[crit]"),
        (b64(b'{"alg":"RS256"}').encode() + b".AAAA.AA", "payload is an invalid JSON"),
        (b64(b'{"alg":"RS256"}').encode() + b".e!.AA", "payload is an invalid Base64"),
        (b64(b'{"alg":"RS256"}').encode() + b".e30.", "signature is an invalid Base64"),
    ],
)
def test_what_is_no_token(token: bytes, text: str) -> None:
    with pytest.raises(TokenError) as caught:
        Jws(token)
    assert text in caught.value.text
    assert caught.value.status == 401


UNUSABLE: list[object] = [
    {},
    5,
    {"kty": "RSA"},
    {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
    {"kty": "RSA", "x5c": ["AAAA"]},
    {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
    {"kty": "EC", "crv": "secp256k1", "x": "AA", "y": "AA"},
    {"kty": "OKP", "crv": "X25519", "x": "AA"},
    {"kty": "OKP", "crv": "Ed25519", "x": "AA"},
    {"kty": "oct", "k": 5},
    {"kty": "oct", "k": "AAAA", "use": "enc"},
    {"kty": "oct", "k": "AAAA", "key_ops": ["encrypt"]},
    {"kty": "oct", "k": "AAAA", "alg": "RS256"},
]


@pytest.mark.parametrize("key", UNUSABLE, ids=str)
def test_keys_that_cannot_be_used_are_left_out(key: object) -> None:
    with pytest.raises(ValueError, match="does not have any key"):
        read_key_set(json.dumps({"keys": [key]}))
    assert len(read_key_set(json.dumps({"keys": [key, public("RS256")]})).keys) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"keys": 5}', '{"kid": "pem"}', "[" * 5000])
def test_what_is_no_key_set(text: str) -> None:
    with pytest.raises(ValueError, match="Jwks"):
        read_key_set(text)
