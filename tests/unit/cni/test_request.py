"""What the plugin may ask, and everything that only looks like it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ztunnel.cni.request import GREETING, BadRequest, Code, Command, PodName, Refusal, Request, answer, parse

ARGS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-1;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=uid-1"
RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "cni0"}, {"name": "veth1", "sandbox": ""}, {"name": "eth0", "sandbox": "/run/netns/x"}],
    "ips": [
        {"address": "10.1.0.7/16", "gateway": "10.1.0.1", "interface": 2},
        {"address": "FD00:0::7/64", "interface": 2},
        {"address": "10.1.0.1/16", "interface": 0},
        {"address": "10.1.0.2/16", "interface": 1},
    ],
}


def message(command: str = "ADD", args: str = ARGS, body: object = None, **variables: str) -> bytes:
    named = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c1",
        "CNI_NETNS": "/run/netns/x",
        "CNI_IFNAME": "eth0",
        "CNI_ARGS": args,
        **variables,
    }
    configuration = {"cniVersion": "1.0.0", "prevResult": RESULT} if body is None else body
    return GREETING + b"".join(f"{key}={value}\0".encode() for key, value in named.items()) + json.dumps(configuration).encode()


def test_an_add() -> None:
    assert parse(message()) == Request(
        Command.ADD, "c1", "/run/netns/x", PodName("shop", "cart-1", "uid-1"), addresses=("10.1.0.7", "fd00::7"), attachments=None
    )


def test_a_result_of_version_0_3_1() -> None:
    old = {"cniVersion": "0.3.1", "ips": [{"version": "4", "address": "10.1.0.7/16"}], "routes": [], "dns": {}}
    assert parse(message(body={"prevResult": old})).addresses == ("10.1.0.7",)


def test_runtimes_that_say_less() -> None:
    assert parse(message(args="K8S_POD_NAMESPACE=a;K8S_POD_NAME=b;")).pod == PodName("a", "b", "")
    assert parse(message(args="")).pod is None
    assert parse(message(args="IgnoreUnknown=1;K8S_POD_NAMESPACE=a;K8S_POD_NAME=")).pod is None
    assert parse(message(body={})).addresses == ()


def test_a_gc() -> None:
    listed = [{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "eth0"}]
    assert parse(message("GC", body={"cni.dev/valid-attachments": listed})).attachments == frozenset(("a", "b"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "greeting"),
        (b"GET / HTTP/1.1\r\n\r\n", "greeting"),
        (GREETING, "ends in its variables"),
        (GREETING + b"CNI_COMMAND=ADD\0", "ends in its variables"),
        (GREETING + b"CNI_COMMAND=ADD\0CNI_NETNS=x\0", "CNI_CONTAINERID is expected"),
        (message(CNI_NETNS="@").replace(b"@", b"\xff"), "CNI_NETNS is not UTF-8"),
        (message("VERSION"), "CNI_COMMAND: 'VERSION' is not for the agent"),
        (message("add"), "CNI_COMMAND"),
        (message()[:-1], "not JSON"),
        (message().replace(b'{"cniVersion"', b"[" * 100_000), "not JSON"),
        (message(body=[]), "not an object"),
        (message(args="K8S_POD_UID=a;K8S_POD_UID=b"), "CNI_ARGS names something twice"),
        (message(body={"prevResult": 1}), "prevResult: an object is expected"),
        (message(body={"prevResult": {"ips": {}}}), r"prevResult\.ips: a list is expected"),
        (message(body={"prevResult": {"interfaces": 3}}), r"prevResult\.interfaces: a list is expected"),
        (message(body={"prevResult": {"ips": [1]}}), r"prevResult\.ips\[0\]\.address: an address is expected"),
        (message(body={"prevResult": {"ips": [{"address": "10.0.0.1/8"}, {"address": "x"}]}}), r"prevResult\.ips\[1\]\.address: 'x' is no"),
        (message(body={"prevResult": {"ips": [{"address": "10.0.0.1"}] * 17}}), "more than 16 addresses"),
        (message("GC", body={}), "valid-attachments: a list is expected"),
        (message("GC", body={"cni.dev/valid-attachments": [{"ifname": "eth0"}]}), "containerID is expected in each"),
    ],
)
def test_what_is_refused(content: bytes, why: str) -> None:
    with pytest.raises(BadRequest, match=why):
        parse(content)


@pytest.mark.parametrize("index", [-1, 3, "1", None, 1.5, True])
def test_an_interface_that_the_result_does_not_have_hides_no_address(index: object) -> None:
    result = {"interfaces": [{"sandbox": "/x"}, {"sandbox": "/x"}], "ips": [{"address": "10.0.0.1/8", "interface": index}]}
    assert parse(message(body={"prevResult": result})).addresses == ("10.0.0.1",)


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_request_or_refused(content: bytes, greeted: bool) -> None:
    try:
        parse(GREETING + content if greeted else content)
    except BadRequest:
        pass


def test_answers_are_one_line() -> None:
    assert answer(None) == b"ok\n"
    assert answer(Refusal(Code.TRY_LATER, "no\nok\x00 because é")) == b"refused 11 no?ok? because ?\n"
    assert len(answer(Refusal(Code.TRY_LATER, "x" * 5000))) < 2048, "the plugin reads no more"
