"""Load for an echoing TCP port: connections, each of some rounds of send, receive and compare, then half-close and wait for the end.

Stand-alone, standard library only, so that it also runs inside of a pod: `python -I -S loadgen.py ADDRESS PORT --connections 20000`.
One thread, one selector; nothing is unbounded: connections, parallelism, rounds, bytes and the whole run's seconds are arguments.
Prints one JSON object, the `Result`. Short connections are one round; long ones are many rounds with an interval.
"""

import argparse
import errno
import json
import selectors
import socket
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field, fields

CHUNK = 65536


@dataclass(frozen=True)
class Load:
    """What to do. Seconds for times, bytes for sizes."""

    address: str
    port: int
    connections: int = 1
    parallel: int = 50
    rounds: int = 1
    interval: float = 0.0
    size: int = 64
    patience: float = 10.0
    """How long one connection may make no progress, pauses between rounds apart."""
    within: float = 300.0
    """How long the whole run may take; what is not finished then counts as `unfinished`."""


@dataclass
class Result:
    """What happened. `failures` counts by kind: refused, reset, timeout, wrong bytes, early end, unfinished, or the errno's name."""

    ok: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    round_ms: dict[str, float] = field(default_factory=dict)
    """Percentiles p50, p99 and p100 of a round; the first round of a connection includes connecting."""

    def as_json(self) -> str:
        """One object. (`asdict` of Python 3.11 makes nonsense of a Counter.)"""
        return json.dumps({each.name: getattr(self, each.name) for each in fields(self)})


class Client:
    """One connection. `step` does what can be done now; it is over once `outcome` is set."""

    def __init__(self, load: Load, number: int, now: float) -> None:
        family = socket.AF_INET6 if ":" in load.address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.setblocking(False)
        self.message = (f"{number}:".encode() * (load.size // 2 + 1))[: load.size]
        self.load = load
        self.outcome: str | None = None
        self.rounds_left = load.rounds
        self.progress = self.began = now
        self.pause_until = 0.0
        self.unsent = memoryview(self.message)
        self.received = bytearray()
        code = self.socket.connect_ex((load.address, load.port))
        if code not in (0, errno.EINPROGRESS):
            self.outcome = kind_of(code)

    @property
    def wants(self) -> int:
        """Selector events to wait for; 0 during a pause."""
        if self.pause_until:
            return 0
        return selectors.EVENT_READ | (selectors.EVENT_WRITE if self.unsent else 0)

    def step(self, now: float) -> float | None:
        """Send and receive once; the seconds that a round took if one just ended."""
        try:
            if self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
                self.progress = now
            data = self.socket.recv(CHUNK)
            self.progress = now
            if not data:
                self.outcome = "ok" if self.rounds_left == 0 else "early end"
                return None
            self.received += data
            return self._compare(now)
        except BlockingIOError:
            return None
        except OSError as error:
            # ENOTCONN comes of the half-close: the reset arrived behind the last byte.
            self.outcome = "reset" if error.errno == errno.ENOTCONN else kind_of(error.errno or 0)
            return None

    def _compare(self, now: float) -> float | None:
        if self.rounds_left == 0 or not self.message.startswith(self.received):
            self.outcome = "wrong bytes"
        elif len(self.received) == len(self.message):
            took, self.rounds_left = now - self.began, self.rounds_left - 1
            self.received.clear()
            if self.rounds_left == 0:
                self.socket.shutdown(socket.SHUT_WR)
            else:
                self.pause_until = now + self.load.interval
            return took
        return None

    def resume(self, now: float) -> None:
        """Begin the next round."""
        self.pause_until, self.began, self.progress = 0.0, now, now
        self.unsent = memoryview(self.message)


def kind_of(code: int) -> str:
    """A failure's name."""
    known = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.EPIPE: "reset", errno.ETIMEDOUT: "timeout"}
    return known.get(code) or errno.errorcode.get(code, str(code))


class Run:
    """All connections of one load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.result = Result()
        self.selector = selectors.DefaultSelector()
        self.clients: dict[Client, int] = {}  # to the events that the selector waits for
        self.paused: deque[Client] = deque()  # in the order of `pause_until`: the interval is one for all
        self.times: list[float] = []
        self.started = 0

    def go(self) -> Result:
        """Run to the end."""
        began = time.monotonic()
        while (self.clients or self.started < self.load.connections) and time.monotonic() < began + self.load.within:
            now = time.monotonic()
            self._start(now)
            self._resume(now)
            for key, _ in self.selector.select(0.02 if self.paused else 0.2):
                client: Client = key.data
                took = client.step(time.monotonic())
                if took is not None:
                    self.times.append(took)
                self._settle(client)
            self._expire(time.monotonic())
        self.result.failures["unfinished"] += len(self.clients) + self.load.connections - self.started
        for client in list(self.clients):
            self._forget(client)
        self.result.failures += Counter()  # without the zeros
        self.result.seconds = time.monotonic() - began
        self.result.round_ms = percentiles(self.times)
        return self.result

    def _start(self, now: float) -> None:
        while self.started < self.load.connections and len(self.clients) < self.load.parallel:
            client = Client(self.load, self.started, now)
            self.started += 1
            self.clients[client] = 0
            self._settle(client)

    def _resume(self, now: float) -> None:
        while self.paused and self.paused[0].pause_until <= now:
            client = self.paused.popleft()
            if client in self.clients:
                client.resume(now)
                self._settle(client)

    def _settle(self, client: Client) -> None:
        if client.outcome is not None:
            if client.outcome == "ok":
                self.result.ok += 1
            else:
                self.result.failures[client.outcome] += 1
            self._forget(client)
            return
        wants, waited = client.wants, self.clients[client]
        if wants == waited:
            return
        self.clients[client] = wants
        if not waited:
            self.selector.register(client.socket, wants, client)
        elif wants:
            self.selector.modify(client.socket, wants, client)
        else:
            self.selector.unregister(client.socket)
            self.paused.append(client)

    def _expire(self, now: float) -> None:
        for client in [each for each in self.clients if not each.pause_until and now > each.progress + self.load.patience]:
            client.outcome = "timeout"
            self._settle(client)

    def _forget(self, client: Client) -> None:
        if self.clients.pop(client):
            self.selector.unregister(client.socket)
        client.socket.close()


def percentiles(times: list[float]) -> dict[str, float]:
    """In milliseconds."""
    ordered = sorted(times)
    return {f"p{part}": round(ordered[(len(ordered) - 1) * part // 100] * 1000, 2) for part in (50, 99, 100)} if ordered else {}


def parse(words: list[str]) -> Load:
    """The load that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    for name, default in (("connections", 1), ("parallel", 50), ("rounds", 1), ("size", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, seconds in (("interval", 0.0), ("patience", 10.0), ("within", 300.0)):
        parser.add_argument(f"--{name}", type=float, default=seconds)
    return Load(**vars(parser.parse_args(words)))


if __name__ == "__main__":
    sys.stdout.write(Run(parse(sys.argv[1:])).go().as_json() + "\n")
