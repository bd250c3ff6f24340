"""What every benchmark can be told on its command line. PURE."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.rows import Row


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is done. `pin` and `awake` decide the model of the machine, see tests/bench/README.md."""

    rounds: int
    seconds: float
    only: tuple[str, ...]
    workers: int
    pin: bool
    awake: bool
    sources: bool
    """Our Python as it is, not its compiled form."""
    json: Path | None

    def chosen(self, rows: Sequence[Row]) -> tuple[Row, ...]:
        """The rows that are asked for.

        Raises:
            BenchError: there is none.
        """
        wanted = tuple(row for row in rows if not self.only or any(fnmatch(row.name, each) for each in self.only))
        if not wanted:
            raise BenchError(f"no row is called that; there are: {', '.join(row.name for row in rows)}")
        return wanted


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a run is unless the command line says so."""

    rounds: int
    seconds: float
    """Of each measurement."""


def parser(scenario: str, description: str | None, full: Extent, quick: Extent) -> argparse.ArgumentParser:
    """A parser of the options of everything that measures in rounds; the caller adds its own."""
    made = plain_parser(scenario, description, "ROW", "bulk-*")
    made.add_argument("--quick", action="store_true", help="less than two minutes; noisier")
    made.add_argument("--rounds", type=int, help=f"default: {full.rounds}, with --quick {quick.rounds}")
    made.add_argument("--seconds", type=float, help=f"of each measurement; default: {full.seconds:g}, with --quick {quick.seconds:g}")
    return made


def plain_parser(scenario: str, description: str | None, unit: str, pattern: str) -> argparse.ArgumentParser:
    """A parser of the options that all have. `unit`: what --only chooses, with an example of several."""
    made = argparse.ArgumentParser(prog=f"scripts/bench {scenario}", description=description)
    made.add_argument(
        "--only", action="append", default=[], metavar=unit, help=f"a {unit.lower()}, or several by a pattern such as '{pattern}'"
    )
    made.add_argument("--workers", type=int, default=1, help="of each proxy")
    made.add_argument("--pin", action=argparse.BooleanOptionalAction, help="two nodes of one CPU; default with one worker")
    made.add_argument("--awake", action=argparse.BooleanOptionalAction, default=True, help="keep the CPUs from halting")
    made.add_argument("--sources", action="store_true", help="ours as Python runs it from the sources; default: its compiled form")
    made.add_argument("--json", type=Path, metavar="FILE", help="write every measurement, and what it was taken on")
    return made


def options(given: argparse.Namespace, full: Extent, quick: Extent) -> Options:
    """What the parser of rounds has found."""
    extent = quick if given.quick else full
    return plain_options(given, Extent(given.rounds or extent.rounds, given.seconds or extent.seconds))


def plain_options(given: argparse.Namespace, extent: Extent) -> Options:
    """What the parser that all have has found, of a run of this extent."""
    pin = given.workers == 1 if given.pin is None else given.pin
    return Options(
        rounds=extent.rounds,
        seconds=extent.seconds,
        only=tuple(given.only),
        workers=given.workers,
        pin=pin,
        awake=given.awake,
        sources=given.sources,
        json=given.json,
    )
