"""Which list our plugin goes into, and what becomes of the others."""

from __future__ import annotations

import json

import pytest

from ztunnel.cni.conflist import BadConfiguration, Edit, Json, installed, removed

OURS: Json = {"type": "ztunnel-cni", "socket": "/run/s"}
BRIDGE: Json = {"type": "bridge", "ipam": {"type": "host-local"}}
PORTMAP: Json = {"type": "portmap", "capabilities": {"portMappings": True}}


def listing(*plugins: Json, version: object = "1.0.0", **more: object) -> bytes:
    return json.dumps({"cniVersion": version, "name": "k8s", **more, "plugins": plugins}).encode()


def single(version: object = "0.3.1", **more: object) -> bytes:
    return json.dumps({"cniVersion": version, "name": "k8s", **BRIDGE, **more}).encode()


def written(edit: Edit) -> dict[str, list[object]]:
    return {name: [each["type"] for each in json.loads(content)["plugins"]] for name, content in edit.write.items()}


def test_it_goes_to_the_end_of_the_first_list() -> None:
    edit = installed({"20-b.conflist": listing(BRIDGE), "10-a.conflist": listing(BRIDGE, PORTMAP, disableCheck=True)}, OURS)
    assert written(edit) == {"10-a.conflist": ["bridge", "portmap", "ztunnel-cni"]}
    document = json.loads(edit.write["10-a.conflist"])
    assert document == {"cniVersion": "1.0.0", "name": "k8s", "disableCheck": True, "plugins": [BRIDGE, PORTMAP, OURS]}
    assert edit.remove == ()


def test_what_is_as_it_should_be_is_left_alone() -> None:
    assert not installed({"10-a.conflist": listing(BRIDGE, OURS), "20-b.conf": single()}, OURS)
    assert not installed({}, OURS)


@pytest.mark.parametrize(
    "plugins", [(BRIDGE, {**OURS, "socket": "/old"}), (OURS, BRIDGE), (BRIDGE, OURS, PORTMAP), (OURS, BRIDGE, OURS)], ids=str
)
def test_an_older_self_and_another_place_are_mended(plugins: tuple[Json, ...]) -> None:
    edit = installed({"10-a.conflist": listing(*plugins)}, OURS)
    assert json.loads(edit.write["10-a.conflist"])["plugins"] == [each for each in plugins if each["type"] != "ztunnel-cni"] + [OURS]


def test_a_single_plugin_becomes_a_list_where_it_stood() -> None:
    edit = installed({"10-a.conf": single(), "10-a.conflist": listing(PORTMAP), "20-b.conflist": listing(PORTMAP)}, OURS)
    assert edit.remove == ("10-a.conf",)
    (name,) = edit.write
    assert min([name, "10-a.conflist", "20-b.conflist"]) == name, "the runtime takes it"
    document = json.loads(edit.write[name])
    assert document == {"cniVersion": "0.3.1", "name": "k8s", "plugins": [json.loads(single()), OURS]}
    assert not installed({name: edit.write[name], "10-a.conflist": listing(PORTMAP)}, OURS)


def test_a_list_without_plugins_is_passed_over_as_runtimes_do() -> None:
    edit = installed({"05-x.conflist": listing(), "06-y.conflist": listing(OURS), "10-a.conflist": listing(BRIDGE)}, OURS)
    assert written(edit) == {"06-y.conflist": [], "10-a.conflist": ["bridge", "ztunnel-cni"]}


def test_it_moves_with_the_runtimes_choice() -> None:
    edit = installed({"00-new.conflist": listing(PORTMAP), "10-a.conflist": listing(BRIDGE, OURS)}, OURS)
    assert written(edit) == {"00-new.conflist": ["portmap", "ztunnel-cni"], "10-a.conflist": ["bridge"]}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"10-a.conflist": b""}, "10-a.conflist: is not JSON"),
        ({"10-a.conflist": b'{"plugins": ['}, "10-a.conflist: is not JSON"),
        ({"10-a.conflist": b"[" * 100_000}, "10-a.conflist: is not JSON"),
        ({"10-a.conflist": b"[]"}, "10-a.conflist: is not a JSON object"),
        ({"10-a.conflist": b"{}", "20-b.conflist": listing(BRIDGE)}, "10-a.conflist: plugins: a list of objects"),
        ({"10-a.conflist": b'{"plugins": [1]}'}, "plugins: a list of objects"),
        ({"10-a.conf": b"{}"}, "10-a.conf: type: a plugin's name is expected"),
        ({"10-a.json": listing(BRIDGE)}, "10-a.json: type: a plugin's name is expected"),
        ({"10-a.conflist": listing(BRIDGE, version="0.2.0")}, r"10-a.conflist: cniVersion '0\.2\.0': one of 0\.3\.1, "),
        ({"10-a.conflist": listing(BRIDGE, version=None)}, "cniVersion None"),
        ({"10-a.conf": single(version=["1.0.0"])}, "cniVersion"),
    ],
)
def test_where_the_runtime_stops_nothing_is_done(files: dict[str, bytes], why: str) -> None:
    with pytest.raises(BadConfiguration, match=why):
        installed(files, OURS)


def test_removal_takes_it_out_of_every_list() -> None:
    files = {
        "10-a.conflist": listing(BRIDGE, OURS),
        "20-b.conflist": listing(PORTMAP, {**OURS, "socket": "/old"}, BRIDGE),
        "30-c.conflist": listing(BRIDGE),
        "40-d.conf": single(note="ztunnel-cni"),
        "50-e.conflist": b"ztunnel-cni",
    }
    assert written(removed(files)) == {"10-a.conflist": ["bridge"], "20-b.conflist": ["portmap", "bridge"]}
    assert not removed({"30-c.conflist": listing(BRIDGE)})
