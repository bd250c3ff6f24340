"""The load generator against servers that echo, refuse, reset, lie and stall."""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.kit import loadgen
from tests.kit.loadgen import Load, Run

Serve = Callable[[socket.socket], None]


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def echo_in_pieces(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        for at in range(0, len(data), 7):
            connection.sendall(data[at : at + 7])


def reset(connection: socket.socket) -> None:
    connection.recv(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def end_early(connection: socket.socket) -> None:
    connection.sendall(connection.recv(65536)[:3])


def lie(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"nonsense")
    connection.recv(65536)


def stall(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


@contextmanager
def serving(serve: Serve) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # shut down below
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        def one(connection: socket.socket) -> None:
            with connection:
                try:
                    serve(connection)
                except ConnectionError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.mark.parametrize("serve", [echo, echo_in_pieces])
@pytest.mark.parametrize(("connections", "rounds", "size"), [(40, 1, 1), (10, 3, 5000), (1, 2, 300_000)])
def test_every_connection_gets_its_bytes_back(serve: Serve, connections: int, rounds: int, size: int) -> None:
    with serving(serve) as port:
        result = Run(Load("127.0.0.1", port, connections=connections, rounds=rounds, size=size, interval=0.01, parallel=8)).go()
    assert (result.ok, result.failures) == (connections, {})
    assert result.round_ms["p50"] <= result.round_ms["p100"]


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [(reset, "reset"), (end_early, "early end"), (lie, "wrong bytes"), (stall, "timeout")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_failures_are_counted_by_kind(serve: Serve, outcome: str) -> None:
    with serving(serve) as port:
        result = Run(Load("127.0.0.1", port, connections=5, patience=0.3)).go()
    assert (result.ok, result.failures) == (0, {outcome: 5})


def test_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert Run(Load("127.0.0.1", port, connections=3)).go().failures == {"refused": 3}


def test_the_whole_run_is_bounded() -> None:
    with serving(stall) as port:
        result = Run(Load("127.0.0.1", port, connections=9, parallel=2, patience=60, within=0.2)).go()
    assert result.failures == {"unfinished": 9}


@pytest.mark.parametrize(("serve", "ok", "failures"), [(echo, 5, {}), (reset, 0, {"reset": 5})])
def test_it_runs_alone_and_speaks_json(serve: Serve, ok: int, failures: dict[str, int]) -> None:
    with serving(serve) as port:
        words = [sys.executable, "-I", "-S", loadgen.__file__, "127.0.0.1", str(port), "--connections", "5"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    said = json.loads(done.stdout)
    assert (said["ok"], said["failures"]) == (ok, failures)
