"""What h2load prints, as numbers. PURE."""

from __future__ import annotations

import re

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class UnreadableError(ValueError):
    """It is not h2load's report; the text is what was found instead."""


def parse(report: str) -> dict[str, float]:
    """Count, seconds and errors of one run; answers other than 2xx are errors.

    Raises:
        UnreadableError: there is no total in it.
    """
    total = re.search(r"finished in ([\d.]+)(us|ms|s),", report)
    counts = re.search(r"requests: \d+ total, \d+ started, \d+ done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", report)
    codes = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", report)
    if total is None or counts is None or codes is None:
        raise UnreadableError(report[-500:])
    succeeded, failed, errored, late = (float(each) for each in counts.groups())
    others = sum(float(each) for each in codes.groups()[1:])
    # an answer that is no 2xx counts as failed already
    return {"count": succeeded, "seconds": float(total[1]) * _UNITS[total[2]], "errors": max(failed, others) + errored + late}
