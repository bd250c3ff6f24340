"""Rounds that measure several ways side by side, scenario by scenario."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from scripts.benchmarks import scenarios
from scripts.benchmarks.conduct import say
from scripts.benchmarks.figures import Measurement
from scripts.benchmarks.rows import Values
from scripts.benchmarks.ways import Way

Scenarios = Mapping[str, Callable[[scenarios.Bench, Way], Values]]


def in_rounds(rounds: int, wanted: Scenarios, bench: scenarios.Bench, ways: Sequence[Way], measurements: list[Measurement]) -> None:
    """Adds the measurements as they are taken. Every second round turns the order of the ways around.

    Raises:
        BenchError: a load failed.
    """
    for number in range(rounds):
        began = time.monotonic()
        measurements.extend(one_round(number, wanted, bench, ways if number % 2 == 0 else ways[::-1]))
        say(f"round {number + 1} of {rounds}: {time.monotonic() - began:.0f} s")


def one_round(number: int, wanted: Scenarios, bench: scenarios.Bench, ways: Sequence[Way]) -> Iterator[Measurement]:
    """Every way in each scenario, but for those that have no such figure."""
    for name, scenario in wanted.items():
        for way in ways:
            values = scenarios.run(scenario, bench, way)
            if values:
                yield Measurement(number, name, way.name, values)
