"""`ztunnel waypoint`: waypoints by name, with the flags and words of `istioctl waypoint`, in a lab or a Kubernetes cluster.

What is decided here is only the Gateway's manifest (`manifest`) and which lines are shown of what objects say of themselves.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from ztunnel.cli.clusters import in_cluster
from ztunnel.cli.lab_common import LabCommand

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ztunnel.cli.clusters import Cluster
    from ztunnel.mesh.manifests.tree import Tree

DEFAULT_NAME = "waypoint"
WAIT_SECONDS = 90.0
POLL_SECONDS = 0.1
TRAFFIC = ("service", "workload", "all", "none")
_TOLD = (
    ("Service", ("istio.io/WaypointBound",)),
    ("AuthorizationPolicy", ("WaypointAccepted",)),
    ("RequestAuthentication", ("WaypointAccepted",)),
)
"""Kinds that are told of waypoints in their status, and in which conditions."""
_ROUTES = ("HTTPRoute", "GRPCRoute", "TCPRoute", "TLSRoute")


def _namespace(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("-n", "--namespace", default="default", show_default=True, metavar="NS", help="Namespace of the waypoint.")(command)


def _describing(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say what a waypoint is."""
    options = (
        click.option("--name", default=DEFAULT_NAME, show_default=True, metavar="NAME", help="Name of the waypoint."),
        click.option("--for", "traffic", type=click.Choice(TRAFFIC), help="Which addressing it serves; by default services'."),
        click.option("-r", "--revision", default="", metavar="REV", help="Which control plane's it is (istio.io/rev)."),
        _namespace,
    )
    for option in reversed(options):
        command = option(command)
    return command


def manifest(name: str, namespace: str, traffic: str | None, revision: str) -> Tree:
    """The Gateway of a waypoint."""
    from ztunnel.mesh.waypoints import WAYPOINT_CLASS, WAYPOINT_FOR

    labels = {key: value for key, value in ((WAYPOINT_FOR, traffic), ("istio.io/rev", revision)) if value}
    metadata: Tree = {"name": name, "namespace": namespace, **({"labels": labels} if labels else {})}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata,
        "spec": {"gatewayClassName": WAYPOINT_CLASS, "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
    }


def _named(name: str) -> str:
    if name == "none":
        raise click.UsageError("a waypoint cannot be called none: that name opts out")
    return name


@click.group()
def waypoint() -> None:
    """Waypoints: L7 proxies in front of a namespace, a service or a service account.

    \b
    Examples:
      ztunnel waypoint apply -n shop --enroll-namespace --wait
      ztunnel waypoint apply -n shop --name cart-waypoint --for all --enroll-service-account cart
      ztunnel waypoint status -n shop
      ztunnel waypoint delete -n shop --all
    """


@waypoint.command(cls=LabCommand)
@_describing
def generate(name: str, traffic: str | None, revision: str, namespace: str) -> None:
    """Print the manifest that `apply` would apply.

    \b
    Examples:
      ztunnel waypoint generate -n shop --for all
    """
    import yaml

    body = manifest(_named(name), namespace, traffic, revision)
    click.echo(str(yaml.dump(body, Dumper=yaml.CSafeDumper, sort_keys=False, default_flow_style=False)), nl=False)


@waypoint.command(cls=LabCommand)
@_describing
@click.option("--enroll-namespace", is_flag=True, help="Label the namespace, so that all of its services use the waypoint.")
@click.option("--enroll-service", "services", multiple=True, metavar="NAME", help="Label this service; may be repeated.")
@click.option("--enroll-service-account", "accounts", multiple=True, metavar="NAME", help="Label this service account: its pods use it.")
@click.option("--overwrite", is_flag=True, help="Change labels that name another waypoint.")
@click.option("-w", "--wait", is_flag=True, help="Wait until the waypoint is programmed.")
@click.option("--waypoint-timeout", "seconds", type=float, default=WAIT_SECONDS, show_default=True, metavar="SECONDS", help="How long.")
@in_cluster
def apply(  # noqa: PLR0913 - click passes one argument per option
    *,
    name: str,
    traffic: str | None,
    revision: str,
    namespace: str,
    enroll_namespace: bool,
    services: tuple[str, ...],
    accounts: tuple[str, ...],
    overwrite: bool,
    wait: bool,
    seconds: float,
    cluster: Cluster,
) -> None:
    """Make or change a waypoint, and say who uses it.

    For a service account the waypoint has to serve workloads: --for workload (connections to its pods' own addresses) or --for all (those
    that address a service, too); all is what --enroll-service-account takes where --for is not given.

    \b
    Examples:
      ztunnel waypoint apply --enroll-namespace --wait
      ztunnel waypoint apply -n shop --name cart-waypoint --enroll-service-account cart
    """
    from ztunnel.lab.objects import LabError

    if accounts and traffic in ("service", "none"):
        raise click.UsageError(f"--enroll-service-account needs a waypoint for workloads, not --for {traffic}")
    body = manifest(_named(name), namespace, traffic or ("all" if accounts else None), revision)
    targets = [("Namespace", namespace)] if enroll_namespace else []
    targets += [*(("Service", each) for each in services), *(("ServiceAccount", each) for each in accounts)]
    _check_enrolment(cluster, targets, namespace, name, overwrite)
    _check_name(cluster, namespace, name)
    cluster.apply(body)
    click.echo(f"waypoint {namespace}/{name} applied")
    if wait and not _programmed(cluster, namespace, name, seconds):
        told = next((row[-1] for row in _conditions(cluster.get("Gateway", namespace, name)[0], "waypoint", ("Programmed",))), "")
        words = f"timed out while waiting for waypoint {namespace}/{name} to be programmed ({seconds:g} s)"
        raise LabError("", f"{words}: {told or 'no controller has said anything of it'}; nobody was enrolled")
    for kind, each in targets:
        _enrol(cluster, kind, each, namespace, name)


def _check_enrolment(cluster: Cluster, targets: Sequence[tuple[str, str]], namespace: str, name: str, overwrite: bool) -> None:
    """Before anything is changed.

    Raises:
        LabError: something is not there, or uses another waypoint.
    """
    from ztunnel.lab.objects import LabError, labels_of
    from ztunnel.mesh.waypoints import USE_WAYPOINT

    for kind, each in targets:
        (body,) = cluster.get(kind, namespace, each)
        before = labels_of(body).get(USE_WAYPOINT, name)
        if before != name and not overwrite:
            words = f'the label "{USE_WAYPOINT}" of {_words(kind)} {each} is {before} already; use --overwrite to change it'
            raise LabError("", words)


def _check_name(cluster: Cluster, namespace: str, name: str) -> None:
    """A waypoint that is new gets a Service of its name, which must not be an application's.

    Raises:
        LabError: it is.
    """
    from ztunnel.lab.objects import LabError, labels_of
    from ztunnel.mesh.manifests.tree import text
    from ztunnel.mesh.waypoints import GATEWAY_NAME

    if any(text(body, "metadata", "name") == name for body in cluster.get("Gateway", namespace)):
        return
    for body in cluster.get("Service", namespace):
        if text(body, "metadata", "name") == name and labels_of(body).get(GATEWAY_NAME) != name:
            raise LabError("", f"a waypoint's Service has its name, and service {namespace}/{name} is there already; use another --name")


def _enrol(cluster: Cluster, kind: str, target: str, namespace: str, name: str) -> None:
    from ztunnel.lab.objects import labels_of
    from ztunnel.mesh.enrolment import MODE_LABEL
    from ztunnel.mesh.waypoints import USE_WAYPOINT

    cluster.label(kind, namespace, target, {USE_WAYPOINT: name})
    click.echo(f'{_words(kind)} {target} labeled with "{USE_WAYPOINT}: {name}"')
    if kind == "Namespace" and labels_of(cluster.get(kind, namespace, target)[0]).get(MODE_LABEL) != "ambient":
        click.echo(f"Warning: namespace {target} is not in the mesh; consider the label {MODE_LABEL}=ambient", err=True)


def _words(kind: str) -> str:
    return {"ServiceAccount": "service account"}.get(kind, kind.lower())


def _programmed(cluster: Cluster, namespace: str, name: str, seconds: float) -> bool:
    from ztunnel.lab.printers import condition_status

    deadline = time.monotonic() + seconds
    while condition_status(cluster.get("Gateway", namespace, name)[0], "Programmed") != "True":
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


@waypoint.command("list", cls=LabCommand)
@click.option("-A", "--all-namespaces", "everywhere", is_flag=True, help="In every namespace.")
@_namespace
@in_cluster
def list_command(everywhere: bool, namespace: str, cluster: Cluster) -> None:
    """List waypoints.

    \b
    Examples:
      ztunnel waypoint list -A
    """
    from ztunnel.lab.objects import labels_of
    from ztunnel.lab.printers import aligned, condition_status
    from ztunnel.mesh.manifests.tree import text
    from ztunnel.mesh.waypoints import WAYPOINT_FOR

    found = _waypoints(cluster, "" if everywhere else namespace)
    if not found:
        click.echo("No waypoints found.")
        return
    front = ["NAMESPACE"] if everywhere else []
    rows = [[*front, "NAME", "REVISION", "TRAFFIC TYPE", "PROGRAMMED"]]
    for body in found:
        labels = labels_of(body)
        row = [text(body, "metadata", "name"), labels.get("istio.io/rev", "default"), labels.get(WAYPOINT_FOR, "service")]
        place = [text(body, "metadata", "namespace")] if everywhere else []
        rows.append([*place, *row, condition_status(body, "Programmed")])
    click.echo(aligned(rows))


@waypoint.command(cls=LabCommand)
@click.argument("name", default="")
@_namespace
@in_cluster
def status(name: str, namespace: str, cluster: Cluster) -> None:
    """Show what waypoints, and the services, routes and policies of the namespace, are told of themselves. Exit code 1 for a problem.

    \b
    Examples:
      ztunnel waypoint status -n shop
    """
    from ztunnel.lab.printers import aligned
    from ztunnel.mesh.manifests.tree import text

    found = [body for body in _waypoints(cluster, namespace) if name in ("", text(body, "metadata", "name"))]
    if name and not found:
        from ztunnel.lab.objects import LabError

        raise LabError("NotFound", f'waypoint "{namespace}/{name}" not found')
    if not found:
        click.echo("No waypoints found.")
    rows = [row for body in found for row in _conditions(body, "waypoint", ("Accepted", "Programmed"))]
    rows += _bound(cluster, namespace)
    if rows:
        click.echo(aligned([["KIND", "NAMESPACE", "NAME", "STATUS", "TYPE", "REASON", "MESSAGE"], *rows]))
    if any(row[3] != "True" for row in rows):
        raise SystemExit(1)


def _bound(cluster: Cluster, namespace: str) -> Iterator[list[str]]:
    from ztunnel.mesh.manifests.tree import branches

    for kind, types in _TOLD:
        for body in cluster.get(kind, namespace):
            yield from _conditions(body, kind, types)
    for kind in _ROUTES:
        for body in cluster.get(kind, namespace):
            for parent in branches(body, "status", "parents"):
                yield from _conditions({**body, "status": parent}, kind, ("Accepted", "ResolvedRefs", "ResolvedWaypoints"))


def _conditions(body: Tree, kind: str, types: Sequence[str]) -> Iterator[list[str]]:
    from ztunnel.mesh.manifests.tree import branches, text

    for each in branches(body, "status", "conditions"):
        if text(each, "type") in types:
            place = [kind, text(body, "metadata", "namespace"), text(body, "metadata", "name")]
            yield [*place, *(text(each, field) for field in ("status", "type", "reason", "message"))]


@waypoint.command(cls=LabCommand)
@click.argument("names", nargs=-1, metavar="[NAME...]")
@click.option("--all", "every", is_flag=True, help="Delete every waypoint of the namespace.")
@click.option("-r", "--revision", default="", metavar="REV", help="With --all: only those of this revision.")
@_namespace
@in_cluster
def delete(names: tuple[str, ...], every: bool, revision: str, namespace: str, cluster: Cluster) -> None:
    """Delete waypoints. Who names them in a label is refused from then on, until the label goes.

    \b
    Examples:
      ztunnel waypoint delete -n shop waypoint
      ztunnel waypoint delete -n shop --all
    """
    from ztunnel.lab.objects import LabError, labels_of
    from ztunnel.mesh.manifests.tree import text
    from ztunnel.mesh.waypoints import USE_WAYPOINT

    if every is bool(names):
        raise click.UsageError("give the names of waypoints, or --all")
    found = {text(body, "metadata", "name"): body for body in _waypoints(cluster, namespace)}
    missing = [name for name in names if name not in found]
    if missing:
        raise LabError("NotFound", ", ".join(f'waypoint "{namespace}/{name}" not found' for name in missing))
    chosen = names or [name for name, body in found.items() if revision in ("", labels_of(body).get("istio.io/rev"))]
    if not chosen:
        click.echo("No waypoints found.")
    for name in chosen:
        cluster.delete("Gateway", namespace, name)
        click.echo(f"waypoint {namespace}/{name} deleted")
    for kind, target, name in _left_behind(cluster, namespace, chosen):
        words = f"{_words(kind)} {target} still asks for {name}, and is refused until that label goes"
        place = "" if kind == "Namespace" else f" -n {namespace}"
        click.echo(f"Warning: {words}: kubectl label {kind.lower()} {target}{place} {USE_WAYPOINT}-", err=True)


def _left_behind(cluster: Cluster, namespace: str, names: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Kind and name of those in the namespace whose label names one of the waypoints, and which."""
    from ztunnel.lab.objects import labels_of
    from ztunnel.mesh.manifests.tree import text
    from ztunnel.mesh.waypoints import USE_WAYPOINT, USE_WAYPOINT_NAMESPACE

    bodies = [("Namespace", body) for body in cluster.get("Namespace", "", namespace)]
    bodies += [(kind, body) for kind in ("Service", "ServiceAccount") for body in cluster.get(kind, namespace)]
    for kind, body in bodies:
        labels = labels_of(body)
        if labels.get(USE_WAYPOINT) in names and labels.get(USE_WAYPOINT_NAMESPACE, namespace) == namespace:
            yield kind, text(body, "metadata", "name"), labels[USE_WAYPOINT]


def _waypoints(cluster: Cluster, namespace: str) -> list[Tree]:
    from ztunnel.mesh.manifests.tree import text
    from ztunnel.mesh.waypoints import WAYPOINT_CLASS

    return [body for body in cluster.get("Gateway", namespace) if text(body, "spec", "gatewayClassName") == WAYPOINT_CLASS]
