"""`ztunnel ca`: settings from a file and the environment, then the authority."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


@click.command()
@click.option(
    "--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="YAML file with the settings; without it, defaults."
)
@click.option("--kubeconfig", type=click.Path(path_type=Path, dir_okay=False), help="Cluster to serve, when not started in a pod of it.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least severe line that is logged.")
@click.option("--check", is_flag=True, help="Report all problems of the settings and end; paths are not looked at.")
def ca(file: Path | None, kubeconfig: Path | None, log_level: str | None, check: bool) -> None:
    """Run a certificate authority that node agents ask in Istio's protocol, until SIGTERM.

    It signs for the service accounts of pods that run on the asking agent's own node, and for whoever asks for itself; the API server says
    whose a token is. Every setting can be overridden by an environment variable: ZTUNNEL_CA_SERVER_ and its name in capitals, with _ for a
    dot.

    \b
    Examples:
      ztunnel ca                                              in a pod, with the defaults
      ztunnel ca --config /etc/ztunnel/ca.yaml
      ztunnel ca --config ca.yaml --kubeconfig ~/.kube/config --log-level debug
      ztunnel ca --config ca.yaml --check

    \b
    A new root, announced at once and signing after root.spread_hours:
      kubectl -n ztunnel-system annotate secret ztunnel-ca --overwrite ztunnel.io/rotate="$(date)"
    """
    from ztunnel.ca_settings import parse, variable
    from ztunnel.runtime.settings_file import read_settings

    given = {"kubernetes.kubeconfig": kubeconfig, "log.level": log_level}
    environ = {**os.environ, **{variable(key): str(value) for key, value in given.items() if value is not None}}
    settings = parse({} if file is None else read_settings(file), environ)
    if check:
        click.echo(f"{file or 'settings'}: fine, for trust domain {settings.trust_domain}")
        return
    from ztunnel.ca_app import run

    sys.exit(run(settings))
