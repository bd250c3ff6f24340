"""What the command line asks for."""

from __future__ import annotations

import pytest

from scripts.benchmarks import __main__ as command
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.l4 import plan
from scripts.benchmarks.options import Options


def asked(*words: str) -> Options:
    return plan(words).options


def test_one_worker_stands_on_two_nodes_of_one_cpu() -> None:
    full, quick = asked(), asked("--quick")
    assert (full.rounds, full.pin, full.awake) == (5, True, True)
    assert quick.rounds < full.rounds
    assert quick.seconds < full.seconds


def test_several_workers_take_the_cpus_that_there_are() -> None:
    assert not asked("--workers", "2").pin
    assert asked("--workers", "2").awake
    assert asked("--workers", "2", "--pin", "--no-awake").pin
    assert not asked("--workers", "2", "--pin", "--no-awake").awake


def test_rows_are_chosen_by_pattern() -> None:
    chosen = plan(["--only", "bulk-*-8", "--only", "rss-idle"])
    assert [row.name for row in chosen.rows] == ["bulk-up-8", "bulk-down-8", "rss-idle"]
    with pytest.raises(BenchError, match="cpu-per-gb"):
        _ = plan(["--only", "nonsense"]).rows


def test_a_baseline_is_one_way_more() -> None:
    assert "naive" not in plan([]).ways
    assert plan(["--baseline", "naive"]).ways[-2:] == ("naive", "ztunnel")


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["l5"]) == 2
    assert "l4" in capsys.readouterr().err


def test_the_help_names_the_other_scenarios(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan(["--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(".", " ").split()
    assert command.SCENARIOS.keys() - {"l4"} <= set(words)
