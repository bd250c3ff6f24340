"""The command line of the L7 proxy."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TypeVar

import click

from ztunnel import __version__

_Command = TypeVar("_Command", bound=Callable[..., None])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="waypoint")
def main() -> None:
    """The L7 proxy of the mesh."""


def _settings_options(command: _Command) -> _Command:
    """What both kinds of proxy are started with."""
    options = (
        click.option(
            "--config",
            "file",
            type=click.Path(path_type=Path, dir_okay=False),
            help="YAML file with the settings; without it, the environment's.",
        ),
        click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Least severe line that is logged."),
        click.option("--check", is_flag=True, help="Report all problems of the settings and end; paths are not looked at."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@main.command()
@_settings_options
def run(file: Path | None, log_level: str | None, check: bool) -> None:
    """Run the L7 proxy of one Gateway until SIGTERM.

    Every setting of the file can be overridden by an environment variable: WAYPOINT_ and its name in capitals, with _ for a dot.

    \b
    Examples:
      waypoint run --config /etc/waypoint/waypoint.yaml
      WAYPOINT_ADMIN_METRICS_PORT=9100 waypoint run --config waypoint.yaml
      waypoint run --config waypoint.yaml --check

    \b
    A file needs at least:
      name: waypoint
      namespace: default
      sources:
        files: /etc/ztunnel/manifests
    """
    _start(file, check, {"log.level": log_level})


@main.command()
@_settings_options
def gateway(file: Path | None, log_level: str | None, check: bool) -> None:
    """Run an ingress gateway until SIGTERM: the same proxy for clients outside the mesh, on the ports of its Gateway's listeners.

    Settings are those of `waypoint run`, with `kind: gateway`.

    \b
    Examples:
      waypoint gateway --config /etc/waypoint/ingress.yaml
      WAYPOINT_NAME=ingress WAYPOINT_NAMESPACE=edge WAYPOINT_SOURCES_FILES=/etc/ztunnel/manifests waypoint gateway
    """
    _start(file, check, {"log.level": log_level, "kind": "gateway"})


def _start(file: Path | None, check: bool, given: dict[str, str | None]) -> None:
    from waypoint.settings import parse, variable
    from ztunnel.runtime.settings_file import read_settings

    with _sentences():
        environ = {**os.environ, **{variable(key): str(value) for key, value in given.items() if value is not None}}
        settings = parse({} if file is None else read_settings(file), environ)
        if check:
            click.echo(f"{file or 'settings'}: fine, for {settings.kind.value} {settings.namespace}/{settings.name}")
            return
        from waypoint.app import run as run_proxy

        sys.exit(run_proxy(settings))


@main.command()
@click.argument("target")
@click.option("--method", "-X", default="GET", show_default=True, help="The request's method.")
@click.option("--header", "-H", "headers", multiple=True, metavar="NAME:VALUE", help="A header of the request; may be given several times.")
@click.option("--from", "account", metavar="NAMESPACE/ACCOUNT", help="The client's service account; without it, it has no identity.")
@click.option("--address", default="", metavar="IP", help="The client's address.")
@click.option("--json", "as_json", is_flag=True, help="The answer as JSON.")
@click.option(
    "--socket",
    "path",
    type=click.Path(path_type=Path),
    default=Path("/run/waypoint/waypoint.sock"),
    show_default=True,
    envvar="WAYPOINT_ADMIN_SOCKET",
    show_envvar=True,
    help="The proxy's control socket.",
)
def explain(target: str, method: str, headers: tuple[str, ...], account: str | None, address: str, as_json: bool, path: Path) -> None:
    """Why a request would be allowed, denied or routed as it would be, asked of the running proxy.

    TARGET is a URL; its host is a service's address, host name or name, its port the service's port.

    \b
    Examples:
      waypoint explain http://reviews:9080/reviews/1 --from default/productpage
      waypoint explain http://10.96.0.10:80/admin -X DELETE -H "authorization: Bearer TOKEN"
      kubectl exec deploy/waypoint -- waypoint explain http://reviews:9080/
      ztunnel lab exec deploy/waypoint -- waypoint explain http://reviews:9080/
    """
    from waypoint.questions import QuestionError, ask, question_of, show

    with _sentences():
        try:
            answer = ask(path, question_of(target, method, headers, account or "", address))
        except QuestionError as error:
            _fail([str(error)], 1)
    click.echo(answer.decode().rstrip() if as_json else show(answer))


@contextmanager
def _sentences() -> Iterator[None]:
    """Errors that this program raises on purpose, as sentences on stderr: exit code 2 for settings, 1 for the others."""
    from ztunnel.mesh.errors import ConfigError, MeshError, leaves

    try:
        yield
    except ConfigError as error:
        _fail(error.problems, 2)
    except MeshError as error:
        _fail([str(error)], 1)
    except BaseExceptionGroup as group:
        # What tasks raise arrives in groups; a group with a bug in it keeps its traceback.
        ours, others = group.split(MeshError)
        if ours is None or others is not None:
            raise
        errors = list(leaves(ours))
        _fail([str(error) for error in errors], 2 if all(isinstance(error, ConfigError) for error in errors) else 1)


def _fail(sentences: list[str], code: int) -> NoReturn:
    for sentence in sentences:
        click.echo(f"Error: {sentence}", err=True)
    sys.exit(code)
