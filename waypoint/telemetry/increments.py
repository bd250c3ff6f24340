"""What a worker tells the supervisor of its series. A module of its own because msgspec reads it, which compiled classes do not allow."""

from __future__ import annotations

import msgspec

Labels = tuple[tuple[str, str], ...]


class Increment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What was added to one series since the last time."""

    metric: str
    """`Metric.value`."""
    labels: Labels
    count: float
    """For a histogram: observations."""
    total: float = 0.0
    buckets: tuple[int, ...] = ()
    """Of a histogram: observations in each bucket by itself, the one without bound last."""
