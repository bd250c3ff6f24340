"""What wrk prints, as numbers."""

from __future__ import annotations

import pytest

from scripts.benchmarks.wrk import UnreadableError, parse

REPORT = """Running 2s test @ http://10.102.0.1:9001/
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   731.47us    1.02ms  19.90ms   94.41%
    Req/Sec    55.96k     8.80k   71.02k    70.00%
  Latency Distribution
     50%  488.00us
     75%  677.00us
     90%    1.19ms
     99%    1.50s
  111375 requests in 2.00s, 125.55MB read
"""
FAILURES = "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\n"
RATES = "Requests/sec:  55683.78\nTransfer/sec:     62.77MB\n"


def test_totals_and_latencies() -> None:
    assert parse(REPORT + RATES) == {
        "count": 111375,
        "seconds": 2.0,
        "p50_us": 488,
        "p75_us": 677,
        "p90_us": 1190,
        "p99_us": 1_500_000,
        "errors": 0,
    }


def test_all_kinds_of_failures_are_errors() -> None:
    assert parse(REPORT + FAILURES + RATES)["errors"] == 54321


def test_a_run_of_more_than_a_minute() -> None:
    assert parse(REPORT.replace("in 2.00s", "in 1.50m"))["seconds"] == 90


@pytest.mark.parametrize("text", ["", "unable to connect to 10.102.0.1:9001 Connection refused"])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UnreadableError):
        parse(text)
