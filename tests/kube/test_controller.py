"""`ztunnel controller` against a real API server with the published CRDs: what Gateways get, what objects are told, who works, rights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.kit.builders import authorization, gateway
from tests.kit.kube_api import ApiError, ApiServer, Json, User
from tests.kit.polling import eventually
from ztunnel.controller.belongings import ROLE, ROLE_IN_NAMESPACE
from ztunnel.mesh.manifests.tree import Tree, at, branches, text

SECONDS = 90.0
GATEWAY_API = "/apis/gateway.networking.k8s.io/v1"
NAMESPACE = "ztunnel-system"
_READ = ["list", "watch"]
_KEPT = ["create", "patch", "delete"]
_RBAC = "rbac.authorization.k8s.io"
RIGHTS: dict[str, tuple[str, list[str], list[str]]] = {
    "namespaces": ("", ["namespaces"], _READ),
    "services": ("", ["services"], [*_READ, *_KEPT]),
    "serviceaccounts": ("", ["serviceaccounts"], [*_READ, *_KEPT]),
    "deployments.apps": ("apps", ["deployments"], [*_READ, *_KEPT]),
    "services/status": ("", ["services/status"], ["patch"]),
    "authorizationpolicies.security.istio.io": ("security.istio.io", ["authorizationpolicies", "requestauthentications"], _READ),
    "authorizationpolicies/status.security.istio.io": (
        "security.istio.io",
        ["authorizationpolicies/status", "requestauthentications/status"],
        ["patch"],
    ),
    "serviceentries.networking.istio.io": (
        "networking.istio.io",
        ["serviceentries", "workloadentries", "virtualservices", "destinationrules"],
        _READ,
    ),
    "virtualservices/status.networking.istio.io": (
        "networking.istio.io",
        ["serviceentries/status", "virtualservices/status", "destinationrules/status"],
        ["patch"],
    ),
    "gateways.gateway.networking.k8s.io": ("gateway.networking.k8s.io", ["gateways"], _READ),
    "gateways/status.gateway.networking.k8s.io": ("gateway.networking.k8s.io", ["gateways/status"], ["patch"]),
    "gatewayclasses.gateway.networking.k8s.io": ("gateway.networking.k8s.io", ["gatewayclasses"], [*_READ, "create"]),
    "gatewayclasses/status.gateway.networking.k8s.io": ("gateway.networking.k8s.io", ["gatewayclasses/status"], ["patch"]),
    "httproutes.gateway.networking.k8s.io": (
        "gateway.networking.k8s.io",
        ["httproutes", "grpcroutes", "tcproutes", "tlsroutes", "referencegrants"],
        _READ,
    ),
    "httproutes/status.gateway.networking.k8s.io": (
        "gateway.networking.k8s.io",
        ["httproutes/status", "grpcroutes/status", "tcproutes/status", "tlsroutes/status"],
        ["patch"],
    ),
    "rolebindings.rbac.authorization.k8s.io": (_RBAC, ["rolebindings", "clusterrolebindings"], [*_READ, *_KEPT]),
    "leases.coordination.k8s.io": ("coordination.k8s.io", ["leases"], ["get", "create", "update"]),
}
"""Every right that the controller needs, by what its absence is to name."""


@dataclass
class Replica:
    """One controller process."""

    process: subprocess.Popen[bytes]
    file: Path

    def says(self, *texts: str) -> None:
        """Wait until its log has these in one line."""
        eventually(
            lambda: any(all(each in line for each in texts) for line in self.file.read_text(errors="replace").splitlines()),
            within=SECONDS,
            saying=f"{texts} in the log",
        )


@pytest.fixture(scope="module", name="api")
def fixture_api() -> Iterator[ApiServer]:
    """Of its own: other tests give kinds of the same names schemas of their own."""
    with ApiServer.started() as api:
        api.crds()
        for role in (ROLE, ROLE_IN_NAMESPACE):
            api.apply({"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": {"name": role}, "rules": []})
        api.namespace(NAMESPACE)
        yield api


def allowed(api: ApiServer, name: str, without: str = "") -> User:
    """A user with the controller's rights, but one."""
    user = api.user(name)
    rules: list[dict[str, list[str]]] = [
        {"apiGroups": [group], "resources": resources, "verbs": verbs}
        for right, (group, resources, verbs) in RIGHTS.items()
        if right != without
    ]
    rules.append({"apiGroups": [_RBAC], "resources": ["clusterroles"], "verbs": ["bind"], "resourceNames": [ROLE, ROLE_IN_NAMESPACE]})
    api.allow(user, rules)
    return user


@contextmanager
def controller(api: ApiServer, directory: Path, user: User | None = None, identity: str = "one", lease: str = "") -> Iterator[Replica]:
    directory.mkdir(exist_ok=True)
    kubeconfig, config, log = (directory / f"{identity}.{suffix}" for suffix in ("kubeconfig", "yaml", "log"))
    kubeconfig.write_text(api.kubeconfig(user or allowed(api, "controller")))
    settings: Json = {
        "kubernetes": {"kubeconfig": str(kubeconfig), "namespace": NAMESPACE},
        "election": {"identity": identity, "lease": lease or "one", "lease_seconds": 3, "renew_seconds": 2, "retry_seconds": 0.2},
        "gateways": {"image": "registry.example/ztunnel:test", "environment": ["WAYPOINT_LOG_LEVEL=debug"]},
        "admin": {"address": "127.0.0.1", "metrics_port": 0, "readiness_port": 0},
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ZTUNNEL_", "KUBE"))}
    with log.open("wb") as output:
        command = [sys.executable, "-m", "ztunnel", "controller", "--config", str(config)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield Replica(process, log)
    finally:
        process.terminate()
        try:
            assert process.wait(SECONDS) in (0, -9), log.read_text()
        finally:
            process.kill()


@pytest.fixture(scope="class", name="replica")
def fixture_replica(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with controller(api, tmp_path_factory.mktemp("controller")) as replica:
        yield replica


def find(api: ApiServer, path: str) -> Tree | None:
    try:
        return api.request("GET", path)
    except ApiError as error:
        if error.status == 404:
            return None
        raise


def exists(api: ApiServer, path: str) -> Tree:
    return eventually(lambda: find(api, path), within=SECONDS, saying=f"{path} is there")


def told(api: ApiServer, path: str, type_: str, *members: str) -> tuple[str, str, str]:
    """Status, reason and message of a condition; empty when there is none."""
    found = find(api, path) or {}
    holders: Sequence[Tree] = branches(found, *members) if members else [{"conditions": at(found, "status", "conditions")}]
    for holder in holders:
        for each in branches(holder, "conditions"):
            if text(each, "type") == type_:
                return text(each, "status"), text(each, "reason"), text(each, "message")
    return "", "", ""


def is_told(api: ApiServer, path: str, type_: str, status: str, reason: str, *members: str) -> str:
    """Wait for a condition; its message."""
    eventually(
        lambda: told(api, path, type_, *members)[:2] == (status, reason),
        within=SECONDS,
        saying=f"{path}: {type_} is {status} for {reason}, not {told(api, path, type_, *members)}",
    )
    return told(api, path, type_, *members)[2]


def parent_ref(name: str) -> Json:
    return {"group": "", "kind": "Service", "name": name}


def deploy(api: ApiServer, namespace: str, name: str) -> None:
    """Report a deployment's pod as ready, as the cluster's own controllers would."""
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}/status"
    status = {"replicas": 1, "readyReplicas": 1, "availableReplicas": 1, "updatedReplicas": 1, "observedGeneration": 1}
    api.request("PATCH", path, {"status": status})


def shop(api: ApiServer, name: str, labels: Mapping[str, str] | None = None) -> str:
    """A namespace with one service."""
    api.namespace(name, {"istio.io/dataplane-mode": "ambient", **(labels or {})})
    api.apply(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": name},
            "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]},
        }
    )
    return name


class TestOne:
    """One replica that goes on working; the tests behind have replicas of their own, which it would be faster than."""

    def test_a_gateway_gets_its_pods_and_its_addresses_once_one_is_ready(self, api: ApiServer, replica: Replica) -> None:
        shop(api, "one", {"istio.io/use-waypoint": "waypoint"})
        api.apply(gateway("waypoint", namespace="one"))
        place = f"{GATEWAY_API}/namespaces/one/gateways/waypoint"
        account = exists(api, "/api/v1/namespaces/one/serviceaccounts/waypoint")
        service = exists(api, "/api/v1/namespaces/one/services/waypoint")
        deployment = exists(api, "/apis/apps/v1/namespaces/one/deployments/waypoint")
        owners = [text(each, "kind") for body in (account, service, deployment) for each in branches(body, "metadata", "ownerReferences")]
        assert owners == ["Gateway"] * 3
        container = branches(deployment, "spec", "template", "spec", "containers")[0]
        assert text(container, "image") == "registry.example/ztunnel:test"
        environment = {text(each, "name"): text(each, "value") for each in branches(container, "env")}
        assert (environment["WAYPOINT_NAME"], environment["WAYPOINT_LOG_LEVEL"]) == ("waypoint", "debug")
        assert at(container, "securityContext", "readOnlyRootFilesystem") is True

        assert is_told(api, place, "Programmed", "False", "AddressNotAssigned")
        web = "/api/v1/namespaces/one/services/web"
        assert "no address yet" in is_told(api, web, "istio.io/WaypointBound", "False", "WaypointIsNotReady")
        deploy(api, "one", "waypoint")
        is_told(api, place, "Programmed", "True", "Programmed")
        ip = text(service, "spec", "clusterIP")
        found = branches(exists(api, place), "status", "addresses")
        assert [text(each, "value") for each in found] == [ip, "waypoint.one.svc.cluster.local"]
        is_told(api, web, "istio.io/WaypointBound", "True", "WaypointAccepted")
        is_told(api, f"{GATEWAY_API}/gatewayclasses/istio-waypoint", "Accepted", "True", "Accepted")

    def test_what_somebody_edits_or_deletes_is_mended_and_what_others_add_stays(self, api: ApiServer, replica: Replica) -> None:
        shop(api, "edited")
        api.apply(gateway("waypoint", namespace="edited"))
        path = "/apis/apps/v1/namespaces/edited/deployments/waypoint"
        exists(api, path)
        api.kubectl("set", "image", "deployment/waypoint", "istio-proxy=somebody/else:1", "-n", "edited")
        api.kubectl("scale", "deployment/waypoint", "--replicas=3", "-n", "edited")

        def image() -> str:
            return text(branches(find(api, path), "spec", "template", "spec", "containers")[0], "image")

        eventually(lambda: image() == "registry.example/ztunnel:test", within=SECONDS, saying="the image is ours again")
        assert at(find(api, path), "spec", "replicas") == 3
        uid = text(find(api, "/api/v1/namespaces/edited/services/waypoint"), "metadata", "uid")
        api.delete("/api/v1/namespaces/edited/services/waypoint")
        eventually(
            lambda: text(find(api, "/api/v1/namespaces/edited/services/waypoint"), "metadata", "uid") not in ("", uid),
            within=SECONDS,
            saying="the service is made again",
        )

    def test_a_gateway_of_another_class_keeps_nothing(self, api: ApiServer, replica: Replica) -> None:
        shop(api, "moved")
        api.apply(gateway("waypoint", namespace="moved"))
        path = "/apis/apps/v1/namespaces/moved/deployments/waypoint"
        exists(api, path)
        binding = f"/apis/{_RBAC}/v1/clusterrolebindings/{ROLE}:moved:waypoint"
        assert branches(exists(api, binding), "subjects")[0]["namespace"] == "moved"
        api.apply(gateway("waypoint", namespace="moved", class_name="somebody-elses"))
        eventually(lambda: find(api, path) is None, within=SECONDS, saying="the deployment is gone")
        eventually(lambda: find(api, binding) is None, within=SECONDS, saying="the right to read the mesh is gone")

    def test_what_is_there_already_is_not_taken(self, api: ApiServer, replica: Replica) -> None:
        shop(api, "taken")
        api.ensure("/api/v1/namespaces/taken/serviceaccounts", {"metadata": {"name": "payments"}})
        api.apply(gateway("payments", namespace="taken"))
        place = f"{GATEWAY_API}/namespaces/taken/gateways/payments"
        message = is_told(api, place, "Programmed", "False", "Invalid")
        assert "ServiceAccount taken/payments is there already" in message
        assert find(api, "/apis/apps/v1/namespaces/taken/deployments/payments") is None
        api.delete("/api/v1/namespaces/taken/serviceaccounts/payments")
        exists(api, "/apis/apps/v1/namespaces/taken/deployments/payments")
        is_told(api, place, "Programmed", "False", "AddressNotAssigned")

    def test_routes_and_policies_are_told_and_others_words_stay(self, api: ApiServer, replica: Replica) -> None:
        shop(api, "routed", {"istio.io/use-waypoint": "waypoint"})
        api.apply(gateway("waypoint", namespace="routed"))
        exists(api, "/apis/apps/v1/namespaces/routed/deployments/waypoint")
        deploy(api, "routed", "waypoint")
        parent = {"group": "", "kind": "Service", "name": "web", "port": 80}
        api.apply(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": "web", "namespace": "routed"},
                "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "nowhere", "port": 80}]}]},
            },
            authorization("l7", namespace="routed", targetRefs=[parent_ref("web")], rules=[{"to": [{"operation": {"methods": ["GET"]}}]}]),
            authorization("lost", namespace="routed", targetRefs=[parent_ref("nothing")]),
        )  # fmt: skip
        route = f"{GATEWAY_API}/namespaces/routed/httproutes/web"
        theirs = {
            "controllerName": "example.com/other",
            "parentRef": {"name": "edge"},
            "conditions": [
                {"type": "Accepted", "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2030-01-01T00:00:00Z"}
            ],
        }
        is_told(api, route, "ResolvedRefs", "False", "BackendNotFound", "status", "parents")
        present = branches(find(api, route), "status", "parents")
        api.request("PATCH", f"{route}/status", {"status": {"parents": [theirs, *present]}})
        api.request("PATCH", route, {"spec": {"rules": [{"backendRefs": [{"name": "web", "port": 80}]}]}})
        eventually(
            lambda: (
                [text(each, "controllerName") for each in branches(find(api, route), "status", "parents")]
                == ["example.com/other", "istio.io/mesh-controller"]
                and told(api, route, "ResolvedRefs", "status", "parents") != ("", "", "")
            ),
            within=SECONDS,
            saying="both controllers' words are there",
        )
        policies = "/apis/security.istio.io/v1/namespaces/routed/authorizationpolicies"
        is_told(api, f"{policies}/l7", "WaypointAccepted", "True", "Accepted")
        is_told(api, f"{policies}/lost", "WaypointAccepted", "False", "TargetNotFound")

    def test_a_status_at_rest_is_not_written_again(self, api: ApiServer, replica: Replica) -> None:
        shop(api, "rest", {"istio.io/use-waypoint": "waypoint"})
        api.apply(gateway("waypoint", namespace="rest"))
        exists(api, "/apis/apps/v1/namespaces/rest/deployments/waypoint")
        deploy(api, "rest", "waypoint")
        place = f"{GATEWAY_API}/namespaces/rest/gateways/waypoint"
        is_told(api, place, "Programmed", "True", "Programmed")
        is_told(api, "/api/v1/namespaces/rest/services/web", "istio.io/WaypointBound", "True", "WaypointAccepted")
        watched = (place, "/api/v1/namespaces/rest/services/web", "/apis/apps/v1/namespaces/rest/deployments/waypoint")
        versions = [text(find(api, path), "metadata", "resourceVersion") for path in watched]
        # Something else happens, which makes it look at everything.
        api.namespace("rest", {"another": "label"})
        shop(api, "restless", {"istio.io/use-waypoint": "none-such"})
        is_told(api, "/api/v1/namespaces/restless/services/web", "istio.io/WaypointBound", "False", "WaypointIsNotReady")
        assert [text(find(api, path), "metadata", "resourceVersion") for path in watched] == versions


def test_one_of_two_replicas_works_and_the_other_takes_over(api: ApiServer, tmp_path: Path) -> None:
    user = allowed(api, "two-controllers")
    with controller(api, tmp_path, user, "first", "two") as first:
        first.says("leading", "identity=first")
        with controller(api, tmp_path, user, "second", "two") as second:
            lease = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/two"
            assert text(exists(api, lease), "spec", "holderIdentity") == "first"
            first.process.kill()
            first.process.wait(SECONDS)
            second.says("leading", "identity=second")
            assert at(find(api, lease), "spec", "leaseTransitions") == 1
            second.process.terminate()
            assert second.process.wait(SECONDS) == 0
            assert text(find(api, lease), "spec", "holderIdentity") == ""


@pytest.mark.parametrize("right", RIGHTS)
def test_a_missing_right_is_named(api: ApiServer, tmp_path: Path, right: str) -> None:
    number = list(RIGHTS).index(right)
    namespace = shop(api, f"right-{number}", {"istio.io/use-waypoint": "waypoint"})
    if right.startswith("gatewayclasses"):
        # Only who has none makes them, and only who is told anew writes.
        for name in ("istio-waypoint", "istio"):
            api.delete(f"{GATEWAY_API}/gatewayclasses/{name}")
    user = allowed(api, f"without-{number}", right)
    with controller(api, tmp_path, user, lease=f"without-{number}") as replica:
        parent = {"group": "", "kind": "Service", "name": "web"}
        rule = {"route": [{"destination": {"host": "web"}}]}
        api.apply(
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "VirtualService",
                "metadata": {"name": "web", "namespace": namespace},
                "spec": {"hosts": ["web"], "http": [rule]},
            },
            gateway("waypoint", namespace=namespace),
            authorization("l7", namespace=namespace, targetRefs=[parent_ref("web")]),
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "HTTPRoute",
                "metadata": {"name": "web", "namespace": namespace},
                "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]},
            },
        )
        replica.says("the right to", f"{right} is missing")
