"""Bringing labs up and taking them down, from the outside: state directories, the controller's process, what a killed one left.

Everything of a lab lives in namespaces that die with its controller, so cleaning up after a killed one is: make sure that the process is
dead (by number and start time, never by name), then remove the directory. Standard library only.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ztunnel.lab.client import Client, NoLab
from ztunnel.lab.images import python_path
from ztunnel.lab.isolation import ProcessId
from ztunnel.lab.objects import LabError
from ztunnel.lab.paths import lab_state_dir, labs_root
from ztunnel.lab.wire import LOG_NAME, MAX_SOCKET_PATH, PROCESS_FILE, BadMessage, decode
from ztunnel.mesh.manifests.tree import integer

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?")
START_SECONDS = 60.0
END_SECONDS = 15.0
POLL_SECONDS = 0.01
LOG_LINES = 15
LONGEST_SOCKET_BELOW = "nodes/node-64/agent.sock"


@dataclass(frozen=True, slots=True)
class Options:
    """How a lab is built."""

    nodes: int = 2
    ip_family: str = "ipv4"
    images: Sequence[str] = ()
    has_mesh: bool = True

    def arguments(self) -> list[str]:
        """For the controller's command line."""
        given = ["--nodes", str(self.nodes), "--ip-family", self.ip_family]
        for image in self.images:
            given += ["--image", image]
        return given if self.has_mesh else [*given, "--no-mesh"]


def state_of(name: str) -> Path:
    """The state directory of a lab.

    Raises:
        LabError: not a name.
    """
    if not NAME.fullmatch(name):
        raise LabError("", f"a lab's name is up to 40 lower-case letters, digits and '-', not {name!r}")
    return lab_state_dir(name)


def start(name: str, options: Options) -> Client:
    """Start a lab's controller; it answers when this returns.

    Raises:
        LabError: a lab of that name is up, or the controller failed; the text has its reason and the end of its log.
    """
    state = state_of(name)
    longest = len(str(state / LONGEST_SOCKET_BELOW).encode())
    if longest > MAX_SOCKET_PATH:
        raise LabError("", f"{state} is too long for the sockets in it: {longest} bytes of path, and the kernel allows {MAX_SOCKET_PATH}")
    _make_root(state.parent)
    with ExitStack() as starting:
        with _held(state.parent):
            _make_way(state)
            state.mkdir(mode=0o700)
            starting.enter_context(_held(state))
        try:
            reason = _launch(state, options)
        except KeyboardInterrupt:
            clean(state)
            raise
        if reason is not None:
            tail = log_tail(state)
            clean(state)
            raise LabError("", reason + (f"\nlast lines of its log:\n{tail}" if tail and reason not in tail else ""))
    return Client(state)


def _make_way(state: Path) -> None:
    """Remove what a dead lab of that name has left.

    Raises:
        LabError: it is not dead: it is up, or somebody brings it up.
    """
    if not state.exists():
        return
    name = state.name
    if is_up(state):
        raise LabError("", f"a lab named {name!r} is up already (ztunnel lab down --name {name}, or use another --name)")
    try:
        with _held(state, wait=False):
            clean(state)
    except BlockingIOError as error:
        raise LabError("", f"a lab named {name!r} is being brought up already (use another --name)") from error


@contextmanager
def _held(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Nobody else holds the directory meanwhile; the kernel lets go of it when a holder dies.

    Raises:
        BlockingIOError: somebody holds it, and we do not wait.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def is_up(state: Path) -> bool:
    """Whether the lab's controller runs."""
    process = _controller(state)
    return process is not None and process.is_alive()


def stop(name: str) -> bool:
    """Take a lab down, or clean up after a dead one; whether there was anything.

    Raises:
        LabError: it cannot be ended.
    """
    state = state_of(name)
    if not state.exists():
        return False
    with suppress(FileNotFoundError), _held(state):
        pass  # one that is being brought up is waited for, since its controller cannot be ended before it is known
    if not state.exists():
        return False
    if is_up(state):
        try:
            Client(state).call("down")
            _await_end(state, END_SECONDS)
        except (NoLab, TimeoutError):
            pass  # it does not obey: `clean` kills it
    clean(state)
    return True


def clean(state: Path) -> None:
    """Kill what is left of a lab and remove its directory.

    Raises:
        LabError: the process survives SIGKILL, or the directory cannot be removed.
    """
    process = _controller(state)
    if process is not None and process.is_alive():
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            fd = -1
        if fd != -1:
            try:
                if process.is_alive():  # the descriptor now is of that very process
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)
        try:
            _await_end(state, END_SECONDS)
        except TimeoutError as error:
            raise LabError("", f"process {process.pid} of the lab does not end") from error
    try:
        shutil.rmtree(state)
    except OSError as error:
        raise LabError("", f"cannot remove {error.filename}: {error.strerror}") from error


def names() -> list[tuple[str, bool]]:
    """Every lab that has a state directory, and whether it is up."""
    root = labs_root()
    if not root.is_dir():
        return []
    return [(entry.name, is_up(entry)) for entry in sorted(root.iterdir()) if entry.is_dir() and NAME.fullmatch(entry.name)]


def log_tail(state: Path, lines: int = LOG_LINES) -> str:
    """The end of the controller's log."""
    return "\n".join(tail_of(state / LOG_NAME, lines))


def tail_of(path: Path, lines: int) -> list[str]:
    """The last lines of a log; none where there is no such file."""
    try:
        return path.read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def _launch(state: Path, options: Options) -> str | None:
    """Start the controller; None when it is ready, else why it is not."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "ztunnel.lab.controller", "--state", str(state), "--ready", str(write), *options.arguments()]
    environment = os.environ | {"PYTHONPATH": python_path(os.environ)}
    quiet = subprocess.DEVNULL
    with (
        open(state / LOG_NAME, "ab") as log,
        # The process that this starts only forks the controller into its namespaces and ends.
        subprocess.Popen(command, stdin=quiet, stdout=log, stderr=log, cwd="/", env=environment, pass_fds=(write,), start_new_session=True),
    ):
        os.close(write)
        words = _read_within(read, START_SECONDS)
    if words == "ok":
        return None
    return words or "the lab's controller ended before it was ready"


def _read_within(fd: int, seconds: float) -> str:
    with os.fdopen(fd, "rb") as source:
        readable, _, _ = select.select([source], [], [], seconds)
        return source.readline(1 << 16).decode(errors="replace").strip() if readable else f"the lab was not ready within {seconds:g} s"


def _controller(state: Path) -> ProcessId | None:
    try:
        record = decode((state / PROCESS_FILE).read_bytes())
    except (OSError, BadMessage):
        return None
    return ProcessId(integer(record, "pid"), integer(record, "start_time"))


def _await_end(state: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while is_up(state):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(POLL_SECONDS)


def _make_root(root: Path) -> None:
    """Make the directory of all labs; an existing one must be ours alone, since /tmp is everybody's."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise LabError("", f"{root} must be a directory that only you can write to")
