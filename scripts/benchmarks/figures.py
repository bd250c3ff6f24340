"""From measurements to verdicts. PURE.

A figure of a way is the median over the rounds; a ratio is the median of the rounds' own ratios, because the machine drifts between
rounds by more than the ways differ. Of several rivals (Envoys) each row is compared with the better one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from scripts.benchmarks.rows import Against, Better, Row, Samples, Values

OURS = "ztunnel"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One scenario, one way, one round."""

    round: int
    scenario: str
    way: str
    values: Values


class Verdict(Enum):
    """How a row ends."""

    OK = "ok"
    SHORT = "SHORT"
    ERRORS = "ERRORS"  # some of its measurements counted errors: whatever it shows, it is not a result
    MISSING = "-"  # not measured


@dataclass(frozen=True, slots=True)
class Figure:
    """One row's result."""

    row: Row
    medians: Mapping[str, float]
    """By way."""
    rival: str | None
    """Which way the ratios are to."""
    ratios: tuple[float, ...]
    """Ours to the rival's, round by round; ours as it is in a row that is compared with nothing."""
    gain: float | None
    """Ours to the baseline's, the median over the rounds: how many times better, never worse than 1 when we are."""
    errors: int

    @property
    def ratio(self) -> float:
        """The median. Raises StatisticsError when nothing was measured."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> Verdict:
        """Against the floor."""
        if not self.ratios:
            return Verdict.MISSING
        if self.errors:
            return Verdict.ERRORS
        return Verdict.OK if self.row.reaches(self.ratio, self.row.floor) else Verdict.SHORT


def judge(
    row: Row, measurements: Sequence[Measurement], rivals: Iterable[str], baseline: str | None = None, *, judged: str = OURS
) -> Figure:
    """The row's figure out of all measurements of a run.

    Args:
        rivals: names of the ways that ours is compared with.
        baseline: name of the way that `gain` is to.
        judged: name of ours.
    """
    concerned = [each for each in measurements if each.scenario in row.scenarios]
    by_way = {way: _by_round(row, [each for each in concerned if each.way == way]) for way in dict.fromkeys(each.way for each in concerned)}
    by_way = {way: values for way, values in by_way.items() if values}
    medians = {way: statistics.median(values.values()) for way, values in by_way.items()}
    best = max if row.better is Better.HIGHER else min
    rival = best((way for way in rivals if way in medians), key=lambda way: medians[way], default=None)
    ours = by_way.get(judged, {})
    if row.against is Against.NOTHING:
        ratios = tuple(ours.values())
        rival = None
    else:
        ratios = _ratios(ours, by_way.get(rival or "", {}))
    gains = _ratios(ours, by_way.get(baseline or "", {}))
    gain = statistics.median(gains) if gains else None
    if gain and row.better is Better.LOWER:
        gain = 1 / gain
    errors = int(sum(each.values.get("errors", 0) for each in concerned if each.way in (judged, rival)))
    return Figure(row, medians, rival, ratios, gain, errors)


def _by_round(row: Row, measurements: Sequence[Measurement]) -> dict[int, float]:
    rounds: dict[int, dict[str, Values]] = {}
    for each in measurements:
        rounds.setdefault(each.round, {})[each.scenario] = each.values
    found = {}
    for number, samples in rounds.items():
        value = _value(row, samples)
        if value is not None:
            found[number] = value
    return found


def _value(row: Row, samples: Samples) -> float | None:
    """None where this way has no such figure: no proxy whose CPU could be counted, or not all scenarios."""
    try:
        return row.value(samples)
    except (KeyError, ZeroDivisionError):
        return None


def _ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, ...]:
    return tuple(ours[each] / theirs[each] for each in sorted(ours) if theirs.get(each))
