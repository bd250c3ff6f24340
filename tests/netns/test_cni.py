"""New pods through a real CNI chain (Debian's bridge plugin, then ours) and a real agent: nothing leaves a meshed pod past it."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kit.cni import Chain, Refused, Sandbox, arguments, call, plugin
from tests.kit.cni_cluster import AMBIENT, APP, Cluster, carries, cluster
from tests.kit.polling import eventually
from ztunnel.mesh.ports import INBOUND_HBONE

WAIT = 60


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cni")) as made:
        made.start()
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path) as made:
        yield made


def test_the_first_packet_of_a_new_pod_is_captured(shared: Cluster) -> None:
    args = shared.schedule("first")
    with Sandbox.make("first") as sandbox:
        result = shared.chain.add(sandbox, args)
        # Its object has no address yet: what is known is known from CNI.
        assert carries(sandbox, shared.server, shared.agent) == {INBOUND_HBONE}
        assert shared.row("first")["captured"]
        assert "tcp flags" not in sandbox.place.command("nft", "list", "ruleset"), "a new pod has nothing that a grace period would spare"
        shared.chain.check(sandbox, args, result)
        shared.schedule("first", addresses=(sandbox.place.v4,))
        assert carries(sandbox, shared.server, shared.agent) == {INBOUND_HBONE}
        shared.chain.delete(sandbox, args)
    shared.mesh.delete("Pod", "first")
    eventually(lambda: not shared.row("first"), within=WAIT)


def test_results_of_the_oldest_version_are_understood(shared: Cluster) -> None:
    chain, args = replace(shared.chain, version="0.3.1"), shared.schedule("old")
    with Sandbox.make("old") as sandbox:
        assert chain.add(sandbox, args)["cniVersion"] == "0.3.1"
        assert carries(sandbox, shared.server, shared.agent) == {INBOUND_HBONE}
        chain.delete(sandbox, args)
    shared.mesh.delete("Pod", "old")


def test_a_pod_outside_of_the_mesh_is_let_through(shared: Cluster) -> None:
    args = shared.schedule("plain", labels={})
    with Sandbox.make("plain") as sandbox:
        result = shared.chain.add(sandbox, args)
        assert carries(sandbox, shared.server, shared.agent) == {APP}
        assert not shared.row("plain")["captured"]
        shared.chain.check(sandbox, args, result)
        shared.chain.delete(sandbox, args)
    shared.mesh.delete("Pod", "plain")


def test_a_pod_that_is_made_before_the_mesh_hears_of_it_waits(shared: Cluster) -> None:
    with Sandbox.make("early") as sandbox:
        shared.mesh.namespace("later", **AMBIENT)
        # Nothing else would let the waiting plugin go.
        timer = threading.Timer(0.5, lambda: shared.schedule("early", namespace="later", labels={}))
        timer.start()
        shared.chain.add(sandbox, arguments("early", "later", "uid-early"))
        timer.join()
        assert carries(sandbox, shared.server, shared.agent) == {INBOUND_HBONE}
        shared.chain.delete(sandbox, arguments("early", "later", "uid-early"))
    shared.mesh.delete("Pod", "early", "later")


def test_a_pod_that_cannot_be_captured_does_not_start(own: Cluster) -> None:
    own.agent.overrides["ZTUNNEL_CNI_ADD_SECONDS"] = "1"
    own.start()
    args = own.schedule("busy")

    def refusal() -> str:
        """As kubelet, tries again and again."""
        with Sandbox.make("busy") as sandbox, sandbox.place.listener(INBOUND_HBONE, "0.0.0.0"), pytest.raises(Refused) as refused:
            own.chain.add(sandbox, args)
        return str(refused.value)

    # On a slow machine the first second may be over before anything was tried.
    eventually(lambda: "15008" in refusal(), within=WAIT)
    with Sandbox.make("unknown") as sandbox, pytest.raises(Refused, match=r"11 .*does not know pod default/unknown"):
        own.chain.add(sandbox, arguments("unknown", uid="u"))


def test_a_namespace_that_the_agent_cannot_see_is_refused(shared: Cluster) -> None:
    args = shared.schedule("unseen")
    ours = shared.chain.plugins[1]
    given = {**ours, "cniVersion": "1.0.0", "name": "test", "prevResult": {"ips": [{"address": "10.101.0.200/25"}]}}
    code, words = call("ADD", given, args=args, path="/run/netns/gone").error
    assert (code, "HostToContainer" in words) == (11, True), words
    code, words = call("ADD", {**given, "prevResult": {"ips": []}}, args=args, path="/run/netns/gone").error
    assert (code, "no address" in words) == (7, True), words
    shared.mesh.delete("Pod", "unseen")


def test_check_says_what_is_wrong(shared: Cluster) -> None:
    args = shared.schedule("checked")
    with Sandbox.make("checked") as sandbox:
        result = shared.chain.add(sandbox, args)
        sandbox.place.command("ip", "rule", "del", "priority", "32764")
        shared.chain.check(sandbox, args, result)
        assert "32764" in sandbox.place.command("ip", "rule"), "what can be mended is mended"
        shared.chain.delete(sandbox, args)
    shared.schedule("never", addresses=("10.101.0.201",))
    given = {**shared.chain.plugins[1], "cniVersion": "1.0.0", "name": "test", "prevResult": result}
    eventually(lambda: bool(shared.row("never")), within=WAIT)
    code, words = call("CHECK", given, args=arguments("never", uid="uid-never")).error
    assert (code, "no namespace of pod uid-never" in words) == (11, True), words
    for name in ("checked", "never"):
        shared.mesh.delete("Pod", name)


def test_a_second_sandbox_is_captured_before_it_starts(shared: Cluster) -> None:
    args = shared.schedule("again")
    with Sandbox.make("again-1") as first:
        shared.chain.add(first, args)
        shared.schedule("again", addresses=(first.place.v4,))
        # As after a crash of the sandbox: the object still has the old address, and the old sandbox is cleaned up later.
        with Sandbox.make("again-2") as second:
            shared.chain.add(second, args)
            assert second.place.v4 != first.place.v4
            assert carries(second, shared.server, shared.agent) == {INBOUND_HBONE}
            shared.chain.delete(first, args)
            assert carries(second, shared.server, shared.agent) == {INBOUND_HBONE}
            shared.schedule("again", addresses=(second.place.v4,))
            shared.chain.delete(second, args)
    shared.mesh.delete("Pod", "again")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_without_the_agent_only_pods_outside_of_the_mesh_start(own: Cluster, how: signal.Signals) -> None:
    own.start()
    meshed, plain = own.schedule("meshed"), own.schedule("unmeshed", labels={})
    eventually(
        lambda: "allow pod uid-unmeshed\n" in own.known.read_text() and "refuse pod uid-meshed\n" in own.known.read_text(), within=WAIT
    )
    own.agent.stop(how)
    with Sandbox.make("meshed") as sandbox, pytest.raises(Refused, match=r"11 .*the pod is in the mesh"):
        own.chain.add(sandbox, meshed)
    with Sandbox.make("unmeshed") as sandbox:
        own.chain.add(sandbox, plain)
        own.chain.delete(sandbox, plain)
    with Sandbox.make("new") as sandbox:
        own.chain.add(sandbox, arguments("new", "plain", "uid-new"))
        own.chain.delete(sandbox, arguments("new", "plain", "uid-new"))
        with pytest.raises(Refused, match=r"11 .*the namespace may be in the mesh: default"):
            own.chain.add(sandbox, arguments("new", "default", "uid-new"))


def test_pods_that_are_there_when_the_agent_starts_are_captured(own: Cluster) -> None:
    own.start()
    args = own.schedule("present")
    with Sandbox.make("present") as sandbox:
        own.chain.add(sandbox, args)
        own.schedule("present", addresses=(sandbox.place.v4,))
        eventually(lambda: own.row("present").get("captured"), within=WAIT)
        own.agent.stop()
        own.mesh.start(0)
        eventually(lambda: own.row("present").get("captured"), within=WAIT)
        assert carries(sandbox, own.server, own.agent) == {INBOUND_HBONE}


def test_the_agent_installs_the_plugin_and_keeps_it_until_it_leaves_for_good(own: Cluster, tmp_path: Path) -> None:
    programs, configurations = tmp_path / "bin", tmp_path / "net.d"
    for directory in (programs, configurations):
        directory.mkdir()
    bridge = own.chain.plugins[0]
    (configurations / "10-bridge.conf").write_text(json.dumps({"cniVersion": "0.4.0", "name": "test", **bridge}))
    before = (configurations / "10-bridge.conf").read_bytes()
    own.agent.overrides.update(
        ZTUNNEL_CNI_PLUGIN=str(plugin()),
        ZTUNNEL_CNI_BIN_DIRECTORY=str(programs),
        ZTUNNEL_CNI_CONF_DIRECTORY=str(configurations),
    )
    own.start()
    listed = json.loads((configurations / "10-bridge.conf.conflist").read_text())
    chain = Chain(own.node, tuple(listed["plugins"]), listed["cniVersion"], programs / "ztunnel-cni")
    args = own.schedule("first")
    with Sandbox.make("first") as sandbox:
        chain.add(sandbox, args)
        assert carries(sandbox, own.server, own.agent) == {INBOUND_HBONE}
        chain.delete(sandbox, args)
    assert own.agent.metric("ztunnel_cni_requests_total", command="ADD", answer="ok") == 1
    assert own.agent.stop() == 0
    assert (programs / "ztunnel-cni").exists(), "while the agent is replaced, new pods wait"
    with Sandbox.make("second") as sandbox, pytest.raises(Refused, match=r"11 .*the pod is in the mesh"):
        chain.add(sandbox, args)
    own.agent.overrides["ZTUNNEL_CNI_REMOVE_AT_EXIT"] = "true"
    own.mesh.start(0)
    (configurations / "05-broken.conflist").write_text("{")
    eventually(lambda: any("05-broken.conflist: is not JSON" in problem for problem in own.agent.problems), within=WAIT)
    assert own.agent.status()["pending"] == ["cni"]  # type: ignore[index]  # it answers
    (configurations / "05-broken.conflist").unlink()
    own.agent.await_ready()
    assert own.agent.stop() == 0
    assert {each.name: each.read_bytes() for each in configurations.iterdir()} == {"10-bridge.conf": before}
    assert list(programs.iterdir()) == []
