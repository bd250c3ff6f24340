"""Which agents are asked, and what is said when they do not answer."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ztunnel.cli import client
from ztunnel.cli.client import Choice, Refused, Target, Unreachable, ask, targets
from ztunnel.lab.paths import agent_socket, lab_state_dir, labs_root


def lab(root: Path, name: str, *nodes: str) -> dict[str, str]:
    environ = {"ZTUNNEL_LAB_DIR": str(root)}
    for node in nodes:
        path = agent_socket(lab_state_dir(name, environ), node)
        path.parent.mkdir(parents=True)
        path.touch()
    return environ


def test_labs_live_where_their_owner_may_write() -> None:
    assert labs_root({"ZTUNNEL_LAB_DIR": "/x"}, 0) == Path("/x")
    assert labs_root({}, 0) == Path("/run/ztunnel-lab")
    assert labs_root({"XDG_RUNTIME_DIR": "/run/user/7"}, 7) == Path("/run/user/7/ztunnel-lab")
    assert labs_root({}, 7) == Path("/tmp/ztunnel-lab-7")
    assert lab_state_dir("a", {}, 0) == Path("/run/ztunnel-lab/a")


def test_what_is_named_wins(tmp_path: Path) -> None:
    environ = lab(tmp_path, "lab", "node-2", "node-1")
    default = tmp_path / "default.sock"
    assert [target.node for target in targets(Choice(), environ, default)] == ["node-1", "node-2"]
    default.touch()
    assert targets(Choice(), environ, default) == [Target(default)]
    assert targets(Choice(socket=tmp_path / "s"), environ, default) == [Target(tmp_path / "s")]
    assert [target.node for target in targets(Choice(node="node-2"), environ, default)] == ["node-2"]
    assert [target.node for target in targets(Choice(lab="lab"), environ, default)] == ["node-1", "node-2"]


def test_what_is_not_there_is_said_with_the_next_command(tmp_path: Path) -> None:
    environ = lab(tmp_path, "lab", "node-1")
    (tmp_path / "lab" / "nodes" / "node-9").mkdir()
    for choice, expected in {
        Choice(lab="other"): "the lab other has no running agents. See `ztunnel lab status --name other`",
        Choice(node="node-9"): "no running agent on node node-9; it has them on node-1",
    }.items():
        with pytest.raises(Unreachable) as caught:
            targets(choice, environ, tmp_path / "none")
        assert expected in caught.value.message
        assert caught.value.exit_code == 3
    with pytest.raises(Unreachable, match="no agent runs here"):
        targets(Choice(), {"ZTUNNEL_LAB_DIR": str(tmp_path / "empty")}, tmp_path / "none")
    with pytest.raises(Unreachable, match=r"no lab called lab\.\nOther labs are up: big, small\. Ask one with --lab NAME") as others:
        targets(Choice(), lab(tmp_path / "others", "small", "node-1") | lab(tmp_path / "others", "big", "node-1"), tmp_path / "none")
    assert others.value.message.count("\n") == 2


@contextmanager
def answering(path: Path, serve: Callable[[socket.socket], None]) -> Iterator[Target]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def once() -> None:
            connection, _ = listener.accept()
            with connection:
                serve(connection)

        thread = threading.Thread(target=once)
        thread.start()
        yield Target(path)
        thread.join(10)


def says(content: bytes) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.recv(4096)
        connection.sendall(content)

    return serve


def http(status: int, body: bytes) -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_an_answer(tmp_path: Path) -> None:
    with answering(tmp_path / "s", says(http(200, b'{"version":1,"items":[]}'))) as target:
        assert ask(target, "status") == {"version": 1, "items": []}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "is no agent"),
        (b"", "is no agent"),
        (http(200, b"{"), "is no agent"),
        (http(200, b"[" * 5000), "is no agent"),
        (http(200, b"[]"), "another version"),
        (http(200, b'{"version":2}'), "another version"),
        (http(200, b"x")[:-1], "is no agent"),
        (b"HTTP/1.1 200 X\r\n" + b"a: b\r\n" * 20000, "is no agent"),
    ],
)
def test_an_answer_that_is_none(tmp_path: Path, content: bytes, expected: str) -> None:
    with answering(tmp_path / "s", says(content)) as target, pytest.raises(Unreachable) as caught:
        ask(target, "status")
    assert expected in caught.value.message


def test_an_error_status_is_the_agents_own_words(tmp_path: Path) -> None:
    with answering(tmp_path / "s", says(http(404, b"nothing at '/v1/x'\n"))) as target, pytest.raises(Refused, match="nothing at"):
        ask(target, "x")


def test_an_endless_answer_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1000)
    with answering(tmp_path / "s", says(http(200, b"x" * 2000))) as target, pytest.raises(Unreachable, match="no listing of ours"):
        ask(target, "status")


def test_silence_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.05)
    released = threading.Event()

    def silent(_: socket.socket) -> None:
        released.wait(10)

    with answering(tmp_path / "s", silent) as target:
        with pytest.raises(Unreachable, match=r"did not answer within 0\.05 s"):
            ask(target, "status")
        released.set()


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="there is no such socket"):
        ask(Target(tmp_path / "none"), "status")
    dead = tmp_path / "dead"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    with pytest.raises(Unreachable, match="its agent has ended"):
        ask(Target(dead), "status")
    with pytest.raises(Unreachable, match="cannot reach the agent"):
        ask(Target(tmp_path / ("x" * 200)), "status")
