"""Who gets the CPU first: a worker, which carries bytes that somebody waits for, before its supervisor, which has time.

The two share the node's CPUs with each other and with all pods. Where both want one, the worker mostly runs: the supervisor that reads
a thousand changes of the mesh a second makes way for it. Workers must not be as patient, and nobody without privileges may take patience
back. So they are started by a thread that was there before (`launcher`).
Source: sched(7), nice(2).
"""

from __future__ import annotations

import os
import threading

PATIENCE = 10
"""Steps of nice(2): a tenth of the weight of a process that has none, so that a busy node does not starve the supervisor."""
_MOST_PATIENT = 19


def be_patient() -> None:
    """This thread, and those that it starts from now on, make way for others."""
    here = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, here, min(_MOST_PATIENT, os.getpriority(os.PRIO_PROCESS, here) + PATIENCE))
