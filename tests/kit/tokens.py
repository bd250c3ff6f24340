"""Tokens and keys for tests: `sign` makes a JWT with any algorithm, `public` gives the JWK that verifies it, `jwks` a set of them.

The keys are made when they are first asked for, once in a process.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from functools import cache

from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

HASHES: dict[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
CURVES: dict[str, tuple[str, ec.EllipticCurve]] = {
    "ES256": ("P-256", ec.SECP256R1()),
    "ES384": ("P-384", ec.SECP384R1()),
    "ES512": ("P-521", ec.SECP521R1()),
}
KEYS = [*(f"{family}{bits}" for family in ("RS", "PS", "ES", "HS") for bits in HASHES), "EdDSA"]
"""Algorithms."""
SECRET = b"0123456789abcdef0123456789abcdef"


def b64(value: bytes) -> str:
    """base64url without padding."""
    return urlsafe_b64encode(value).rstrip(b"=").decode()


@cache
def _rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


@cache
def _elliptic(algorithm: str) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(CURVES[algorithm][1])


@cache
def _edwards() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def sign(payload: Mapping[str, object], algorithm: str = "ES256", *, kid: str = "", secret: bytes = SECRET) -> bytes:
    """A token."""
    header = {"alg": algorithm, **({"kid": kid} if kid else {})}
    signed = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(payload).encode())}".encode()
    return signed + b"." + b64(_signature(signed, algorithm, secret)).encode()


def _signature(signed: bytes, algorithm: str, secret: bytes) -> bytes:
    if algorithm == "EdDSA":
        return _edwards().sign(signed)
    digest = HASHES[algorithm[2:]]
    if algorithm.startswith("HS"):
        code = hmac.HMAC(secret, digest)
        code.update(signed)
        return code.finalize()
    if algorithm.startswith("RS"):
        return _rsa().sign(signed, padding.PKCS1v15(), digest)
    if algorithm.startswith("PS"):
        return _rsa().sign(signed, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)
    half = (CURVES[algorithm][1].key_size + 7) // 8
    first, second = decode_dss_signature(_elliptic(algorithm).sign(signed, ec.ECDSA(digest)))
    return first.to_bytes(half, "big") + second.to_bytes(half, "big")


def public(algorithm: str = "ES256", **more: str) -> dict[str, str]:
    """The JWK that verifies what `sign` signs; `more` are other members (`kid`, `alg`, `use`)."""
    if algorithm == "EdDSA":
        raw = _edwards().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        return {"kty": "OKP", "crv": "Ed25519", "x": b64(raw), **more}
    if algorithm.startswith("HS"):
        return {"kty": "oct", "k": b64(SECRET), **more}
    if algorithm.startswith("ES"):
        point = _elliptic(algorithm).public_key().public_numbers()
        half = (CURVES[algorithm][1].key_size + 7) // 8
        x, y = b64(point.x.to_bytes(half, "big")), b64(point.y.to_bytes(half, "big"))
        return {"kty": "EC", "crv": CURVES[algorithm][0], "x": x, "y": y, **more}
    numbers = _rsa().public_key().public_numbers()
    return {"kty": "RSA", "n": b64(numbers.n.to_bytes(256, "big")), "e": b64(numbers.e.to_bytes(3, "big")), **more}


def jwks(*algorithms: str) -> str:
    """A key set of the keys of these algorithms (ES256's unless told)."""
    return json.dumps({"keys": [public(each) for each in algorithms or ("ES256",)]})
