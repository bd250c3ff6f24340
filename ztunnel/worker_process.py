"""The process of a data-plane worker: `python -m ztunnel.worker_process --channel-fd N`, started by `ztunnel run`.

Owns what comes before the worker's loop and concerns the process: what it loads and keeps in memory, its privileges, its parent's death.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from ctypes import CDLL
from importlib.util import find_spec

from ztunnel.runtime import logs
from ztunnel.runtime.confine import confine
from ztunnel.runtime.memory import settle

log = logging.getLogger("ztunnel.worker_process")  # as a program this module is called __main__

_PR_SET_PDEATHSIG = 1
_HASHES = ("_md5", "_sha1", "_sha3", "_blake2")
"""Modules by which `hashlib` needs no OpenSSL; whoever builds Python without one leaves out others as well."""


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(prog="python -m ztunnel.worker_process", description="Data-plane worker; started by `ztunnel run`.")
    parser.add_argument("--channel-fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True, help="process id of the supervisor: without it there is nothing to do")
    parser.add_argument("--log-format", default="text")
    parser.add_argument("--log-level", default="info", choices=logs.LEVELS)
    arguments = parser.parse_args()
    logs.configure(arguments.log_format, arguments.log_level)
    _leave_one_openssl_out()
    from ztunnel.hbone.rehearsal import rehearse  # noqa: PLC0415 - the line above decides what these load
    from ztunnel.worker import serve  # noqa: PLC0415

    for own_records in (True, False):
        rehearse(own_records)
    settle()
    confinement = confine()
    # Behind it: a change of user clears the parent-death signal.
    _die_with(arguments.parent)
    log.info("worker confined", extra=logs.fields(user=confinement.user, missing=", ".join(confinement.missing) or None))
    serve(socket.socket(fileno=arguments.channel_fd))


def _leave_one_openssl_out() -> None:
    """TLS is spoken by the OpenSSL inside of `cryptography`. The interpreter's own beside it would take 4 MB, for hashes that `hashlib`,
    which `cryptography` imports, finds elsewhere when there is no `_hashlib`."""
    if all(find_spec(each) for each in _HASHES):
        sys.modules["_hashlib"] = None  # type: ignore[assignment]  # this is how the import system is told "not here"


def _die_with(parent: int) -> None:
    """The supervisor's death ends the channel and so the worker; this covers one that is stuck and does not look at its channel."""
    libc = CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the supervisor is gone")


if __name__ == "__main__":
    main()
