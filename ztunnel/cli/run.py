"""`ztunnel run`: settings from a file, the environment and the command line, then the daemon."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path, dir_okay=False), required=True, help="YAML file with the settings.")
@click.option("--node-name", help="This node, as in pods' spec.nodeName. Default: the setting `node`, else NODE_NAME.")
@click.option("--ca-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the embedded authority keeps its root.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least severe line that is logged.")
@click.option("--waypoint-fallback", type=click.Choice(["refuse", "l4"]), help="What becomes of connections whose waypoint is not ready.")
@click.option("--check", is_flag=True, help="Report all problems of the settings and end; paths are not looked at.")
def run(file: Path, node_name: str | None, ca_dir: Path | None, log_level: str | None, waypoint_fallback: str | None, check: bool) -> None:
    """Run the node agent until SIGTERM.

    Every setting of the file can be overridden by an environment variable: ZTUNNEL_ and its name in capitals, with _ for a dot.

    \b
    Examples:
      ztunnel run --config /etc/ztunnel/agent.yaml
      ztunnel run --config agent.yaml --ca-dir ./ca --log-level debug
      ZTUNNEL_ADMIN_METRICS_PORT=9100 ztunnel run --config agent.yaml
      ztunnel run --config agent.yaml --check

    \b
    A file needs at least:
      node: node-1
      sources:
        files: /etc/ztunnel/manifests

    \b
    In a Kubernetes cluster, with NODE_NAME set from spec.nodeName:
      sources:
        kubernetes: true
    """
    from ztunnel.runtime.settings_file import read_settings
    from ztunnel.settings import parse, variable

    given = {"node": node_name, "ca.directory": ca_dir, "log.level": log_level, "waypoint.fallback": waypoint_fallback}
    environ = {**os.environ, **{variable(key): str(value) for key, value in given.items() if value is not None}}
    config = read_settings(file)
    if "node" not in config and "NODE_NAME" in environ:
        # Not over the file's: others have a variable of that name, too.
        config["node"] = environ["NODE_NAME"]
    settings = parse(config, environ)
    if check:
        click.echo(f"{file}: fine, for node {settings.node}")
        return
    from ztunnel.app import run as run_agent

    sys.exit(run_agent(settings))
