"""`ztunnel join` and `ztunnel leave`: what `kubectl label` does, and first what it will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ztunnel.cli.clusters import in_cluster
from ztunnel.cli.lab_common import LabCommand

if TYPE_CHECKING:
    from collections.abc import Callable

    from ztunnel.cli.clusters import Cluster
    from ztunnel.mesh.joining import Plan


def _options(command: Callable[..., None]) -> Callable[..., None]:
    options = (
        click.argument("namespace"),
        click.option("--plan", "only_plan", is_flag=True, help="Say what will happen, to live connections too, and change nothing."),
        click.option("--root-namespace", default="istio-system", show_default=True, metavar="NS", help="Where policies are the mesh's."),
        in_cluster,
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command(cls=LabCommand)
@_options
def join(namespace: str, only_plan: bool, root_namespace: str, cluster: Cluster) -> None:
    """Bring the pods of a namespace into the mesh: the label istio.io/dataplane-mode=ambient, which kubectl sets as well.

    No pod is restarted. --plan says first which pods are captured, what happens to the connections that they have, and which policies come
    into force.

    \b
    Examples:
      ztunnel join shop --plan
      ztunnel join shop
      ztunnel join shop --kubeconfig ~/.kube/config
    """
    _run(namespace, only_plan, root_namespace, cluster, joins=True)


@click.command(cls=LabCommand)
@_options
def leave(namespace: str, only_plan: bool, root_namespace: str, cluster: Cluster) -> None:
    """Take the pods of a namespace out of the mesh: without the label istio.io/dataplane-mode. Pods with a label of their own keep to it.

    \b
    Examples:
      ztunnel leave shop --plan
      ztunnel leave shop
    """
    _run(namespace, only_plan, root_namespace, cluster, joins=False)


def _run(namespace: str, only_plan: bool, root_namespace: str, cluster: Cluster, *, joins: bool) -> None:
    from ztunnel.mesh.enrolment import MODE_LABEL

    cluster.get("Namespace", "", namespace)
    _show(_plan(namespace, root_namespace, cluster, joins=joins))
    label = f"{MODE_LABEL}=ambient" if joins else f"{MODE_LABEL}-"
    if only_plan:
        click.echo(f"\nNothing was changed. The same without --plan does it, or: kubectl label namespace {namespace} {label}")
        return
    cluster.label("Namespace", "", namespace, {MODE_LABEL: "ambient" if joins else None})
    click.echo(f"\nnamespace {namespace} {'labeled' if joins else 'unlabeled'}: {MODE_LABEL}{'=ambient' if joins else ''}")


def _plan(namespace: str, root_namespace: str, cluster: Cluster, *, joins: bool) -> Plan:
    from ztunnel.lab.objects import LabError
    from ztunnel.mesh.derive import MeshOptions
    from ztunnel.mesh.errors import ManifestError
    from ztunnel.mesh.joining import plan
    from ztunnel.mesh.manifests.parse import Ignored, key, parse
    from ztunnel.mesh.manifests.tree import Tree

    bodies: list[Tree] = []
    for kind in ("Namespace", "Gateway", "ServiceAccount", "AuthorizationPolicy", "PeerAuthentication"):
        bodies += cluster.get(kind, "")
    for kind in ("Pod", "Service"):
        bodies += cluster.get(kind, namespace)
    objects = {}
    for body in bodies:
        try:
            item = parse(body, "the cluster")
        except ManifestError as error:
            raise LabError("", f"cannot plan with an object that is not in force as written: {error}") from error
        if not isinstance(item, Ignored):
            objects[key(item)] = item
    return plan(objects, namespace, joins, MeshOptions(root_namespace=root_namespace))


def _show(found: Plan) -> None:
    from ztunnel.lab.printers import aligned

    what = "joins" if found.joins else "leaves"
    click.echo(f"namespace {found.namespace} {what} the mesh: {found.changed} of {len(found.pods)} pods change")
    rows = [[pod.name, pod.node, pod.becomes or "-", pod.connections, pod.reason] for pod in found.pods]
    if rows:
        click.echo(aligned([["POD", "NODE", "BECOMES", "ITS LIVE CONNECTIONS", "WHY"], *rows]))
    for warning in found.warnings:
        click.echo(f"Note: {warning}.")
