"""Finds the agents' control sockets and asks them: HTTP/1.1 over a Unix socket, with a deadline and a bound on the answer.

h11 because it is the quickest to import: http.client brings the email package and ssl along.
"""

from __future__ import annotations

import errno
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import h11

from ztunnel.lab.paths import DEFAULT_LAB, agent_sockets, lab_state_dir, labs_root

DEFAULT_SOCKET = Path("/run/ztunnel/agent.sock")
ANSWER_SECONDS = 10.0
MAX_ANSWER_BYTES = 256 << 20
"""A hundred thousand connections are under 60 MB."""
_CHUNK = 1 << 18


class Unreachable(click.ClickException):
    """No agent answers: exit code 3. The text says what, why and what to do next."""

    exit_code = 3


class Refused(click.ClickException):
    """The agent answered, with an error: exit code 1."""


@dataclass(frozen=True, slots=True)
class Target:
    """One agent to ask. `node` is empty until it has answered, for a socket that was given."""

    path: Path
    node: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which agents the user meant."""

    socket: Path | None = None
    lab: str | None = None
    node: str | None = None


def targets(choice: Choice, environ: Mapping[str, str], default: Path = DEFAULT_SOCKET) -> list[Target]:
    """The agents that the user meant.

    A socket that was given; else a lab that was named (all its nodes, or one); else the default socket if it is there, else the
    lab of the default name if it is up.

    Raises:
        Unreachable: there are none.
    """
    if choice.socket is not None:
        return [Target(choice.socket)]
    if choice.lab is None and choice.node is None and default.exists():
        return [Target(default)]
    lab = choice.lab or DEFAULT_LAB
    found = agent_sockets(lab_state_dir(lab, environ))
    if choice.node is not None and found:
        if choice.node not in found:
            raise Unreachable(f"the lab {lab} has no running agent on node {choice.node}; it has them on {', '.join(found)}")
        found = {choice.node: found[choice.node]}
    if found:
        return [Target(path, node) for node, path in found.items()]
    if choice.lab is None and choice.node is None:
        raise Unreachable(
            f"no agent runs here: there is no {default} and no lab called {lab}.\n{_others(environ)}"
            "Start a lab with `ztunnel lab up -f deploy/samples`, an agent with `ztunnel run --config FILE`, or name a socket: --socket."
        )
    raise Unreachable(f"the lab {lab} has no running agents. See `ztunnel lab status --name {lab}`, or start it with `ztunnel lab up`.")


def _others(environ: Mapping[str, str]) -> str:
    root = labs_root(environ)
    try:
        names = sorted(entry.name for entry in root.iterdir() if agent_sockets(entry))
    except OSError:
        return ""
    return f"Other labs are up: {', '.join(names)}. Ask one with --lab NAME, or set ZTUNNEL_LAB.\n" if names else ""


def ask(target: Target, resource: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
    """The JSON object that an agent answers with.

    Args:
        resource: path below /v1/.
        body: sent by POST; None is a GET.
    Raises:
        Unreachable: nobody answers, or not in time, or not our API.
        Refused: an error status; the text is the agent's.
    """
    status, content = _exchange(target, f"/v1/{resource}", body)
    if status != 200:
        raise Refused(f"the agent on {target.path} says: {content.decode('utf-8', 'replace').strip()[:500]}")
    try:
        answer: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unreachable(f"what listens on {target.path} is no agent: {error}") from error
    if not isinstance(answer, dict) or answer.get("version") != 1:
        raise Unreachable(f"the agent on {target.path} speaks another version of the control API; use its own `ztunnel`")
    return answer


def _exchange(target: Target, resource: str, body: Mapping[str, object] | None) -> tuple[int, bytes]:
    path = target.path
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_SECONDS)
            sock.connect(str(path))
            http = h11.Connection(h11.CLIENT)
            sock.sendall(_request(http, resource, b"" if body is None else json.dumps(body).encode(), post=body is not None))
            return _response(http, sock, deadline)
    except TimeoutError as error:
        raise Unreachable(f"the agent on {path} did not answer within {ANSWER_SECONDS:g} s; see its log") from error
    except h11.RemoteProtocolError as error:
        raise Unreachable(f"what listens on {path} is no agent: {error}") from error
    except OSError as error:
        raise Unreachable(_why(target, error)) from error


def _request(http: h11.Connection, resource: str, content: bytes, *, post: bool) -> bytes:
    headers = [("host", "ztunnel"), ("connection", "close"), ("content-length", str(len(content)))]
    out = http.send(h11.Request(method="POST" if post else "GET", target=resource, headers=headers)) or b""
    if content:
        out += http.send(h11.Data(data=content)) or b""
    return out + (http.send(h11.EndOfMessage()) or b"")


def _response(http: h11.Connection, sock: socket.socket, deadline: float) -> tuple[int, bytes]:
    status, content = 0, bytearray()
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            http.receive_data(sock.recv(_CHUNK))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            content += event.data
            if len(content) > MAX_ANSWER_BYTES:
                raise Unreachable(f"an answer of more than {MAX_ANSWER_BYTES} bytes is no listing of ours")
        elif not isinstance(event, h11.InformationalResponse):
            return status, bytes(content)


def _why(target: Target, error: OSError) -> str:
    again = "start it again with `ztunnel run --config FILE`"
    if target.node:
        state = target.path.parents[2]
        again = f"start it again with `ztunnel lab agent start {target.node} --name {state.name}`"
        if not _has_controller(state):
            return f"the lab {state.name} has ended, and its agents with it: `ztunnel lab down --name {state.name}` cleans up after it."
    match error.errno:
        case errno.ENOENT:
            reason = (
                "there is no such socket. Is the agent running? Start it with `ztunnel run --config FILE`, or a lab with `ztunnel lab up`."
            )
        case errno.ECONNREFUSED:
            reason = f"nobody listens: its agent has ended. Look at its log, and {again}."
        case errno.EACCES:
            reason = "permission denied: the socket is its agent's user's alone. Try again as that user (usually with sudo)."
        case errno.ECONNRESET | errno.EPIPE:
            reason = "the connection was closed: the agent is ending, or too many clients ask it. Try again."
        case _:
            reason = f"{error.strerror or error}."
    return f"cannot reach the agent on {target.path}: {reason}"


def _has_controller(state: Path) -> bool:
    from ztunnel.lab.lifecycle import is_up

    return is_up(state)
