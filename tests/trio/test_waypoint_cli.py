"""`ztunnel waypoint` as a user types it, against a lab whose objects are real and whose pods are not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from click.testing import CliRunner, Result

from tests.kit.builders import authorization, gateway, service_account
from tests.kit.polling import eventually
from ztunnel.cli.main import main
from ztunnel.lab.admission import Offered, Rules
from ztunnel.lab.api import Api
from ztunnel.lab.client import Client
from ztunnel.lab.cluster import Cluster, Mint
from ztunnel.lab.gateway_controller import GatewayController
from ztunnel.lab.gateways import Installation
from ztunnel.lab.objects import Key
from ztunnel.lab.paths import LAB_DIR_VARIABLE, lab_state_dir
from ztunnel.lab.pods import Kubelet
from ztunnel.lab.processes import Processes
from ztunnel.lab.server import Server
from ztunnel.lab.site import Site
from ztunnel.lab.wire import socket_path
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.tree import Tree, branches, put, strings, text

SERVICE: Tree = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "w"}, "ports": [{"port": 80}]},
}


class Lab:
    """A lab's API server and gateway controller in a thread."""

    def __init__(self, state: Path) -> None:
        numbers = count(1)
        self.cluster = Cluster(Rules(validate=parse), (4,), Mint(lambda: f"uid-{next(numbers)}", lambda: "2030-01-01T00:00:00Z"))
        self.site = Site(state, self.cluster, Processes(), {}, (4,), 1, -1)
        self.cluster.listeners.append(lambda _event, _body: self.site.bell.ring())
        self.controller = GatewayController(self.site, Installation(Path("/s"), "/code").pod_spec)
        self.cluster.bootstrap()
        self.controller.bootstrap()
        self.path = socket_path(state)
        self.started = threading.Event()
        self.stop: trio.CancelScope | None = None
        self.makes_pods = True

    def apply(self, body: Tree) -> None:
        """As any user would."""
        Client(self.site.state).call("apply", objects=[{"source": "f", "body": body}], namespace="default")

    async def serve(self) -> None:
        token = SimpleNamespace(are_services_current=lambda: True, are_gateways_current=self.controller.is_current)
        server = Server(Api(self.site, Kubelet(self.site), {}, cast(Any, token)), self.path)
        async with trio.open_nursery() as nursery:
            self.stop, self.token = nursery.cancel_scope, trio.lowlevel.current_trio_token()
            await nursery.start(server.run)
            nursery.start_soon(self.controller.run)
            nursery.start_soon(self.pods)
            self.started.set()

    async def pods(self) -> None:
        """Each deployment has a ready pod at once."""
        while True:
            changed = self.site.bell.next()
            for deployment in self.cluster.select("Deployment") if self.makes_pods else ():
                name, namespace = text(deployment, "metadata", "name"), text(deployment, "metadata", "namespace")
                if self.cluster.find(Key("Pod", namespace, name)) is None:
                    pod: Tree = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}}
                    put(pod, strings(deployment, "spec", "template", "metadata", "labels"), "metadata", "labels")
                    put(pod, [{"type": "Ready", "status": "True"}], "status", "conditions")
                    self.cluster.create(pod)
            await changed.wait()


@pytest.fixture(name="lab")
def fixture_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setenv(LAB_DIR_VARIABLE, str(tmp_path))
    state = lab_state_dir("lab")
    state.mkdir()
    made = Lab(state)
    made.cluster.apply([Offered("f", SERVICE), Offered("f", service_account("cart"))])
    thread = threading.Thread(target=trio.run, args=(made.serve,))
    thread.start()
    assert made.started.wait(30)
    yield made
    assert made.stop is not None
    made.token.run_sync_soon(made.stop.cancel)
    thread.join(30)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["waypoint", *words])


def lines(*words: str, code: int = 0) -> list[str]:
    result = invoke(*words)
    assert result.exit_code == code, result.output
    return result.output.splitlines()


def get(kind: str, name: str) -> Tree:
    (found,) = branches({"items": Client(lab_state_dir("lab")).call("get", kind=kind, namespace="default", name=name)}, "items")
    return found


def test_apply_waits_until_it_is_programmed_and_enrols_the_namespace(lab: Lab) -> None:
    assert lines("apply", "--enroll-namespace", "--wait", "--waypoint-timeout", "30") == [
        "waypoint default/waypoint applied",
        'namespace default labeled with "istio.io/use-waypoint: waypoint"',
        "Warning: namespace default is not in the mesh; consider the label istio.io/dataplane-mode=ambient",
    ]
    assert strings(get("Namespace", "default"), "metadata", "labels")["istio.io/use-waypoint"] == "waypoint"
    assert lines("list") == ["NAME       REVISION   TRAFFIC TYPE   PROGRAMMED", "waypoint   default    service        True"]
    eventually(lab.controller.is_current, within=30)
    shown = lines("status")
    assert shown[0].split() == ["KIND", "NAMESPACE", "NAME", "STATUS", "TYPE", "REASON", "MESSAGE"]
    assert [line.split()[:5] for line in shown[1:]] == [
        ["waypoint", "default", "waypoint", "True", "Accepted"],
        ["waypoint", "default", "waypoint", "True", "Programmed"],
        ["Service", "default", "web", "True", "istio.io/WaypointBound"],
    ]


def test_a_service_account_gets_a_waypoint_for_everything(lab: Lab) -> None:
    shown = lines("apply", "--name", "cart", "--enroll-service-account", "cart", "--enroll-service", "web")
    assert shown[1:] == [
        'service web labeled with "istio.io/use-waypoint: cart"',
        'service account cart labeled with "istio.io/use-waypoint: cart"',
    ]
    assert strings(get("Gateway", "cart"), "metadata", "labels") == {"istio.io/waypoint-for": "all"}
    assert invoke("apply", "--for", "service", "--enroll-service-account", "cart").exit_code == 2


def test_another_waypoints_users_are_not_taken_over_by_accident(lab: Lab) -> None:
    lines("apply", "--name", "one", "--enroll-service", "web")
    result = invoke("apply", "--name", "two", "--enroll-service", "web")
    assert result.exit_code == 1
    assert "is one already; use --overwrite" in result.output
    assert lab.cluster.find(Key("Gateway", "default", "two")) is None, "nothing is changed before"
    lines("apply", "--name", "two", "--enroll-service", "web", "--overwrite")
    assert strings(get("Service", "web"), "metadata", "labels")["istio.io/use-waypoint"] == "two"


def test_waiting_ends(lab: Lab) -> None:
    lab.makes_pods = False
    result = invoke("apply", "--wait", "--waypoint-timeout", "0.2")
    assert result.exit_code == 1
    assert "timed out while waiting for waypoint default/waypoint to be programmed" in result.output
    assert "no pod of it is ready yet; nobody was enrolled" in result.output


def test_status_says_what_is_wrong(lab: Lab) -> None:
    assert lines("status") == ["No waypoints found."]
    rule = [{"to": [{"operation": {"methods": ["GET"]}}]}]
    policy = authorization("l7", targetRefs=[{"group": "", "kind": "Service", "name": "web"}], rules=rule)
    lab.apply(policy)
    eventually(lab.controller.is_current, within=30)
    shown = lines("status", code=1)
    assert [line.split()[:6] for line in shown[2:]] == [
        ["AuthorizationPolicy", "default", "l7", "False", "WaypointAccepted", "AncestorNotBound"],
    ]
    assert lines("status", "nobody", code=1) == ['Error from server (NotFound): waypoint "default/nobody" not found']


def test_list_is_of_waypoints_only_and_of_all_namespaces_if_asked(lab: Lab) -> None:
    assert lines("list") == ["No waypoints found."]
    lab.apply(gateway("front", class_name="istio", listeners=[{"name": "h", "port": 80, "protocol": "HTTP"}]))
    lab.apply(gateway("far", namespace="istio-system", traffic="workload"))
    assert lines("list") == ["No waypoints found."]
    assert [line.split()[:4] for line in lines("list", "-A")[1:]] == [["istio-system", "far", "default", "workload"]]


def test_delete(lab: Lab) -> None:
    for name, revision in (("a", ""), ("b", "default"), ("c", "")):
        lines("apply", "--name", name, *(("-r", revision) if revision else ()))
    assert lines("delete", "a") == ["waypoint default/a deleted"]
    assert lines("delete", "a", code=1) == ['Error from server (NotFound): waypoint "default/a" not found']
    assert invoke("delete").exit_code == 2
    assert lines("delete", "--all", "-r", "default") == ["waypoint default/b deleted"]
    assert lines("delete", "--all") == ["waypoint default/c deleted"]
    assert lines("delete", "--all") == ["No waypoints found."]


def test_who_asks_for_a_deleted_waypoint_is_named(lab: Lab) -> None:
    lines("apply", "--enroll-namespace")
    lines("apply", "--name", "other")
    assert lines("delete", "other") == ["waypoint default/other deleted"]
    words = "namespace default still asks for waypoint, and is refused until that label goes"
    assert lines("delete", "waypoint") == [
        "waypoint default/waypoint deleted",
        f"Warning: {words}: kubectl label namespace default istio.io/use-waypoint-",
    ]


def test_a_service_of_the_same_name_is_no_waypoint(lab: Lab) -> None:
    said = lines("apply", "--name", "web", "--enroll-service", "web", code=1)
    assert said == ["error: a waypoint's Service has its name, and service default/web is there already; use another --name"]
    assert lines("list") == ["No waypoints found."]


def test_none_is_no_name() -> None:
    assert invoke("generate", "--name", "none").exit_code == 2
