"""`ztunnel lab`: the group, and the commands that concern a lab as a whole. Others are in `lab_objects` and `lab_pods`."""

from __future__ import annotations

import importlib
import json
import time
from typing import TYPE_CHECKING, Any

import click

from ztunnel.cli.lab_common import LabCommand, client_of, name_option
from ztunnel.lab.paths import name_option_of

if TYPE_CHECKING:
    from ztunnel.lab.client import Client

AGENT_SECONDS = 30.0
"""An agent that starts is ready within a second or two, on a busy machine within ten."""
AGENT_POLL_SECONDS = 0.05

_ELSEWHERE = {
    **dict.fromkeys(("apply", "delete", "get", "describe", "label", "scale", "rollout"), "ztunnel.cli.lab_objects"),
    **dict.fromkeys(("exec", "logs"), "ztunnel.cli.lab_pods"),
}


class LabGroup(click.Group):
    """Finds commands in the modules that have them, and imports only the one that is asked for."""

    command_class = LabCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name."""
        return sorted({*super().list_commands(ctx), *_ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command."""
        if cmd_name in _ELSEWHERE:
            found = getattr(importlib.import_module(_ELSEWHERE[cmd_name]), f"{cmd_name}_command")
            assert isinstance(found, click.Command)
            return found
        return super().get_command(ctx, cmd_name)


@click.group(cls=LabGroup)
def lab() -> None:
    """A cluster in network namespaces, without Kubernetes or Docker.

    \b
    Examples:
      ztunnel lab up -f deploy/samples
      ztunnel lab get pods -A -o wide
      ztunnel lab exec client -n shop -- curl -s http://orders/
      ztunnel lab down
    """


@lab.command()
@click.option(
    "-f", "--filename", "files", multiple=True, metavar="FILE_OR_DIR", help="Manifests to run: files or directories; may be repeated."
)
@click.option("--nodes", type=click.IntRange(1, 64), default=2, show_default=True, help="How many nodes.")
@click.option(
    "--ip-family",
    type=click.Choice(["ipv4", "ipv6", "dual"]),
    default="ipv4",
    show_default=True,
    help="Addresses of nodes, pods and services.",
)
@click.option(
    "--image", "images", multiple=True, metavar="IMAGE=COMMAND", help="What containers of an image run; may be a pattern, may be repeated."
)
@click.option("--no-mesh", is_flag=True, help="Without node agents: the same cluster, plain connections.")
@click.option(
    "--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="How long pods and agents may take to become ready."
)
@click.option("-v", "--verbose", is_flag=True, help="Say how long each step took.")
@name_option
def up(files: tuple[str, ...], nodes: int, ip_family: str, images: tuple[str, ...], no_mesh: bool, **rest: Any) -> None:
    """Build a cluster and run manifests in it.

    Returns when every pod is Ready and every node agent works. Needs root or user namespaces; never touches the host's network.

    \b
    Examples:
      ztunnel lab up -f deploy/samples
      ztunnel lab up -f shop.yaml -f policies/ --nodes 3 --ip-family dual --name big
      ztunnel lab up -f db.yaml --image '*postgres*=python3 -m http.server 5432'
    """
    from ztunnel.lab import documents, lifecycle
    from ztunnel.mesh.errors import LocalError

    for image in images:
        if not image.partition("=")[0] or not image.partition("=")[2]:
            raise click.BadParameter(f"{image!r} is not IMAGE=COMMAND", param_hint="--image")
    lab_name, timeout = str(rest["lab_name"]), float(rest["timeout"])
    began = time.perf_counter()
    objects = documents.read(files) if files else []
    client = lifecycle.start(lab_name, lifecycle.Options(nodes, ip_family, images, not no_mesh))
    started = time.perf_counter()
    try:
        client.call("apply", objects=objects)
    except (LocalError, KeyboardInterrupt):
        lifecycle.stop(lab_name)
        raise
    try:
        missing = client.call("settle", timeout=timeout)
    except KeyboardInterrupt:
        suffix = name_option_of(lab_name)
        click.echo(
            f"interrupted: the lab stays up, ready or not; `ztunnel lab status{suffix}` and `ztunnel lab down{suffix}` go on from here",
            err=True,
        )
        raise
    if missing:
        _complain(lab_name, missing, timeout)
    _report(client.call("status"), lab_name, time.perf_counter() - began)
    if rest["verbose"]:
        click.echo(f"controller and nodes up after {started - began:.2f} s")
        _timings(client.call("status"))


def _report(status: object, lab_name: str, seconds: float) -> None:
    from ztunnel.mesh.manifests.tree import branches, integer, texts

    nodes = ", ".join(f"{node['name']} ({', '.join(texts(node, 'addresses'))})" for node in branches(status, "nodes"))
    agents = (
        f"{sum(agent['ready'] is True for agent in branches(status, 'agents'))} node agents" if branches(status, "agents") else "no mesh"
    )
    pods, ready = integer(status, "pods"), integer(status, "ready_pods")
    click.echo(
        f"lab {lab_name!r} is up after {seconds:.2f} s: {ready} of {pods} pods ready, {integer(status, 'services')} services, {agents}"
    )
    click.echo(f"nodes: {nodes}")
    click.echo(f"next: ztunnel lab get pods -A -o wide{name_option_of(lab_name)}")


def _timings(status: object) -> None:
    from ztunnel.mesh.manifests.tree import branch

    for step, seconds in branch(status, "timings").items():
        click.echo(f"  {step}: {seconds:.3f} s")


def _complain(lab_name: str, missing: object, timeout: float) -> None:
    from ztunnel.lab.lifecycle import log_tail, state_of, tail_of
    from ztunnel.lab.objects import LabError
    from ztunnel.mesh.manifests.tree import texts

    state, lines = state_of(lab_name), [f"not everything was ready within {timeout:g} s:"]
    for reason in texts({"missing": missing}, "missing"):
        lines.append(f"  {reason}")
        words = reason.split()
        if words[0] == "pod":
            lines += [f"    | {line}" for line in tail_of(state / "pods" / f"{words[1].replace('/', '_')}.log", 3)]
        elif words[0] == "agent":
            lines += [f"    | {line}" for line in tail_of(state / "nodes" / words[2] / "agent.log", 3)]
    lines += ["last lines of the lab's log:", log_tail(state)]
    suffix = name_option_of(lab_name)
    lines.append(
        f"the lab is left up for a look: ztunnel lab describe pod POD{suffix}, ztunnel lab logs POD|NODE{suffix}; "
        f"then ztunnel lab down{suffix}"
    )
    raise LabError("", "\n".join(lines))


@lab.command()
@click.option("--all", "every", is_flag=True, help="All labs of this user.")
@name_option
def down(every: bool, lab_name: str) -> None:
    """Take a lab down, or clean up after one that was killed.

    \b
    Examples:
      ztunnel lab down
      ztunnel lab down --name big
      ztunnel lab down --all
    """
    from ztunnel.lab import lifecycle

    names = [name for name, _ in lifecycle.names()] if every else [lab_name]
    for name in names:
        click.echo(f"lab {name!r} is down" if lifecycle.stop(name) else f"there is no lab named {name!r}")


@lab.command("list")
def list_command() -> None:
    """The labs of this user.

    \b
    Examples:
      ztunnel lab list
    """
    from ztunnel.lab import lifecycle
    from ztunnel.lab.printers import aligned

    rows = [[name, "up" if is_up else "dead (ztunnel lab down cleans up)"] for name, is_up in lifecycle.names()]
    click.echo(aligned([["NAME", "STATE"], *rows]) if rows else "no labs")


@lab.command()
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", help="Form of the answer.")
@name_option
def status(output: str, lab_name: str) -> None:
    """What a lab consists of, and what is not yet as it should be. Exit code 1 while anything is not.

    \b
    Examples:
      ztunnel lab status
      ztunnel lab status -o json
    """
    from ztunnel.lab.printers import aligned
    from ztunnel.mesh.manifests.tree import branches, integer, text, texts

    found = client_of(lab_name).call("status")
    if output == "json":
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(f"lab {lab_name!r}: controller process {integer(found, 'pid')}, state in {text(found, 'state')}")
        click.echo(f"{integer(found, 'ready_pods')} of {integer(found, 'pods')} pods ready, {integer(found, 'services')} services")
        agents = {text(agent, "node"): agent for agent in branches(found, "agents")}
        rows = [["NODE", "ADDRESSES", "AGENT", "PID", "STARTS"]]
        for node in branches(found, "nodes"):
            agent = agents.get(text(node, "name"))
            state = (
                "none" if agent is None else "ready" if agent["ready"] is True else "starting" if agent["running"] is True else "stopped"
            )
            rows.append(
                [
                    text(node, "name"),
                    ",".join(texts(node, "addresses")),
                    state,
                    str((agent or {}).get("pid") or "-"),
                    str((agent or {}).get("starts", "-")),
                ]
            )
        click.echo(aligned(rows))
        for reason in texts(found, "unsettled"):
            click.echo(reason)
    if texts(found, "unsettled"):
        raise SystemExit(1)


@lab.command()
@click.option("--timeout", type=float, default=60.0, show_default=True, metavar="SECONDS", help="How long to wait.")
@name_option
def settle(timeout: float, lab_name: str) -> None:
    """Wait until pods, rollouts, services, agents and capture are as the objects and labels ask for.

    \b
    Examples:
      ztunnel lab label ns outside istio.io/dataplane-mode=ambient && ztunnel lab settle
    """
    missing = client_of(lab_name).call("settle", timeout=timeout)
    if missing:
        _complain(lab_name, missing, timeout)


@lab.command()
@click.argument("action", type=click.Choice(["start", "stop", "kill"]))
@click.argument("node")
@name_option
def agent(action: str, node: str, lab_name: str) -> None:
    """Start, stop (SIGTERM) or kill (SIGKILL) a node's agent. A stopped or killed one stays so until it is started.

    `start` returns when the agent is ready: its pods' new connections are served again.

    \b
    Examples:
      ztunnel lab agent kill node-1
      ztunnel lab agent start node-1
    """
    client = client_of(lab_name)
    code = client.call("agent", action=action, node=node)
    if action == "start":
        _await_agent(client, lab_name, node)
    past = {"start": "started", "stop": "stopped", "kill": "killed"}[action]
    click.echo(f"agent of {node} {past}" + ("" if code is None else f" (exit code {code})"))


def _await_agent(client: Client, lab_name: str, node: str) -> None:
    """Wait until the agent is ready.

    Raises:
        LabError: it is not, in time.
    """
    from ztunnel.lab.objects import LabError
    from ztunnel.mesh.manifests.tree import branches, text

    deadline = time.monotonic() + AGENT_SECONDS
    while not any(agent["ready"] is True for agent in branches(client.call("status"), "agents") if text(agent, "node") == node):
        if time.monotonic() > deadline:
            raise LabError(
                "",
                f"the agent of {node} is not ready after {AGENT_SECONDS:g} s: ztunnel lab logs {node}{name_option_of(lab_name)} --tail 20",
            )
        time.sleep(AGENT_POLL_SECONDS)
