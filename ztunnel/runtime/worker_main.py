"""What the entry point of every worker process does, the node agent's and a waypoint's: its arguments, its last step before it serves."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from ctypes import CDLL

from ztunnel.runtime import logs
from ztunnel.runtime.confine import confine
from ztunnel.runtime.memory import settle

_PR_SET_PDEATHSIG = 1


def begin(program: str, description: str) -> argparse.Namespace:
    """The arguments that `runtime.workers.spawn_process` gives: `channel_fd` and `parent`. Logs go where they say from here on."""
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor: without it there is nothing to do")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--log-level", default="info", choices=logs.LEVELS)
    arguments = parser.parse_args()
    logs.configure(arguments.log_format, arguments.log_level)
    return arguments


def confine_for_good(log: logging.Logger, parent: int, allowed: frozenset[str] = frozenset()) -> None:
    """Everything is loaded: memory, privileges and the parent's death are settled. See `confine` for `allowed` and what it raises."""
    settle()
    confinement = confine(allowed)
    # Behind it: a change of user clears the parent-death signal.
    _die_with(parent)
    log.info("worker confined", extra=logs.fields(user=confinement.user, missing=", ".join(confinement.missing) or None))


def _die_with(parent: int) -> None:
    """The supervisor's death ends the channel and so the worker; this covers one that is stuck and does not look at its channel."""
    libc = CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")
