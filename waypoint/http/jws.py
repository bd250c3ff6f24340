"""Signed tokens: taking a JWS apart, key sets, and whether a key made a signature. Every refusal is one of `TokenError`'s texts.

Algorithms are bound to kinds of keys, so that a public key can never serve as a shared secret; `none` does not exist.
Source: RFC 7515, 7517, 7518, 8037; the texts are those of Envoy's jwt_verify_lib.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode
from collections.abc import Callable
from typing import Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.x509 import load_der_x509_certificate

LONGEST_TOKEN: Final = 16 << 10
MAX_KEYS: Final = 256
_BASE64 = re.compile(rb"[A-Za-z0-9_-]+")
_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_CURVES: Final[dict[str, tuple[str, ec.EllipticCurve]]] = {
    "P-256": ("ES256", ec.SECP256R1()),
    "P-384": ("ES384", ec.SECP384R1()),
    "P-521": ("ES512", ec.SECP521R1()),
}
_SMALLEST_RSA: Final = 1024
_LARGEST_RSA: Final = 16384
ALGORITHMS: Final = frozenset({f"{family}{bits}" for family in ("RS", "PS", "ES", "HS") for bits in _HASHES} | {"EdDSA"})

BAD_FORM: Final = "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
FAILED: Final = "Jwt verification fails"
NO_KEY: Final = "Jwks doesn't have key to match kid or alg from Jwt"
NO_KEY_SET: Final = "Jwks remote fetch is failed"


class TokenError(ValueError):
    """Why a token is refused, in the words that the client is told. `status` is 401, or 403 for a wrong audience."""

    def __init__(self, text: str, status: int = 401) -> None:
        super().__init__(text)
        self.text = text
        self.status = status


class Jws:
    """A token taken apart; nothing of it is verified."""

    __slots__ = ("algorithm", "key_id", "payload", "payload_text", "signature", "signed")

    def __init__(self, token: bytes) -> None:
        """
        Raises:
            TokenError: it is no token, or its header cannot be used.
        """
        sections = token.split(b".") if len(token) <= LONGEST_TOKEN else []
        if len(sections) != 3 or not sections[0] or not sections[1]:
            raise TokenError(BAD_FORM)
        header = _mapping(_decoded(sections[0], "Jwt header is an invalid Base64url encoded"), "Jwt header is an invalid JSON")
        algorithm, key_id = header.get("alg"), header.get("kid", "")
        if not isinstance(algorithm, str):
            raise TokenError("Jwt header [alg] field is required and must be a string")
        if algorithm not in ALGORITHMS:
            raise TokenError("Jwt header [alg] is not supported")
        if not isinstance(key_id, str):
            raise TokenError("Jwt header [kid] field is not a string")
        if "crit" in header:
            raise TokenError("Jwt header [crit] names an extension that is not supported")
        self.algorithm: str = algorithm
        self.key_id: str = key_id
        self.payload_text = sections[1]
        """base64url, as it came."""
        self.payload = _mapping(_decoded(sections[1], "Jwt payload is an invalid Base64"), "Jwt payload is an invalid JSON")
        self.signature = _decoded(sections[2], "Jwt signature is an invalid Base64")
        self.signed = token[: len(sections[0]) + 1 + len(sections[1])]


def _decoded(section: bytes, refusal: str) -> bytes:
    if not _BASE64.fullmatch(section):
        raise TokenError(refusal)
    try:
        return urlsafe_b64decode(section + b"=" * (-len(section) % 4))
    except ValueError:
        raise TokenError(refusal) from None


def _mapping(text: bytes, refusal: str) -> dict[str, object]:
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        raise TokenError(refusal) from None
    if not isinstance(value, dict):
        raise TokenError(refusal)
    return value


_Verify = Callable[[bytes, bytes, str], None]
"""(signature, signed, algorithm); raises InvalidSignature."""


class Key:
    """One key of a set, and the algorithms that it may verify."""

    __slots__ = ("_verify", "algorithm", "algorithms", "key_id")

    def __init__(self, key_id: str, algorithm: str, algorithms: frozenset[str], verify: _Verify) -> None:
        """
        Args:
            algorithm: the one that it says it is for, or empty.
            algorithms: those that its kind can verify.
        """
        self.key_id = key_id
        self.algorithm = algorithm
        self.algorithms = algorithms
        self._verify = verify

    def fits(self, token: Jws) -> bool:
        """Whether it may be meant by a token: by key id, where both have one, and by the algorithm that it says it is for."""
        if token.key_id and self.key_id and token.key_id != self.key_id:
            return False
        return not self.algorithm or token.algorithm == self.algorithm

    def made(self, token: Jws) -> bool:
        """Whether the token's signature is this key's. A key never verifies what is not for its kind."""
        if token.algorithm not in self.algorithms:
            return False
        try:
            self._verify(token.signature, token.signed, token.algorithm)
        except (InvalidSignature, ValueError):
            return False
        return True


class KeySet:
    """The keys of an issuer. Keys that we cannot use are left out (other kinds, for encryption, too weak)."""

    __slots__ = ("keys", "problem")

    def __init__(self, keys: tuple[Key, ...], problem: str = "") -> None:
        self.keys = keys
        self.problem = problem
        """Not empty: there is no set, and this is what tokens are refused with."""

    def verify(self, token: Jws) -> None:
        """
        Raises:
            TokenError: no key of the set made the token's signature.
        """
        if self.problem:
            raise TokenError(self.problem)
        fitting = [key for key in self.keys if key.fits(token)]
        if not fitting:
            raise TokenError(NO_KEY)
        if not any(key.made(token) for key in fitting):
            raise TokenError(FAILED)


def read_key_set(text: str | bytes) -> KeySet:
    """The keys of a JWK set.

    Raises:
        ValueError: it is no key set, or none of its keys can be used; the text says so.
    """
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("Jwks is an invalid JSON") from error
    listed = value.get("keys") if isinstance(value, dict) else None
    if not isinstance(listed, list):
        raise ValueError('Jwks does not have "keys", or they are not a list')  # noqa: TRY004 - what a peer says, not how we are called
    keys = tuple(key for key in map(_key, listed[:MAX_KEYS]) if key is not None)
    if not keys:
        raise ValueError("Jwks does not have any key that can be used")
    return KeySet(keys)


def _key(value: object) -> Key | None:
    if not isinstance(value, dict) or value.get("use", "sig") != "sig":
        return None
    operations = value.get("key_ops")
    if isinstance(operations, list) and "verify" not in operations:
        return None
    maker = _MAKERS.get(str(value.get("kty")))
    if maker is None:
        return None
    try:
        algorithms, verify = maker(value)
    except (ValueError, TypeError, KeyError, OverflowError, UnsupportedAlgorithm, TokenError):
        return None
    named, key_id = value.get("alg", ""), value.get("kid", "")
    if not isinstance(named, str) or (named and named not in algorithms):
        return None
    return Key(key_id if isinstance(key_id, str) else "", named, algorithms, verify)


def _bytes(value: dict[str, object], name: str) -> bytes:
    text = value[name]
    if not isinstance(text, str):
        raise TypeError(name)
    return _decoded(text.rstrip("=").encode(), name)


def _rsa(value: dict[str, object]) -> tuple[frozenset[str], _Verify]:
    public: object
    if "n" in value:
        numbers = rsa.RSAPublicNumbers(int.from_bytes(_bytes(value, "e")), int.from_bytes(_bytes(value, "n")))
        if not _SMALLEST_RSA <= numbers.n.bit_length() <= _LARGEST_RSA or numbers.e.bit_length() > 64:
            raise ValueError("a size of key that is not accepted")
        public = numbers.public_key()
    else:
        public = _certified(value)
    if not isinstance(public, rsa.RSAPublicKey) or not _SMALLEST_RSA <= public.key_size <= _LARGEST_RSA:
        raise ValueError("not an RSA key that is accepted")
    key = public

    def verify(signature: bytes, signed: bytes, algorithm: str) -> None:
        digest = _HASHES[algorithm[2:]]
        if algorithm.startswith("RS"):
            key.verify(signature, signed, padding.PKCS1v15(), digest)
        else:
            key.verify(signature, signed, padding.PSS(padding.MGF1(digest), digest.digest_size), digest)

    return frozenset(f"{family}{bits}" for family in ("RS", "PS") for bits in _HASHES), verify


def _certified(value: dict[str, object]) -> object:
    """The key of the first certificate of `x5c`."""
    chain = value["x5c"]
    if not isinstance(chain, list) or not chain or not isinstance(chain[0], str):
        raise TypeError("x5c")
    text = chain[0].translate(str.maketrans("+/", "-_")).rstrip("=")
    return load_der_x509_certificate(_decoded(text.encode(), "x5c")).public_key()


def _elliptic(value: dict[str, object]) -> tuple[frozenset[str], _Verify]:
    algorithm, curve = _CURVES[str(value["crv"])]
    numbers = ec.EllipticCurvePublicNumbers(int.from_bytes(_bytes(value, "x")), int.from_bytes(_bytes(value, "y")), curve)
    public = numbers.public_key()
    half = (curve.key_size + 7) // 8

    def verify(signature: bytes, signed: bytes, algorithm: str) -> None:
        if len(signature) != 2 * half:
            raise InvalidSignature
        pair = encode_dss_signature(int.from_bytes(signature[:half]), int.from_bytes(signature[half:]))
        public.verify(pair, signed, ec.ECDSA(_HASHES[algorithm[2:]]))

    return frozenset({algorithm}), verify


def _edwards(value: dict[str, object]) -> tuple[frozenset[str], _Verify]:
    if value["crv"] != "Ed25519":
        raise ValueError("only Ed25519 is accepted")
    public = Ed25519PublicKey.from_public_bytes(_bytes(value, "x"))

    def verify(signature: bytes, signed: bytes, _algorithm: str) -> None:
        public.verify(signature, signed)

    return frozenset({"EdDSA"}), verify


def _shared(value: dict[str, object]) -> tuple[frozenset[str], _Verify]:
    secret = _bytes(value, "k")

    def verify(signature: bytes, signed: bytes, algorithm: str) -> None:
        code = hmac.HMAC(secret, _HASHES[algorithm[2:]])
        code.update(signed)
        code.verify(signature)

    return frozenset(f"HS{bits}" for bits in _HASHES), verify


_MAKERS: Final[dict[str, Callable[[dict[str, object]], tuple[frozenset[str], _Verify]]]] = {
    "RSA": _rsa,
    "EC": _elliptic,
    "OKP": _edwards,
    "oct": _shared,
}
