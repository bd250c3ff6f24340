"""An honest connection that measures itself, in a process of its own, so that a busy test does not slow it down.

    python -m tests.kit.bystander CLIENT_NETNS SERVER_NETNS ADDRESS PORT

Listens in one namespace, connects from the other, and exchanges a byte every few milliseconds over this one connection. One line per
exchange: the seconds that it took. The first line is `open`. Ends when its standard input does, or with the error that broke it.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.kit.netns import Pod
from tests.kit.polling import eventually
from ztunnel.node import netns

REPOSITORY = Path(__file__).parents[2]
INTERVAL_SECONDS = 0.005
TIMEOUT_SECONDS = 5.0


class Bystander:
    """The process, and what it has measured."""

    def __init__(self, client: Pod, server: Pod, port: int, log: Path) -> None:
        self._log = log
        self._read = 0
        command = [sys.executable, "-m", "tests.kit.bystander", client.path, server.path, server.v4, str(port)]
        with log.open("w") as out:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, cwd=REPOSITORY)
        eventually(lambda: "open" in self._log.read_text(), saying="the bystander is connected")
        self.news()

    def news(self) -> list[float]:
        """Times of the exchanges since it was last asked. Raises AssertionError if the connection is broken."""
        text = self._log.read_text()
        assert self._process.poll() is None, f"an honest connection was broken: {text[-1000:]}"
        end = text.rfind("\n") + 1
        lines, self._read = text[self._read : end].split(), end
        return [float(line) for line in lines if line != "open"]

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


def main(client: str, server: str, address: str, port: int) -> None:
    """The process."""
    listener = _socket_in(server, address)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen()
    near = _socket_in(client, address)
    near.connect((address, port))
    far, _ = listener.accept()
    for each in (near, far):
        each.settimeout(TIMEOUT_SECONDS)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _say("open")
    while not select.select([sys.stdin], [], [], INTERVAL_SECONDS)[0]:
        began = time.perf_counter()
        for sender, receiver in ((near, far), (far, near)):
            sender.send(b"x")
            if receiver.recv(1) != b"x":
                raise ConnectionError("the connection ended")
        _say(f"{time.perf_counter() - began:.6f}")


def _socket_in(path: str, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with open(path) as namespace, netns.inside(namespace.fileno()):
        made = socket.socket(family, socket.SOCK_STREAM)
    made.settimeout(TIMEOUT_SECONDS)
    return made


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
