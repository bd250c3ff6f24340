"""Callers and pods from files that change."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.kit.polling import eventually_async
from ztunnel.ca.issuance import Caller, Refusal
from ztunnel.ca.pods import PodTable
from ztunnel.ca.static import FilePods, FileTokens
from ztunnel.mesh.errors import MeshError

POD = """
apiVersion: v1
kind: Pod
metadata: {name: NAME, namespace: shop, uid: uid-NAME}
spec: {nodeName: node-1, serviceAccountName: cart}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: shop}
"""


def callers(token: str) -> str:
    digest = sha256(token.encode()).hexdigest()
    return f"- {{token_sha256: {digest}, namespace: mesh, serviceAccount: agent, pod: agent-1, uid: u}}\n"


async def test_a_token_is_known_by_its_digest(tmp_path: Path) -> None:
    file = tmp_path / "callers.yaml"
    file.write_text(callers("secret") + callers("other"))
    tokens = FileTokens(file)
    assert await tokens.review("secret") == Caller("mesh", "agent", "agent-1", "u")
    with pytest.raises(Refusal):
        await tokens.review("wrong")
    file.write_text(callers("a newer and longer secret"))
    assert (await tokens.review("a newer and longer secret")).pod == "agent-1"
    with pytest.raises(Refusal):
        await tokens.review("secret")


@pytest.mark.parametrize("content", ["- token_sha256: short\n", "nonsense", "- {", "[5]"])
async def test_a_file_that_cannot_be_read_vouches_for_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "callers.yaml").write_text(content)
    with pytest.raises(MeshError, match=r"callers\.yaml"):
        await FileTokens(tmp_path / "callers.yaml").review("x")
    with pytest.raises(MeshError, match="No such file"):
        await FileTokens(tmp_path / "missing").review("x")


async def test_pods_come_and_go_with_their_files(tmp_path: Path) -> None:
    table = PodTable()
    (tmp_path / "a.yaml").write_text(POD.replace("NAME", "a"))
    async with trio.open_nursery() as nursery:
        await nursery.start(FilePods(tmp_path, table).run)
        assert table.node_of("shop", "a", "uid-a") == "node-1"
        (tmp_path / "b.yaml").write_text(POD.replace("NAME", "b"))
        await eventually_async(lambda: table.node_of("shop", "b", "uid-b") == "node-1", within=30)
        (tmp_path / "a.yaml").unlink()
        await eventually_async(lambda: table.node_of("shop", "a", "uid-a") is None, within=30)
        (tmp_path / "c.yaml").write_text("{")
        await eventually_async(lambda: not table.synced, within=30)
        (tmp_path / "c.yaml").unlink()
        await eventually_async(lambda: table.synced, within=30)
        nursery.cancel_scope.cancel()
