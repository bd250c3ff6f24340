"""The error tree, cut by who is at fault and what we do next.

Foreign exceptions are mapped to one of these once, at the seam where they are raised, and chained with `from`.
An error carries data: what the peer sees (a status or an alert), what the operator sees (the text) and what the dashboard
sees (`flag`, a response flag from a closed set) are three fields. Peers never learn a policy's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import ClassVar, TypeVar

_Error = TypeVar("_Error", bound=BaseException)


class Flag(Enum):
    """Closed set of `response_flags` values in metrics and logs. Source: Istio ztunnel's ResponseFlags."""

    __hash__ = object.__hash__  # Enum's own is Python code, and this one is a key for every connection

    NONE = "-"
    DENY = "DENY"
    CONNECT = "CONNECT"
    TLS_FAILURE = "TLS_FAILURE"
    H2_HANDSHAKE_FAILURE = "H2_HANDSHAKE_FAILURE"
    NETWORK_POLICY = "NETWORK_POLICY"
    IDENTITY_ERROR = "IDENTITY_ERROR"
    CERT_REVOKED = "CERT_REVOKED"


class MeshError(Exception):
    """Root of every error that this project raises on purpose."""

    flag: ClassVar[Flag] = Flag.CONNECT


class PeerError(MeshError):
    """The other side broke the rules: end its connection, serve everyone else."""


class UntrustedPeer(PeerError):
    """The peer's certificate does not give it an identity that we accept."""

    flag: ClassVar[Flag] = Flag.IDENTITY_ERROR


class PolicyDenied(PeerError):
    """Authorization said no. `policy` is for the operator; the peer only sees 401 or a reset."""

    flag: ClassVar[Flag] = Flag.DENY

    def __init__(self, text: str, policy: str | None = None) -> None:
        super().__init__(text)
        self.policy = policy


class BadConnect(PeerError):
    """A CONNECT request that cannot be served; `status` is what the peer is told."""

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


class UpstreamError(MeshError):
    """The side that we dial failed."""


class UpstreamTimeout(UpstreamError):
    """The side that we dial did not answer within its deadline."""


class UpstreamRefused(UpstreamError):
    """The side that we dial refused: a TCP reset or an HTTP status."""

    def __init__(self, text: str, status: int | None = None) -> None:
        super().__init__(text)
        self.status = status


class LocalError(MeshError):
    """Our configuration, our kernel or our API server: nobody else can mend it."""


class ConfigError(LocalError):
    """Settings that cannot be used; `problems` lists every one found, not only the first."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ManifestError(LocalError):
    """A Kubernetes object that is refused. The text names the object, the field and the reason."""

    def __init__(self, subject: str, field: str, reason: str) -> None:
        super().__init__(f"{subject}: {field}: {reason}")
        self.subject = subject
        self.field = field
        self.reason = reason


class NetlinkError(LocalError):
    """The kernel refused a change to links, routes, rules or nf_tables."""


def leaves(group: BaseExceptionGroup[_Error]) -> Iterator[_Error]:
    """The errors of a group and of the groups in it, as trio's nurseries raise them."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
