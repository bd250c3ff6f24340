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


give_way = os.sched_yield
"""For between two pieces of a turn that is long for a worker: whoever else wants this CPU has it before the next one.

A patient process gets the CPU seldom, but when it does, the kernel leaves it there until the next tick of its clock, up to 4 ms, unless
somebody who slept wakes up meanwhile; a worker that an application has just interrupted does not sleep. Half a microsecond if nobody
wants it.
Source: sched_yield(2); Linux `yield_task_fair`, EEVDF's slice protection.
"""


def be_patient() -> None:
    """This thread, and those that it starts from now on, make way for others."""
    here = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, here, min(_MOST_PATIENT, os.getpriority(os.PRIO_PROCESS, here) + PATIENCE))
