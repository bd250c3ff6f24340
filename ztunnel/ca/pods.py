"""Which pods run where: what `issuance` asks, kept current by a watch. Pure.

Indexed by node and service account, so that an answer costs a look-up whatever the cluster's size: 5,000 pods are about 2 MB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class PodPlace(NamedTuple):
    """One pod that has not ended."""

    namespace: str
    name: str
    uid: str
    node: str
    """Empty before it is scheduled."""
    service_account: str
    """Empty if it has none."""


class PodTable:
    """The pods of a cluster. Satisfies `issuance.Pods`."""

    def __init__(self) -> None:
        self.synced = False
        self._pods: dict[tuple[str, str], PodPlace] = {}
        self._accounts: Counter[tuple[str, str, str]] = Counter()

    def __len__(self) -> int:
        return len(self._pods)

    def replace(self, pods: Iterable[PodPlace]) -> None:
        """These are all; from now on they are known."""
        self._pods = {(pod.namespace, pod.name): pod for pod in pods}
        self._accounts = Counter(_account(pod) for pod in self._pods.values() if pod.node)
        self.synced = True

    def put(self, pod: PodPlace) -> None:
        """A pod that is new, or has changed."""
        self.remove(pod.namespace, pod.name)
        self._pods[pod.namespace, pod.name] = pod
        if pod.node:
            self._accounts[_account(pod)] += 1

    def remove(self, namespace: str, name: str) -> None:
        """A pod that is gone, or has ended."""
        former = self._pods.pop((namespace, name), None)
        if former is None or not former.node:
            return
        key = _account(former)
        self._accounts[key] -= 1
        if not self._accounts[key]:
            del self._accounts[key]

    def node_of(self, namespace: str, name: str, uid: str) -> str | None:
        """See `issuance.Pods`."""
        pod = self._pods.get((namespace, name))
        return pod.node if pod is not None and pod.uid == uid and pod.node else None

    def runs_on(self, node: str, namespace: str, service_account: str) -> bool:
        """See `issuance.Pods`."""
        return bool(service_account) and (node, namespace, service_account) in self._accounts


def _account(pod: PodPlace) -> tuple[str, str, str]:
    return pod.node, pod.namespace, pod.service_account
