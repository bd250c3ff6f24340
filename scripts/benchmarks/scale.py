"""`scripts/bench scale`: the set-up time of one connection, with little and with much of everything else in the mesh.

Every point of scripts/benchmarks/points.py is a mesh of its own with a pair of our agents; all of them, and the base that they are
compared with, are up at the same time. A round measures each point and, right beside it, the base.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace

from scripts.benchmarks import machine, scenarios
from scripts.benchmarks.conduct import conduct, say, write_report
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import OURS, Figure, Measurement, judge
from scripts.benchmarks.options import Extent, Options, options, parser
from scripts.benchmarks.points import BASE, Point, manifests, points, rows
from scripts.benchmarks.rows import Row
from scripts.benchmarks.table import table
from scripts.benchmarks.ways import SERVER, Way, ours
from tests.kit.polling import NeverHappened, eventually

# Many short rounds: what else the machine does then falls on both of a pair, or on few of the rounds whose median counts.
FULL, QUICK = Extent(21, 0.4), Extent(5, 0.25)
TAKE_OVER_SECONDS = 60
WARM_UP_SECONDS = 0.5
_SHORT = scenarios.short(1)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    options: Options
    points: tuple[Point, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are asked for; raises BenchError if there is none."""
        return self.options.chosen(rows(self.points))

    @property
    def wanted(self) -> tuple[Point, ...]:
        """The points that these rows are about."""
        names = {scenario for row in self.rows for scenario in row.scenarios}
        return tuple(point for point in self.points if point.name in names)


@dataclass(frozen=True, slots=True)
class Site:
    """One point that is up, with its open connections."""

    point: Point
    way: Way
    held: tuple[scenarios.Held, ...]


def plan(words: Sequence[str], descriptors: int) -> Plan:
    """What the command line asks for, of a machine on which a process may have so many descriptors."""
    return Plan(options(parser("scale", __doc__, FULL, QUICK).parse_args(words), FULL, QUICK), points(descriptors))


def main(words: Sequence[str]) -> int:
    """Exit code: see `conduct`."""
    asked = plan(words, machine.descriptors())
    return conduct(lambda measurements: measure(asked, measurements), lambda measurements: conclude(asked, measurements))


def measure(asked: Plan, measurements: list[Measurement]) -> None:
    """Adds all measurements of the run, as they are taken.

    Raises:
        BenchError: something that must be there is not.
    """
    wanted, how = asked.wanted, asked.options
    with scenarios.set_up(how) as bench, ExitStack() as stack:
        began = time.monotonic()
        base, *sites = [stack.enter_context(_site(bench, point, how.workers)) for point in (BASE, *wanted)]
        say(f"{1 + len(sites)} meshes are up: {time.monotonic() - began:.0f} s")
        for number in range(how.rounds):
            began = time.monotonic()
            for site in sites if number % 2 == 0 else sites[::-1]:
                measurements.extend(_side_by_side(number, bench, base, site))
            say(f"round {number + 1} of {how.rounds}: {time.monotonic() - began:.0f} s")
        measurements.extend(Measurement(how.rounds, site.point.name, OURS, _released(site)) for site in sites)


def _side_by_side(number: int, bench: scenarios.Bench, base: Site, site: Site) -> Iterator[Measurement]:
    pair = ((BASE.name, base), (OURS, site))
    for name, measured in pair if number % 2 == 0 else pair[::-1]:
        yield Measurement(number, site.point.name, name, scenarios.run(_SHORT, bench, measured.way))


def _released(site: Site) -> Mapping[str, float]:
    """Connections that did not stay open are errors of the point: what it shows is not what it is called."""
    return {"errors": sum(held.release() for held in site.held)}


@contextmanager
def _site(bench: scenarios.Bench, point: Point, workers: int) -> Iterator[Site]:
    with ExitStack() as stack:
        way = replace(stack.enter_context(ours(bench.tools, bench.cpus, workers)), name=point.name)
        _fill(way, point)
        # Between two pairs of pods: one pair may have 64 tunnels of 100 streams.
        halves = (((way.client, way.server), point.open - point.open // 2), (way.neighbour, point.open // 2))
        held = tuple(stack.enter_context(scenarios.holding(bench, *pods, count)) for pods, count in halves)
        for each in held:
            each.await_all()
        # The first connections of a process cost more than all others.
        scenarios.run(_SHORT, replace(bench, seconds=WARM_UP_SECONDS), way)
        scenarios.must_be_tunnelled(way)
        yield Site(point, way, held)


def _fill(way: Way, point: Point) -> None:
    """Returns when all agents and their workers know what the point says that there is."""
    assert way.configure is not None
    assert way.holds is not None
    holds = way.holds
    policies = holds("policies") - 1 + point.policies  # the neighbour's is one more than the point says
    for name, text in manifests(point, holds("workloads"), SERVER).items():
        way.configure(name, text)
    try:
        eventually(
            lambda: holds("workloads") >= point.workloads and holds("policies") >= policies,
            within=TAKE_OVER_SECONDS,
            saying=f"the agents have taken over the manifests of {point.name}",
        )
    except NeverHappened as error:
        raise BenchError(str(error)) from error


def conclude(asked: Plan, measurements: Sequence[Measurement]) -> list[Figure]:
    """The table, and the report if one is asked for."""
    figures = [judge(row, measurements, (BASE.name,)) for row in asked.rows]
    print("\n".join(table(figures, (BASE.name, OURS), None)))
    print(f"base: {BASE.title}; ratios are medians of the rounds' own, each to the base measured beside it")
    if asked.options.json is not None:
        write_report(asked.options.json, asdict(asked), figures, measurements)
    return figures
