"""Which endpoint of a service gets a connection: power of two choices, by live connections.

Two candidates at random, the less loaded one wins: nearly as even as asking all of them, without the herd that follows a
single least-loaded endpoint. Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ztunnel.mesh.workloads import Workload


@dataclass(frozen=True, slots=True)
class Candidate:
    """One endpoint that could serve: a workload and its own port number."""

    workload: Workload
    port: int


def pick(candidates: Sequence[Candidate], active: Callable[[str], int], random: Callable[[int], int]) -> Candidate:
    """The candidate to dial.

    Args:
        candidates: at least one.
        active: live connections to a workload's UID, as this process counts them.
        random: uniform integer in [0, n).
    """
    count = len(candidates)
    if count == 1:
        return candidates[0]
    first = random(count)
    second = random(count - 1)
    if second >= first:
        second += 1
    one, other = candidates[first], candidates[second]
    return other if active(other.workload.uid) < active(one.workload.uid) else one
