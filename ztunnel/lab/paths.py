"""Where labs keep their state, so that `ztunnel status` finds a lab's agents without asking anybody.

Standard library only: the command line imports this on every start. Invariant: nothing here touches the file system except
the questions `exists` and `iterdir`; making and removing these directories is `lab`'s business.

    <root>/<lab name>/nodes/<node>/agent.sock
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DEFAULT_LAB = "lab"
"""The name that every `ztunnel lab` command uses when `--name` is not given."""

LAB_DIR_VARIABLE = "ZTUNNEL_LAB_DIR"
"""Environment variable that moves the state of all labs, as tests do."""


def labs_root(environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The directory that holds one directory per lab.

    $ZTUNNEL_LAB_DIR; else /run/ztunnel-lab for root; else $XDG_RUNTIME_DIR/ztunnel-lab; else /tmp/ztunnel-lab-<uid>.

    Args:
        uid: the effective user id; None asks the kernel.
    """
    chosen = environ.get(LAB_DIR_VARIABLE)
    if chosen:
        return Path(chosen)
    user = os.geteuid() if uid is None else uid
    if user == 0:
        return Path("/run/ztunnel-lab")
    runtime = environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime) / "ztunnel-lab"
    return Path(f"/tmp/ztunnel-lab-{user}")  # noqa: S108 - `lab` makes it mode 0700 and refuses one that is not its own


def lab_state_dir(name: str, environ: Mapping[str, str] = os.environ, uid: int | None = None) -> Path:
    """The state directory of one lab; it exists while the lab is up."""
    return labs_root(environ, uid) / name


def name_option_of(name: str) -> str:
    """What a command must add to mean the lab of that name; empty for the default one."""
    return "" if name == DEFAULT_LAB else f" --name {name}"


def agent_socket(state: Path, node: str) -> Path:
    """The control socket of one node's agent."""
    return state / "nodes" / node / "agent.sock"


def agent_sockets(state: Path) -> dict[str, Path]:
    """Node name → control socket of every agent of a lab, in name order; empty when there is no such lab."""
    nodes = state / "nodes"
    if not nodes.is_dir():
        return {}
    found = {entry.name: agent_socket(state, entry.name) for entry in nodes.iterdir() if entry.is_dir()}
    return {node: path for node, path in sorted(found.items()) if path.exists()}
