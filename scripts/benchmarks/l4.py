"""`scripts/bench l4`: TCP through a pair of nodes, every way in every round, and the table of what came out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from scripts.benchmarks import scenarios
from scripts.benchmarks.conduct import conduct, write_report
from scripts.benchmarks.figures import OURS, Figure, Measurement, judge
from scripts.benchmarks.options import Extent, Options, options, parser
from scripts.benchmarks.rounds import in_rounds, one_round
from scripts.benchmarks.rows import Row, rows
from scripts.benchmarks.table import table
from scripts.benchmarks.ways import way_builders

ENVOYS = ("envoy", "envoy-large")
FULL, QUICK = Extent(5, 2.0), Extent(2, 0.6)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    options: Options
    baseline: str | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are asked for; raises BenchError if there is none."""
        return self.options.chosen(rows(self.options.workers))

    @property
    def ways(self) -> tuple[str, ...]:
        """In the order of the table."""
        return ("direct", *ENVOYS, *([self.baseline] if self.baseline else []), OURS)


def plan(words: Sequence[str]) -> Plan:
    """What the command line asks for."""
    asked = parser("l4", __doc__, FULL, QUICK)
    asked.epilog = (
        "Other scenarios, each with a --help of its own: scripts/bench kube, profile, same-node, scale, waypoint. What is measured and how "
        "to read it: tests/bench/README.md. Compiles our hot modules first, once for the same sources, which takes about two minutes. "
        "Exit code 0: every row is ok, 1: one is not, 2: it could not be measured."
    )
    asked.add_argument(
        "--baseline", choices=["naive", "pure"], help="also a plain relay of trio streams, or our own sources, and how much faster we are"
    )
    given = asked.parse_args(words)
    return Plan(options(given, FULL, QUICK), given.baseline)


def main(words: Sequence[str]) -> int:
    """Exit code: see `conduct`."""
    asked = plan(words)
    return conduct(lambda measurements: measure(asked, measurements), lambda measurements: conclude(asked, measurements))


def measure(asked: Plan, measurements: list[Measurement]) -> None:
    """Adds all measurements of the run, as they are taken.

    Raises:
        BenchError: something that must be there is not.
    """
    wanted = {scenario for row in asked.rows for scenario in row.scenarios}
    how = asked.options
    with scenarios.set_up(how) as bench, ExitStack() as stack:
        builders = way_builders(bench.tools, bench.cpus, how.workers)
        ways = [stack.enter_context(builders[each]()) for each in asked.ways]
        for way in ways:
            scenarios.warm_up(bench, way)
        once = {key: value for key, value in scenarios.ONCE.items() if key in wanted}
        every = {key: value for key, value in scenarios.EVERY_ROUND.items() if key in wanted}
        if once:
            measurements.extend(one_round(0, once, bench, ways))
        if every:
            in_rounds(how.rounds, every, bench, ways, measurements)


def conclude(asked: Plan, measurements: Sequence[Measurement]) -> list[Figure]:
    """The table, and the report if one is asked for."""
    figures = [judge(row, measurements, ENVOYS, asked.baseline) for row in asked.rows]
    print("\n".join(table(figures, asked.ways, asked.baseline)))
    print("* the better Envoy, which the ratio is to; ratios are medians of the rounds' own")
    if asked.options.json is not None:
        write_report(asked.options.json, asdict(asked), figures, measurements)
    return figures
