"""`waypoint explain`: the question as JSON over the control socket, and its answer for people. Without trio, to start quickly."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from waypoint.http.messages import Client, Request
from ztunnel.mesh.addresses import canonical
from ztunnel.mesh.identity import SpiffeId, parse_spiffe

_SECONDS = 10.0
_MOST = 8 << 20


class QuestionError(ValueError):
    """A question that cannot be asked or answered; the text says why."""


class Asked(msgspec.Struct, frozen=True):
    """A question on the wire."""

    address: str
    """Of a service or pod; or a service's host name or name."""
    port: int
    method: str = "GET"
    path: str = "/"
    host: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    account: str = ""
    """`namespace/service account` of the client, or empty."""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, read."""

    address: str
    request: Request
    client: Client


def question_of(target: str, method: str, headers: Sequence[str], account: str, source: str) -> bytes:
    """The question that a command line asks.

    Raises:
        QuestionError: an argument is not what it should be.
    """
    try:
        parts = urlsplit(target if "://" in target else f"http://{target}")
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise QuestionError(f"{target[:100]!r} is no URL: {error}") from error
    if not parts.hostname:
        raise QuestionError(f"{target[:100]!r} names no host")
    pairs = []
    for line in headers:
        name, colon, value = line.partition(":")
        if not colon:
            raise QuestionError(f"{line[:100]!r} is no header (NAME:VALUE)")
        pairs.append((name.strip(), value.strip()))
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return msgspec.json.encode(Asked(parts.hostname, port, method, path, parts.netloc, tuple(pairs), account, source))


def read_question(body: bytes, trust_domain: str) -> Question:
    """
    Raises:
        QuestionError: it is none.
    """
    try:
        asked = msgspec.json.decode(body, type=Asked)
    except (ValueError, RecursionError) as error:
        raise QuestionError(f"not a question: {error}") from error
    if not 1 <= asked.port <= 65535:
        raise QuestionError("port: a number from 1 to 65535")
    headers = [(name.lower().encode(), value.encode()) for name, value in asked.headers]
    host = next((value for name, value in headers if name == b"host"), asked.host.encode())
    request = Request(asked.method.encode(), asked.path.encode(), host, [line for line in headers if line[0] != b"host"])
    identity = _identity(asked.account, trust_domain)
    source = canonical(asked.source) if asked.source else ""
    if source is None:
        raise QuestionError(f"source: {asked.source[:60]!r} is no IP address")
    client = Client(
        identity,
        source,
        namespace="" if identity is None else identity.namespace,
        service_port=asked.port,
        destination=canonical(asked.address) or asked.address,
    )
    return Question(canonical(asked.address) or asked.address, request, client)


def _identity(account: str, trust_domain: str) -> SpiffeId | None:
    if not account:
        return None
    namespace, _, name = account.partition("/")
    try:
        return parse_spiffe(account if "://" in account else f"spiffe://{trust_domain}/ns/{namespace}/sa/{name}")
    except ValueError as error:
        raise QuestionError(f"account: {account[:100]!r} is not NAMESPACE/ACCOUNT") from error


class _Connection(HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("waypoint", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(str(self._path))


def ask(path: Path, question: bytes) -> bytes:
    """The proxy's answer, JSON.

    Raises:
        QuestionError: nobody answers at that socket, or the answer is a refusal.
    """
    connection = _Connection(path)
    try:
        connection.request("POST", "/v1/explain", question, {"content-type": "application/json"})
        response = connection.getresponse()
        body = response.read(_MOST)
    except (OSError, HTTPException) as error:
        raise QuestionError(f"no waypoint answers at {path}: {error}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise QuestionError(body.decode("utf-8", "replace").strip()[:1000])
    return body


def show(answer: bytes) -> str:
    """An answer as lines of text."""
    told = json.loads(answer)
    lines = [told["outcome"], ""]
    for step in told["steps"]:
        ending = f" ({step['status']})" if step["status"] else ""
        lines.append(f"{step['decision']}: {step['text']}{ending}")
        lines += [f"  {detail}" for detail in step["details"]]
    return "\n".join(lines)
