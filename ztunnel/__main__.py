"""`python -m ztunnel` is the `ztunnel` command."""

from ztunnel.cli.main import main

main(prog_name="ztunnel")
