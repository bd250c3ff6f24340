"""Agents that read their mesh from a real API server, and the pods' traffic through them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit import apps, kube_crds
from tests.kit.kube_api import ApiServer
from tests.kit.kube_mesh import AGENT_RULES, KubeMesh
from tests.kit.netns import Pod
from tests.kit.polling import eventually
from ztunnel.sources.kubernetes import MESH_KINDS

APP = 8080
WITHIN = 120.0

pytestmark = pytest.mark.netns


@pytest.fixture(scope="module")
def own_api() -> Iterator[ApiServer]:
    """One whose pods are this mesh's alone."""
    with ApiServer.started() as api:
        kube_crds.define(api)
        yield api


@pytest.fixture(scope="module")
def shared(own_api: ApiServer) -> Iterator[KubeMesh]:
    with KubeMesh(own_api) as mesh:
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("server", node=1, ambient=True)
        mesh.service("server", "server", {80: APP}, ("10.96.0.77",))
        mesh.settle()
        yield mesh


@pytest.fixture
def mesh(shared: KubeMesh) -> Iterator[KubeMesh]:
    yield shared
    shared.check()


def tunnelled(mesh: KubeMesh, client: Pod, to: tuple[str, int], server: Pod) -> bool:
    """Whether a new connection works and arrives through HBONE."""
    with apps.Echo(server, APP) as echo, client.connect(to) as connection:
        connection.sendall(b"hello")
        assert connection.recv(16) == b"hello"
        rows = mesh.agent_of(server).rows("connections")
        del echo
        return any(row["direction"] == "inbound" and row["protocol"] == "HBONE" for row in rows)


def test_pods_talk_through_the_mesh_and_say_that_they_are_in_it(mesh: KubeMesh) -> None:
    client, server = mesh.pods["client"], mesh.pods["server"]
    assert (mesh.annotation("client"), mesh.annotation("server")) == ("enabled", "enabled")
    for to in ((server.v4, APP), ("10.96.0.77", 80)):
        assert tunnelled(mesh, client, to, server)
    agent = mesh.agents[0]
    assert agent.metric("ztunnel_kubernetes_following") == len(MESH_KINDS)
    assert agent.metric("ztunnel_kubernetes_events_total", kind="Pod") >= 2
    assert agent.metric("ztunnel_kubernetes_requests_total", verb="watch", code="200") >= 8
    assert agent.metric("ztunnel_kubernetes_requests_total", verb="patch", code="200") >= 1


def test_policies_and_labels_are_followed(mesh: KubeMesh) -> None:
    client, server = mesh.pods["client"], mesh.pods["server"]
    mesh.policy("nobody", {"action": "DENY", "rules": [{}]})
    mesh.settle()
    # Refused while it connects or just after, as it happens.
    with apps.Echo(server, APP), pytest.raises(ConnectionResetError), client.connect((server.v4, APP)) as connection:
        connection.recv(16)
    mesh.delete("AuthorizationPolicy", "nobody")
    mesh.enrol("client", ambient=False)
    mesh.settle()
    eventually(lambda: mesh.annotation("client") == "", within=WITHIN, saying="the annotation is taken away")
    with apps.Echo(server, APP) as echo, client.connect((server.v4, APP)) as connection:
        connection.sendall(b"plain")
        assert connection.recv(16) == b"plain"
        assert echo.peers
    mesh.enrol("client")
    mesh.settle()
    assert tunnelled(mesh, client, (server.v4, APP), server)


def test_without_the_api_server_everything_goes_on(mesh: KubeMesh) -> None:
    client, server = mesh.pods["client"], mesh.pods["server"]
    with apps.Echo(server, APP), client.connect(("10.96.0.77", 80)) as lasting:
        mesh.api.stop()
        eventually(lambda: all(agent.problems for agent in mesh.agents), within=WITHIN, saying="the agents say that they do not hear")
        with client.connect(("10.96.0.77", 80)) as new:
            for connection in (lasting, new):
                connection.sendall(b"still here")
                assert connection.recv(16) == b"still here"
        mesh.api.start()
        lasting.sendall(b"and after")
        assert lasting.recv(16) == b"and after"
    eventually(lambda: not any(agent.problems for agent in mesh.agents), within=WITHIN, saying="the agents hear again")
    late = mesh.pod("late", node=0, ambient=True)
    mesh.settle()
    assert tunnelled(mesh, late, (server.v4, APP), server)
    mesh.remove_pod("late")
    mesh.settle()


def test_an_agent_that_waits_for_the_api_server_can_be_ended(mesh: KubeMesh) -> None:
    agent = mesh.agents[0]
    agent.stop()
    mesh.api.stop()
    agent.start()
    eventually(lambda: (agent.status() or {}).get("ready") is False, within=WITHIN, saying="it is up and waits")
    assert agent.stop() == 0
    mesh.api.start()
    mesh.start(0)
    mesh.settle()


def test_a_pod_that_cannot_be_taken_in_has_an_event_that_says_why(mesh: KubeMesh) -> None:
    pod = mesh.pod("lost", node=0)
    (mesh.netns / pod.uid).unlink()
    mesh.enrol("lost")
    found = eventually(lambda: mesh.events("lost"), within=WITHIN, saying="an Event")
    assert (found[0]["type"], found[0]["reason"], found[0]["regarding"]["uid"]) == ("Warning", "NotEnrolled", pod.uid)
    assert "not in the mesh" in found[0]["note"]
    eventually(lambda: mesh.annotation("lost") == "pending", within=WITHIN, saying="it is called pending")
    (mesh.netns / pod.uid).symlink_to(pod.path)
    eventually(lambda: mesh.annotation("lost") == "enabled", within=WITHIN, saying="it is in the mesh")
    mesh.remove_pod("lost")
    mesh.settle()


def test_rights_that_an_agent_lacks_to_tell_are_named(mesh: KubeMesh) -> None:
    mesh.api.allow(mesh.user, [rule for rule in AGENT_RULES if "patch" not in rule["verbs"]])
    agent = mesh.agents[1]
    mesh.pod("silent", node=1, ambient=True)
    eventually(lambda: agent.said("the right to patch pods is missing"), within=WITHIN, saying="the log names the right")
    mesh.api.allow(mesh.user, AGENT_RULES)
    eventually(lambda: mesh.annotation("silent") == "enabled", within=WITHIN, saying="it is told as soon as it may be")
    mesh.remove_pod("silent")
    mesh.settle()
