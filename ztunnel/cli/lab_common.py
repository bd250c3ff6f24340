"""What every `ztunnel lab` command shares: options in kubectl's spelling, refusals as one line on standard error, the lab's client."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ztunnel.lab.paths import DEFAULT_LAB

if TYPE_CHECKING:
    from ztunnel.lab.client import Client

NO_LAB = 3
"""Exit code when nobody answers, as for a daemon."""

Command = TypeVar("Command", bound=Callable[..., Any])


class LabCommand(click.Command):
    """A command that shows an error as kubectl does: one line, exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        from ztunnel.lab.client import NoLab
        from ztunnel.mesh.errors import LocalError

        # A reader that went away (`| head`) ends us silently, as it ends any other command.
        before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        try:
            return super().invoke(ctx)
        except LocalError as error:
            words = str(error)
            click.echo(words if words.startswith(("error: ", "Error ")) else f"error: {words}", err=True)
            ctx.exit(NO_LAB if isinstance(error, NoLab) else 1)
        except KeyboardInterrupt:
            ctx.exit(130)
        finally:
            # Whoever runs commands inside of a program of its own (tests do) has sockets that may break.
            signal.signal(signal.SIGPIPE, before)


def name_option(command: Command) -> Command:
    """`--name`: which lab."""
    option = click.option(
        "--name",
        "lab_name",
        envvar="ZTUNNEL_LAB",
        default=DEFAULT_LAB,
        show_default=True,
        show_envvar=True,
        metavar="LAB",
        help="Which lab.",
    )
    return option(command)


def namespace_option(command: Command) -> Command:
    """`-n`: which namespace."""
    return click.option("-n", "--namespace", default="default", show_default=True, metavar="NS", help="Namespace of the object.")(command)


def files_option(command: Command) -> Command:
    """`-f`: manifests."""
    text = "File or directory of manifests, or - for standard input; may be repeated."
    return click.option("-f", "--filename", "files", multiple=True, required=True, metavar="FILE_OR_DIR", help=text)(command)


def client_of(lab_name: str) -> Client:
    """The client of a lab."""
    from ztunnel.lab.client import Client
    from ztunnel.lab.lifecycle import state_of

    return Client(state_of(lab_name))


def kind_and_name(words: tuple[str, ...]) -> tuple[str, str]:
    """KIND NAME or KIND/NAME.

    Raises:
        click.UsageError: neither.
        LabError: no such kind.
    """
    from ztunnel.lab.objects import kind_named

    parts = words[0].split("/", 1) if len(words) == 1 else list(words)
    if len(parts) != 2 or not all(parts):
        raise click.UsageError("give KIND NAME or KIND/NAME, for example: pod web, or deploy/web")
    return kind_named(parts[0]).kind, parts[1]
