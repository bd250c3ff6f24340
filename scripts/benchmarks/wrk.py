"""What wrk prints, as numbers. PURE."""

from __future__ import annotations

import re

_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


class UnreadableError(ValueError):
    """It is not wrk's report; the text is what was found instead."""


def parse(report: str) -> dict[str, float]:
    """Count, seconds, latencies and errors of one run of `wrk --latency`.

    Raises:
        UnreadableError: there is no total in it.
    """
    total = re.search(r"(\d+) requests in ([\d.]+)(us|ms|s|m),", report)
    if total is None:
        raise UnreadableError(report[-500:])
    values = {"count": float(total[1]), "seconds": _microseconds(total[2], total[3]) / 1e6}
    for percent, number, unit in re.findall(r"^ +(\d+)% +([\d.]+)(us|ms|s|m)$", report, re.MULTILINE):
        values[f"p{percent}_us"] = _microseconds(number, unit)
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", report)
    broken = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", report)
    counts = [*(broken.groups() if broken else ()), *(refused.groups() if refused else ())]
    return {**values, "errors": float(sum(int(count) for count in counts))}


def _microseconds(number: str, unit: str) -> float:
    return float(number) * _UNITS[unit]
