"""The whole of it: the chart applied to a real API server; the authority and the agents run with what it gives them, and pods talk.

No kubelet: the test makes the pods of the DaemonSet and mounts for them what their pod spec says (tokens, the ConfigMap with the roots).
The rights are those of the chart, the admission policy is in force, and each agent has a token that is bound to its own node.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml
from cryptography import x509

from tests.kit import apps
from tests.kit.authority import AuthorityProcess, authority
from tests.kit.helm import NAMESPACE, document, objects, template
from tests.kit.kube_api import ApiError, ApiServer, User
from tests.kit.kube_mesh import KubeMesh, Relay
from tests.kit.mesh import Agent
from tests.kit.netns import Node
from tests.kit.polling import eventually
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.request import IssueError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.rpc.client import Target

pytestmark = pytest.mark.netns

APP = 8080
SECONDS = 120.0
AUTHORITY = f"ztunnel-ca.{NAMESPACE}.svc"


def mapping(value: object) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value


def claims(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    return mapping(json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))))


@dataclass
class Installed:
    """What the chart says, and the authority that runs by it."""

    api: ApiServer
    manifests: dict[tuple[str, str], dict[str, object]]
    authority: AuthorityProcess

    def config(self, name: str, key: str) -> dict[str, Any]:
        data = mapping(self.manifests["ConfigMap", name]["data"])
        return document(data[key])

    def roots(self) -> str:
        try:
            found = self.api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/ztunnel-ca-root-cert")
        except ApiError:
            return ""
        return str(mapping(found["data"])["root-cert.pem"])


class InstalledMesh(KubeMesh):
    """Agents as the DaemonSet has them."""

    def __init__(self, installed: Installed, stack: ExitStack) -> None:
        self._installed = installed
        self._stack = stack
        super().__init__(installed.api, nodes=2, start=False)
        self._documents[f"Service-{NAMESPACE}-ztunnel-ca"] = {
            "kind": "Service",
            "metadata": {"namespace": NAMESPACE, "name": "ztunnel-ca"},
        }
        # Only what the chart grants.
        role = "test-" + self.user.name.replace(":", "-")
        self.api.delete(f"/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{role}")

    def _agent(self, node: Node, settings: str) -> Agent:
        agent = super()._agent(node, settings)
        name, directory = f"ztunnel-{node.name}", agent.directory
        body = self.api.pod(
            NAMESPACE, name, node=node.name, address=f"10.98.0.{node.number}", account="ztunnel", labels={"app": "ztunnel"}, annotations={}
        )
        self._documents[f"Pod-{NAMESPACE}-{name}"] = body
        bound = name, str(mapping(body["metadata"])["uid"])
        token = self.api.token(NAMESPACE, "ztunnel", pod=bound)
        assert claims(token)["kubernetes.io"]["node"]["name"] == node.name
        (directory / "kubeconfig").write_text(self.api.kubeconfig(User(self.user.name, token=token)))
        (directory / "token").write_text(self.api.token(NAMESPACE, "ztunnel", audience="istio-ca", pod=bound))
        (directory / "root-cert.pem").write_text(self._installed.roots())
        port = self._installed.authority.port
        self._stack.callback(Relay(node, port, ("127.0.0.1", port)).close)
        config = self._installed.config("ztunnel", "agent.yaml")
        config.pop("cni")
        config["sources"]["kubeconfig"] = str(directory / "kubeconfig")
        config["pods"] = {"netns_directory": str(self.netns)}
        config["admin"] = {"socket": str(directory / "agent.sock")}
        config["ca"] |= {
            "address": f"127.0.0.1:{port}",
            "server_name": AUTHORITY,
            "roots_file": str(directory / "root-cert.pem"),
            "token_file": str(directory / "token"),
        }
        config |= document(settings)
        (directory / "agent.yaml").write_text(yaml.safe_dump(config))
        return agent


@pytest.fixture(scope="module", name="installed")
def fixture_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    """An API server of its own, whose pods are this mesh's alone."""
    directory = tmp_path_factory.mktemp("installed")
    with ApiServer.started() as api:
        api.crds()
        api.namespace(NAMESPACE)
        manifests = template()
        api.kubectl("apply", "--server-side", "-f", "-", stdin=manifests)
        made = objects(manifests)
        (directory / "kubeconfig").write_text(api.kubeconfig(User("ztunnel-ca", token=api.token(NAMESPACE, "ztunnel-ca"))))
        config = document(mapping(made["ConfigMap", "ztunnel-ca"]["data"])["ca.yaml"])
        config["kubernetes"] = {"kubeconfig": str(directory / "kubeconfig"), "namespace": NAMESPACE}
        config["listen"] = {**config["listen"], "address": "127.0.0.1", "port": 0}
        with authority(directory / "run", config, name=AUTHORITY) as process:
            found = Installed(api, made, process)
            assert process.port
            eventually(found.roots, within=SECONDS, saying=f"the roots are published\n{process.log()}")
            yield found


def test_an_installed_mesh_carries_its_pods(installed: Installed) -> None:
    with ExitStack() as stack:
        mesh = stack.enter_context(InstalledMesh(installed, stack))
        client = mesh.pod("client", node=0, ambient=True)
        server = mesh.pod("server", node=1, ambient=True)
        mesh.start()
        mesh.settle()
        with apps.Echo(server, APP):
            eventually(lambda: mesh.annotation("server") == "enabled", within=SECONDS, saying="the agent has told of its pod")
            assert apps.call(client, (server.v4, APP)) == b"hello"
            eventually(lambda: apps.call(client, (server.v4, APP)) == b"hello" and mesh.agents[0].rows("tunnels"), within=SECONDS)
        (root,) = x509.load_pem_x509_certificates(installed.roots().encode())
        assert root.not_valid_after_utc.timestamp() > time.time()
        for agent, account in zip(mesh.agents, ("client", "server"), strict=True):
            (row,) = agent.rows("certificates")
            assert row["identity"] == str(mesh.identity(account))
            assert row["state"] == "Valid"
            assert not agent.said("right to"), agent.log
        log = installed.authority.log()
        assert log.count("certificate issued") >= 2
        assert "the right to" not in log


@contextmanager
def controller(installed: Installed, directory: Path) -> Iterator[Path]:
    """A replica with the chart's settings and rights; its log."""
    api, log = installed.api, directory / "controller.log"
    (directory / "controller.kubeconfig").write_text(api.kubeconfig(User("controller", token=api.token(NAMESPACE, "ztunnel-controller"))))
    config = installed.config("ztunnel-controller", "controller.yaml")
    config["kubernetes"] = {"kubeconfig": str(directory / "controller.kubeconfig"), "namespace": NAMESPACE}
    config["admin"] = {"address": "127.0.0.1", "metrics_port": 0, "readiness_port": 0}
    (directory / "controller.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "ztunnel", "controller", "--config", str(directory / "controller.yaml")]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield log
    finally:
        process.kill()
        process.wait(SECONDS)


def test_a_gateway_gets_pods_that_can_live_in_this_cluster(installed: Installed, tmp_path: Path) -> None:
    api = installed.api
    api.namespace("waypoints")
    gateway = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "gate", "namespace": "waypoints"},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
    }
    with ExitStack() as stack:
        log = stack.enter_context(controller(installed, tmp_path))
        api.apply(gateway)

        def made() -> dict[str, Any]:
            try:
                return api.request("GET", "/apis/apps/v1/namespaces/waypoints/deployments/gate")
            except ApiError as error:
                raise AssertionError(f"{error}\n{log.read_text()}") from error

        pod = eventually(made, within=SECONDS, saying="the Gateway has a Deployment")["spec"]["template"]["spec"]
        assert "is missing" not in log.read_text()
        container = pod["containers"][0]
        agent: Any = installed.manifests["DaemonSet", "ztunnel"]
        assert container["image"] == agent["spec"]["template"]["spec"]["containers"][0]["image"]
        assert container["args"][0] == "waypoint"
        environment = {each["name"]: each.get("value") for each in container["env"]}
        assert environment["WAYPOINT_CA_ADDRESS"] == f"{AUTHORITY}:15012"
        # The roots are where its volume wants them, and its account gets a certificate with them.
        (volume,) = [each["configMap"]["name"] for each in pod["volumes"] if "configMap" in each]
        found = eventually(lambda: api.request("GET", f"/api/v1/namespaces/waypoints/configmaps/{volume}"), within=SECONDS)
        (tmp_path / "roots.pem").write_text(str(mapping(found["data"])["root-cert.pem"]))
        account = pod["serviceAccountName"]
        uid = str(mapping(api.pod("waypoints", "gate-0", node="node-9", address="10.98.0.7", account=account)["metadata"])["uid"])
        (tmp_path / "token").write_text(api.token("waypoints", account, audience="istio-ca", pod=("gate-0", uid)))
        target = Target("127.0.0.1", installed.authority.port, AUTHORITY)
        asked = RemoteAuthority(target, tmp_path / "roots.pem", tmp_path / "token", "Kubernetes", 3600, impersonates=False)
        identity = SpiffeId("cluster.local", "waypoints", account)

        async def obtain() -> SpiffeId:
            return (await asked.obtain(identity, time.time())).identity

        def obtained() -> bool:
            try:
                return trio.run(obtain) == identity
            except IssueError as error:
                raise AssertionError(str(error)) from error

        eventually(obtained, within=SECONDS, saying="the waypoint has a certificate")
        api.delete("/api/v1/namespaces/waypoints/pods/gate-0")
        # Its rights at the API server: what it reads, and no more.
        waypoint = User(account, token=api.token("waypoints", account))
        for path in ("/api/v1/pods", "/apis/gateway.networking.k8s.io/v1/httproutes", "/apis/networking.istio.io/v1/virtualservices"):
            eventually(lambda path=path: not refused(api, waypoint, "GET", path, None), within=SECONDS, saying=f"{path} may be read")  # type: ignore[misc]  # a lambda's default
        for path in ("/api/v1/secrets", f"/api/v1/namespaces/{NAMESPACE}/secrets", "/api/v1/configmaps"):
            assert refused(api, waypoint, "GET", path, None), path


def refused(api: ApiServer, user: User, method: str, path: str, body: object) -> bool:
    try:
        api.request(method, path, body, user=user)
    except ApiError as error:
        return error.status == 403
    return False


def test_a_stolen_node_stays_one_node(installed: Installed, tmp_path: Path) -> None:
    """All that an agent holds, its tokens and kubeconfig, does nothing for another node's pods."""
    api = installed.api
    uid = str(mapping(api.pod(NAMESPACE, "ztunnel-thief", node="thief", address="10.98.0.9", account="ztunnel")["metadata"])["uid"])
    api.pod("default", "victim", node="elsewhere", address="10.98.0.8")
    thief = User("thief", token=api.token(NAMESPACE, "ztunnel", pod=("ztunnel-thief", uid)))
    annotation = {"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}}
    for method, path, body in (
        ("PATCH", "/api/v1/namespaces/default/pods/victim", annotation),
        ("PATCH", "/api/v1/namespaces/default/pods/victim", {"metadata": {"labels": {"app": "x"}}}),
        ("DELETE", "/api/v1/namespaces/default/pods/victim", None),
        ("GET", f"/api/v1/namespaces/{NAMESPACE}/secrets/ztunnel-ca", None),
        ("GET", "/api/v1/secrets", None),
        ("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/ztunnel-ca/token", {"spec": {"audiences": ["istio-ca"]}}),
        ("PATCH", f"/api/v1/namespaces/{NAMESPACE}/configmaps/ztunnel-ca-root-cert", {"data": {"root-cert.pem": "mine"}}),
    ):
        # The API server takes a policy and rights into use some moments after they were made.
        eventually(lambda wish=(method, path, body): refused(api, thief, *wish), within=SECONDS, saying=f"{method} {path} is refused")  # type: ignore[misc]  # a lambda's default
    api.delete("/api/v1/namespaces/default/pods/victim")
    api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/ztunnel-thief")
