"""The options that commands which ask agents share, and what they ask for: `Listing`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TypeVar

import click

from ztunnel.cli.client import Choice, Target, Unreachable, ask, targets
from ztunnel.cli.output import FORMATS, Kind, Row, items, merged

Answer = dict[str, object]
_Command = TypeVar("_Command", bound=Callable[..., None])


class Listing:
    """What the options of a listing ask for."""

    def __init__(self, choice: Choice, namespace: str | None, form: str, headers: bool) -> None:
        self.choice = choice
        self.namespace = namespace
        self.form = form
        self.headers = headers

    def fetch(self, resource: str) -> tuple[list[tuple[str, Answer]], list[Unreachable]]:
        """The answers of the agents that can be reached, with their nodes, and what went wrong with the others.

        Raises:
            Unreachable: none can be.
        """
        answers: list[tuple[str, Answer]] = []
        errors: list[Unreachable] = []
        found: Sequence[Target] = targets(self.choice, os.environ)
        for target in found:
            try:
                answer = ask(target, resource)
            except Unreachable as error:
                errors.append(error)
            else:
                answers.append((target.node or str(answer.get("node", "")), answer))
        if not answers:
            raise errors[0]
        return answers, errors

    def rows(self, kind: Kind, answers: Sequence[tuple[str, Answer]]) -> list[Row]:
        """The answers' rows laid together, in order, of the chosen namespace."""
        by_agent = [(agent, [row for row in items(answer) if self.wanted(kind, row)]) for agent, answer in answers]
        return merged(kind, by_agent)

    def wanted(self, kind: Kind, row: Row) -> bool:
        """Whether a row is of the chosen namespace."""
        return self.namespace is None or kind.namespace(row) == self.namespace


def target_options(command: _Command) -> _Command:
    """Which agents to ask."""
    options = (
        click.option(
            "--socket",
            "path",
            type=click.Path(path_type=Path),
            envvar="ZTUNNEL_SOCKET",
            show_envvar=True,
            help="Control socket of an agent.",
        ),
        click.option("--lab", metavar="NAME", envvar="ZTUNNEL_LAB", show_envvar=True, help="Ask the agents of this lab."),
        click.option("--node", metavar="NODE", help="Only the lab's agent on this node."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def listing_options(command: Callable[[Listing, bool, float], None]) -> Callable[..., None]:
    """The options that every listing has, as one `Listing`."""

    @target_options
    @click.option("-o", "--output", "form", type=click.Choice(FORMATS), default="table", show_default=True, help="How to print.")
    @click.option("-n", "--namespace", metavar="NAME", help="Only this namespace.")
    @click.option("-A", "--all-namespaces", is_flag=True, help="All namespaces; that is the default.")
    @click.option("--no-headers", is_flag=True, help="A table without its first line.")
    @click.option("-w", "--watch", is_flag=True, help="Go on, and print what is new or changes.")
    @click.option("--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True, help="Seconds between looks of --watch.")
    @wraps(command)
    def wrapped(  # noqa: PLR0913 - click passes one argument per option
        *,
        path: Path | None,
        lab: str | None,
        node: str | None,
        form: str,
        namespace: str | None,
        all_namespaces: bool,
        no_headers: bool,
        watch: bool,
        interval: float,
    ) -> None:
        if all_namespaces and namespace is not None:
            raise click.UsageError("--namespace and --all-namespaces exclude each other")
        try:
            command(Listing(choice(path, lab, node), namespace, form, headers=not no_headers), watch, interval)
        except BrokenPipeError:
            # A reader that has seen enough (`| head`) is not the exit code 1 of a problem found.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(128 + signal.SIGPIPE)

    return wrapped


def choice(path: Path | None, lab: str | None, node: str | None) -> Choice:
    """Which agents the user meant.

    Raises:
        UsageError: a socket and a lab.
    """
    source, typed = click.get_current_context().get_parameter_source, click.core.ParameterSource.COMMANDLINE
    explicit = path is not None and source("path") is typed
    if explicit and source("lab") is not typed:
        lab = None
    if explicit and (lab is not None or node is not None):
        raise click.UsageError("--socket names one agent; --lab and --node look for others")
    # A variable in the environment gives way to what was typed.
    return Choice(None if lab is not None or node is not None else path, lab, node)
