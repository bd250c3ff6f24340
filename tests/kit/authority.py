"""`ztunnel ca` as a process of the test's, and what it told in its log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.kit.polling import eventually
from ztunnel.rpc.client import Target

SECONDS = 60.0


@dataclass
class AuthorityProcess:
    """One replica."""

    process: subprocess.Popen[bytes]
    file: Path
    name: str
    """That its certificate is for."""

    def log(self) -> str:
        """All that it said."""
        return self.file.read_text(errors="replace")

    @property
    def port(self) -> int:
        """Where callers are let in; waits until they are."""

        def found() -> re.Match[str] | None:
            assert self.process.poll() is None, f"the authority ended with {self.process.returncode}:\n{self.log()}"
            return re.search(r"\tca_app\tready\tport=(\d+)", self.log())

        return int(eventually(found, within=SECONDS, saying=f"the authority is ready\n{self.log()}")[1])

    @property
    def target(self) -> Target:
        """For our client."""
        return Target("127.0.0.1", self.port, self.name)

    def says(self, text: str) -> None:
        """Wait until its log has this."""
        eventually(lambda: text in self.log(), within=SECONDS, saying=f"{text!r} in the log")

    def end(self) -> int:
        """Ask it to end; its exit status."""
        self.process.terminate()
        return self.process.wait(SECONDS)


@contextmanager
def authority(
    directory: Path,
    settings: Mapping[str, object],
    name: str = "ca.test",
    prefix: Sequence[str] = (),
    program: Sequence[str] = (sys.executable, "-m", "ztunnel"),
    config: str = "",
) -> Iterator[AuthorityProcess]:
    """A replica on free ports of the loopback address.

    Args:
        directory: its own; settings and log are put there.
        prefix: of its command, e.g. to enter a namespace.
        program: `ztunnel`.
        config: that directory as the program sees it, if it sees it elsewhere.
    """
    directory.mkdir(parents=True, exist_ok=True)
    everything = {
        "listen": {"address": "127.0.0.1", "port": 0, "names": [name]},
        "admin": {"address": "127.0.0.1", "metrics_port": 0, "readiness_port": 0},
        "poll_seconds": 0.2,
        **settings,
    }
    (directory / "ca.yaml").write_text(yaml.safe_dump(everything))
    log = directory / "ca.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ZTUNNEL_", "KUBE"))}
    with log.open("wb") as output:
        command = [*prefix, *program, "ca", "--config", f"{config or directory}/ca.yaml"]
        # A group of its own: behind a prefix that changes users nobody else would end the program.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        yield AuthorityProcess(process, log, name)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(SECONDS)
