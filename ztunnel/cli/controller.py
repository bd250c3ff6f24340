"""`ztunnel controller`: settings from a file and the environment, then the controller."""

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
def controller(file: Path | None, kubeconfig: Path | None, log_level: str | None, check: bool) -> None:
    """Run the controller of a cluster until SIGTERM: what istiod does for Gateways.

    A Gateway of class istio-waypoint or istio gets a ServiceAccount, a Deployment and a Service; Gateways, routes, policies and services
    are told in their status what became of them. Several replicas may run: one works, the others wait for its Lease. Every setting can be
    overridden by an environment variable: ZTUNNEL_CONTROLLER_ and its name in capitals, with _ for a dot.

    \b
    Examples:
      ztunnel controller                                         in a pod, with the defaults
      ztunnel controller --kubeconfig ~/.kube/config --log-level debug
      ZTUNNEL_CONTROLLER_GATEWAYS_IMAGE=registry.example/ztunnel:0.1 ztunnel controller --config controller.yaml
      ztunnel controller --config controller.yaml --check
    """
    from ztunnel.controller_settings import parse, variable
    from ztunnel.runtime.settings_file import read_settings

    given = {"kubernetes.kubeconfig": kubeconfig, "log.level": log_level}
    environ = {**os.environ, **{variable(key): str(value) for key, value in given.items() if value is not None}}
    settings = parse({} if file is None else read_settings(file), environ)
    if check:
        click.echo(f"{file or 'settings'}: fine, for trust domain {settings.trust_domain}")
        return
    from ztunnel.controller_app import run

    sys.exit(run(settings))
