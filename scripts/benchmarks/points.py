"""How much of everything there is when a connection is set up: the points of `scripts/bench scale`, and their rows. PURE.

Each point has much of one thing and of everything else as little as the base. Its figures are ratios to the base's, which is measured
right beside it: 1 is flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from scripts.benchmarks import elsewhere
from scripts.benchmarks.rows import Against, Better, Row, Samples

FLOOR, AIM = 1.5, 1.1
"""What a set-up time may be of the base's."""
RATE_FLOOR, RATE_AIM = 0.67, 0.91
"""What a rate must be of the base's: the inverse."""
OBJECTS_PER_FILE = 2500
SPARE_DESCRIPTORS = 1000
"""Of a worker: listeners, tunnels, sockets in stock."""


@dataclass(frozen=True, slots=True)
class Point:
    """One mesh."""

    name: str
    title: str
    workloads: int = 10
    policies: int = 1
    """Beside the one that lets the neighbour's client in."""
    concern_server: bool = False
    """Whether all of them select the server, every second one to deny; otherwise all but the one that lets its client in are others'."""
    open: int = 10
    """Connections that are open and idle, half of them between the neighbour's pods."""


BASE = Point("base", "10 workloads, 1 policy, 10 open connections")


def points(descriptors: int) -> tuple[Point, ...]:
    """All that are measured, with no more connections open than a worker with so many descriptors can hold: it needs one for each."""
    most = max(descriptors - SPARE_DESCRIPTORS, BASE.open)
    return (
        *(replace(BASE, name=f"workloads-{count}", title=f"{count:,} workloads", workloads=count) for count in (1000, 10_000)),
        *(replace(BASE, name=f"policies-{count}", title=f"{count:,} policies, of others", policies=count) for count in (100, 1000)),
        *(
            replace(BASE, name=f"applying-{count}", title=f"{count:,} policies, all of the server", policies=count, concern_server=True)
            for count in (100, 1000)
        ),
        *(_open(count, most) for count in (1000, 10_000)),
    )


def _open(count: int, most: int) -> Point:
    if count <= most:
        return replace(BASE, name=f"open-{count}", title=f"{count:,} open connections", open=count)
    return replace(BASE, name=f"open-{count}", title=f"{most:,} open connections (no descriptors for {count:,})", open=most)


def rows(measured: Sequence[Point]) -> tuple[Row, ...]:
    """Set-up times of all points, then their rates."""
    return (*(_time(each) for each in measured), *(_rate(each) for each in measured))


def _time(point: Point) -> Row:
    def microseconds(samples: Samples) -> float:
        return samples[point.name]["p50_us"]

    return Row(point.name, f"{point.title}: p50, µs", (point.name,), microseconds, Against.BASE, Better.LOWER, FLOOR, AIM)


def _rate(point: Point) -> Row:
    def rate(samples: Samples) -> float:
        return samples[point.name]["count"] / samples[point.name]["seconds"]

    return Row(f"{point.name}-rate", f"{point.title}: /s", (point.name,), rate, Against.BASE, Better.HIGHER, RATE_FLOOR, RATE_AIM)


def manifests(point: Point, present: int, server: str) -> Mapping[str, str]:
    """Files, by name, that make of a mesh what the point asks for.

    Args:
        present: workloads that the mesh has of its own.
        server: label of the server's pod. It has a policy of its own that lets the client in, and comes last by name.
    """
    pods = [elsewhere.pod(each) for each in range(point.workloads - present)]
    whose = server if point.concern_server else elsewhere.LABEL
    policies = [elsewhere.policy(each, ("ALLOW", "DENY")[each % 2], whose) for each in range(point.policies - 1)]
    return {
        f"{kind}-{number}.json": elsewhere.listing(part)
        for kind, objects in (("pods", pods), ("policies", policies))
        for number, part in enumerate(_parts(objects))
    }


def _parts(objects: Sequence[elsewhere.Json]) -> list[Sequence[elsewhere.Json]]:
    return [objects[at : at + OBJECTS_PER_FILE] for at in range(0, len(objects), OBJECTS_PER_FILE)]
