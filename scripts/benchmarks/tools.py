"""The programs that a benchmark needs: found, or compiled from the C sources beside this module."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.errors import BenchError
from scripts.compile import CompileError, compiled

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Tools:
    """Programs, ready to be run."""

    load: str
    spin: str
    wrk: str
    nginx: tuple[str, ...]
    at_once: tuple[str, ...]
    """Words before a command that is to get the CPU whenever it wants it; none where that is not allowed."""
    tree: Path
    """Where our agents' `ztunnel` is imported from: its compiled form, or the sources."""

    def versions(self) -> dict[str, str]:
        """What those that are not ours say of themselves."""
        return {"wrk": _first_line([self.wrk, "-v"]), "nginx": _first_line([self.nginx[0], "-v"]), "gcc": _first_line(["gcc", "--version"])}


def make_tools(directory: Path, *, sources: bool = False) -> Tools:
    """Compiles into `directory`, and our own modules into their place (scripts/compile.py) unless the `sources` are asked for.

    Raises:
        BenchError: a program is missing or does not compile.
    """
    built = []
    for name in ("load", "spin"):
        command = [found("gcc"), "-O2", "-Wall", "-o", str(directory / name), str(SOURCES / f"{name}.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"{name}.c does not compile:\n{done.stderr}")
        built.append(str(directory / name))
    try:
        tree = ROOT if sources else compiled()
    except CompileError as error:
        raise BenchError(f"{error}\n--sources does without") from error
    at_once = ("chrt", "--fifo", "1")
    allowed = subprocess.run([*at_once, "true"], capture_output=True, check=False).returncode == 0
    return Tools(built[0], built[1], found("wrk"), (found("nginx"), "-e", "stderr"), at_once if allowed else (), tree)


def found(program: str) -> str:
    """A program's path.

    Raises:
        BenchError: it is not installed.
    """
    path = shutil.which(program, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise BenchError(f"{program} is missing; scripts/bench installs it when it runs as root")
    return path


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return next(iter((done.stdout + done.stderr).splitlines()), "")
