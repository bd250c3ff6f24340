"""The machine that a benchmark runs on: namespaces of its own, descriptors enough, and which CPU is which node."""

from __future__ import annotations

import os
import platform
import resource
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks import processes
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.tools import Tools
from tests.kit import isolation

SPIN_SECONDS = 3600
MOST_DESCRIPTORS = 65536
_LATENCY = Path("/dev/cpu_dma_latency")
_SHALLOWEST = Path("/sys/devices/system/cpu/cpu0/cpuidle/state0/name")


@dataclass(frozen=True, slots=True)
class Cpus:
    """Where the two nodes are; None: wherever the kernel likes."""

    near: int | None
    far: int | None


def isolate() -> None:
    """Namespaces of our own, and as many descriptors as we and our children may have.

    Raises:
        BenchError: not allowed here.
    """
    refusal = isolation.isolate()
    if refusal is not None:
        raise BenchError(refusal)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), most))


def descriptors() -> int:
    """How many a process of a benchmark may have, behind `isolate`."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_DESCRIPTORS if most == resource.RLIM_INFINITY else min(most, MOST_DESCRIPTORS)


def cpus(pin: bool) -> Cpus:
    """Two nodes of one CPU, or no binding at all.

    Raises:
        BenchError: there are not two.
    """
    if not pin:
        return Cpus(None, None)
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise BenchError("two nodes need two CPUs; --no-pin does without")
    return Cpus(available[0], available[1])


@contextmanager
def awake(tools: Tools, used: Cpus) -> Iterator[None]:
    """None of the CPUs in use halts: a virtual one that does takes 40 to 50 us to wake, which would drown the software in question.

    The kernel's idle loop polls instead, if it can. It is not a process: a process that spins, however patient, is switched away from at
    each wake-up, and has its turns of a tick (4 ms) like any other. So one spins only where each CPU has its own work anyway.
    """
    if idle_polls():
        descriptor = os.open(_LATENCY, os.O_WRONLY)
        try:
            os.write(descriptor, struct.pack("=i", 0))
            yield
        finally:
            os.close(descriptor)
        return
    with ExitStack() as stack:
        for cpu in (used.near, used.far):
            if cpu is not None:
                stack.enter_context(processes.running([tools.spin, str(cpu), str(SPIN_SECONDS)], Path(os.devnull)))
        yield


def idle_polls() -> bool:
    """Whether a CPU with nothing to do may be told to poll for work.

    Source: Linux Documentation/power/pm_qos_interface.rst; Documentation/admin-guide/pm/cpuidle.rst (POLL is the first of the states).
    """
    try:
        return _SHALLOWEST.read_text().strip() == "POLL" and os.access(_LATENCY, os.W_OK)
    except OSError:
        return False


def described() -> dict[str, object]:
    """What a report says of it."""
    return {
        "kernel": platform.release(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "idle": "polls" if idle_polls() else "a process spins",
        "descriptors": descriptors(),
    }


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
