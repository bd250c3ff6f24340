"""Who gets the CPU first: a worker, which carries bytes that somebody waits for, before its supervisor, which has time.

The two share the node's CPUs with each other and with all pods. Where both want one, the worker runs: it is never waited for longer
than a short slice, and the supervisor that reads a thousand changes of the mesh a second makes way for it. Workers must not be as
patient as the supervisor, and nobody without privileges may take its patience back. So they are started by a thread that was there
before (`launcher`).
Source: sched(7), sched_setattr(2); Linux 6.12 for slices of ordinary processes, which older kernels ignore.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

SLICE_SECONDS = 0.0001
"""The shortest that the kernel grants."""
PATIENCE = 10
"""Steps of nice(2): a tenth of the weight of a process that has none, so that a busy node does not starve the supervisor."""
_MOST_PATIENT = 19
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
"""The first version of `struct sched_attr`: size, policy, flags, nice, priority, runtime, deadline, period."""


def ask_for_short_slices() -> None:
    """This thread, and those that it starts, run sooner after they wake up, and for less long. A wish: nothing depends on it."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    wish = _ATTRIBUTES.pack(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, round(SLICE_SECONDS * 1e9), 0, 0)
    ctypes.CDLL(None).syscall(number, 0, wish, 0)


def be_patient() -> None:
    """This thread, and those that it starts from now on, make way for others."""
    here = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, here, min(_MOST_PATIENT, os.getpriority(os.PRIO_PROCESS, here) + PATIENCE))
