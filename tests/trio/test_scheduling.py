"""Workers before their supervisor: short slices, patience, and who inherits it."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import subprocess
import sys
import threading

import pytest
import trio

from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.scheduling import PATIENCE, SLICE_SECONDS, ask_for_short_slices

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
_PATIENT_PARENT = """
import os, sys, trio
from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.scheduling import be_patient

async def main():
    launcher = Launcher()
    be_patient()
    be_patient()
    worker = await launcher.launch([sys.executable, "-c", "import os; print(os.getpriority(os.PRIO_PROCESS, 0), flush=True)"], [])
    worker.wait()
    print(os.getpriority(os.PRIO_PROCESS, 0))

trio.run(main)
"""


def slice_now() -> int:
    """Of this thread, in nanoseconds."""
    room = ctypes.create_string_buffer(56)
    assert ctypes.CDLL(None, use_errno=True).syscall(_SCHED_GETATTR[platform.machine()], 0, room, 56, 0) == 0
    runtime: int = struct.unpack_from("=Q", room, 24)[0]
    return runtime


@pytest.mark.skipif(
    platform.machine() not in _SCHED_GETATTR or tuple(map(int, platform.release().split(".")[:2])) < (6, 12),
    reason="this kernel has no slices of ordinary processes",
)
def test_a_worker_asks_for_short_slices() -> None:
    seen: list[int] = []

    def ask() -> None:
        ask_for_short_slices()
        seen.append(slice_now())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [round(SLICE_SECONDS * 1e9)]


def test_a_patient_supervisor_has_workers_that_are_not() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    done = subprocess.run([sys.executable, "-c", _PATIENT_PARENT], capture_output=True, text=True, check=True, timeout=60)
    worker, supervisor = map(int, done.stdout.split())
    assert worker == before
    assert supervisor == min(19, before + 2 * PATIENCE)


async def test_what_cannot_be_started_is_an_error() -> None:
    launcher = Launcher()
    for command, error in (("/nowhere/to/be/found", FileNotFoundError), ("/no\0where", ValueError), ("/nowhere", FileNotFoundError)):
        with trio.fail_after(10), pytest.raises(error):
            await launcher.launch([command], [])
