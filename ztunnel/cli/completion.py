"""`ztunnel completion` and `ztunnel version`: the two commands that ask nobody."""

from __future__ import annotations

import platform

import click
from click.shell_completion import get_completion_class

from ztunnel import __version__


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      source <(ztunnel completion bash)
      ztunnel completion zsh > "${fpath[1]}/_ztunnel"
      ztunnel completion fish > ~/.config/fish/completions/ztunnel.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "ztunnel", "_ZTUNNEL_COMPLETE").source())


@click.command()
def version() -> None:
    """Print the version of this program.

    \b
    Examples:
      ztunnel version
    """
    click.echo(f"ztunnel {__version__} (Python {platform.python_version()})")
