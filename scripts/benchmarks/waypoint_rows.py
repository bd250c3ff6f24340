"""The rows of `scripts/bench waypoint`: L7 in the middle, ours beside Envoy's. PURE."""

from __future__ import annotations

from scripts.benchmarks.rows import MEGA, Against, Better, Row, Samples

BODIES = ("down-body", "up-body")


def _rate(scenario: str, title: str, floor: float, aim: float) -> Row:
    def rate(samples: Samples) -> float:
        return samples[scenario]["count"] / samples[scenario]["seconds"]

    return Row(scenario, title, (scenario,), rate, Against.ENVOY, Better.HIGHER, floor, aim)


def _added(percent: int) -> Row:
    def added(samples: Samples) -> float:
        return samples["single"][f"p{percent}_us"] - samples["single"][f"plain_p{percent}_us"]

    title = f"added by the waypoint, 1 connection, p{percent}, µs"
    return Row(f"added-p{percent}", title, ("single",), added, Against.ENVOY, Better.LOWER, 1.2, 0.9)


def _body(scenario: str, title: str) -> Row:
    def rate(samples: Samples) -> float:
        return samples[scenario]["bytes"] / samples[scenario]["seconds"] / MEGA

    return Row(scenario, title, (scenario,), rate, Against.ENVOY, Better.HIGHER, 0.9, 1.1)


def _cpu_per_request(samples: Samples) -> float:
    return samples["requests-32"]["cpu_seconds"] / samples["requests-32"]["count"] * 1e6


def _with_many(samples: Samples) -> float:
    times = [samples[each]["cpu_seconds"] / samples[each]["count"] for each in ("requests-32-many", "requests-32")]
    return times[0] / times[1]


WAYPOINT_ROWS = (
    _rate("requests-32", "requests/s, HTTP/1.1, 32 connections, 1 KB", 0.8, 1.2),
    Row(
        "cpu-request",
        "CPU µs of the waypoint per such request",
        ("requests-32",),
        _cpu_per_request,
        Against.ENVOY,
        Better.LOWER,
        1.25,
        0.83,
    ),
    _added(50),
    _added(99),
    _rate("grpc-32", "requests/s, gRPC unary, 1 connection, 32 streams", 0.5, 1.0),
    _body("down-body", "body of 100 MB down, MB/s"),
    _body("up-body", "body of 100 MB up, MB/s"),
    Row(
        "many",
        "CPU per request with 1,000 routes and 1,000 rules ÷ with ten",
        ("requests-32", "requests-32-many"),
        _with_many,
        Against.NOTHING,
        Better.LOWER,
        1.3,
        1.05,
    ),
)
