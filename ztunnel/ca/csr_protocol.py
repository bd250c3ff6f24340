"""The messages of Istio's certificate signing protocol, `istio.v1.auth.IstioCertificateService/CreateCertificate`. Pure.

Source: Istio `security/proto/istio/v1/auth/ca.proto`; what the elements of a chain mean: Istio ztunnel `identity/caclient.rs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ztunnel.ca.request import IssueError, Signed
from ztunnel.mesh.identity import SpiffeId
from ztunnel.rpc.protobuf import WireError, bytes_field, int_field, read_bytes, read_fields, read_int64, read_text

PATH = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
MAX_CHAIN = 16
"""Elements of an answer; the usual two or three."""

_IMPERSONATED = "ImpersonatedIdentity"
_CSR, _VALIDITY, _METADATA, _CHAIN = 1, 3, 4, 1
_STRUCT_FIELDS, _KEY, _VALUE, _STRING_VALUE = 1, 1, 2, 3


@dataclass(frozen=True, slots=True)
class CertificateRequest:
    """What a caller asks for."""

    csr_pem: bytes
    validity_seconds: int = 0
    """0: whatever the authority gives."""
    impersonated: str = ""
    """The SPIFFE id that a node agent asks for on behalf of one of its pods; empty: for the caller itself."""


def encode_request(csr_pem: bytes, validity_seconds: int, impersonated: SpiffeId | None) -> bytes:
    """A request for somebody that the caller names, or None for the caller itself."""
    request = bytes_field(_CSR, csr_pem) + int_field(_VALIDITY, validity_seconds)
    if impersonated is None:
        return request
    value = bytes_field(_STRING_VALUE, impersonated.uri)
    entry = bytes_field(_KEY, _IMPERSONATED) + bytes_field(_VALUE, value)
    return request + bytes_field(_METADATA, bytes_field(_STRUCT_FIELDS, entry))


def decode_request(data: bytes) -> CertificateRequest:
    """A caller's request; what else its metadata says is for authorities of other kinds.

    Raises:
        WireError: it cannot be read.
    """
    csr, validity, impersonated = b"", 0, ""
    for number, value in read_fields(data):
        if number == _CSR:
            csr = read_bytes(number, value)
        elif number == _VALIDITY:
            validity = read_int64(number, value)
        elif number == _METADATA:
            # A message that comes twice is merged: the later value wins, an absent one changes nothing.
            impersonated = _impersonated(read_bytes(number, value)) or impersonated
    return CertificateRequest(csr, validity, impersonated)


def encode_answer(signed: Signed) -> bytes:
    """An authority's answer: the leaf, each intermediate, and as the last element all roots together."""
    chain = [*_split(signed.chain_pem), signed.roots_pem]
    return b"".join(bytes_field(_CHAIN, element) for element in chain)


def decode_answer(data: bytes) -> Signed:
    """What an authority answered.

    Raises:
        WireError: it cannot be read.
        IssueError: fewer than two elements: no roots to check peers against.
    """
    chain = [read_text(number, value).encode() for number, value in read_fields(data) if number == _CHAIN]
    if not 2 <= len(chain) <= MAX_CHAIN:
        raise IssueError(f"the authority gave a chain of {len(chain)} elements; a leaf and roots at least are needed")
    return Signed(b"".join(element.strip() + b"\n" for element in chain[:-1]), chain[-1])


def _impersonated(struct: bytes) -> str:
    found = ""
    for number, value in read_fields(struct):
        if number != _STRUCT_FIELDS:
            continue
        entry = dict(read_fields(read_bytes(number, value)))
        if _KEY not in entry or read_text(_KEY, entry[_KEY]) != _IMPERSONATED:
            continue
        given = dict(read_fields(read_bytes(_VALUE, entry.get(_VALUE, b""))))
        if _STRING_VALUE not in given:
            # Fail closed: a caller that means to name somebody must not get a certificate of its own instead.
            raise WireError(f"{_IMPERSONATED} is not text")
        found = read_text(_STRING_VALUE, given[_STRING_VALUE])
    return found


def _split(chain_pem: bytes) -> list[bytes]:
    end = b"-----END CERTIFICATE-----\n"
    return [part.lstrip() + end for part in chain_pem.split(end) if part.strip()]
