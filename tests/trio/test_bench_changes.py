"""What `scripts/bench` does to the manifests of a mesh is what an agent takes over: without it, a daemon at rest would be measured."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from scripts.benchmarks import elsewhere
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.sources.files import FileSource
from ztunnel.sources.objects import Refusal

POLL_SECONDS = 0.05
"""As the agents of a benchmark have it (tests/kit/mesh.py)."""
TURNS = 40


async def test_every_change_of_a_benchmark_is_taken_over(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    changed = 0
    former: MeshState | None = None

    async def sink(state: MeshState, _refusals: tuple[Refusal, ...]) -> None:
        nonlocal changed, former
        if former is not None:
            changed += sum(former.workloads.get(uid) != workload for uid, workload in state.workloads.items())
        former = state

    async with trio.open_nursery() as nursery:
        await nursery.start(FileSource(tmp_path, MeshOptions(), interval_seconds=POLL_SECONDS).run, sink)
        for turn in range(TURNS):
            name, text = elsewhere.change(turn)
            (tmp_path / ".next").write_text(text)
            (tmp_path / ".next").replace(tmp_path / name)
            await trio.sleep(1 / elsewhere.CHANGES_PER_SECOND)
        await trio.sleep(4 * POLL_SECONDS)
        nursery.cancel_scope.cancel()
    assert changed == TURNS * elsewhere.OBJECTS_PER_CHANGE
