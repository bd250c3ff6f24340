"""How often somebody may ask: token buckets by name, in bounded memory. Pure."""

from __future__ import annotations

from collections import OrderedDict


class Allowance:
    """A bucket for each name: it holds `burst` requests at most and gets `per_second` back.

    Args:
        names: buckets that are kept; the one that was used longest ago makes room. It comes back full, so that somebody with more names
            than this is not held up here: `names` is well above what can be at once.
    """

    def __init__(self, per_second: float, burst: float, names: int = 20_000) -> None:
        self._per_second = per_second
        self._burst = burst
        self._names = names
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Name → what was left, and when."""

    def take(self, name: str, now: float) -> bool:
        """Whether this name may ask once more.

        Args:
            now: seconds of a clock that does not go back.
        """
        left, when = self._buckets.pop(name, (self._burst, now))
        left = min(self._burst, left + max(0.0, now - when) * self._per_second)
        allowed = left >= 1
        self._buckets[name] = (left - 1 if allowed else left, now)
        if len(self._buckets) > self._names:
            self._buckets.popitem(last=False)
        return allowed
