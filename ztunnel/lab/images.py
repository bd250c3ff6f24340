"""What a container runs: its own command from the host's file system, or what a small table says about its image. Pure.

There are no images here: an image's name only chooses a program of this machine. `--image IMAGE=COMMAND` adds to the table and is
asked first. An image that nobody knows is refused when the manifest is applied, not when the pod fails to start.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import ztunnel
from ztunnel.mesh.manifests.tree import Tree, branches, text, texts

ECHO = str(Path(__file__).with_name("echo.py"))
PYTHON = (sys.executable, "-I", "-S")
PACKAGE_ROOT = str(Path(ztunnel.__file__).parent.parent)
IDLE = ("sleep", "infinity")
_BOOKINFO = re.compile(r"(?:examples-)?bookinfo-(productpage|details|reviews|ratings)-(v\d+)")
"""The images of Istio's bookstore sample."""


def python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH with which a child finds this package wherever it was found, and everything else where we find it."""
    return os.pathsep.join(dict.fromkeys([PACKAGE_ROOT, *filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))]))


class UnknownImage(Exception):
    """No command and no entry in the table; the text says what to do."""


def command_of(container: Tree, images: Mapping[str, str], tools: Mapping[str, str]) -> tuple[str, ...]:
    """The argument vector of a container.

    Args:
        images: IMAGE=COMMAND pairs of the user; the image may be a pattern (`*mysql*`), the command is split as a shell would.
        tools: programs of this machine that were found, such as `nginx`, to their paths.

    Raises:
        UnknownImage: the container has no command and nothing is known about its image.
    """
    command, arguments = texts(container, "command"), texts(container, "args")
    if command:
        return (*command, *arguments)
    image = text(container, "image")
    bare = image.rsplit("/", 1)[-1].split("@", 1)[0].split(":", 1)[0]
    for pattern, line in images.items():
        if image == pattern or bare == pattern or fnmatchcase(image, pattern):
            return (*shlex.split(line), *arguments)
    if bookinfo := _BOOKINFO.fullmatch(bare):
        return (*PYTHON, str(Path(__file__).with_name("bookinfo.py")), *bookinfo.groups())
    if "echo" in bare:
        return (*PYTHON, ECHO, *_echo_ports(container), *arguments)
    if "curl" in bare:
        return IDLE if not arguments else ("curl", *arguments)
    if "nginx" in bare and "nginx" in tools:
        return (*PYTHON, str(Path(__file__).with_name("nginx.py")), tools["nginx"], *_tcp_ports(container))
    missing = " (nginx is not installed on this machine)" if "nginx" in bare else ""
    advice = f"give the container a command, or use --image '{bare or 'IMAGE'}=COMMAND'"
    known = f"and nothing is known about image {image!r}{missing}" if image else "and no image"
    raise UnknownImage(f"no command, {known}: {advice}")


def _tcp_ports(container: Tree) -> list[str]:
    ports = branches(container, "ports")
    return [str(port.get("containerPort")) for port in ports if text(port, "protocol", default="TCP") == "TCP"]


def _echo_ports(container: Tree) -> list[str]:
    """`--port N` for each TCP port; `--tcp-port N` where the port's name says that it is not HTTP."""
    options: list[str] = []
    for port in branches(container, "ports"):
        if text(port, "protocol", default="TCP") == "TCP":
            raw = text(port, "name").split("-")[0] in ("tcp", "tls", "redis", "mysql", "mongo")
            options += ["--tcp-port" if raw else "--port", str(port.get("containerPort"))]
    return options or ["--port", "8080"]
