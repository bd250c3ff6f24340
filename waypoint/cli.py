"""The command line of the L7 proxy."""

from __future__ import annotations

import click

from ztunnel import __version__


@click.group()
@click.version_option(__version__, prog_name="waypoint")
def main() -> None:
    """The L7 proxy of the mesh."""
