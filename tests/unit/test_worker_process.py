"""The process of a data-plane worker, as far as it can be had without a channel."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
from ztunnel import worker_process
worker_process._leave_one_openssl_out()
import ztunnel.worker
from ztunnel.hbone.rehearsal import rehearse
rehearse(own_records=True)
print("libcrypto" in open("/proc/self/maps").read())
"""


def test_a_worker_has_one_openssl() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert not done.stderr, "hashlib has found all of its hashes"
