"""`scripts/bench waypoint`: requests through a waypoint, ours and Envoy, in the same mesh of ours.

Both terminate HBONE, authorize by ten rules, route by one of ten headers and go on over HBONE. Both meshes are up at the same time and
measured side by side in every round.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from scripts.benchmarks import h2load, scenarios, wrk
from scripts.benchmarks.conduct import conduct, write_report
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import Figure, Measurement, judge
from scripts.benchmarks.options import Extent, Options, options, parser
from scripts.benchmarks.rounds import in_rounds
from scripts.benchmarks.rows import Row, Values
from scripts.benchmarks.scenarios import Bench
from scripts.benchmarks.table import table
from scripts.benchmarks.tools import found
from scripts.benchmarks.waypoint_manifests import Service
from scripts.benchmarks.waypoint_rows import WAYPOINT_ROWS
from scripts.benchmarks.waypoint_ways import APP, BODY_BYTES, MANY, MESSAGE, PLAIN, RIVAL, UNARY, way_builders
from scripts.benchmarks.ways import Way
from tests.kit.polling import NeverHappened, eventually

FULL, QUICK = Extent(5, 3.0), Extent(2, 1.0)
_BODIES = 4
"""Transfers of a large body in one measurement."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    options: Options
    ways: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that are asked for; raises BenchError if there is none."""
        return self.options.chosen(WAYPOINT_ROWS)


def plan(words: Sequence[str]) -> Plan:
    """What the command line asks for."""
    asked = parser("waypoint", __doc__, FULL, QUICK)
    asked.add_argument("--alone", choices=list(way_names()), help="only this way: no ratios; for finding out where its time goes")
    given = asked.parse_args(words)
    return Plan(options(given, FULL, QUICK), (given.alone,) if given.alone else way_names())


def way_names() -> tuple[str, ...]:
    """In the order of the table."""
    return (RIVAL, "ztunnel")


def main(words: Sequence[str]) -> int:
    """Exit code: see `conduct`."""
    asked = plan(words)
    return conduct(lambda measurements: measure(asked, measurements), lambda measurements: conclude(asked, measurements))


def measure(asked: Plan, measurements: list[Measurement]) -> None:
    """Adds all measurements of the run, as they are taken.

    Raises:
        BenchError: something that must be there is not, or requests did not go through the waypoint.
    """
    wanted = {scenario for row in asked.rows for scenario in row.scenarios}
    how = asked.options
    with scenarios.set_up(how) as bench, tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        loads = Loads(Path(name))
        builders = way_builders(bench.tools, bench.cpus, how.workers)
        ways = [stack.enter_context(builders[each]()) for each in asked.ways]
        short = replace(bench, seconds=1.0)
        for way in ways:
            _await_waypoint(bench, way)
            for scenario in loads.all().values():
                scenarios.run(scenario, short, way)
        in_rounds(how.rounds, {key: value for key, value in loads.all().items() if key in wanted}, bench, ways, measurements)


class Loads:
    """The scenarios; what they send stands in files of a directory."""

    def __init__(self, directory: Path) -> None:
        self._message = directory / "message"
        self._message.write_bytes(MESSAGE)
        self._body = directory / "body"
        with self._body.open("wb") as body:
            body.truncate(BODY_BYTES)

    def all(self) -> Mapping[str, Callable[[Bench, Way], Values]]:
        """By name."""
        return {
            "requests-32": lambda bench, way: _requests(bench, way, APP, 32),
            "requests-32-many": lambda bench, way: _requests(bench, way, MANY, 32),
            "single": _single,
            "grpc-32": self._unary,
            "down-body": lambda bench, way: _bodies(bench, way, "down", []),
            "up-body": lambda bench, way: _bodies(bench, way, "up", ["-T", str(self._body), "-H", "expect:"]),
        }

    def _unary(self, bench: Bench, way: Way) -> Values:
        seconds = max(1, round(bench.seconds))
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers", "-H", UNARY.route]
        words = [found("h2load"), f"--duration={seconds}", "-c1", "-m32", "-d", str(self._message), *headers, UNARY.url]
        try:
            return h2load.parse(_output(bench, way, words, seconds))
        except h2load.UnreadableError as error:
            raise BenchError(f"h2load: {error}") from error


def _requests(bench: Bench, way: Way, service: Service, connections: int) -> dict[str, float]:
    seconds = max(1, round(bench.seconds))  # wrk knows whole seconds only
    words = [bench.tools.wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-H", service.route, service.url]
    try:
        return wrk.parse(_output(bench, way, words, seconds))
    except wrk.UnreadableError as error:
        raise BenchError(f"wrk: {error}") from error


def _single(bench: Bench, way: Way) -> Values:
    """One connection through the waypoint and, right after it, one without."""
    through, plain = (_requests(bench, way, service, 1) for service in (APP, PLAIN))
    return {**through, "errors": through["errors"] + plain["errors"], "plain_p50_us": plain["p50_us"], "plain_p99_us": plain["p99_us"]}


def _bodies(bench: Bench, way: Way, what: str, words: Sequence[str]) -> Values:
    url = f"{APP.url.rpartition('/')[0]}/{what}"
    told = "%{http_code} %{size_upload} %{size_download} %{time_total}\\n"
    moved = seconds = 0.0
    for _ in range(_BODIES):
        output = _output(bench, way, [found("curl"), "-sS", "-o", "/dev/null", "-w", told, "-H", APP.route, *words, url], bench.seconds)
        status, sent, received, took = output.split()[-4:]
        size = float(received if what == "down" else sent)
        if status != "200" or size != BODY_BYTES:
            raise BenchError(f"a body of {BODY_BYTES} bytes {what}: status {status}, {size:.0f} bytes")
        moved += size
        seconds += float(took)
    return {"bytes": moved, "seconds": seconds, "errors": 0}


def _await_waypoint(bench: Bench, way: Way) -> None:
    """Returns when both services that have a waypoint answer through it, and the one that has none does not."""

    def served(service: Service) -> str:
        words = [found("curl"), "-s", "-i", "-m", "5", "-o", "-", "-H", service.route, service.url]
        done = subprocess.run(bench.command(way.client, words), capture_output=True, text=True, check=False)
        head = done.stdout.partition("\r\n\r\n")[0].lower()
        return ("waypoint" if "istio-envoy" in head else "plain") if head.startswith("http/1.1 200") else head or f"exit {done.returncode}"

    expected = {APP: "waypoint", MANY: "waypoint", PLAIN: "plain"}
    found_out: dict[Service, str] = {}

    def as_expected() -> bool:
        found_out.update({each: served(each) for each in expected})
        return found_out == expected

    try:
        eventually(as_expected, within=60)
    except NeverHappened as error:
        said = "; ".join(f"{each.name}: {text}" for each, text in found_out.items())
        raise BenchError(f"{way.name}: requests do not go as they should: {said}") from error


def _output(bench: Bench, way: Way, words: Sequence[str | Path], seconds: float) -> str:
    return scenarios.output(bench.command(way.client, [str(each) for each in words]), seconds)


def conclude(asked: Plan, measurements: Sequence[Measurement]) -> list[Figure]:
    """The table, and the report if one is asked for."""
    figures = [judge(row, measurements, (RIVAL,)) for row in asked.rows]
    print("\n".join(table(figures, asked.ways, None)))
    print("ratios are medians of the rounds' own, ours to Envoy's")
    if asked.options.json is not None:
        write_report(asked.options.json, asdict(asked), figures, measurements)
    return figures
