"""An endpoint at work: what this worker knows of it beyond its configuration."""

from __future__ import annotations

from ztunnel.mesh.l7.clusters import Endpoint


class EndpointAtWork:
    """One endpoint of one cluster. The engine counts `active` up and down; outlier detection owns the rest."""

    __slots__ = (
        "active",
        "consecutive_5xx",
        "consecutive_gateway",
        "consecutive_local",
        "ejected",
        "ejected_at",
        "ejections",
        "endpoint",
        "joined",
        "key",
        "pool",
        "weight",
    )

    def __init__(self, endpoint: Endpoint, joined: float) -> None:
        self.endpoint = endpoint
        self.joined = joined
        self.key = key_of(endpoint.address, endpoint.port)
        """`address:port`: what access logs and consistent hashes know it by."""
        self.weight = max(1, endpoint.weight)
        self.active = 0
        """Requests (TCP: connections) that are on their way to it."""
        self.pool: object | None = None
        """The engine's own: connections to it."""
        self.consecutive_5xx = 0
        self.consecutive_gateway = 0
        self.consecutive_local = 0
        self.ejected = False
        self.ejected_at = 0.0
        self.ejections = 0
        """How often it was ejected lately: the multiplier of the next ejection's time."""

    def __repr__(self) -> str:
        return f"<{self.key}{' ejected' if self.ejected else ''} active={self.active}>"


def key_of(address: str, port: int) -> str:
    """`address:port`, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
