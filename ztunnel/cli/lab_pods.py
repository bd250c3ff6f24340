"""`ztunnel lab exec` and `ztunnel lab logs`: the commands that touch what runs in pods."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from ztunnel.cli.lab_common import LabCommand, client_of, name_option, namespace_option

if TYPE_CHECKING:
    from ztunnel.lab.client import Client

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_FOLLOW_SECONDS = 0.1
_CHUNK = 1 << 16


@click.command("exec", cls=LabCommand)
@click.argument("pod")
@click.argument("command", nargs=-1, required=True, metavar="-- COMMAND...")
@click.option("-c", "--container", default="", metavar="NAME", help="Which container's environment; the first by default.")
@click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="With a terminal.")
@namespace_option
@name_option
def exec_command(pod: str, command: tuple[str, ...], container: str, with_stdin: bool, tty: bool, namespace: str, lab_name: str) -> None:
    """Run a command in a pod, or in a node's network; exits with its exit code.

    POD is a pod's name, deploy/NAME for one of its pods, a node's name (or node/NAME), or fabric for the bridge between nodes.

    \b
    Examples:
      ztunnel lab exec client -n shop -- curl -s http://orders/
      echo hello | ztunnel lab exec -i web -- cat
      ztunnel lab exec -it web -- bash
      ztunnel lab exec fabric -- tcpdump -c 10 -ni br0 port 15008
    """
    client = client_of(lab_name)
    arguments: dict[str, object] = {"name": pod, "namespace": namespace, "container": container, "argv": list(command)}
    if tty and not sys.stdin.isatty():
        click.echo("Unable to use a TTY - input is not a terminal or the right kind of file", err=True)
        tty = False
    if tty:
        from ztunnel.cli.lab_terminal import exec_in_terminal

        code = exec_in_terminal(client, arguments)
    else:
        code = _exec(client, arguments, with_stdin)
    if code:
        click.echo(f"command terminated with exit code {code}", err=True)
        raise SystemExit(code)


def _exec(client: Client, arguments: dict[str, object], with_stdin: bool) -> int:
    nothing = os.open(os.devnull, os.O_RDONLY)
    try:
        fds = (0 if with_stdin else nothing, 1, 2)
        with forwarding() as set_target:
            return client.exec(fds, on_start=set_target, **arguments)
    finally:
        os.close(nothing)


@contextmanager
def forwarding() -> Iterator[Callable[[Callable[[int], None]], None]]:
    """Signals that reach us go to the command, once its `send` function is known; before that they end us as usual."""
    earlier = {number: signal.getsignal(number) for number in _FORWARDED}

    def set_target(send: Callable[[int], None]) -> None:
        for number in _FORWARDED:
            signal.signal(number, lambda received, _: send(received))

    try:
        yield set_target
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@click.command("logs", cls=LabCommand)
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written, until the pod is gone.")
@click.option("--tail", type=int, default=-1, metavar="N", help="Only the last N lines.")
@namespace_option
@name_option
def logs_command(name: str, follow: bool, tail: int, namespace: str, lab_name: str) -> None:
    """Show what a pod's containers, or a node's agent, have written.

    \b
    Examples:
      ztunnel lab logs deploy/orders -n shop
      ztunnel lab logs node-1 -f --tail 20
    """
    from ztunnel.mesh.manifests.tree import text

    client = client_of(lab_name)
    found = client.call("logs", name=name, namespace=namespace)
    path, uid = text(found, "path"), text(found, "uid")
    if not os.path.exists(path):
        return
    with open(path, "rb") as source:
        _to_tail(source.fileno(), tail)
        while True:
            while data := source.read(_CHUNK):
                sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            if not follow or not _goes_on(client, path, uid, name, namespace):
                return
            if os.fstat(source.fileno()).st_size < source.tell():
                source.seek(0)  # the log was cut because it had grown too large
            time.sleep(_FOLLOW_SECONDS)


def _to_tail(fd: int, lines: int) -> None:
    """Move to the start of the last `lines` lines; negative means from the beginning."""
    if lines < 0:
        return
    end = os.lseek(fd, 0, os.SEEK_END)
    data, position = b"", end
    while position > 0 and data.count(b"\n") <= lines:
        step = min(_CHUNK, position)
        position -= step
        data = os.pread(fd, step, position) + data
    kept = data.splitlines(keepends=True)[-lines:] if lines else []
    os.lseek(fd, end - sum(map(len, kept)), os.SEEK_SET)


def _goes_on(client: Client, path: str, uid: str, name: str, namespace: str) -> bool:
    """Whether more can come: the file, and the pod that wrote it, are still there."""
    from ztunnel.mesh.errors import LocalError
    from ztunnel.mesh.manifests.tree import text

    if not os.path.exists(path):
        return False
    try:
        return text(client.call("logs", name=name, namespace=namespace), "uid") == uid
    except LocalError:
        return False
