"""What a process that has started and will run for long does with its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator

_YOUNG_OBJECTS = 20_000
"""New objects before the collector looks at them: connections are counted out by themselves, and each look is a pause for all of them."""
_MADV_DONTNEED = 4
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+ +/")
"""The first line of a part of a file in memory. Source: proc(5), `/proc/pid/smaps`."""


def settle() -> None:
    """What is there now stays: the collector need not look at it again. What only starting needed goes back to the kernel.

    Libraries' code goes back only while there is no other thread: one that resolves a name maps the loader's cache and unmaps it, and what
    is in its place a moment later is memory in use, which would be gone.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 100)
    libc = ctypes.CDLL(None)
    try:
        libc.malloc_trim(0)
    except AttributeError:
        pass  # not glibc
    if _has_threads():
        return
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, size in unwritten(_smaps()):
        libc.madvise(start, size, _MADV_DONTNEED)


def unwritten(smaps: str) -> Iterator[tuple[int, int]]:
    """Start and size of the parts of files in memory that are as they are in the file and cannot be written to: libraries' code, most of
    which is for starting. A page that is needed again is taken from the kernel's cache."""
    candidate: tuple[int, int] | None = None
    for line in smaps.splitlines():
        if mapping := _MAPPING.match(line):
            start, end, access = int(mapping[1], 16), int(mapping[2], 16), mapping[3]
            candidate = None if "w" in access else (start, end - start)
        elif line.startswith("Anonymous:") and candidate is not None:
            # Relocated pages are not in the file any more.
            if line.split()[1] == "0":
                yield candidate
            candidate = None


def _has_threads() -> bool:
    """Whether this process has more than one, whoever has started them."""
    try:
        return len(os.listdir("/proc/self/task")) != 1
    except OSError:
        return True


def _smaps() -> str:
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""  # no /proc here: then it all stays in memory
