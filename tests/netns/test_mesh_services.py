"""Services as a pod in the mesh sees them: VIPs and headless ones, ports by number and by name, endpoints that come and go."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.kit import apps
from tests.kit.mesh import Mesh
from tests.kit.netns import Pod
from tests.kit.polling import eventually

APP = 8080
VIP4, VIP6 = "10.96.0.10", "fd96::10"
FAMILIES = pytest.mark.parametrize("vip", [VIP4, VIP6], ids=["ipv4", "ipv6"])
BACKENDS = ("backend-a", "backend-b", "backend-c")


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with Mesh(nodes=2) as mesh:
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("outsider", node=1, labels={"role": "outside"})
        for number, name in enumerate(BACKENDS):
            mesh.pod(name, node=number % 2, ambient=True, labels={"role": "backend"}, ports={"web": APP + number})
        mesh.settle()
        yield mesh


@pytest.fixture
def mesh(shared: Mesh) -> Iterator[Mesh]:
    """With one echo server in each backend that says the pod's name: on 8080, and on a port of its own that is named `web`."""
    with ExitStack() as stack:
        for number, name in enumerate(BACKENDS):
            for port in {APP, APP + number}:
                stack.enter_context(apps.Echo(shared.pods[name], port, name=name))
        yield shared
    shared.clear("Service")
    for name in BACKENDS:
        shared.ready(name, True)
        shared.enrol(name)
        shared.relabel(name, "role", "backend")
    shared.settle()
    shared.check()


@pytest.fixture
def client(mesh: Mesh) -> Pod:
    return mesh.pods["client"]


def service(mesh: Mesh, port: int | str = APP, *, role: str = "backend", vips: tuple[str, ...] = (VIP4, VIP6)) -> None:
    """The service `web` on port 80 in front of all pods of a role."""
    mesh.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {
                "clusterIP": vips[0] if vips else "None",
                "clusterIPs": list(vips) or ["None"],
                "selector": {"role": role},
                "ports": [{"name": "http", "port": 80, "targetPort": port}],
            },
        }
    )
    mesh.settle()


def answering(client: Pod, to: tuple[str, int], times: int = 24) -> Counter[str]:
    """Which servers answered so many connections, one after the other."""
    return Counter(apps.call(client, to).partition(b"\n")[0].decode() for _ in range(times))


@FAMILIES
def test_a_vip_spreads_connections_over_all_ready_endpoints(mesh: Mesh, client: Pod, vip: str) -> None:
    service(mesh)
    answers = answering(client, (vip, 80), 45)
    assert set(answers) == set(BACKENDS)
    assert min(answers.values()) >= 5


def test_live_connections_count_as_load(mesh: Mesh, client: Pod) -> None:
    service(mesh)
    with ExitStack() as stack:
        live = [stack.enter_context(client.connect((VIP4, 80))) for _ in range(60)]
        names = Counter(apps.read_exactly(each, len(BACKENDS[0])).decode() for each in live)
    # The power of two choices keeps three endpoints within a few connections of each other; a random choice seldom does.
    assert max(names.values()) - min(names.values()) <= 8, names


def test_a_named_target_port_is_each_pods_own(mesh: Mesh, client: Pod) -> None:
    service(mesh, "web")
    assert set(answering(client, (VIP4, 80), 30)) == set(BACKENDS)


def test_the_connection_names_its_service(mesh: Mesh, client: Pod) -> None:
    service(mesh)
    apps.call(client, (VIP4, 80))
    assert eventually(lambda: mesh.agents[0].said("direction=outbound", "dst.service=web.default.svc.cluster.local"))
    assert eventually(lambda: mesh.agents[0].metric("istio_tcp_connections_opened_total", destination_service_name="web") >= 1)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_a_headless_service_is_its_pods_addresses(mesh: Mesh, client: Pod, family: int) -> None:
    service(mesh, vips=())
    for name in BACKENDS:
        assert answering(client, (mesh.pods[name].address(family), APP), 2) == {name: 2}


def test_a_service_may_lead_out_of_the_mesh(mesh: Mesh, client: Pod) -> None:
    service(mesh, role="outside")
    with apps.Echo(mesh.pods["outsider"], APP, name="outsider") as echo:
        assert answering(client, (VIP4, 80), 2) == {"outsider": 2}
    assert set(echo.peers) == {client.v4}


def test_an_endpoint_that_is_not_ready_is_not_used(mesh: Mesh, client: Pod) -> None:
    mesh.ready("backend-b", False)
    service(mesh)
    assert set(answering(client, (VIP4, 80))) == {"backend-a", "backend-c"}
    mesh.ready("backend-b", True)
    mesh.settle()
    assert "backend-b" in answering(client, (VIP4, 80))


def test_a_pod_that_is_not_ready_is_still_reached_by_its_address(mesh: Mesh, client: Pod) -> None:
    mesh.ready("backend-b", False)
    mesh.settle()
    assert answering(client, (mesh.pods["backend-b"].v4, APP), 1) == {"backend-b": 1}


@FAMILIES
def test_a_service_without_endpoints_refuses_and_says_why(mesh: Mesh, client: Pod, vip: str) -> None:
    service(mesh, role="nobody")
    assert apps.outcome(client, (vip, 80)) == "reset"
    assert eventually(lambda: mesh.agents[0].said(vip, "no healthy upstream", "its selector matches no running pod"))


def test_a_service_whose_endpoints_are_all_unready_refuses_and_says_why(mesh: Mesh, client: Pod) -> None:
    for name in BACKENDS:
        mesh.ready(name, False)
    service(mesh)
    assert apps.outcome(client, (VIP4, 80)) == "reset"
    assert eventually(lambda: mesh.agents[0].said("no healthy upstream", "3 endpoints, none of them ready"))


@FAMILIES
def test_a_port_that_the_service_does_not_declare_refuses_and_says_which_ones_there_are(mesh: Mesh, client: Pod, vip: str) -> None:
    service(mesh)
    assert apps.outcome(client, (vip, 8081)) == "reset"
    assert eventually(lambda: mesh.agents[0].said(vip, "does not declare port 8081 (declared: 80)"))


def test_an_endpoint_that_leaves_under_traffic_costs_no_connection(mesh: Mesh, client: Pod) -> None:
    service(mesh)
    with ExitStack() as stack:
        live = [stack.enter_context(client.connect((VIP4, 80))) for _ in range(12)]
        for each in live:
            apps.read_exactly(each, len(BACKENDS[0]) + 1)
        mesh.relabel("backend-a", "role", "retired")
        gone = eventually(lambda: "backend-a" not in answering(client, (VIP4, 80), 45))
        mesh.settle()
        assert gone
        # Of the two that are left, the less loaded one gets every new connection: which one that is, the twelve decide.
        assert set(answering(client, (VIP4, 80))) <= {"backend-b", "backend-c"}
        assert all(apps.ping(each) for each in live)


def test_an_endpoint_that_leaves_the_mesh_is_reached_in_plaintext(mesh: Mesh, client: Pod) -> None:
    service(mesh)
    for name in BACKENDS:
        mesh.enrol(name, False)
    eventually(lambda: _protocols(mesh) == {"TCP"})
    assert set(answering(client, (VIP4, 80))) == set(BACKENDS)


def _protocols(mesh: Mesh) -> set[object]:
    mesh.annotate()
    return {row["protocol"] for agent in mesh.agents for row in agent.rows("workloads") if str(row["name"]) in BACKENDS}


def test_a_removed_service_is_an_unknown_address(mesh: Mesh, client: Pod) -> None:
    service(mesh)
    assert answering(client, (VIP4, 80), 1)
    mesh.clear("Service")
    mesh.settle()
    # Nobody answers there: neither the mesh nor, in this topology, the node.
    assert apps.outcome(client, (VIP4, 80)) in ("reset", "refused")
