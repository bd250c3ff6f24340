"""The loads: what is done to a way, and the numbers that come back. Generators are C programs, never this process.

Values: `bytes`, `count`, `seconds`, `p50_us`, `p99_us`, `errors`, `generator_cpu`; the caller adds `cpu_seconds` of the proxies.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks import elsewhere, machine, processes, wrk
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.machine import Cpus
from scripts.benchmarks.options import Options
from scripts.benchmarks.rows import Values
from scripts.benchmarks.tools import Tools, make_tools
from scripts.benchmarks.ways import APP, AT_ONCE, GIVE_WAY, WEB, YIELDING, Way
from tests.kit.netns import Pod

IDLE_CONNECTIONS = 1000
_GRACE_SECONDS = 40.0
_HEAD_START_SECONDS = 0.2
_WARM_UP_SECONDS = 0.3
_MOST_OF = 0.9
"""Of the changes that should be made in a time; the rest may be late."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What every load needs to know."""

    tools: Tools
    cpus: Cpus
    seconds: float

    def command(self, pod: Pod, words: Sequence[str]) -> list[str]:
        """A generator in a client pod, on the client's CPU."""
        return [*processes.pinned(self.cpus.near), "nsenter", f"--net={pod.path}", *words]

    def load(self, pod: Pod, what: str, to: Pod, *words: object) -> dict[str, float]:
        """One run of load.c.

        Raises:
            BenchError: it could not do it.
        """
        command = self.command(pod, [self.tools.load, what, to.v4, str(APP), *map(str, words)])
        values: dict[str, float] = json.loads(output(command, self.seconds))
        return values


def output(command: Sequence[str], seconds: float) -> str:
    """What a generator prints that runs for so long; raises BenchError if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + _GRACE_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{command} did not end") from error
    if done.returncode != 0 or not done.stdout.strip():
        raise BenchError(f"{command}: {done.stderr.strip() or done.returncode}")
    return done.stdout


@contextmanager
def set_up(how: Options) -> Iterator[Bench]:
    """A machine of its own for a benchmark: namespaces, programs, CPUs that stay awake if that is asked for.

    Raises:
        BenchError: something that must be there is not.
    """
    machine.isolate()
    cpus = machine.cpus(how.pin)
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        tools = make_tools(Path(name), sources=how.sources)
        if how.awake:
            stack.enter_context(machine.awake(tools, cpus))
        yield Bench(tools, cpus, how.seconds)


def warm_up(bench: Bench, way: Way) -> None:
    """Tunnels stand, buffers have grown.

    Raises:
        BenchError: nothing comes through, or it comes through without a tunnel.
    """
    use(bench, way)
    must_be_tunnelled(way)


def use(bench: Bench, way: Way) -> None:
    """A little of each kind, between both pairs of pods.

    Raises:
        BenchError: nothing comes through.
    """
    for client, server in dict.fromkeys(((way.client, way.server), way.neighbour)):
        for what, words in (("ping", (4, 100)), ("up", (2,)), ("down", (2,))):
            bench.load(client, what, server, *words, _WARM_UP_SECONDS)


def must_be_tunnelled(way: Way) -> None:
    """Asked after a load.

    Raises:
        BenchError: it went some other way.
    """
    if not way.has_tunnel():
        raise BenchError(f"{way.name}: the load did not go through a tunnel")


def _bulk(what: str, connections: int) -> Callable[[Bench, Way], Values]:
    return lambda bench, way: bench.load(way.client, what, way.server, connections, bench.seconds)


def _ping(bench: Bench, way: Way) -> Values:
    return bench.load(way.client, "ping", way.server, 1, 1, bench.seconds)


def _ping_at_once(bench: Bench, way: Way) -> Values:
    """A ping whose ends never wait for the CPU, so that what it waits for is the network and the proxies."""
    words = [*bench.tools.at_once, bench.tools.load, "ping", way.server.v4, str(AT_ONCE), "1", "1", str(bench.seconds)]
    values: dict[str, float] = json.loads(output(bench.command(way.client, words), bench.seconds))
    return values


def short(parallel: int) -> Callable[[Bench, Way], Values]:
    """New connections: connect, 64 bytes there and back, close; so many at a time."""
    return lambda bench, way: bench.load(way.client, "short", way.server, parallel, 64, bench.seconds)


def _requests(connections: int) -> Callable[[Bench, Way], Values]:
    def run(bench: Bench, way: Way) -> Values:
        seconds = max(1, round(bench.seconds))  # wrk knows whole seconds only
        words = [bench.tools.wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", f"http://{way.server.v4}:{WEB}/"]
        try:
            return wrk.parse(output(bench.command(way.client, words), seconds))
        except wrk.UnreadableError as error:
            raise BenchError(f"wrk: {error}") from error

    return run


def _beside_bulk(bench: Bench, way: Way) -> Values:
    client, server = way.neighbour
    # The generator and its server give way, or they and not the proxies would be what the ping waits for: see the direct way's figure.
    words = [*GIVE_WAY, bench.tools.load, "up", server.v4, str(YIELDING), "1", str(bench.seconds + 2 * _HEAD_START_SECONDS)]
    with subprocess.Popen(bench.command(client, words), stdout=subprocess.PIPE, text=True) as bulk:
        time.sleep(_HEAD_START_SECONDS)
        values = dict(_ping_at_once(bench, way))
        output, _ = bulk.communicate(timeout=bench.seconds + _GRACE_SECONDS)
    if not output:
        raise BenchError("the neighbour's bulk transfer failed")
    moved = json.loads(output)
    return {
        **values,
        "errors": values["errors"] + moved["errors"],
        "neighbour_bytes": moved["bytes"],
        "neighbour_seconds": moved["seconds"],
    }


def _beside_config(bench: Bench, way: Way) -> Values:
    """A ping while the manifests change. Changes that were not made, or that the agents have not taken over, are errors: a daemon that
    had nothing to do says nothing."""
    if way.configure is None or way.holds is None:
        return {}
    with _changing(way.configure, at_once=bool(bench.tools.at_once)) as made:
        time.sleep(_HEAD_START_SECONDS)
        while made[0] < elsewhere.CHANGING_FILES:
            time.sleep(1 / elsewhere.CHANGES_PER_SECOND)
        began, at = time.monotonic(), made[0]
        values = _ping_at_once(bench, way)
        changes, seconds = made[0] - at, time.monotonic() - began
        held = way.holds("workloads")
    wanted = round(_MOST_OF * elsewhere.CHANGES_PER_SECOND * seconds)
    missed = max(0, wanted - changes) + max(0, elsewhere.CHANGING_FILES * elsewhere.OBJECTS_PER_CHANGE - held)
    return {
        **values,
        "errors": values["errors"] + missed,
        "config_events": changes * elsewhere.OBJECTS_PER_CHANGE,
        "config_seconds": seconds,
    }


@contextmanager
def _changing(configure: Callable[[str, str], None], *, at_once: bool) -> Iterator[list[int]]:
    """Changes pods on some other node until the block ends; the list holds the number of changes that were made.

    `at_once`: not for want of a CPU that the load and the proxies take would fewer changes be made.
    """
    made, stop = [0], threading.Event()
    changes = [elsewhere.change(turn) for turn in range(2 * elsewhere.CHANGING_FILES)]  # as many as there are: they begin again then

    def run() -> None:
        if at_once:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # of this thread
        due = time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            configure(*changes[made[0] % len(changes)])
            made[0] += 1
            due += 1 / elsewhere.CHANGES_PER_SECOND

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield made
    finally:
        stop.set()
        thread.join()
        for each in range(elsewhere.CHANGING_FILES):
            configure(elsewhere.change(each)[0], "")


class Held:
    """Idle connections, from the moment when the first is dialled."""

    def __init__(self, holder: subprocess.Popen[str], count: int) -> None:
        self._holder = holder
        self._count = count

    def await_all(self) -> None:
        """Returns when each of them has carried its first byte there and back.

        Raises:
            BenchError: one of them could not be opened.
        """
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != "ready\n":
            raise BenchError(f"{self._count} idle connections could not be opened")

    def release(self) -> int:
        """Asks for one more byte of each and lets them go; returns how many did not answer.

        Raises:
            BenchError: nobody knows.
        """
        try:
            output, _ = self._holder.communicate(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BenchError("the holder of idle connections did not end") from error
        if not output:
            raise BenchError(f"the holder of {self._count} idle connections has ended: {self._holder.returncode}")
        return int(json.loads(output)["errors"])


@contextmanager
def holding(bench: Bench, client: Pod, server: Pod, count: int) -> Iterator[Held]:
    """Begins to open `count` connections between two pods; they are gone after the block."""
    command = bench.command(client, [bench.tools.load, "idle", server.v4, str(APP), str(count)])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            yield Held(holder, count)
        finally:
            holder.kill()


def _idle(bench: Bench, way: Way) -> Values:
    """Memory of the larger data plane, and how much it grows by a thousand idle connections."""
    if way.proxies is None:
        return {}
    before = [processes.resident_bytes(pid) for pid in way.proxies.data_planes]
    with holding(bench, way.client, way.server, IDLE_CONNECTIONS) as held:
        held.await_all()
        after = [processes.resident_bytes(pid) for pid in way.proxies.data_planes]
        if held.release():
            raise BenchError(f"{way.name}: not all of {IDLE_CONNECTIONS} idle connections stayed open")
    grown = [late - early for early, late in zip(before, after, strict=True)]
    return {"resident_bytes": max(before), "grown_bytes": max(grown)}


ONCE: Mapping[str, Callable[[Bench, Way], Values]] = {"idle": _idle}
"""Measured once, before the rounds: memory that was used before would not grow again."""

EVERY_ROUND: Mapping[str, Callable[[Bench, Way], Values]] = {
    "up-1": _bulk("up", 1),
    "down-1": _bulk("down", 1),
    "up-8": _bulk("up", 8),
    "down-8": _bulk("down", 8),
    "ping": _ping,
    "ping-at-once": _ping_at_once,
    "ping-beside-bulk": _beside_bulk,
    "ping-beside-config": _beside_config,
    "requests-32": _requests(32),
    "requests-256": _requests(256),
    "short-1": short(1),
    "short-16": short(16),
}


def run(scenario: Callable[[Bench, Way], Values], bench: Bench, way: Way) -> Values:
    """The scenario's values and the CPU seconds that both proxies took; empty if the way has no such figure."""
    pids = processes.tree(way.proxies.roots) if way.proxies else []
    before = processes.cpu_seconds(pids)
    try:
        values = scenario(bench, way)
    except BenchError as error:
        raise BenchError(f"{way.name}: {error}") from error
    if not values or way.proxies is None:
        return values
    return {**values, "cpu_seconds": processes.cpu_seconds(pids) - before}
