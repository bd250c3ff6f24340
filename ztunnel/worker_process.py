"""The process of a data-plane worker: `python -m ztunnel.worker_process --channel-fd N`, started by `ztunnel run`.

Owns what comes before the worker's loop and concerns the process: what it loads and keeps in memory, its privileges, its parent's death.
"""

from __future__ import annotations

import logging
import socket
import sys
from importlib.util import find_spec

from ztunnel.runtime.worker_main import begin, confine_for_good

log = logging.getLogger("ztunnel.worker_process")  # as a program this module is called __main__

_HASHES = ("_md5", "_sha1", "_sha3", "_blake2")
"""Modules by which `hashlib` needs no OpenSSL; whoever builds Python without one leaves out others as well."""


def main() -> None:
    """Entry point of the process."""
    arguments = begin("python -m ztunnel.worker_process", "Data-plane worker; started by `ztunnel run`.")
    _leave_one_openssl_out()
    from ztunnel.hbone.rehearsal import rehearse  # noqa: PLC0415 - the line above decides what these load
    from ztunnel.worker import serve  # noqa: PLC0415

    for own_records in (True, False):
        rehearse(own_records)
    confine_for_good(log, arguments.parent)
    serve(socket.socket(fileno=arguments.channel_fd))


def _leave_one_openssl_out() -> None:
    """TLS is spoken by the OpenSSL inside of `cryptography`. The interpreter's own beside it would take 4 MB, for hashes that `hashlib`,
    which `cryptography` imports, finds elsewhere when there is no `_hashlib`."""
    if all(find_spec(each) for each in _HASHES):
        sys.modules["_hashlib"] = None  # type: ignore[assignment]  # this is how the import system is told "not here"


if __name__ == "__main__":
    main()
