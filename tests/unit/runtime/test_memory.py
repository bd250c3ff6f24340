"""What of a process's memory may be given back: what its file still has."""

from __future__ import annotations

import subprocess
import sys

from ztunnel.runtime.memory import unwritten

SMAPS = """\
00400000-00420000 r--p 00000000 fe:00 7                          /usr/bin/python
Size:                128 kB
Anonymous:             0 kB
00420000-00500000 r-xp 00020000 fe:00 7                          /usr/bin/python
Anonymous:             0 kB
00500000-00510000 r--p 00100000 fe:00 7                          /usr/lib/relocated.so
Anonymous:             4 kB
00510000-00520000 rw-p 00110000 fe:00 7                          /usr/lib/data.so
Anonymous:             0 kB
00520000-00530000 r--p 00000000 00:00 0
Anonymous:             0 kB
7ffd0000-7ffd2000 r-xp 00000000 00:00 0                          [vdso]
Anonymous:             0 kB
"""


def test_only_parts_of_files_that_nobody_has_written_to_are_given_back() -> None:
    assert list(unwritten(SMAPS)) == [(0x400000, 0x20000), (0x420000, 0xE0000)]


def test_a_process_goes_on_after_it_has_settled() -> None:
    program = "import json; from ztunnel.runtime.memory import settle; settle(); settle(); print(json.dumps([1]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[1]\n"


def test_nothing_is_unmapped_under_another_thread() -> None:
    program = """
import sys, threading
from ztunnel.runtime import memory

seen = []
memory._smaps = lambda: seen.append(threading.active_count()) or ""
memory.settle()
over = threading.Event()
other = threading.Thread(target=over.wait)
other.start()
memory.settle()
over.set()
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[1]\n"
