"""Where commands find objects and change them: in a lab, or in a Kubernetes cluster. One seam, two implementations."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import click

from ztunnel.cli.lab_common import client_of
from ztunnel.lab.objects import KINDS, LabError
from ztunnel.lab.paths import DEFAULT_LAB
from ztunnel.mesh.manifests.tree import Tree, branches, text

if TYPE_CHECKING:
    from ztunnel.kube.client import KubeClient
    from ztunnel.kube.config import Access
    from ztunnel.kube.resources import Resource

MANAGER = "ztunnel-waypoint"
"""Who has made a field, to the API server."""


PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Seconds before a server that is busy is asked again."""
_Value = TypeVar("_Value")


class Cluster(Protocol):
    """The objects of one cluster. Each method raises LocalError, worded for the user."""

    def get(self, kind: str, namespace: str, name: str = "") -> list[Tree]:
        """Objects of a kind; namespace empty means all. A name that is not there is an error."""

    def apply(self, body: Tree) -> None:
        """Make or change an object."""

    def label(self, kind: str, namespace: str, name: str, changes: Mapping[str, str | None]) -> None:
        """Set labels, whatever they were; None takes one away."""

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object."""


class LabCluster:
    """A lab. Implements `Cluster`."""

    def __init__(self, name: str) -> None:
        self._client = client_of(name)

    def get(self, kind: str, namespace: str, name: str = "") -> list[Tree]:
        return branches({"items": self._client.call("get", kind=kind, namespace=namespace, name=name, selector="")}, "items")

    def apply(self, body: Tree) -> None:
        self._client.call("apply", objects=[{"source": "ztunnel waypoint", "body": body}])

    def label(self, kind: str, namespace: str, name: str, changes: Mapping[str, str | None]) -> None:
        self._client.call("label", kind=kind, name=name, namespace=namespace, changes=dict(changes), overwrite=True)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self._client.call("delete", keys=[{"kind": kind, "namespace": namespace, "name": name}])


class KubeCluster:
    """A Kubernetes cluster, asked anew for every step: a command has few. Implements `Cluster`.

    Kinds that the cluster does not serve have no objects.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    def get(self, kind: str, namespace: str, name: str = "") -> list[Tree]:
        from ztunnel.kube.errors import NotFound

        resource = _resource(kind)

        async def ask(client: KubeClient) -> list[Tree]:
            if name:
                try:
                    return [dict(await client.get(resource, name, namespace))]
                except NotFound as error:
                    raise LabError("NotFound", f'{KINDS[kind].resource} "{name}" not found') from error
            try:
                found = await client.list(resource, namespace)
            except NotFound:
                return []
            # The items of a list do not say what they are.
            return [{"apiVersion": resource.api_version, "kind": resource.kind, **each} for each in branches(dict(found), "items")]

        return self._run(ask)

    def apply(self, body: Tree) -> None:
        resource = _resource(text(body, "kind"))
        name, namespace = text(body, "metadata", "name"), text(body, "metadata", "namespace")
        self._run(lambda client: client.apply(resource, body, name, namespace, manager=MANAGER))

    def label(self, kind: str, namespace: str, name: str, changes: Mapping[str, str | None]) -> None:
        patch = {"metadata": {"labels": dict(changes)}}
        self._run(lambda client: client.patch(_resource(kind), patch, name, namespace))

    def delete(self, kind: str, namespace: str, name: str) -> None:
        self._run(lambda client: client.delete(_resource(kind), name, namespace))

    def _run(self, step: Callable[[KubeClient], Awaitable[_Value]]) -> _Value:
        import trio

        from ztunnel.kube.client import KubeClient
        from ztunnel.kube.errors import Overloaded

        async def run() -> _Value:
            async with KubeClient(self._access) as client:
                for pause in PAUSES:
                    try:
                        return await step(client)
                    except Overloaded as error:  # as for some seconds after a kind was made known
                        await trio.sleep(max(pause, min(error.retry_after or 0.0, PAUSES[-1])))
                return await step(client)

        return trio.run(run)


def _resource(kind: str) -> Resource:
    from ztunnel.kube.resources import Resource

    known = KINDS[kind]
    return Resource(known.group, known.versions[0], known.plural, known.kind, known.namespaced)


def cluster_of(lab: str, kubeconfig: Path | None, context: str) -> Cluster:
    """The cluster that the options of a command mean.

    Raises:
        BadConfig: a kubeconfig that cannot be used.
    """
    if kubeconfig is None and not context:
        return LabCluster(lab)
    from ztunnel.kube.config import load

    return KubeCluster(load(os.environ, kubeconfig, context))


def in_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say in which cluster; together they become the argument `cluster`."""

    @click.option("--lab", default=DEFAULT_LAB, show_default=True, envvar="ZTUNNEL_LAB", show_envvar=True, metavar="NAME", help="In a lab.")
    @click.option("--kubeconfig", type=click.Path(path_type=Path, dir_okay=False), help="In a Kubernetes cluster, by this file.")
    @click.option("--context", default="", metavar="NAME", help="In a Kubernetes cluster, by this context of the kubeconfig.")
    @wraps(command)
    def wrapped(*, lab: str, kubeconfig: Path | None, context: str, **options: object) -> None:
        command(cluster=cluster_of(lab, kubeconfig, context), **options)

    return wrapped
