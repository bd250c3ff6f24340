"""A process that plays kubelet, as far as the kernel and /proc can tell: its name, its control group, its connections to pods."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.kit.cgroups import join
from tests.kit.netns import Node

APP = 8080

PROBER = """
import socket, sys
print(flush=True)
for line in sys.stdin:
    host, port = line.split()
    try:
        with socket.create_connection((host, int(port)), timeout=10) as probe:
            probe.sendall(b"GET /healthz HTTP/1.0\\r\\n\\r\\n")
            probe.shutdown(socket.SHUT_WR)
            print("healthz" if b"GET /healthz" in b"".join(iter(lambda: probe.recv(4096), b"")) else "cut", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class Prober:
    """A process on a node, with the name that it is given, that probes what it is told."""

    def __init__(self, node: Node, program: Path, group: Path | None) -> None:
        self.process = subprocess.Popen(
            ["nsenter", f"--net={node.path}", program, "-I", "-c", PROBER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=None if group is None else partial(join, group),  # noqa: PLW1509 - as systemd does: before it has its name
        )
        self._answer()

    def probe(self, address: str, port: int = APP) -> str:
        """`healthz` when the application answered."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{address} {port}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()


@contextmanager
def process(node: Node, directory: Path, group: Path | None, name: str = "kubelet") -> Iterator[Prober]:
    program = directory / name
    if not program.exists():
        program.symlink_to(os.path.realpath(sys.executable))
    prober = Prober(node, program, group)
    try:
        yield prober
    finally:
        prober.end()
