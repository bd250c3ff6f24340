"""`ztunnel`: the group, and where each command lives. Commands are imported when they are asked for; their one-line help is here, so
that `ztunnel --help` imports none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import IO, NamedTuple

import click

from ztunnel.mesh.errors import ConfigError, MeshError, leaves


class Lazy(NamedTuple):
    """Where a command is and what the list of commands says of it."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "status": Lazy("ztunnel.cli.show", "status", "The agent in one look: pods, certificates, problems."),
    "connections": Lazy("ztunnel.cli.show", "connections", "Live connections of this node's pods."),
    "tunnels": Lazy("ztunnel.cli.show", "tunnels", "Live HBONE tunnels to and from other nodes."),
    "workloads": Lazy("ztunnel.cli.show", "workloads", "Workloads of the mesh, as this agent knows them."),
    "services": Lazy("ztunnel.cli.show", "services", "Services of the mesh and their endpoints."),
    "policies": Lazy("ztunnel.cli.show", "policies", "Authorization policies in force."),
    "certificates": Lazy("ztunnel.cli.show", "certificates", "Certificates of this node's identities."),
    "log-level": Lazy("ztunnel.cli.show", "log_level", "Show or change what a running agent logs."),
    "join": Lazy("ztunnel.cli.join", "join", "Bring a namespace into the mesh; --plan says first what happens."),
    "leave": Lazy("ztunnel.cli.join", "leave", "Take a namespace out of the mesh."),
    "waypoint": Lazy("ztunnel.cli.waypoint", "waypoint", "L7 proxies: apply, generate, status, list, delete."),
    "lab": Lazy("ztunnel.cli.lab", "lab", "A cluster in network namespaces, without Kubernetes."),
    "run": Lazy("ztunnel.cli.run", "run", "Run the node agent."),
    "ca": Lazy("ztunnel.cli.ca", "ca", "Run the certificate authority of a cluster."),
    "controller": Lazy("ztunnel.cli.controller", "controller", "Run the controller of a cluster: Gateways and statuses."),
    "completion": Lazy("ztunnel.cli.completion", "completion", "Shell completion for bash, zsh and fish."),
    "version": Lazy("ztunnel.cli.completion", "version", "Which version this is."),
}


class Failure(click.ClickException):
    """Errors of ours, as sentences on stderr instead of a traceback; exit code 1."""

    def __init__(self, sentences: list[str]) -> None:
        super().__init__("\n".join(sentences))
        self.sentences = sentences

    def show(self, file: IO[str] | None = None) -> None:
        """Print one line for each."""
        for sentence in self.sentences:
            click.echo(f"Error: {sentence}", file=file, err=file is None)


class WrongSettings(Failure):
    """Settings that cannot be used; exit code 2, as for any other usage error."""

    exit_code = 2


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports them when needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of COMMANDS: what one looks at first, first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported."""
        lazy = COMMANDS.get(cmd_name)
        if lazy is None:
            return None
        command: object = getattr(import_module(lazy.module), lazy.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, lazy.summary) for name, lazy in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a suggestion: click itself would look for one among commands that are imported."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches  # only for a mistake

            close = get_close_matches(name, COMMANDS, n=1)
            ctx.fail(f"No such command '{name}'.{f' Did you mean {close[0]!r}?' if close else ''}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """As click's, with the errors that this program raises on purpose turned into sentences."""
        try:
            result: object = super().invoke(ctx)
        except ConfigError as error:
            raise WrongSettings(error.problems) from error
        except MeshError as error:
            raise Failure([str(error)]) from error
        except BaseExceptionGroup as group:
            # What a daemon's tasks raise arrives in groups; a group with a bug in it keeps its traceback.
            ours, others = group.split(MeshError)
            if ours is None or others is not None:
                raise
            errors = list(leaves(ours))
            failure = WrongSettings if all(isinstance(error, ConfigError) for error in errors) else Failure
            raise failure([str(error) for error in errors]) from group
        return result


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main() -> None:
    """An ambient-mode service mesh: a proxy per node, HBONE tunnels between nodes, identities for workloads.

    \b
    Examples:
      ztunnel lab up -f deploy/samples        a two-node cluster on this machine
      ztunnel status                          is everything in the mesh that should be?
      ztunnel connections -n shop -o wide     who talks to whom, with which identity
      ztunnel run --config agent.yaml         the daemon itself

    \b
    Exit codes: 0 ok, 1 problem found, 2 usage, 3 cannot reach the daemon.
    """
