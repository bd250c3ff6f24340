"""HTTP messages as every part of the proxy sees them, whichever version carried them.

Names are lower-case bytes without `:`; values are bytes without CR, LF and NUL (the codecs guarantee both). Pseudo-headers of HTTP/2 and
the request line of HTTP/1.1 are attributes. Hop-by-hop headers are gone before anybody here sees a message.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.security import Claims

Headers = list[tuple[bytes, bytes]]


class Request:
    """A request's head. Mutable: filters edit it on its way; `original_path` stays what the client sent (after normalisation)."""

    __slots__ = ("authority", "claims", "headers", "method", "original_path", "path", "scheme", "upgrade", "version")

    def __init__(
        self,
        method: bytes,
        path: bytes,
        authority: bytes,
        headers: Headers,
        *,
        scheme: bytes = b"http",
        version: int = 11,
        upgrade: bytes = b"",
    ) -> None:
        """
        Args:
            path: origin form with its query.
            version: 10, 11 or 20.
            upgrade: lower-case protocol of an HTTP/1.1 upgrade or an extended CONNECT (`websocket`).
        """
        self.method = method
        self.path = path
        self.original_path = path
        self.authority = authority
        self.headers = headers
        self.scheme = scheme
        self.version = version
        self.upgrade = upgrade
        self.claims: Claims | None = None
        """Of its verified token, once there is one."""

    def get(self, name: bytes) -> bytes | None:
        """The values of a header joined with `,` (RFC 9110 §5.3); None without one."""
        return header(self.headers, name)

    @property
    def is_grpc(self) -> bool:
        kind = self.get(b"content-type")
        return kind is not None and kind.startswith(b"application/grpc")


class Response:
    """A response's head."""

    __slots__ = ("headers", "status")

    def __init__(self, status: int, headers: Headers) -> None:
        self.status = status
        self.headers = headers

    def get(self, name: bytes) -> bytes | None:
        """As `Request.get`."""
        return header(self.headers, name)


def header(headers: Headers, name: bytes) -> bytes | None:
    """The values of a header joined with `,`; None without one."""
    found = [value for key, value in headers if key == name]
    if not found:
        return None
    return found[0] if len(found) == 1 else b",".join(found)


@dataclass(slots=True)
class Client:
    """Who sent a request, by what the proxy knows itself: never from headers."""

    identity: SpiffeId | None
    """From the certificate of the HBONE connection; a gateway's clients have none."""
    address: str
    port: int = 0
    namespace: str = ""
    service_port: int = 0
    """The port that the client addressed."""
    destination: str = ""
    """The address that it addressed."""
    sni: str = ""
    tls: bool = True
    principal: str = ""
    """Of `identity`, as rules write it; made once, here."""
    principal_bytes: bytes = b""

    def __post_init__(self) -> None:
        if self.identity is not None:
            self.principal = self.identity.principal
            self.principal_bytes = self.principal.encode()


@dataclass(slots=True)
class LocalReply:
    """An answer that the proxy gives itself. For gRPC requests the engine turns it into trailers-only (`grpc_status`)."""

    status: int
    body: bytes = b""
    headers: Headers = field(default_factory=list)
    flag: str = ""
    """Response flag (NR, UH, UF, UO, UT, FI, RL, UAEX, …)."""
    details: str = ""
    """response_code_details."""
    grpc_status: int | None = None
    """None: mapped from the HTTP status."""
