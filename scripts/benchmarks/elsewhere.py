"""Manifests of things that the load never touches: pods on other nodes, policies of others. PURE."""

from __future__ import annotations

import json
from collections.abc import Iterable

LABEL = "elsewhere"
"""Their `app`."""
Json = dict[str, object]
CHANGES_PER_SECOND, OBJECTS_PER_CHANGE, CHANGING_FILES = 20, 50, 5
"""A thousand changed objects a second."""


def listing(items: Iterable[Json]) -> str:
    """One file of many objects."""
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(items)})


def pod(number: int, ready: bool = True) -> Json:
    """A pod with a service account of its own; up to 62,500 of them have an address each."""
    name = f"elsewhere-{number}"
    address = f"10.200.{number // 250}.{number % 250 + 1}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": name, "labels": {"app": LABEL}},
        "spec": {"nodeName": "elsewhere", "serviceAccountName": name, "containers": [{"name": "app", "image": "app"}]},
        "status": {
            "phase": "Running",
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": str(ready)}],
        },
    }


def change(turn: int) -> tuple[str, str]:
    """The `turn`-th of many changes: the name of a file of pods and what it says from now on, other than before of each of them.

    The files take turns, because an agent reads a file once two of its looks have found the same: one that is different at each look is
    never read, and changes nothing.
    """
    at, ready = turn % CHANGING_FILES, turn // CHANGING_FILES % 2 == 0
    pods = range(at * OBJECTS_PER_CHANGE, (at + 1) * OBJECTS_PER_CHANGE)
    return f"changing-{at}.json", listing(pod(each, ready) for each in pods)


def policy(number: int, action: str, app: str) -> Json:
    """A policy of one service account that no pod of a benchmark has. By name they come before any that a way has of its own."""
    principal = f"cluster.local/ns/default/sa/nobody-{number}"
    return {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": f"a-{number:06}", "namespace": "default"},
        "spec": {
            "selector": {"matchLabels": {"app": app}},
            "action": action,
            "rules": [{"from": [{"source": {"principals": [principal]}}]}],
        },
    }
