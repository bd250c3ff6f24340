"""Names, directories and leftovers of labs; labs that really run are in tests/netns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ztunnel.lab import lifecycle
from ztunnel.lab.client import Client, NoLab
from ztunnel.lab.isolation import ProcessId, start_time
from ztunnel.lab.objects import LabError
from ztunnel.lab.paths import LAB_DIR_VARIABLE
from ztunnel.lab.wire import PROCESS_FILE, BadMessage, decode, encode


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The labs of this test."""
    monkeypatch.setenv(LAB_DIR_VARIABLE, str(tmp_path / "labs"))
    return tmp_path / "labs"


@pytest.mark.parametrize("name", ["", "Upper", "a/b", "..", "-a", "x" * 41])
def test_names_that_a_lab_cannot_have(name: str) -> None:
    with pytest.raises(LabError, match="a lab's name"):
        lifecycle.state_of(name)


def test_no_lab_is_nothing_to_take_down() -> None:
    assert lifecycle.names() == []
    assert not lifecycle.stop("lab")
    with pytest.raises(NoLab, match="no lab named 'lab' is up"):
        Client(lifecycle.state_of("lab")).call("status")


def test_a_stale_directory_is_cleaned_and_an_innocent_process_is_left_alone(root: Path) -> None:
    state = root / "old"
    state.mkdir(parents=True)
    started = start_time(os.getpid())
    assert started is not None
    # Our own process id, but of a process that began at another time.
    (state / PROCESS_FILE).write_bytes(encode({"pid": os.getpid(), "start_time": started - 1}))
    assert lifecycle.names() == [("old", False)]
    assert lifecycle.stop("old")
    assert not state.exists()


def test_a_lab_that_is_being_brought_up_is_neither_cleaned_nor_brought_up_twice(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[str] = []

    def launch(state: Path, options: lifecycle.Options) -> None:
        with pytest.raises(LabError) as second:
            lifecycle.start("lab", options)
        refused.append(str(second.value))
        assert state.exists()

    monkeypatch.setattr(lifecycle, "_launch", launch)
    lifecycle.start("lab", lifecycle.Options())
    assert refused == ["error: a lab named 'lab' is being brought up already (use another --name)"]
    assert (root / "lab").exists()


def test_an_interrupted_start_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(state: Path, options: lifecycle.Options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lifecycle, "_launch", launch)
    with pytest.raises(KeyboardInterrupt):
        lifecycle.start("lab", lifecycle.Options())
    assert lifecycle.names() == []


def test_a_directory_that_others_can_write_to_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(LabError, match="only you can write to"):
        lifecycle.start("lab", lifecycle.Options())
    assert list(root.iterdir()) == []


def test_a_path_that_is_too_long_for_sockets_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAB_DIR_VARIABLE, str(root / ("x" * 90)))
    with pytest.raises(LabError, match="too long for the sockets"):
        lifecycle.start("lab", lifecycle.Options())


def test_processes_are_told_apart_by_their_start() -> None:
    started = start_time(os.getpid())
    assert started is not None
    assert ProcessId(os.getpid(), started).is_alive()
    assert not ProcessId(os.getpid(), started + 1).is_alive()
    assert start_time(2**22 + 1) is None


def test_messages_are_one_line_of_an_object() -> None:
    assert encode({"a": "x\ny"}).count(b"\n") == 1
    assert decode(encode({"a": "x\ny"})) == {"a": "x\ny"}
    assert decode(b'{"a":' * 60 + b"1" + b"}" * 60)
    for line in (b"", b"[]", b"{", b"[" * 100_000, b"\xff", b'{"a":' * 65 + b"1" + b"}" * 65):
        with pytest.raises(BadMessage):
            decode(line)
