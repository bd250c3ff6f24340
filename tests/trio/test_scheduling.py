"""Workers before their supervisor: patience, and who inherits it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import trio

from ztunnel.runtime.launcher import Launcher
from ztunnel.runtime.scheduling import PATIENCE

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
