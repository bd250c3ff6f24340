"""`CreateCertificate`, as a caller meets it: prove yourself, be judged, be signed for; one audit line for each request.

Order, cheapest first and nothing signed before all of it: the caller's address is not too busy, the message can be read, the API server
vouches for the token, `issuance` grants the identity, the node is not too busy. Callers learn that they were refused, operators why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio
from cryptography import x509

from ztunnel.ca.allowance import Allowance
from ztunnel.ca.authority import Authority
from ztunnel.ca.csr_protocol import CertificateRequest, decode_request, encode_answer
from ztunnel.ca.issuance import Caller, Grant, Pods, Reason, Refusal, Rules, decide
from ztunnel.ca.request import IssueError, Signed
from ztunnel.mesh.errors import MeshError
from ztunnel.rpc.messages import RpcError, Status
from ztunnel.rpc.protobuf import WireError
from ztunnel.rpc.server import Call
from ztunnel.runtime.logs import fields

log = logging.getLogger(__name__)

MAX_CSR_BYTES = 16 << 10
MAX_TOKEN_BYTES = 16 << 10
MAX_REVIEWS = 32
"""Tokens that the API server is asked about at one time; further callers wait, within the deadline of their call."""
_NEWS_STEP_SECONDS = 0.05
MIN_LIFE_SECONDS = 60
"""Shorter wishes get this: a certificate that is over before it has arrived helps nobody."""

_TEXTS = {
    Reason.BUSY: (Status.RESOURCE_EXHAUSTED, "too many requests"),
    Reason.NO_REVIEW: (Status.UNAVAILABLE, "callers cannot be checked now"),
    Reason.NOT_SYNCED: (Status.UNAVAILABLE, "callers cannot be checked now"),
    Reason.FAILED: (Status.UNAVAILABLE, "nothing can be signed now"),
    Reason.BAD_REQUEST: (Status.INVALID_ARGUMENT, "the request cannot be read"),
}
_REFUSED = (Status.UNAUTHENTICATED, "request authenticate failure")
"""Everything else, in istiod's words: a stranger does not learn what was wrong."""


class TokenReviewer(Protocol):
    """Who vouches for tokens."""

    async def review(self, token: str) -> Caller:
        """Whose it is.

        Raises:
            Refusal: nobody's, or not meant for us.
            MeshError: it cannot be found out now.
        """
        ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How often may be asked, each as a rate per second and a burst; and how long somebody may be too early."""

    per_address: tuple[float, float] = (20.0, 500.0)
    per_node: tuple[float, float] = (5.0, 500.0)
    news_seconds: float = 1.0
    """An agent may hear of a new pod before we do, and the pod waits for its certificate. So who asks for a pod that is not there is judged
    again within this time before it is refused, for it would come again much later."""


@dataclass(slots=True)
class _Audit:
    """What is known of a request when it ends."""

    peer: str
    caller: Caller | None = None
    asked: str = ""
    grant: Grant | None = None


class CertificateService:
    """The method.

    Args:
        authority: what signs now; None while there is no root.
        count: told of each request's outcome.
        wall, steady: the clocks of certificates and of rates, in seconds.
    """

    def __init__(
        self,
        reviewer: TokenReviewer,
        pods: Pods,
        rules: Rules,
        authority: Callable[[], Authority | None],
        count: Callable[[Reason], None],
        clocks: tuple[Callable[[], float], Callable[[], float]],
        limits: Limits = Limits(),
    ) -> None:
        self._reviewer = reviewer
        self._pods = pods
        self._rules = rules
        self._authority = authority
        self._count = count
        self._wall, self._steady = clocks
        self._reviewing = trio.CapacityLimiter(MAX_REVIEWS)
        self._news_seconds = limits.news_seconds
        self._addresses = Allowance(*limits.per_address)
        self._nodes = Allowance(*limits.per_node)

    async def create_certificate(self, call: Call) -> bytes:
        """See `rpc.server.Method`."""
        audit = _Audit(call.peer)
        try:
            signed = await self._serve(call, audit)
        except Refusal as error:
            self._tell(audit, error.reason, error=str(error))
            raise RpcError(*_TEXTS.get(error.reason, _REFUSED)) from error
        leaf = x509.load_pem_x509_certificate(signed.chain_pem)
        self._tell(audit, Reason.ISSUED, serial=f"{leaf.serial_number:x}", expires=leaf.not_valid_after_utc.isoformat())
        return encode_answer(signed)

    async def _serve(self, call: Call, audit: _Audit) -> Signed:
        if not self._addresses.take(call.peer, self._steady()):
            raise Refusal(Reason.BUSY, "too many requests from this address")
        request = _request(call.message)
        audit.asked = request.impersonated
        token = _bearer(call.metadata.get("authorization", ""))
        try:
            async with self._reviewing:
                audit.caller = await self._reviewer.review(token)
        except MeshError as error:
            raise Refusal(Reason.NO_REVIEW, str(error)) from error
        grant = audit.grant = await self._decide(audit.caller, request.impersonated)
        if not self._nodes.take(grant.node, self._steady()):
            raise Refusal(Reason.BUSY, "too many requests from this node")
        return self._sign(request, grant)

    async def _decide(self, caller: Caller, impersonated: str) -> Grant:
        until = self._steady() + self._news_seconds
        while True:
            try:
                return decide(caller, impersonated, self._pods, self._rules)
            except Refusal as error:
                if error.reason not in (Reason.NO_POD, Reason.NOT_ON_NODE) or self._steady() >= until:
                    raise
            await trio.sleep(_NEWS_STEP_SECONDS)

    def _sign(self, request: CertificateRequest, grant: Grant) -> Signed:
        authority = self._authority()
        if authority is None:
            raise Refusal(Reason.FAILED, "there is no root yet")
        wanted = max(request.validity_seconds, MIN_LIFE_SECONDS) if request.validity_seconds > 0 else None
        try:
            return authority.sign(request.csr_pem, grant.identity, self._wall(), wanted)
        except IssueError as error:
            raise Refusal(Reason.BAD_REQUEST, str(error)) from error

    def _tell(self, audit: _Audit, reason: Reason, **more: str) -> None:
        self._count(reason)
        caller = audit.caller
        level = logging.INFO if reason is Reason.ISSUED else logging.WARNING
        log.log(
            level,
            "certificate issued" if reason is Reason.ISSUED else "certificate refused",
            extra=fields(
                reason=None if reason is Reason.ISSUED else reason.value,
                identity=audit.grant.identity if audit.grant is not None else audit.asked or None,
                caller=caller,
                pod=caller.pod if caller is not None else None,
                node=audit.grant.node if audit.grant is not None else None,
                peer=audit.peer,
                **more,
            ),
        )


def _request(message: bytes) -> CertificateRequest:
    try:
        request = decode_request(message)
    except WireError as error:
        raise Refusal(Reason.BAD_REQUEST, str(error)) from error
    if len(request.csr_pem) > MAX_CSR_BYTES:
        raise Refusal(Reason.BAD_REQUEST, f"a signing request of {len(request.csr_pem)} bytes")
    return request


def _bearer(header: str) -> str:
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Refusal(Reason.NO_TOKEN, "no bearer token")
    if len(token) > MAX_TOKEN_BYTES:
        raise Refusal(Reason.TOKEN_REFUSED, f"a token of {len(token)} bytes")
    return token.strip()
