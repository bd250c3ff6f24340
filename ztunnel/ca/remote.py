"""The client of an authority that speaks Istio's protocol: `ztunnel ca`, or istiod. A new key for each request, which never leaves here.

Token and roots are read anew for each call, because both are files that somebody else keeps fresh. Nothing is retried here: `rotation`
does that, with a back-off.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from ztunnel.ca.csr_protocol import PATH, decode_answer, encode_request
from ztunnel.ca.request import IssueError, accept, check_chain, new_request
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.rpc.client import Target, unary
from ztunnel.rpc.messages import RpcError, Status
from ztunnel.rpc.protobuf import WireError
from ztunnel.rpc.tls import client_context

MAX_TOKEN_BYTES = 16 << 10
MAX_ROOTS_BYTES = 1 << 20
ROOTS_SECONDS = 10.0
"""Between two looks at the roots file; the kubelet brings a change of a ConfigMap within a minute or two."""
RENEW_SECONDS = 300.0
"""Over which renewals after a change of roots are spread, so that a cluster's agents do not ask all at once."""
CALL_SECONDS = 9.0
"""Deadline of one call; under `rotation`'s own, so that the error says what was waited for."""


@dataclass(frozen=True, slots=True)
class RemoteAuthority:
    """Asks one authority for certificates. Satisfies `rotation.Issuer`.

    Args:
        roots_file: PEM; whom to believe that it is the authority.
        token_file: this agent's projected token, audience `istio-ca`.
        cluster: the name that istiod knows this cluster by.
        leaf_seconds: life to ask for; the authority may give less.
        impersonates: whether it asks for others, as a node agent does for its pods; else for its own service account only.
    """

    target: Target
    roots_file: Path
    token_file: Path
    cluster: str
    leaf_seconds: int
    impersonates: bool = True

    async def obtain(self, identity: SpiffeId, now: float) -> Credentials:
        """Fresh credentials for one identity.

        Raises:
            IssueError: the authority refused, or gave something else than was asked for.
            MeshError: it cannot be reached, or our files cannot be used.
        """
        context = self._context()
        metadata = {"authorization": f"Bearer {self._token()}", "clusterid": self.cluster}
        request = new_request(identity)
        message = encode_request(request.csr_pem, self.leaf_seconds, identity if self.impersonates else None)
        try:
            signed = decode_answer(await unary(self.target, context, PATH, message, metadata, CALL_SECONDS))
        except WireError as error:
            raise IssueError(f"{self.target}: the answer cannot be read: {error}") from error
        except RpcError as error:
            raise _explained(self.target, identity, error) from error
        check_chain(signed, now)
        return accept(request, signed)

    async def follow_roots(
        self, changed: Callable[[float], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Tells of each change of the roots file, for ever.

        A root that will sign soon is in that file before; certificates that are renewed now bring it to their holders, which otherwise
        would hear of it at half of their certificates' lives.

        Args:
            changed: given the seconds within which to renew.
        """
        before = self._roots()
        task_status.started()
        while True:
            await trio.sleep(ROOTS_SECONDS)
            now = self._roots()
            if now and now != before:
                changed(RENEW_SECONDS)
                before = now

    def _roots(self) -> bytes:
        try:
            return _read(self.roots_file, MAX_ROOTS_BYTES, "ca.roots_file")
        except IssueError:
            # The next request says so; here nothing has changed.
            return b""

    def _context(self) -> ssl.SSLContext:
        return client_context(_read(self.roots_file, MAX_ROOTS_BYTES, "ca.roots_file"))

    def _token(self) -> str:
        token = _read(self.token_file, MAX_TOKEN_BYTES, "ca.token_file").strip()
        if not token or not token.isascii() or any(byte <= 0x20 for byte in token):
            raise IssueError(f"ca.token_file: {self.token_file} holds no token")
        return token.decode("ascii")


def _explained(target: Target, identity: SpiffeId, error: RpcError) -> MeshError:
    match error.status:
        case Status.UNAUTHENTICATED | Status.PERMISSION_DENIED:
            hint = "its log says why; usual causes: the token's audience or account, or no pod of this account on this node yet"
            return IssueError(f"{target} refuses a certificate for {identity} ({error}); {hint}")
        case Status.UNIMPLEMENTED:
            return IssueError(f"{target} is no certificate authority ({error}); see ca.address")
        case _:
            return IssueError(f"{target} gives no certificate for {identity}: {error}")


def _read(file: Path, limit: int, setting: str) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(limit + 1)
    except OSError as error:
        raise IssueError(f"{setting}: {file}: {error.strerror}") from error
    if len(content) > limit:
        raise IssueError(f"{setting}: {file}: larger than {limit} bytes")
    return content
