"""Istio's certificate protocol by protobuf's own library, built from descriptors; and an authority of ours without a cluster."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, struct_pb2

from tests.kit.pki import FakePki
from tests.kit.rpc import serving
from ztunnel.ca.authority import Authority
from ztunnel.ca.csr_protocol import PATH
from ztunnel.ca.issuance import Caller, Reason, Refusal, Rules
from ztunnel.ca.pods import PodPlace, PodTable
from ztunnel.ca.root import new_root
from ztunnel.ca.service import CertificateService, Limits
from ztunnel.mesh.errors import UpstreamError
from ztunnel.rpc.client import Target

AGENT = Caller("istio-system", "ztunnel", "ztunnel-1", "uid-ztunnel-1")
TOKEN = "token-of-the-agent-on-node-1"


def _messages() -> tuple[Any, Any]:
    struct_pb2.Struct()  # registers what the request refers to
    file = descriptor_pb2.FileDescriptorProto(
        name="ca.proto", package="istio.v1.auth", syntax="proto3", dependency=["google/protobuf/struct.proto"]
    )
    kinds = descriptor_pb2.FieldDescriptorProto
    request = file.message_type.add(name="IstioCertificateRequest")
    request.field.add(name="csr", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    request.field.add(name="validity_duration", number=3, type=kinds.TYPE_INT64, label=kinds.LABEL_OPTIONAL)
    request.field.add(name="metadata", number=4, type=kinds.TYPE_MESSAGE, type_name=".google.protobuf.Struct", label=kinds.LABEL_OPTIONAL)
    response = file.message_type.add(name="IstioCertificateResponse")
    response.field.add(name="cert_chain", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_REPEATED)
    pool = descriptor_pool.Default()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    made = [
        message_factory.GetMessageClass(find(f"istio.v1.auth.{name}")) for name in ("IstioCertificateRequest", "IstioCertificateResponse")
    ]
    return made[0], made[1]


REQUEST, RESPONSE = _messages()
"""The messages' classes, as a generated module would have them."""


@dataclass
class Tokens:
    """Vouches for the tokens that it was given."""

    known: dict[str, Caller] = field(default_factory=lambda: {TOKEN: AGENT})
    away: bool = False

    async def review(self, token: str) -> Caller:
        if self.away:
            raise UpstreamError("the API server is away")
        if token not in self.known:
            raise Refusal(Reason.TOKEN_REFUSED, "unknown")
        return self.known[token]


def pods(*more: PodPlace) -> PodTable:
    """The agents of two nodes, and a pod of an account on each."""
    table = PodTable()
    table.replace(
        [
            PodPlace("istio-system", "ztunnel-1", "uid-ztunnel-1", "node-1", "ztunnel"),
            PodPlace("istio-system", "ztunnel-2", "uid-ztunnel-2", "node-2", "ztunnel"),
            PodPlace("shop", "cart-0", "uid-cart-0", "node-1", "cart"),
            PodPlace("shop", "bank-0", "uid-bank-0", "node-2", "bank"),
            *more,
        ]
    )
    return table


RULES = Rules("cluster.local", frozenset({("istio-system", "ztunnel")}))


class Desk:
    """An authority's service with everything behind it in memory."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.tokens = Tokens()
        self.pods = pods()
        self.root = new_root("cluster.local", time.time())
        self.authority: Authority | None = Authority(self.root)
        self.outcomes: list[Reason] = []
        clocks = (time.time, time.monotonic)
        self.service = CertificateService(
            self.tokens, self.pods, RULES, lambda: self.authority, self.outcomes.append, clocks, limits or Limits(news_seconds=0.0)
        )

    @asynccontextmanager
    async def serving(self, pki: FakePki) -> AsyncIterator[Target]:
        """On a loopback port, with a server certificate of that authority."""
        async with serving(pki, {PATH: self.service.create_certificate}) as (target, _):
            yield target


def files(directory: Path, pki: FakePki, token: str = TOKEN) -> tuple[Path, Path]:
    """A roots file and a token file, as they are mounted into an agent."""
    roots, tokens = directory / "root-cert.pem", directory / "token"
    roots.write_bytes(pki.root_pem)
    tokens.write_text(token + "\n")
    return roots, tokens
