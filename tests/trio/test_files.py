"""The watched directory on a mock clock: real files, no real time."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
import trio.testing

from ztunnel.dataplane.channel import Update, encode
from ztunnel.mesh.denials import DENY_EVERYTHING
from ztunnel.mesh.derive import MeshOptions, MeshState, diff
from ztunnel.mesh.errors import ConfigError
from ztunnel.mesh.rules import Scope
from ztunnel.sources.files import FileLimits, FileSource
from ztunnel.sources.objects import Refusal

DEFAULT = FileLimits()
PEER = (
    "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{action: {action}}}\n"
)


@dataclass
class Told:
    """A sink that keeps everything."""

    states: list[MeshState] = field(default_factory=list)
    refusals: tuple[Refusal, ...] = ()

    async def __call__(self, state: MeshState, refusals: tuple[Refusal, ...]) -> None:
        self.states.append(state)
        self.refusals = refusals

    @property
    def policies(self) -> list[str]:
        return sorted(policy.name for policy in self.states[-1].policies.values())


def write(path: Path, *names: str, action: str = "DENY") -> None:
    path.write_text("---\n".join(PEER.format(name=name, action=action) for name in names))


@asynccontextmanager
async def watching(directory: Path, limits: FileLimits = DEFAULT) -> AsyncIterator[Told]:
    told = Told()
    source = FileSource(directory, MeshOptions(), limits)
    async with trio.open_nursery() as nursery:
        await nursery.start(source.run, told)
        yield told
        nursery.cancel_scope.cancel()


async def test_everything_is_told_before_it_has_started(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    write(tmp_path / "a.yaml", "one", "two")
    write(tmp_path / "b.yml", "three")
    (tmp_path / "c.json").write_text('{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}')
    for name in (".hidden.yaml", "a.yaml~", "a.yaml.swp", "#a.yaml#", "README.md"):
        write(tmp_path / name, "never")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "dangling.yaml").symlink_to("nowhere")
    async with watching(tmp_path) as told:
        assert told.policies == ["one", "three", "two"]
        assert told.refusals == ()
        await trio.sleep(10)
        assert len(told.states) == 1


async def test_changes_are_in_force_within_a_second(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    async with watching(tmp_path) as told:
        assert told.policies == []
        write(tmp_path / "a.yaml", "one")
        await trio.sleep(0.9)
        assert told.policies == ["one"]
        write(tmp_path / "a.yaml", "one", "two")
        await trio.sleep(0.9)
        assert told.policies == ["one", "two"]
        (tmp_path / "a.yaml").unlink()
        await trio.sleep(0.9)
        assert told.policies == []


async def test_a_change_that_leaves_no_trace_in_the_directory_is_seen(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    file = tmp_path / "a.yaml"
    write(file, "one")
    stamp = file.stat().st_mtime_ns
    async with watching(tmp_path) as told:
        write(file, "two")
        os.utime(file, ns=(stamp, stamp))
        await trio.sleep(0.9)
        assert told.policies == ["two"]


@pytest.mark.parametrize("target", ["x.yaml", "a.yaml/child"], ids=["circle", "through-a-file"])
async def test_a_link_that_cannot_be_followed_hides_no_other_file(tmp_path: Path, mock_clock: trio.testing.MockClock, target: str) -> None:
    write(tmp_path / "a.yaml", "one")
    async with watching(tmp_path) as told:
        (tmp_path / "x.yaml").symlink_to(target)
        await trio.sleep(0.9)
        write(tmp_path / "a.yaml", "one", "two")
        await trio.sleep(0.9)
        assert told.policies == ["one", "two"]
        assert [refusal.file for refusal in told.refusals] == ["x.yaml"]
    async with watching(tmp_path) as told:
        assert told.policies == ["one", "two", "unreadable file x.yaml"]


@pytest.mark.parametrize(
    "content",
    [
        "oops",
        "- a\n- list\n",
        PEER.format(name="one", action="DENY").replace("AuthorizationPolicy", "5"),
        "{apiVersion: v1, kind: List, items: {a: 1}}",
    ],
    ids=["text", "list", "kind", "items"],
)
async def test_an_object_that_becomes_none_stays_in_force(tmp_path: Path, mock_clock: trio.testing.MockClock, content: str) -> None:
    """Nobody can say which object is meant: a policy must not be lifted by a slip."""
    write(tmp_path / "a.yaml", "one")
    async with watching(tmp_path) as told:
        (tmp_path / "a.yaml").write_text(content)
        await trio.sleep(0.9)
        assert told.policies == ["one"]
        (refusal,) = told.refusals
        assert "what it said before stays in force" in refusal.reason
        write(tmp_path / "a.yaml", "two")
        await trio.sleep(0.9)
        assert told.policies == ["two"]


async def test_a_list_that_cannot_be_unpacked_denies_everything_at_the_start(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    (tmp_path / "a.yaml").write_text("{apiVersion: v1, kind: List, items: {a: 1}}")
    async with watching(tmp_path) as told:
        assert told.policies == ["unreadable file a.yaml"]


async def test_a_list_is_as_long_as_a_cluster_is_large(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    items = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"n{number}"}} for number in range(5000)]
    policy = {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "one"}, "spec": {"action": "DENY"}}
    (tmp_path / "a.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": [*items, policy]}))
    async with watching(tmp_path) as told:
        assert told.policies == ["one"]
        assert told.refusals == ()


async def test_a_file_that_is_being_written_is_waited_for(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    file = tmp_path / "a.yaml"
    write(file, "one", "two")
    async with watching(tmp_path) as told:
        await trio.sleep(5)
        for size in range(1, 8):
            file.write_text("#" * size)
            await trio.sleep(0.2)
        write(file, "one", "two", "three")
        await trio.sleep(0.9)
        assert [len(state.policies) for state in told.states] == [2, 3]


async def test_a_file_that_is_replaced_is_never_gone(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    file = tmp_path / "a.yaml"
    write(file, "one")
    async with watching(tmp_path) as told:
        await trio.sleep(5.1)
        file.unlink()
        await trio.sleep(0.2)
        write(file, "two")
        await trio.sleep(0.9)
        assert [sorted(policy.name for policy in state.policies.values()) for state in told.states] == [["one"], ["two"]]


@pytest.mark.parametrize("content", [b"a: [\n", b"\xff\xff", b"[" * 200, b"#" * 2000])
async def test_a_file_that_cannot_be_read_keeps_its_objects(tmp_path: Path, mock_clock: trio.testing.MockClock, content: bytes) -> None:
    file = tmp_path / "a.yaml"
    write(file, "one")
    async with watching(tmp_path, FileLimits(file_bytes=1024)) as told:
        file.write_bytes(content)
        await trio.sleep(0.9)
        assert told.policies == ["one"]
        (refusal,) = told.refusals
        assert refusal.file == "a.yaml"
        assert "stays in force" in refusal.reason
        calls = len(told.states)
        await trio.sleep(10)
        assert len(told.states) == calls
        write(file, "one")
        await trio.sleep(0.9)
        assert told.refusals == ()
        assert told.policies == ["one"]


async def test_documents_are_refused_one_by_one(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    write(tmp_path / "a.yaml", "one")
    (tmp_path / "b.yaml").write_text(PEER.format(name="two", action="NO") + "---\n" + PEER.format(name="three", action="DENY"))
    async with watching(tmp_path) as told:
        assert told.policies == ["one", "three", "two"]
        assert [(refusal.file, refusal.object) for refusal in told.refusals] == [("b.yaml", "AuthorizationPolicy shop/two")]
        (stand_in,) = [policy for policy in told.states[-1].policies.values() if policy.name == "two"]
        assert "refused" in stand_in.reason


async def test_an_object_may_move_between_files(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    write(tmp_path / "a.yaml", "one", "two")
    async with watching(tmp_path) as told:
        await trio.sleep(5)
        write(tmp_path / "b.yaml", "two")
        await trio.sleep(0.9)
        assert [refusal.reason for refusal in told.refusals] == ["defined in a.yaml, b.yaml; keep one of them"]
        write(tmp_path / "a.yaml", "one")
        await trio.sleep(0.9)
        assert told.refusals == ()
        assert {len(state.policies) for state in told.states} == {2}


async def test_too_many_files_or_documents_change_nothing(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    write(tmp_path / "a.yaml", "one")
    async with watching(tmp_path, FileLimits(files=2, documents=40)) as told:
        write(tmp_path / "a.yaml", *(f"p{number}" for number in range(41)))
        await trio.sleep(0.9)
        assert told.policies == ["one"]
        assert "limits.manifest_documents" in told.refusals[0].reason
        write(tmp_path / "b.yaml", "two")
        write(tmp_path / "c.yaml", "three")
        await trio.sleep(0.9)
        assert told.policies == ["one"]
        assert "limits.manifest_files" in told.refusals[0].reason
        (tmp_path / "c.yaml").unlink()
        write(tmp_path / "a.yaml", *(f"p{number}" for number in range(39)))
        await trio.sleep(0.9)
        assert len(told.policies) == 40
        assert told.refusals == ()


async def test_a_directory_that_vanishes_later_keeps_everything(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    directory = tmp_path / "mesh"
    directory.mkdir()
    write(directory / "a.yaml", "one")
    async with watching(directory) as told:
        directory.rename(tmp_path / "away")
        await trio.sleep(0.9)
        assert told.policies == ["one"]
        assert "cannot be listed" in told.refusals[0].reason
        (tmp_path / "away").rename(directory)
        await trio.sleep(0.9)
        assert told.refusals == ()
        assert told.policies == ["one"]


async def test_a_directory_that_is_not_there_at_the_start_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sources\.files: .*none: cannot be listed"):
        await FileSource(tmp_path / "none", MeshOptions()).run(Told())


async def test_a_file_that_could_not_be_read_at_the_start_denies_everything(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    write(tmp_path / "a.yaml", "one")
    (tmp_path / "b.yaml").write_text("spec: {action: [")
    async with watching(tmp_path) as told:
        (broken,) = [policy for policy in told.states[-1].policies.values() if policy.name != "one"]
        assert (broken.scope, broken.rules) == (Scope.GLOBAL, DENY_EVERYTHING)
        assert "b.yaml" in broken.name
        assert "everything is denied until it can be read" in told.refusals[0].reason
        # One that appears broken later forbids nothing: what was in force when it was not there stays so.
        (tmp_path / "c.yaml").write_text("{")
        await trio.sleep(2)
        assert len(told.states[-1].policies) == 2
        write(tmp_path / "b.yaml", "two")
        (tmp_path / "c.yaml").unlink()
        await trio.sleep(2)
        assert told.policies == ["one", "two"]
        assert told.refusals == ()


async def test_what_a_hostile_file_says_can_be_handed_on(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    """Half a surrogate pair in a value, and a name on disk that is not UTF-8, must not end up in what the workers are sent."""
    rule = r'{"from": [{"source": {"principals": ["x\ud800"]}}]}'
    head = '"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy"'
    (tmp_path / "a.json").write_text(f'{{{head}, "metadata": {{"name": "p"}}, "spec": {{"rules": [{rule}]}}}}')
    for name in (b"\xff.json", b"\xfe.yaml"):
        (tmp_path / os.fsdecode(name)).write_text(f'{{{head}, "spec": {{"what": 1}}}}')
    (tmp_path / os.fsdecode(b"\xfd.yaml")).write_text("[")
    async with watching(tmp_path) as told:
        encode(Update(diff(MeshState(), told.states[-1])))
        assert all(policy.rules == DENY_EVERYTHING for policy in told.states[-1].policies.values())
        assert len(told.refusals) == 4
        for refusal in told.refusals:
            f"{refusal.file}{refusal.object}{refusal.reason}".encode()


@pytest.mark.parametrize("suffix", ["yaml", "json"])
async def test_others_get_their_turn_while_one_long_document_is_read(
    tmp_path: Path, mock_clock: trio.testing.MockClock, suffix: str
) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    item = {"kind": "X", "apiVersion": "x/v1"}
    listed = {
        "yaml": "kind: List\napiVersion: v1\nitems:\n" + "- {kind: X, apiVersion: x/v1}\n" * 4000,
        "json": json.dumps({"kind": "List", "apiVersion": "v1", "items": [item] * 4000}),
    }
    (tmp_path / f"a.{suffix}").write_text(listed[suffix])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        async with watching(tmp_path) as told:
            assert told.refusals == ()
        nursery.cancel_scope.cancel()
    assert turns > 20
