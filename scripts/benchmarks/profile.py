"""`scripts/bench profile`: where the CPU time of our processes goes while the loads of `l4` run, as perf's samples of them say.

Only our agents are up, each load runs once. Samples fall only while a process has the CPU, so that what it waits for is not in them; CPU
time is the scheduler's own count, the profiler's interrupts included (about one in a hundred).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from scripts.benchmarks import processes, samples, scenarios
from scripts.benchmarks.conduct import conduct, report, say
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import OURS, Figure, Measurement
from scripts.benchmarks.options import Extent, Options, plain_options, plain_parser
from scripts.benchmarks.rows import Values
from scripts.benchmarks.samples import Kind, Sample, Shares, Symbol
from scripts.benchmarks.tools import found
from scripts.benchmarks.ways import Proxies, Way, ours
from tests.kit.polling import NeverHappened, eventually

SCENARIOS = ("up-1", "down-1", "up-8", "down-8", "ping", "requests-32", "requests-256", "short-1", "short-16")
SECONDS = 3.0
FREQUENCY = 1999
"""Samples of a process a second; a prime, lest they fall in step with what the process does at regular times."""
OUTBOUND, INBOUND, SUPERVISORS = "outbound worker", "inbound worker", "supervisors"
_ATTACH_SECONDS = 10.0
_END_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run does."""

    options: Options
    text: Path | None

    @property
    def wanted(self) -> tuple[str, ...]:
        """The scenarios that are asked for.

        Raises:
            BenchError: there is none.
        """
        only = self.options.only
        names = tuple(name for name in SCENARIOS if not only or any(fnmatch(name, each) for each in only))
        if not names:
            raise BenchError(f"no scenario is called that; there are: {', '.join(SCENARIOS)}")
        return names


@dataclass(frozen=True, slots=True)
class Cost:
    """What one role took of a load: CPU seconds, and per unit of it."""

    cpu_seconds: float
    each: float
    shares: Shares


@dataclass(frozen=True, slots=True)
class Profile:
    """One load. `unit`: what `Cost.each` is."""

    scenario: str
    done: str
    unit: str
    costs: Mapping[str, Cost]
    symbols: Sequence[Symbol]


def plan(words: Sequence[str]) -> Plan:
    """What the command line asks for."""
    asked = plain_parser("profile", __doc__, "SCENARIO", "short-*")
    asked.add_argument("--seconds", type=float, default=SECONDS, help=f"of each load; default: {SECONDS:g}")
    asked.add_argument("--text", type=Path, metavar="FILE", help="write what is printed")
    given = asked.parse_args(words)
    return Plan(plain_options(given, Extent(1, given.seconds)), given.text)


def main(words: Sequence[str]) -> int:
    """Exit code: see `conduct`; there are no rows that could be SHORT."""
    asked = plan(words)
    profiles: list[Profile] = []
    return conduct(lambda measurements: measure(asked, measurements, profiles), lambda _: conclude(asked, profiles))


def measure(asked: Plan, measurements: list[Measurement], profiles: list[Profile]) -> None:
    """Adds a profile of each load, as they are taken.

    Raises:
        BenchError: something that must be there is not.
    """
    wanted, how = asked.wanted, asked.options
    perf = found("perf")
    with scenarios.set_up(how) as bench, tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        way = stack.enter_context(ours(bench.tools, bench.cpus, how.workers))
        scenarios.warm_up(bench, way)
        for scenario in wanted:
            say(f"{scenario}: {how.seconds:g} s")
            values, profile = _one(perf, Path(name) / "perf.data", bench, way, scenario)
            measurements.append(Measurement(0, scenario, OURS, values))
            profiles.append(profile)


def _one(perf: str, file: Path, bench: scenarios.Bench, way: Way, scenario: str) -> tuple[Values, Profile]:
    assert way.proxies is not None
    by_role = roles(way.proxies, [set(processes.descendants(root)) for root in way.proxies.roots])
    before = {role: processes.cpu_seconds(pids) for role, pids in by_role.items()}
    with _recording(perf, file, [pid for pids in by_role.values() for pid in pids]):
        values = scenarios.run(scenarios.EVERY_ROUND[scenario], bench, way)
        spent = {role: processes.cpu_seconds(pids) - before[role] for role, pids in by_role.items()}
    return values, profile_of(scenario, values, by_role, spent, _samples(perf, file))


def roles(proxies: Proxies, below: Sequence[set[int]]) -> dict[str, tuple[int, ...]]:
    """Process ids by role. `below`: what descends from each of the two roots. Without workers an agent is its own."""
    planes = [
        tuple(pid for pid in proxies.data_planes if pid == root or pid in under) for root, under in zip(proxies.roots, below, strict=True)
    ]
    supervisors = tuple(root for root in proxies.roots if root not in proxies.data_planes)
    return {OUTBOUND: planes[0], INBOUND: planes[1], **({SUPERVISORS: supervisors} if supervisors else {})}


def profile_of(
    scenario: str, values: Values, by_role: Mapping[str, Sequence[int]], spent: Mapping[str, float], seen: Sequence[Sample]
) -> Profile:
    """What the numbers say. Bulk is counted by the GB, all else by the operation."""
    if values.get("count"):
        count, unit, per = values["count"], "CPU µs per operation", 1e6
        done = f"{count / values['seconds']:,.0f}/s"
    else:
        count, unit, per = values["bytes"] / 1e9, "CPU s per GB", 1.0
        done = f"{values['bytes'] / values['seconds'] / 1e6:,.0f} MB/s"
    if not count:
        raise BenchError(f"{scenario}: nothing was carried")
    costs = {role: Cost(spent[role], spent[role] / count * per, samples.shares(seen, pids)) for role, pids in by_role.items()}
    return Profile(scenario, done, unit, costs, samples.top(seen, by_role))


@contextmanager
def _recording(perf: str, file: Path, pids: Sequence[int]) -> Iterator[None]:
    """Samples of these processes and all their threads are in `file` after the block."""
    # --no-buildid-cache: it would copy every library into ~/.debug.
    command = [perf, "record", "--quiet", "--no-buildid-cache", "-e", "cpu-clock", "-F", str(FREQUENCY), "-o", str(file)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([*command, "-p", ",".join(map(str, pids))], stdin=subprocess.DEVNULL, stdout=said, stderr=said)

        def ended() -> bool:
            return process.poll() is not None

        def words() -> str:
            return os.pread(said.fileno(), 2000, 0).decode(errors="replace").strip()

        try:
            try:
                eventually(lambda: ended() or _attached(process.pid) >= len(pids), within=_ATTACH_SECONDS)
            except NeverHappened as error:
                raise BenchError(f"perf does not attach to our processes: {words()}") from error
            yield
            if ended():
                raise BenchError(f"perf cannot record our processes (it has to be root): {words()}")
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired as error:
                raise BenchError("perf does not end") from error
        finally:
            process.kill()
            process.wait()


def _attached(pid: int) -> int:
    """How many counters perf has open."""
    found = 0
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += str(each.readlink()) == "anon_inode:[perf_event]"
        except FileNotFoundError:
            continue
    return found


def _samples(perf: str, file: Path) -> list[Sample]:
    done = subprocess.run([perf, "script", "-i", str(file), "-F", samples.FIELDS], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"perf cannot read its own samples: {done.stderr.strip()[-2000:]}")
    try:
        return samples.parse(done.stdout)
    except samples.UnreadableError as error:
        raise BenchError(f"perf: {error}") from error


def conclude(asked: Plan, profiles: Sequence[Profile]) -> list[Figure]:
    """Prints the profiles, and writes them where that is asked for. No figure: nothing is judged."""
    lines = "\n".join(line for profile in profiles for line in (*described(profile), ""))
    print(lines)
    if asked.text is not None:
        asked.text.write_text(lines)
    if asked.options.json is not None:
        told = report({"seconds": asked.options.seconds, "workers": asked.options.workers, "pin": asked.options.pin}, (), ())
        kept = {key: value for key, value in told.items() if key not in ("figures", "measurements")}
        asked.options.json.write_text(json.dumps({**kept, "profiles": [_plain(profile) for profile in profiles]}, indent=1) + "\n")
    return []


def described(profile: Profile) -> list[str]:
    """Lines for a person: what each role spent, on whose code, and in which functions."""
    costs = profile.costs
    width = max(len(Kind.COMPILED.value), len(profile.unit))
    lines = [f"{profile.scenario}: {profile.done}", _line("", [*costs], width)]
    lines.append(_line(profile.unit, [f"{cost.each:.3g}" for cost in costs.values()], width))
    lines += [_line(kind.value, [_percent(cost.shares.of.get(kind)) for cost in costs.values()], width) for kind in Kind]
    lines.append(_line("samples", [f"{cost.shares.samples:,}" for cost in costs.values()], width))
    for symbol in profile.symbols:
        shares = [_percent(symbol.by_role.get(role)) for role in costs]
        lines.append(f"{_line('', shares, width)}  {symbol.name} ({symbol.kind.value})")
    return lines


def _line(title: str, cells: Sequence[str], width: int) -> str:
    return "  ".join([f"  {title:<{width}}", *(f"{cell:>{len(OUTBOUND)}}" for cell in cells)])


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _plain(profile: Profile) -> dict[str, object]:
    return {
        "scenario": profile.scenario,
        "done": profile.done,
        "unit": profile.unit,
        "roles": {
            role: {
                "cpu_seconds": round(cost.cpu_seconds, 4),
                "each": float(f"{cost.each:.4g}"),
                "samples": cost.shares.samples,
                "shares": {kind.value: round(share, 4) for kind, share in cost.shares.of.items()},
            }
            for role, cost in profile.costs.items()
        },
        "symbols": [
            {
                "name": symbol.name,
                "kind": symbol.kind.value,
                "share": round(symbol.share, 4),
                "roles": {role: round(share, 4) for role, share in symbol.by_role.items()},
            }
            for symbol in profile.symbols
        ],
    }
