"""How much a peer may do that costs us something and carries no tunnel data, per second.

Counted in windows of one second of the caller's clock, so a peer gets at most twice the budget around a border. Frames that
legitimate traffic needs in proportion to its data (WINDOW_UPDATE) are counted only beyond what the data that we sent has earned.
Source: CVE-2019-9511…9518, CVE-2023-44487 (rapid reset), CVE-2025-8671 (resets that we are made to send), the CONTINUATION floods of 2024.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from ztunnel.hbone.frames import Code, MuxError

BudgetState = tuple[tuple[int, ...], float, int]
"""The counters, the end of their second, and what our DATA has earned."""
_UPDATE_PRICE: Final = 4096
"""What a WINDOW_UPDATE takes from what our DATA has earned: two per frame and one per 4 KiB are free."""
FRAME_EARNS: Final = 2 * _UPDATE_PRICE
_MOST_EARNED: Final = 64 << 20


class Cost(IntEnum):
    """What is counted."""

    PING = 0
    SETTINGS = 1
    RESET = 2
    """RST_STREAM received, streams that we had to refuse or reset, interim responses."""
    EMPTY_DATA = 3
    WINDOW_UPDATE = 4
    CONTINUATION = 5
    PRIORITY = 6
    OTHER = 7
    """Frames of unknown types and GOAWAY."""
    LATE = 8
    """Frames for a stream that we have reset."""


class Budget:
    """The counters of one connection."""

    __slots__ = ("_allowed", "_spent", "earned", "until")

    def __init__(self, allowed: tuple[int, ...], spent: tuple[int, ...] = (), until: float = 0.0, earned: int = 0) -> None:
        self._allowed = allowed
        self._spent = list(spent) or [0] * len(allowed)
        self.until = until
        """When the current second is over, and `renew` is due."""
        self.earned = earned
        """What our DATA has earned: per frame its length and FRAME_EARNS. Added to by whoever sends DATA, without a call per frame."""

    def renew(self, now: float) -> None:
        """Starts a new second. `now`: seconds of a clock that never goes back."""
        self.until = now + 1.0
        self._spent = [0] * len(self._allowed)

    def pay_update(self) -> None:
        """Counts one WINDOW_UPDATE, against what our DATA has earned as far as that goes.

        Raises:
            MuxError: as `spend`.
        """
        if self.earned < _UPDATE_PRICE:
            self.spend(Cost.WINDOW_UPDATE)
        else:
            self.earned = min(self.earned, _MOST_EARNED) - _UPDATE_PRICE

    def spend(self, cost: Cost) -> None:
        """Counts one.

        Raises:
            MuxError: ENHANCE_YOUR_CALM, over budget.
        """
        self._spent[cost] += 1
        if self._spent[cost] > self._allowed[cost]:
            raise MuxError(f"more than {self._allowed[cost]} {cost.name} in a second", Code.ENHANCE_YOUR_CALM)

    def export(self) -> BudgetState:
        """For `Budget(allowed, *export())`."""
        return tuple(self._spent), self.until, self.earned
