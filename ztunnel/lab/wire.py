"""What the command line and the controller say to each other: one JSON object a line, over the lab's Unix socket.

A connection carries one request. The answer is one line, `{"ok": …}` or `{"error": …}`; `watch`, `exec` and `up` answer with several.
Both sides bound what they read.
"""

from __future__ import annotations

import json
from pathlib import Path

from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.manifests.tree import Tree

MAX_REQUEST = 16 << 20
MAX_ANSWER = 64 << 20
MAX_DEPTH = 64
SOCKET_NAME = "lab.sock"
PROCESS_FILE = "controller.json"
LOG_NAME = "controller.log"
MAX_SOCKET_PATH = 107
"""Longest path of a Unix socket in Linux."""


class BadMessage(LocalError):
    """Bytes on the socket that are no JSON object, or too many of them."""


def encode(message: Tree) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Tree:
    """The object in a line.

    Raises:
        BadMessage: not a JSON object.
    """
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"not JSON: {error}") from error
    if not isinstance(message, dict):
        raise BadMessage("not a JSON object")
    if not _is_shallow(message):
        raise BadMessage(f"nested deeper than {MAX_DEPTH}")
    return message


def _is_shallow(message: object) -> bool:
    """Whether copying and comparing it stays far from Python's limit of recursion. Manifests need about fifteen levels."""
    level: list[object] = [message]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level if isinstance(item, (dict, list)) for inner in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return True
    return False


def socket_path(state: Path) -> Path:
    """Where the controller of a lab listens."""
    return state / SOCKET_NAME
