"""How long to wait before asking again: longer each time, never in step with other clients, never sooner than the server wants. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FIRST_SECONDS = 0.8
MOST_SECONDS = 30.0
_DOUBLINGS = 10


@dataclass(slots=True)
class Backoff:
    """The waits of one client for one thing.

    Args:
        random: gives numbers from 0 to 1.
    """

    random: Callable[[], float]
    first: float = FIRST_SECONDS
    most: float = MOST_SECONDS
    failures: int = 0

    def next(self, at_least: float | None = None) -> float:
        """Seconds to wait after one more failure: from half to all of a span that doubles.

        Args:
            at_least: what the server asks for; the jitter is added to it, or all clients would come back at once.
        """
        span = min(self.most, self.first * (1 << min(self.failures, _DOUBLINGS)))
        self.failures += 1
        wait = span * (0.5 + 0.5 * self.random())
        return wait if at_least is None else at_least + wait

    def succeeded(self) -> None:
        """Begin anew."""
        self.failures = 0
