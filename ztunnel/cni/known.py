"""The list that stands in for an agent that is away: which pods may start then. PURE; `plugin.c` reads it.

A pod that the agent knew is judged by its UID, which a restart of its node does not change. Any other is judged by its namespace:
only one in which nothing was in the mesh lets it start. A pod that joins by a label of its own, in a namespace where no pod had done so
before the agent went, is not caught here: it starts in plain, and is captured when the agent is back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

FIRST, LAST = "ztunnel-cni-known 1", "end"
MAX_BYTES = 4 << 20
"""What the plugin reads; a list that is larger is none."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the agent knows when it writes."""

    outside: frozenset[str]
    """Namespaces, see `MeshState.outside`."""
    pods: tuple[tuple[str, bool], ...]
    """UIDs of this node's pods as their runtime knows them, and whether they are in the mesh."""


def text(known: Known) -> str:
    """The file's content. A truncated one lacks its last line, which the plugin looks for."""
    lines = [FIRST, *_pods(known.pods), *(f"allow namespace {name}" for name in sorted(known.outside) if _is_word(name)), LAST]
    return "\n".join(lines) + "\n"


def _pods(pods: Iterable[tuple[str, bool]]) -> Iterable[str]:
    return sorted(f"{'refuse' if meshed else 'allow'} pod {uid}" for uid, meshed in pods if _is_word(uid))


def _is_word(name: str) -> bool:
    """Names from manifests may be anything; one that would make two lines must not."""
    return name.isprintable() and " " not in name
