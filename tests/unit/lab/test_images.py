"""Which program stands for which image."""

from __future__ import annotations

import pytest

from ztunnel.lab.images import ECHO, IDLE, UnknownImage, command_of, python_path
from ztunnel.mesh.manifests.tree import Tree


def test_a_command_of_its_own_comes_first() -> None:
    assert command_of({"image": "echo", "command": ["a"], "args": ["b"]}, {"echo": "c"}, {}) == ("a", "b")


def test_echo_gets_its_ports() -> None:
    container: Tree = {
        "image": "ghcr.io/x/http-echo:1.0",
        "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 9, "name": "tcp-raw"}, {"containerPort": 53, "protocol": "UDP"}],
    }
    words = command_of(container, {}, {})
    assert words[words.index(ECHO) + 1 :] == ("--port", "80", "--tcp-port", "9")
    assert command_of({"image": "echo"}, {}, {})[-2:] == ("--port", "8080")


def test_the_table() -> None:
    assert command_of({"image": "curlimages/curl:8"}, {}, {}) == IDLE
    assert command_of({"image": "curl", "args": ["-s", "x"]}, {}, {}) == ("curl", "-s", "x")
    assert command_of({"image": "nginx:1", "ports": [{"containerPort": 80}]}, {}, {"nginx": "/sbin/nginx"})[-2:] == ("/sbin/nginx", "80")


@pytest.mark.parametrize("pattern", ["docker.io/library/redis:7@sha256:ab", "redis", "*redis*"])
def test_images_that_were_added(pattern: str) -> None:
    container: Tree = {"image": "docker.io/library/redis:7@sha256:ab", "args": ["--x"]}
    assert command_of(container, {pattern: "redis-server --port '63 79'"}, {}) == ("redis-server", "--port", "63 79", "--x")


@pytest.mark.parametrize("image", ["", "redis", "nginx"])
def test_an_unknown_image_names_the_option(image: str) -> None:
    with pytest.raises(UnknownImage, match="--image"):
        command_of({"image": image}, {}, {})


def test_children_find_this_package_once_and_everything_else() -> None:
    first, *rest = python_path({"PYTHONPATH": f"/a:{python_path({})}::/b"}).split(":")
    assert (first, rest) == (python_path({}), ["/a", "/b"])
