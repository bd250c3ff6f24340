"""The commands that ask running agents and print: `status`, the listings, `log-level`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from ztunnel.cli import kinds
from ztunnel.cli.client import Unreachable, ask, targets
from ztunnel.cli.health import AGENT_COLUMNS, certificate_problem, problems
from ztunnel.cli.options import Answer, Listing, choice, listing_options, target_options
from ztunnel.cli.output import Kind, Row, as_json, as_yaml, changed, columns_of, items, names, shown, table


@click.command()
@listing_options
def connections(listing: Listing, watch: bool, interval: float) -> None:
    """List live connections of this node's pods.

    \b
    Examples:
      ztunnel connections
      ztunnel connections -n shop -o wide
      ztunnel connections --lab lab --node node-1 -w
      ztunnel connections -o json | jq '.items[].peer_identity'
    """
    _show(kinds.CONNECTIONS, listing, watch, interval)


@click.command()
@listing_options
def tunnels(listing: Listing, watch: bool, interval: float) -> None:
    """List live HBONE tunnels to and from other nodes.

    \b
    Examples:
      ztunnel tunnels
      ztunnel tunnels -o wide --lab lab
    """
    _show(kinds.TUNNELS, listing, watch, interval)


@click.command()
@listing_options
def workloads(listing: Listing, watch: bool, interval: float) -> None:
    """List the workloads of the mesh, as this agent knows them. Of several agents, equal rows are shown once.

    \b
    Examples:
      ztunnel workloads
      ztunnel workloads -n shop -o wide
      ztunnel workloads -o name
    """
    _show(kinds.WORKLOADS, listing, watch, interval)


@click.command()
@listing_options
def services(listing: Listing, watch: bool, interval: float) -> None:
    """List the services of the mesh; ENDPOINTS are ready/all.

    \b
    Examples:
      ztunnel services
      ztunnel services -n shop -o yaml
    """
    _show(kinds.SERVICES, listing, watch, interval)


@click.command()
@listing_options
def policies(listing: Listing, watch: bool, interval: float) -> None:
    """List the authorization policies in force. REASON says why one is not in force as written.

    \b
    Examples:
      ztunnel policies
      ztunnel policies -n shop -o json
    """
    _show(kinds.POLICIES, listing, watch, interval)


@click.command()
@listing_options
def certificates(listing: Listing, watch: bool, interval: float) -> None:
    """List the certificates of this node's identities. Exit code 1 if one is not valid or cannot be renewed.

    \b
    Examples:
      ztunnel certificates
      ztunnel certificates -o wide
      ztunnel certificates -o json | jq '.items[] | select(.seconds_left < 3600)'
    """
    rows = _show(kinds.CERTIFICATES, listing, watch, interval)
    if any(certificate_problem(row) for row in rows):
        sys.exit(1)


@click.command()
@listing_options
def status(listing: Listing, watch: bool, interval: float) -> None:
    """Show each agent in one look: its pods, certificates and problems.

    For each pod four answers that must agree: LABELLED (its labels ask for the mesh), ENROLLED (its traffic was redirected), CAPTURED
    (the rules were there at the last check), FLOWING (connections have been seen). Exit code 1 if there is a problem.

    \b
    Examples:
      ztunnel status
      ztunnel status --lab lab -n shop
      ztunnel status -o json | jq '.items[].problems'
    """
    before: list[str] = []
    while True:
        answers, errors = listing.fetch("status")
        lines, healthy = _status_lines(listing, answers, silent=len(errors))
        if lines != before:
            _lines(lines)
            before = lines
        if not watch:
            break
        time.sleep(interval)
    _finish(errors)
    if not healthy:
        sys.exit(1)


@click.command("log-level")
@target_options
@click.argument("level", required=False, type=click.Choice(["debug", "info", "warning", "error"]))
def log_level(path: Path | None, lab: str | None, node: str | None, level: str | None) -> None:
    """Show what running agents log, or change it until they end.

    \b
    Examples:
      ztunnel log-level
      ztunnel log-level debug --lab lab --node node-1
    """
    for target in targets(choice(path, lab, node), os.environ):
        answer = ask(target, "log-level", None if level is None else {"level": level})
        click.echo(f"{shown(answer.get('node'))}: {shown(answer.get('level'))}")


def _show(kind: Kind, listing: Listing, watch: bool, interval: float) -> list[Row]:
    """Print a listing; with `watch`, for ever. The rows that were printed."""
    answers, errors = listing.fetch(kind.plural)
    rows = listing.rows(kind, answers)
    several = len(answers) > 1
    _print(kind, listing, rows, answers, headers=listing.headers)
    while watch:
        time.sleep(interval)
        answers, errors = listing.fetch(kind.plural)
        before, rows = rows, listing.rows(kind, answers)
        different = changed(before, rows)
        if different:
            several = several or len(answers) > 1
            _print(kind, listing, different, answers, headers=False)
    _finish(errors)
    return rows


def _print(kind: Kind, listing: Listing, rows: list[Row], answers: Sequence[tuple[str, Answer]], *, headers: bool) -> None:
    agents = [agent for agent, _ in answers]
    match listing.form:
        case "json":
            click.echo(as_json({"version": 1, "nodes": agents, "items": rows}))
        case "yaml":
            click.echo(as_yaml({"version": 1, "nodes": agents, "items": rows}))
        case "name":
            _lines(names(kind, rows))
        case _ if rows:
            _lines(table(rows, columns_of(kind, wide=listing.form == "wide", agents=len(agents) > 1), headers=headers))
        case _:
            where = f" in namespace {listing.namespace}" if listing.namespace else ""
            click.echo(f"No {kind.plural}{where}.", err=True)


def _status_lines(listing: Listing, answers: Sequence[tuple[str, Answer]], silent: int) -> tuple[list[str], bool]:
    """What `status` prints, and whether all is well where somebody answered; `silent` agents did not."""
    pods = listing.rows(kinds.PODS, answers)
    found = [(agent, problem) for agent, answer in answers for problem in problems(answer)]
    if listing.form in ("json", "yaml"):
        chosen = [{**answer, "items": [row for row in items(answer) if listing.wanted(kinds.PODS, row)]} for _, answer in answers]
        document = {"version": 1, "nodes": [agent for agent, _ in answers], "items": chosen}
        return [as_json(document) if listing.form == "json" else as_yaml(document)], not found
    if listing.form == "name":
        return [f"node/{agent}" for agent, _ in answers], not found
    lines = table([answer for _, answer in answers], AGENT_COLUMNS, headers=listing.headers)
    if pods:
        lines += ["", *table(pods, columns_of(kinds.PODS, wide=listing.form == "wide", agents=len(answers) > 1), headers=listing.headers)]
    if found:
        lines += ["", click.style(f"{_count(len(found), 'problem')}:", fg="red", bold=True)]
        lines += [f"  {agent}: {problem}" for agent, problem in found]
        return lines, False
    seen = f"{_count(len(answers), 'node')}, {_count(len(pods), 'pod')}"
    silence = f"{_count(silent, 'node')} did not answer; {seen} without a problem"
    lines += ["", click.style(silence, fg="red") if silent else click.style(f"{seen}: all well", fg="green")]
    return lines, True


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}{'' if number_of == 1 else 's'}"


def _lines(lines: Sequence[str]) -> None:
    # click takes colours out of what is no terminal; NO_COLOR takes them out everywhere (no-color.org).
    color = False if os.environ.get("NO_COLOR") else None
    for line in lines:
        click.echo(line, color=color)


def _finish(errors: Sequence[Unreachable]) -> None:
    """Some agents answered and some did not: what was found has been printed, and the exit code says that it is not all."""
    for error in errors:
        click.echo(f"error: {error.format_message()}", err=True)
    if errors:
        sys.exit(Unreachable.exit_code)
