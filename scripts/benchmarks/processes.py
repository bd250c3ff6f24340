"""Processes: what they cost, where they run, and that none outlives the benchmark.

Numbers are exact: CPU time in nanoseconds as the scheduler counts it (user and kernel time of all threads, also of those that have ended,
the network's own work in their name included), memory from /proc's `smaps_rollup`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_END_SECONDS = 3.0
_PROC = Path("/proc")
_CPUCLOCK_SCHED = 2
"""The kind of clock in a clock's number (`clock_getcpuclockid(3)`): what the scheduler counts."""


def descendants(pid: int) -> list[int]:
    """Every living process below this one."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            parent = _parent(entry)
            if parent is not None:
                children.setdefault(parent, []).append(int(entry.name))
    found: list[int] = []
    waiting = list(children.get(pid, ()))
    while waiting:
        each = waiting.pop()
        found.append(each)
        waiting.extend(children.get(each, ()))
    return found


def tree(roots: Iterable[int]) -> list[int]:
    """These processes and everything below them."""
    return [each for root in roots for each in (root, *descendants(root))]


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that these processes have had, those that are gone left out.

    By the clock of each process, not thread by thread: a thread that ends between two calls would take its time out of the sum, and
    supervisors end the threads that they have not needed for a while.
    """
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime(~pid << 3 | _CPUCLOCK_SCHED)
        except OSError:
            continue  # it has ended
    return total


def resident_bytes(pid: int) -> int:
    """Its resident set, pages shared with others included."""
    for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/{pid}/smaps_rollup has no Rss")


def pin(pids: Iterable[int], cpu: int | None) -> None:
    """Bind all threads of these processes to one CPU; None leaves them where they are."""
    if cpu is None:
        return
    for task in _tasks(pids):
        try:
            os.sched_setaffinity(int(task.name), {cpu})
        except ProcessLookupError:
            continue


def pinned(cpu: int | None) -> list[str]:
    """Words before a command that is to run on one CPU."""
    return [] if cpu is None else ["taskset", "-c", str(cpu)]


@contextmanager
def running(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block, by SIGTERM and, if that does not help, by SIGKILL."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def ending_all() -> Iterator[None]:
    """What the block has started, and what that has started, is gone after it, also when a process in between has died.

    SIGTERM ends the block as ^C does.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        # A second ^C must not leave half of them behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        deadline = time.monotonic() + _END_SECONDS
        while (left := descendants(os.getpid())) and time.monotonic() < deadline:
            for pid in left:
                _kill(pid)
            time.sleep(0.01)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, os.WNOHANG)
    except (ProcessLookupError, ChildProcessError):
        pass


def _parent(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _tasks(pids: Iterable[int]) -> Iterator[Path]:
    for pid in pids:
        try:
            yield from list((_PROC / str(pid) / "task").iterdir())
        except (FileNotFoundError, ProcessLookupError):
            continue
