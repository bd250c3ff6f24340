"""The plugin as a container runtime calls it, with an agent, without one, with a bad one, and with everything that is not JSON.

In namespaces for the sake of root, whom plugin, socket and list must belong to; the plugin itself knows nothing of namespaces.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.cni import REPOSITORY, arguments, call, plugin
from tests.kit.mesh import Json
from ztunnel.cni.known import Known, text
from ztunnel.cni.request import GREETING, Command, PodName, parse

RESULT = '{ "cniVersion":"1.0.0",  "interfaces":[],"ips":[ {"address":"10.1.0.7/16"} ] ,"dns":{},"odd":[1e5,-0.5,"\\u00e9\\"",{}] }'
POD = arguments("cart", uid="uid-1")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path


def configuration(place: Path, **more: object) -> Json:
    named = {"cniVersion": "1.0.0", "name": "k8s", "type": "ztunnel-cni", "socket": str(place / "cni.sock"), "known": str(place / "known")}
    return {**named, "waitSeconds": 30, "prevResult": json.loads(RESULT), **more}


def with_result(place: Path, result: str = RESULT) -> bytes:
    """The configuration with a result that is spelt as no library spells it."""
    return json.dumps(configuration(place, prevResult="@")).replace('"@"', result).encode()


def know(place: Path, *namespaces: str, **pods: bool) -> None:
    (place / "known").write_text(text(Known(frozenset(namespaces), tuple(pods.items()))))
    (place / "known").chmod(0o600)


@contextmanager
def agent(place: Path, *replies: bytes | None) -> Iterator[list[bytes]]:
    """A server on the socket: each caller's whole request is kept and answered with the next reply; None: not at all, until the end."""
    heard: list[bytes] = []
    ended = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "cni.sock"))
        listener.listen()

        def serve() -> None:
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    heard.append(b"".join(iter(lambda: connection.recv(65536), b"")))  # noqa: B023 - used up at once
                    if reply is None:
                        ended.wait(60)
                    else:
                        connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield heard
        finally:
            ended.set()
            thread.join(60)


def test_the_plugin_needs_nothing_of_its_host() -> None:
    assert plugin().stat().st_size < 64 << 10
    headers = plugin().read_bytes()[:4096]
    assert b"ld-linux" not in headers, "no loader"
    assert b"/lib/" not in headers


@pytest.mark.parametrize("asked", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_its_versions(asked: str) -> None:
    told = call("VERSION", {"cniVersion": asked}).body
    assert told == {"cniVersion": asked, "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]}


@pytest.mark.parametrize("asked", ["0.1.0", "0.2.0", "2.0.0", "", None, 1])
def test_other_versions_are_refused(place: Path, asked: object) -> None:
    code, words = call("ADD", configuration(place, cniVersion=asked), args=POD).error
    assert (code, "cniVersion is none of" in words) == (1, True)
    assert call("VERSION", {"cniVersion": asked}).body["cniVersion"] == "1.1.0"


def test_the_chains_result_is_passed_on_byte_by_byte(place: Path) -> None:
    with agent(place, b"ok\n") as heard:
        assert call("ADD", with_result(place), args=POD, path="/run/netns/n").accepted == RESULT.encode() + b"\n"
    (message,) = heard
    assert message.startswith(GREETING)
    request = parse(message)
    assert (request.command, request.container, request.namespace_path) == (Command.ADD, "c1", "/run/netns/n")
    assert request.pod == PodName("default", "cart", "uid-1")
    assert request.addresses == ("10.1.0.7",)


def test_a_refusal_is_an_error_for_kubelet_to_try_again(place: Path) -> None:
    with agent(place, b'refused 11 not yet "captured"\n'):
        outcome = call("ADD", configuration(place), args=POD)
    assert outcome.error == (11, "ztunnel: the node agent refuses: not yet ?captured?")
    assert outcome.body["cniVersion"] == "1.0.0"


def test_check_says_nothing_or_why(place: Path) -> None:
    with agent(place, b"ok\n", b"refused 11 rules are missing\n"):
        assert call("CHECK", configuration(place), args=POD).accepted == b""
        assert call("CHECK", configuration(place), args=POD).error == (11, "ztunnel: the node agent refuses: rules are missing")


@pytest.mark.parametrize("command", ["DEL", "GC"])
def test_what_goes_is_told_and_never_refused(place: Path, command: str) -> None:
    assert call(command, configuration(place), args=POD).accepted == b"", "nobody there"
    assert call(command, b"{", args=POD).accepted == b""
    assert call(command, configuration(place), environment={"CNI_NETNS": "", "CNI_CONTAINERID": ""}).accepted == b""
    with agent(place, b"refused 11 no\n", b"") as heard:
        assert call(command, configuration(place), args=POD).accepted == b""
        assert call(command, configuration(place), args=POD).accepted == b""
    assert [message.split(b"\0")[0] for message in heard] == [GREETING + b"CNI_COMMAND=" + command.encode()] * 2


def test_what_is_no_pod_of_kubernetes_is_not_held_up(place: Path) -> None:
    assert call("ADD", with_result(place)).accepted == RESULT.encode() + b"\n"
    assert call("ADD", with_result(place), args="IgnoreUnknown=1;FOO=K8S_POD_NAMESPACE=x").accepted == RESULT.encode() + b"\n"


# Without an agent


OUTSIDE_OR_NOT = {arguments("x", "outside", "new"): True, arguments("x", "shop", "plain"): True, arguments("x", "outside", "meshed"): False}


def decides_by_list(place: Path) -> None:
    for args, accepted in OUTSIDE_OR_NOT.items():
        outcome = call("ADD", with_result(place), args=args)
        assert (outcome.status == 0) is accepted, (args, outcome)
        assert not accepted or outcome.accepted == RESULT.encode() + b"\n"


@pytest.mark.parametrize("reply", [b"", b"ok", b"OK\n", b"o" * 5000, b"refused because\n", b"refused 11\n", b"refused 0 x\n"])
def test_without_an_answer_the_list_decides(place: Path, reply: bytes) -> None:
    know(place, "outside", meshed=True, plain=False)
    with agent(place, *[reply] * len(OUTSIDE_OR_NOT)):
        decides_by_list(place)


def test_without_an_agent_the_list_decides(place: Path) -> None:
    know(place, "outside", meshed=True, plain=False)
    decides_by_list(place)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place / "cni.sock"))
    decides_by_list(place)


@pytest.mark.parametrize(
    ("namespace", "uid", "why"),
    [
        ("shop", "meshed", "the pod is in the mesh: meshed"),
        ("outside", "meshed", "the pod is in the mesh: meshed"),
        ("shop", "new", "the namespace may be in the mesh: shop"),
        ("shop", "", "the namespace may be in the mesh: shop"),
        ("outsid", "new", "the namespace may be in the mesh"),
        ("outside2", "new", "the namespace may be in the mesh"),
        ("outside\nallow namespace", "new", ""),
        ("shop", "plain2", "the namespace may be in the mesh"),
    ],
)
def test_whom_the_list_does_not_let_through(place: Path, namespace: str, uid: str, why: str) -> None:
    know(place, "outside", meshed=True, plain=False)
    if not why:
        assert call("CHECK", configuration(place), args=arguments("x", namespace, uid)).status == 0, "a line feed is in no name: no pod"
        return
    for command in ("ADD", "CHECK"):
        code, words = call(command, configuration(place), args=arguments("x", namespace, uid)).error
        assert (code, why in words) == (11, True), words


@pytest.mark.parametrize(
    "fault", ["missing", "empty", "truncated", "another version", "writable", "a link", "a directory", "too large", "no name"]
)
def test_a_list_that_cannot_be_trusted_lets_nobody_through(place: Path, fault: str) -> None:
    know(place, "outside")
    known = place / "known"
    more: Json = {}
    match fault:
        case "missing":
            known.unlink()
        case "empty":
            known.write_text("")
        case "truncated":
            known.write_text("ztunnel-cni-known 1\nallow namespace outside\nen")
        case "another version":
            known.write_text(known.read_text().replace("known 1", "known 2"))
        case "writable":
            known.chmod(0o666)
        case "a link":
            known.rename(place / "elsewhere")
            known.symlink_to("elsewhere")
        case "a directory":
            known.unlink()
            known.mkdir()
        case "too large":
            known.write_text(known.read_text().replace("end\n", "allow namespace n\n" * 300_000 + "end\n"))
        case _:
            more = {"known": None}
    args = arguments("x", "outside")
    code, words = call("ADD", configuration(place, **more), args=args).error
    assert (code, "left no list" in words) == (11, True)
    assert call("STATUS", configuration(place, **more)).error[0] == 50


def test_the_agent_does_not_wait_for_itself(place: Path) -> None:
    own = configuration(place, ownNamespace="mesh-system", prevResult=json.loads(RESULT))
    assert call("ADD", own, args=arguments("ztunnel-x", "mesh-system", "meshed")).status == 0
    for namespace in ("mesh-system2", "mesh-syste", ""):
        assert call("ADD", {**own, "ownNamespace": namespace}, args=arguments("x", "mesh-system")).error[0] == 11
    assert call("ADD", {**own, "ownNamespace": ["mesh-system"]}, args=arguments("x", "mesh-system")).error[0] == 11
    with agent(place, b"refused 11 not yet\n"):
        assert call("ADD", own, args=arguments("x", "mesh-system")).error[0] == 11, "whoever is there decides"


def test_a_node_is_fine_as_long_as_somebody_can_answer(place: Path) -> None:
    with agent(place, b"ok\n") as heard:
        assert call("STATUS", configuration(place)).accepted == b""
    assert heard
    know(place)
    assert call("STATUS", configuration(place)).accepted == b""


def test_an_agent_that_does_not_answer_costs_its_deadline(place: Path) -> None:
    know(place, "outside", meshed=True)
    with agent(place, None):
        code, _ = call("ADD", configuration(place, waitSeconds=1), args=arguments("x", "shop", "meshed")).error
    assert code == 11


IMPOSTOR = """
import os, socket, sys
os.setuid(65534)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print(flush=True)
listener.accept()[0].sendall(b"ok\\n")
"""


def test_an_agent_that_is_not_root_is_none() -> None:
    if os.stat("/proc/1").st_uid == 65534:
        pytest.skip("there is no second user in this user namespace")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o777)
        with subprocess.Popen(["/usr/bin/env", "python3", "-c", IMPOSTOR, place / "cni.sock"], stdout=subprocess.PIPE) as impostor:
            assert impostor.stdout is not None
            impostor.stdout.readline()
            try:
                assert call("ADD", configuration(place), args=POD).error[0] == 11
            finally:
                impostor.kill()


# What must not be said to it


@pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CNI_COMMAND": ""}, "CNI_COMMAND is none of"),
        ({"CNI_COMMAND": "add"}, "CNI_COMMAND is none of"),
        ({"CNI_CONTAINERID": ""}, "not set: CNI_CONTAINERID"),
        ({"CNI_NETNS": ""}, "not set: CNI_NETNS"),
        ({"CNI_IFNAME": ""}, "not set: CNI_IFNAME"),
        ({"CNI_ARGS": "x" * 4097}, "too long: CNI_ARGS"),
        ({"CNI_ARGS": "K8S_POD_NAMESPACE=a;K8S_POD_NAME=x;K8S_POD_NAMESPACE=outside"}, "names a pod twice"),
        ({"CNI_ARGS": "K8S_POD_NAMESPACE=a;K8S_POD_UID=x;K8S_POD_UID=y"}, "names a pod twice"),
    ],
)
def test_a_bad_environment(place: Path, environment: dict[str, str], why: str) -> None:
    know(place, "outside")
    code, words = call("ADD", configuration(place), args=POD, environment=environment).error
    assert (code, why in words) == (4, True), words


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"}",
        b'{"a"}',
        b'{"a":}',
        b'{"a":1,}',
        b'{"a":1 "b":2}',
        b'{"a":[1,]}',
        b'{"a":[,1]}',
        b'{"a":[}]}',
        b'{"a":{]}}',
        b'{"a":[1 2]}',
        b'{"a":{"b" 1}}',
        b'{"a":{1:2}}',
        b"{a:1}",
        b'{"a":01}',
        b'{"a":1.}',
        b'{"a":.5}',
        b'{"a":1e}',
        b'{"a":-}',
        b'{"a":+1}',
        b'{"a":truth}',
        b'{"a":True}',
        b'{"a":NaN}',
        b'{"a":"',
        b'{"a":"\\',
        b'{"a":"\\x"}',
        b'{"a":"\\u12"}',
        b'{"a":"\\u12g4"}',
        b'{"a":"\n"}',
        b'{"a":"\x00"}',
        b"{'a':1}",
        b'{"a":1}}',
        b'{"a":1}{}',
        b'{"a":1}\x00',
        b'{"a":' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"a":' + b'{"a":' * 500_000,
        b'{"cniVersion":"1.0.0","cniVersion":"1.0.0"}',
        b'{"socket":"/a","b":{"socket":1},"socket":"/c"}',
        b" " * (1 << 20) + b"{}",
    ],
)
def test_what_is_not_the_configuration(content: bytes) -> None:
    code, words = call("ADD", content, args=POD).error
    assert (code, "ztunnel: the configuration is" in words) == (6, True)


def test_bytes_at_random_neither_crash_nor_hang_it() -> None:
    source = random.Random(7)
    whole = json.dumps(configuration(Path("/nowhere"))).encode()
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(source.randrange(1, 4)):
            content[source.randrange(len(content))] = source.choice(b'{}[]",:\\0-.eE\x00\xff ntfu1')
        outcome = call("ADD", bytes(content[: source.randrange(len(content) + 1)] if source.random() < 0.3 else content), args=POD)
        assert outcome.status in (0, 1), bytes(content)
        assert outcome.status == 0 or outcome.body["code"] in (1, 6, 7, 11)


@pytest.mark.parametrize("deep", [1, 63])
def test_json_that_it_takes(place: Path, deep: int) -> None:
    result = '{"x":' + "[" * (deep - 1) + "]" * (deep - 1) + "}" if deep > 1 else "{}"
    assert call("ADD", with_result(place, result)).accepted == result.encode() + b"\n"


@pytest.mark.parametrize("result", ["null", "[]", '"x"', "1"])
def test_it_is_never_alone(place: Path, result: str) -> None:
    code, words = call("ADD", with_result(place, result), args=POD).error
    assert (code, "must be the last of a chain" in words) == (7, True)


@pytest.mark.parametrize("wait", ["-1", "1.5", '"1"', "301", "9" * 40])
def test_a_wait_that_is_none(place: Path, wait: str) -> None:
    content = json.dumps(configuration(place, waitSeconds="@")).replace('"@"', wait).encode()
    code, words = call("ADD", content, args=POD).error
    assert (code, "waitSeconds" in words) == (7, True)


def test_a_configuration_of_a_mebibyte_reaches_the_agent_whole(place: Path) -> None:
    body = configuration(place, filler="")
    body["filler"] = "x" * ((1 << 20) - len(json.dumps(body)))
    with agent(place, b"ok\n") as heard:
        assert call("ADD", body, args=POD).status == 0
    assert heard[0].endswith(json.dumps(body).encode())
    assert parse(heard[0]).command is Command.ADD


def test_it_compiles_without_a_warning_of_a_strict_compiler(tmp_path: Path) -> None:
    flags = ["-std=c17", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-fsyntax-only"]
    done = subprocess.run(["gcc", *flags, REPOSITORY / "ztunnel/cni/plugin.c"], capture_output=True, text=True, check=False, cwd=tmp_path)
    if "No such file or directory" in done.stderr:
        pytest.skip("gcc has no headers here")
    assert done.returncode == 0, done.stderr
