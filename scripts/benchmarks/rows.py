"""The table's rows: which measurements make a figure, what it is compared with, and how far it has to come. PURE.

A floor is what has been shown to be possible, an aim is what we want; both are ratios to Envoy doing the same job in the same round,
or, where the row says so, bounds on the figure itself. Nothing here knows how a measurement is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

Values = Mapping[str, float]
"""What one measurement gave, by name; see `scripts.benchmarks.scenarios`."""
Samples = Mapping[str, Values]
"""The measurements of one way in one round, by scenario."""

GIGA, MEGA = 1e9, 1e6


class Against(Enum):
    """What a row's floor and aim bound."""

    ENVOY = "envoy"  # the ratio to Envoy's figure of the same round
    BASE = "base"  # the ratio to our own figure, taken beside it, with little of everything or with other settings
    NOTHING = "nothing"  # the figure itself


class Better(Enum):
    """Which direction is good."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `value` may raise KeyError or ZeroDivisionError where a way was not measured or did nothing."""

    name: str
    title: str
    scenarios: tuple[str, ...]
    value: Callable[[Samples], float]
    against: Against
    better: Better
    floor: float
    aim: float

    def reaches(self, figure: float, bound: float) -> bool:
        """Whether a ratio or figure is at the bound or better."""
        return figure >= bound if self.better is Better.HIGHER else figure <= bound


def rows(workers: int) -> tuple[Row, ...]:
    """What is judged when each proxy has so many workers; with several, only what workers are there for."""
    if workers <= 1:
        return _ONE_WORKER
    bounds = {"bulk": (1.0, 1.1), "requests": (0.95, 1.1), "connections": (1.7, 2.0)}
    parallel = [row for row in _ONE_WORKER if row.name in {"bulk-up-8", "bulk-down-8", "requests-32", "requests-256", "connections-16"}]
    return tuple(_with_bounds(row, *bounds[row.name.partition("-")[0]]) for row in parallel)


def _with_bounds(row: Row, floor: float, aim: float) -> Row:
    return Row(row.name, row.title, row.scenarios, row.value, row.against, row.better, floor, aim)


BULK = ("up-1", "down-1", "up-8", "down-8")
SHORT = ("short-1", "short-16")


def _bulk(scenario: str, title: str, floor: float) -> Row:
    def megabytes(samples: Samples) -> float:
        return samples[scenario]["bytes"] / samples[scenario]["seconds"] / MEGA

    return Row(f"bulk-{scenario}", f"{title}, MB/s", (scenario,), megabytes, Against.ENVOY, Better.HIGHER, floor, 1.25)


def _ping(percent: str) -> Row:
    def microseconds(samples: Samples) -> float:
        return samples["ping"][f"p{percent}_us"]

    title = f"request/response, 1 connection, p{percent}, µs"
    return Row(f"ping-p{percent}", title, ("ping",), microseconds, Against.ENVOY, Better.LOWER, 1.05, 0.9)


def _rate(scenario: str, title: str, floor: float, aim: float) -> Row:
    def rate(samples: Samples) -> float:
        return samples[scenario]["count"] / samples[scenario]["seconds"]

    name = scenario.replace("short", "connections")
    return Row(name, title, (scenario,), rate, Against.ENVOY, Better.HIGHER, floor, aim)


def _cpu_per_gigabyte(samples: Samples) -> float:
    return sum(samples[each]["cpu_seconds"] for each in BULK) / sum(samples[each]["bytes"] / GIGA for each in BULK)


def _cpu_per_thousand(samples: Samples) -> float:
    return sum(samples[each]["cpu_seconds"] for each in SHORT) / sum(samples[each]["count"] / 1000 for each in SHORT)


def _resident(samples: Samples) -> float:
    return samples["idle"]["resident_bytes"] / MEGA


def _grown(samples: Samples) -> float:
    return samples["idle"]["grown_bytes"] / MEGA


def _slowed_by(scenario: str) -> Callable[[Samples], float]:
    return lambda samples: samples[scenario]["p99_us"] / samples["ping-at-once"]["p99_us"]


_ONE_WORKER = (
    _bulk("up-1", "bulk up, 1 connection", 0.95),
    _bulk("down-1", "bulk down, 1 connection", 0.95),
    _bulk("up-8", "bulk up, 8 connections", 1.0),
    _bulk("down-8", "bulk down, 8 connections", 1.0),
    Row("cpu-per-gb", "CPU s per GB, both proxies, all bulk", BULK, _cpu_per_gigabyte, Against.ENVOY, Better.LOWER, 1.0, 0.85),
    _ping("50"),
    _ping("99"),
    _rate("requests-32", "requests/s, 32 connections, 1 KB", 0.95, 1.1),
    _rate("requests-256", "requests/s, 256 connections, 1 KB", 1.2, 1.4),
    _rate("short-1", "new connections/s, 1 client", 1.5, 2.0),
    _rate("short-16", "new connections/s, 16 clients", 1.8, 2.5),
    Row("cpu-per-1000", "CPU s per 1,000 new connections", SHORT, _cpu_per_thousand, Against.ENVOY, Better.LOWER, 0.6, 0.4),
    Row("rss-base", "resident memory of a worker, MB", ("idle",), _resident, Against.NOTHING, Better.LOWER, 45, 35),
    Row("rss-idle", "its growth by 1,000 idle connections, MB", ("idle",), _grown, Against.NOTHING, Better.LOWER, 2, 0.5),
    Row(
        "neighbour-bulk",
        "p99 beside a neighbour's bulk ÷ alone",
        ("ping-at-once", "ping-beside-bulk"),
        _slowed_by("ping-beside-bulk"),
        Against.NOTHING,
        Better.LOWER,
        2,
        1.3,
    ),
    Row(
        "neighbour-config",
        "p99 at 1,000 config events/s ÷ alone",
        ("ping-at-once", "ping-beside-config"),
        _slowed_by("ping-beside-config"),
        Against.NOTHING,
        Better.LOWER,
        1.3,
        1.1,
    ),
)
