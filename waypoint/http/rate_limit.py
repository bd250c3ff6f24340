"""Local rate limits: token buckets, for all clients together or for each client identity.

Each worker process counts for itself, as Envoy's local rate limit counts for each proxy. Buckets of clients are bounded; who has been
quiet longest loses his, and begins anew with a full one, which is what waiting that long would have given him in most cases.
"""

from __future__ import annotations

from collections.abc import Sequence

from waypoint.http.messages import Client
from ztunnel.mesh.l7.routes import RateLimit

MAX_CLIENTS = 4096
"""Buckets of one limit."""


class _Bucket:
    __slots__ = ("at", "tokens")

    def __init__(self, tokens: float, at: float) -> None:
        self.tokens = tokens
        self.at = at


class LimitAtWork:
    """One `RateLimit` and its buckets; several routes may share it."""

    __slots__ = ("_buckets", "burst", "per_client", "rate")

    def __init__(self, limit: RateLimit) -> None:
        self.burst = float(limit.burst)
        self.rate = limit.tokens / limit.seconds
        self.per_client = limit.per_client
        self._buckets: dict[str, _Bucket] = {}

    def bucket(self, client: Client, now: float) -> _Bucket:
        """The client's bucket, filled up to now."""
        name = ""
        if self.per_client:
            name = client.address if client.identity is None else client.identity.principal
        found = self._buckets.pop(name, None)
        if found is None:
            if len(self._buckets) >= MAX_CLIENTS:
                del self._buckets[next(iter(self._buckets))]
            found = _Bucket(self.burst, now)
        elif now > found.at:
            found.tokens = min(self.burst, found.tokens + (now - found.at) * self.rate)
            found.at = now
        self._buckets[name] = found  # at the end: a dictionary keeps order, so the first is the one that was quiet longest
        return found


class Limiter:
    """The limits of one route: a request takes a token of each or of none."""

    __slots__ = ("_limits",)

    def __init__(self, limits: Sequence[LimitAtWork]) -> None:
        self._limits = limits

    def take(self, client: Client, now: float) -> bool:
        """Whether the client's request may go on.

        Args:
            now: monotonic seconds.
        """
        buckets = [limit.bucket(client, now) for limit in self._limits]
        for bucket in buckets:
            if bucket.tokens < 1.0:
                return False
        for bucket in buckets:
            bucket.tokens -= 1.0
        return True
