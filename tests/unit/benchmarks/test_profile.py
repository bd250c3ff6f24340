"""What the command line asks for, and what a profile says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.profile import INBOUND, OUTBOUND, SCENARIOS, SUPERVISORS, conclude, described, plan, profile_of, roles
from scripts.benchmarks.samples import Kind, Sample
from scripts.benchmarks.scenarios import EVERY_ROUND
from scripts.benchmarks.ways import Proxies

BY_ROLE = {OUTBOUND: (11,), INBOUND: (21,), SUPERVISORS: (10, 20)}
SPENT = {OUTBOUND: 0.6, INBOUND: 0.3, SUPERVISORS: 0.0}
SEEN = [Sample(11, Kind.KERNEL, "f"), Sample(11, Kind.CRYPTO, "g"), Sample(21, Kind.KERNEL, "f")]


def test_all_scenarios_are_there_and_some_are_chosen_by_pattern() -> None:
    assert plan([]).wanted == SCENARIOS
    assert set(SCENARIOS) < set(EVERY_ROUND)
    assert plan(["--only", "up-*", "--only", "ping"]).wanted == ("up-1", "up-8", "ping")
    with pytest.raises(BenchError, match="short-16"):
        _ = plan(["--only", "nonsense"]).wanted


def test_a_run_is_told_how_long_and_with_how_many_workers() -> None:
    asked = plan(["--seconds", "0.5", "--workers", "2"]).options
    assert (asked.seconds, asked.workers, asked.pin) == (0.5, 2, False)


def test_processes_have_roles() -> None:
    assert roles(Proxies((10, 20), (11, 12, 21, 22)), [{11, 12, 13}, {21, 22}]) == {
        OUTBOUND: (11, 12),
        INBOUND: (21, 22),
        SUPERVISORS: (10, 20),
    }
    assert roles(Proxies((10, 20), (10, 20)), [set(), set()]) == {OUTBOUND: (10,), INBOUND: (20,)}


def test_costs_are_by_the_operation_or_by_the_gb() -> None:
    short = profile_of("short-1", {"count": 3000, "seconds": 2.0}, BY_ROLE, SPENT, SEEN)
    assert (short.done, short.unit, round(short.costs[OUTBOUND].each)) == ("1,500/s", "CPU µs per operation", 200)
    bulk = profile_of("up-1", {"bytes": 2e9, "seconds": 2.0}, BY_ROLE, SPENT, SEEN)
    assert (bulk.done, bulk.unit, round(bulk.costs[INBOUND].each, 3)) == ("1,000 MB/s", "CPU s per GB", 0.15)
    with pytest.raises(BenchError, match="nothing was carried"):
        profile_of("up-1", {"bytes": 0, "seconds": 2.0}, BY_ROLE, SPENT, SEEN)


def test_a_profile_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = profile_of("short-1", {"count": 3000, "seconds": 2.0}, BY_ROLE, SPENT, SEEN)
    lines = [line.split() for line in described(profile)]
    assert lines[0] == ["short-1:", "1,500/s"]
    assert ["CPU", "µs", "per", "operation", "200", "100", "0"] in lines
    assert ["kernel", "50.0", "%", "100.0", "%", "-"] in lines
    assert ["samples", "2", "1", "0"] in lines
    assert ["50.0", "%", "0.0", "%", "0.0", "%", "g", "(crypto)"] in lines

    files = tmp_path / "profile.json", tmp_path / "profile.txt"
    assert conclude(plan(["--json", str(files[0]), "--text", str(files[1])]), [profile]) == []
    assert files[1].read_text() + "\n" == capsys.readouterr().out
    (written,) = json.loads(files[0].read_text())["profiles"]
    assert written["roles"][OUTBOUND]["shares"]["kernel"] == 0.5
    assert written["symbols"][0] == {
        "name": "f",
        "kind": "kernel",
        "share": 0.6667,
        "roles": {OUTBOUND: 0.5, INBOUND: 1.0, SUPERVISORS: 0.0},
    }
