"""An agent that ends while its DaemonSet stays, and one whose DaemonSet was deleted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import apps, kube_crds
from tests.kit.cni import plugin
from tests.kit.kube_api import ApiServer
from tests.kit.kube_mesh import KubeMesh
from tests.kit.netns import Pod
from tests.kit.polling import eventually

APP = 8080
WITHIN = 120.0
DAEMON_SETS = "/apis/apps/v1/namespaces/ztunnel-system/daemonsets"
RIGHTS = [{"apiGroups": ["apps"], "resources": ["daemonsets"], "verbs": ["list", "watch"]}]

pytestmark = pytest.mark.netns


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[KubeMesh]:
    with ApiServer.started() as api:
        kube_crds.define(api)
        with KubeMesh(api, start=False) as made:
            api.allow(made.user, RIGHTS, "daemon-sets")
            template = {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "a", "image": "a"}]}}
            spec = {"selector": {"matchLabels": {"app": "a"}}, "template": template}
            api.request("POST", DAEMON_SETS, {"metadata": {"name": "ztunnel"}, "spec": spec})
            for directory in ("bin", "net.d"):
                (tmp_path / directory).mkdir()
            listed = {"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "bridge"}]}
            (tmp_path / "net.d" / "10-test.conflist").write_text(json.dumps(listed))
            made.agents[0].overrides.update(
                ZTUNNEL_DAEMON_SET="ztunnel-system/ztunnel",
                ZTUNNEL_PODS_FIND="node",
                ZTUNNEL_PODS_RUNTIME_DIRECTORY=str(made.netns),
                ZTUNNEL_CNI_ENABLED="true",
                ZTUNNEL_CNI_SOCKET=str(tmp_path / "cni.sock"),
                ZTUNNEL_CNI_KNOWN_FILE=str(tmp_path / "known"),
                ZTUNNEL_CNI_PLUGIN=str(plugin()),
                ZTUNNEL_CNI_BIN_DIRECTORY=str(tmp_path / "bin"),
                ZTUNNEL_CNI_CONF_DIRECTORY=str(tmp_path / "net.d"),
            )
            made.pod("client", node=0, ambient=True)
            made.pod("server", node=1, ambient=True)
            made.start()
            made.settle()
            yield made


def rules(pod: Pod) -> bool:
    return "ztunnel" in pod.command("nft", "list", "ruleset")


def is_installed(directory: Path) -> bool:
    return (directory / "bin" / "ztunnel-cni").exists() and "ztunnel-cni" in (directory / "net.d" / "10-test.conflist").read_text()


def test_nothing_stays_when_nobody_follows(mesh: KubeMesh, tmp_path: Path) -> None:
    client, server, agent = mesh.pods["client"], mesh.pods["server"], mesh.agents[0]
    assert agent.stop() == 0
    assert rules(client), "another agent follows"
    assert is_installed(tmp_path)
    mesh.start(0)
    mesh.settle()
    mesh.api.delete(f"{DAEMON_SETS}/ztunnel")
    # What deletes the pods, and kubelet, take longer than the news.
    eventually(lambda: agent.said("no other agent follows"), within=WITHIN)
    assert agent.stop() == 0
    assert agent.said("leaving this node")
    assert not rules(client)
    assert not is_installed(tmp_path)
    eventually(lambda: mesh.annotation("client") != "enabled", within=WITHIN)
    with apps.tapped(agent.node) as tap, apps.Echo(server, APP):
        assert apps.call(client, (server.v4, APP), b"in plain") == b"in plain"
        assert tap.saw(b"in plain")
