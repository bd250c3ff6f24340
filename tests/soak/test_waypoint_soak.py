"""A bookstore behind a waypoint and an ingress gateway while all of it changes: every request is answered, and nothing grows.

Waypoints come, go and are replaced, routes and labels change, an application is rolled out; requests go on all the time, from inside the
mesh and from outside. What is compared at the end is the memory of those that live through it: the agents and the ingress gateway.
"""

from __future__ import annotations

import faulthandler
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit import labs
from tests.kit.labs import SAMPLES, Lab
from tests.kit.polling import eventually

BOOKINFO = SAMPLES / "bookinfo"
INSIDE, OUTSIDE = "http://productpage:9080/productpage", "http://bookinfo-gateway-istio.default/productpage"
WAYPOINT = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
"""
GROWTH_BYTES = 24 << 20
"""What a process may have grown since the warm-up: arenas, memos of routes and metric series fill in their own time."""
SETTLE_SECONDS = 120.0


@pytest.fixture(name="lab")
def fixture_lab() -> Iterator[Lab]:
    with labs.up([BOOKINFO / "bookinfo.yaml", BOOKINFO / "gateway.yaml"]) as found:
        found.label("namespace", "default", {"istio.io/dataplane-mode": "ambient"})
        found.apply(WAYPOINT)
        found.settle(SETTLE_SECONDS)
        found.scale("waypoint", 2)
        found.label("namespace", "default", {"istio.io/use-waypoint": "waypoint"})
        found.settle(SETTLE_SECONDS)
        yield found


def changes(lab: Lab) -> list[Callable[[], object]]:
    """One round of them, in order; each may begin once the one before has settled. After a round all is as before."""
    return [
        lambda: lab.scale("waypoint", 3),
        lambda: lab.apply(BOOKINFO / "reviews-90-10.yaml"),
        lambda: lab.client.call("restart", name="waypoint", namespace="default"),
        lambda: lab.label("service", "productpage", {"istio.io/ingress-use-waypoint": "true"}),
        lambda: lab.client.call("restart", name="reviews-v1", namespace="default"),
        lambda: lab.label("service", "details", {"istio.io/use-waypoint": "none"}),
        lambda: lab.scale("waypoint", 1),
        lambda: lab.delete("httproute", "reviews"),
        lambda: lab.label("service", "productpage", {"istio.io/ingress-use-waypoint": None}),
        lambda: lab.label("service", "details", {"istio.io/use-waypoint": None}),
        lambda: lab.scale("waypoint", 2),
    ]


class Asking:
    """Requests one after the other from a pod, until told to end."""

    def __init__(self, lab: Lab, pod: str, namespace: str, url: str) -> None:
        script = f"while :; do curl -s -o /dev/null --max-time 30 -w '%{{http_code}}\\n' {url}; done"
        self._process: subprocess.Popen[bytes] = lab.start(pod, "sh", "-c", script, namespace=namespace)
        self._counted: Counter[str] = Counter()
        self._reader = threading.Thread(target=self._count)
        self._reader.start()

    def _count(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._counted[line.decode().strip()] += 1

    def end(self) -> Counter[str]:
        """How often each status came."""
        self._process.terminate()
        self._reader.join(60)
        self._process.wait(60)
        return self._counted


def resident(lab: Lab, name: str) -> dict[int, int]:
    """Bytes of the lab's processes of which the environment or command line has this name, by process id."""
    found: dict[int, int] = {}
    for process in labs.processes_of(lab):
        place = Path("/proc", str(process.pid))
        try:
            if name.encode() in (place / "environ").read_bytes() + (place / "cmdline").read_bytes():
                line = next(line for line in (place / "status").read_text().splitlines() if line.startswith("VmRSS:"))
                found[process.pid] = int(line.split()[1]) << 10
        except (OSError, StopIteration):
            continue  # ended meanwhile
    return found


@pytest.mark.parametrize("seconds", [20, pytest.param(600, marks=pytest.mark.long)], ids=["short", "long"])
def test_every_request_is_answered_while_everything_changes(lab: Lab, seconds: int) -> None:
    # What all tests have is five minutes.
    faulthandler.dump_traceback_later(2 * seconds + 300, exit=True)
    asking = [Asking(lab, "curl", "default", INSIDE), Asking(lab, "browser", "outside", OUTSIDE)]
    began = time.monotonic()
    rounds = 0
    before: dict[int, int] = {}
    while rounds == 0 or time.monotonic() - began < seconds:
        for change in changes(lab):
            change()
            lab.settle(SETTLE_SECONDS)
        rounds += 1
        if not before:
            before = resident(lab, "WAYPOINT_NAME=bookinfo-gateway") | resident(lab, "agent.yaml")
    counted = [each.end() for each in asking]
    for statuses in counted:
        assert statuses.keys() == {"200"}, (rounds, counted, lab.everything_logged())
        assert statuses["200"] >= 10 * rounds
    after = resident(lab, "WAYPOINT_NAME=bookinfo-gateway") | resident(lab, "agent.yaml")
    assert before.keys() == after.keys(), "nobody of those that are to live through it has died"
    grown = {pid: after[pid] - before[pid] for pid in before}
    assert before
    assert max(grown.values()) < GROWTH_BYTES, grown
    eventually(lambda: lab.curl("curl", INSIDE).code == 0, within=30)
