"""What the interop tests share: one certificate authority, and plain TCP ends to put behind and before the tunnels."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from tests.kit.pki import FakePki


@pytest.fixture(scope="session")
def pki() -> FakePki:
    """The trust domain of both ends."""
    return FakePki()


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    """The address of a TCP server that sends back what it gets, and half-closes after it got everything."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        thread = threading.Thread(target=_serve, args=(server,), daemon=True)
        thread.start()
        yield server.getsockname()
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def _serve(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # the fixture has shut the listener down
            return
        threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        except (ConnectionError, BrokenPipeError):
            return
