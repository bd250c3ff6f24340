"""The chart and what it renders: taken by a real API server, with the settings that our programs take and the rights that they need."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit.authority import authority
from tests.kit.builders import gateway
from tests.kit.helm import CHART, NAMESPACE, ROOT, ChartRefused, objects, template
from tests.kit.kube_api import ApiError, ApiServer, User, tools
from tests.kit.polling import eventually
from ztunnel import ca_settings, controller_settings, settings
from ztunnel.controller.belongings import RBAC, ROLE_IN_NAMESPACE, belongings, bindings
from ztunnel.controller.pods import ProxySettingsOfPods
from ztunnel.mesh.manifests.tree import branches, put, text

SECONDS = 60.0
VARIANTS: dict[str, list[str]] = {
    "defaults": [],
    "istiod": [
        "--set=controller.enabled=false",
        "--set=ca.enabled=false,certificates.address=istiod.istio-system.svc:15012,certificates.rootsConfigMap=istio-ca-root-cert",
        "--set=admissionPolicy.enabled=false",
    ],
    "bare": ["--set=agent.cni.enabled=false,agent.findByProcesses=false,agent.probes.enabled=false,ca.replicas=1"],
    "full": [
        "--set=networkPolicy.enabled=true,dashboard.enabled=true,ca.rootSecret=cacerts,image.digest=sha256:" + "a" * 64,
        '--set-json=ca.publishTo=["*"]',
        '--set-json=agent.settings={"workers":2,"tunnel":{"same_node":"plaintext"}}',
        "--set=controller.taints=true",
        '--set-json=imagePullSecrets=[{"name":"x"}]',
    ],
}


@pytest.fixture(scope="module", autouse=True)
def needs_tools(request: pytest.FixtureRequest) -> None:
    """Helm comes with the API server; where there is neither, conftest has left these tests out."""
    if tools()[0] is None:
        pytest.skip("no helm")


@pytest.fixture(scope="module", autouse=True)
def leave_no_trace(needs_tools: None, kube_api: ApiServer) -> Iterator[None]:
    """Pods and the admission policy would disturb tests of whole meshes, which share the API server."""
    yield
    for kind in ("validatingadmissionpolicybindings", "validatingadmissionpolicies"):
        for name in ("ztunnel-agent", "ztunnel-controller"):
            kube_api.delete(f"/apis/admissionregistration.k8s.io/v1/{kind}/{name}")
    for namespace in (NAMESPACE, "admission"):
        kube_api.kubectl("delete", "pods", "--all", "--namespace", namespace, "--force", "--grace-period=0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_api_server_takes_it(kube_api: ApiServer, variant: str) -> None:
    kube_api.namespace(NAMESPACE)
    manifests = template(*VARIANTS[variant])
    said = kube_api.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", stdin=manifests)
    assert said.count("serverside-applied") == len(objects(manifests))


def config(manifests: dict[tuple[str, str], dict[str, object]], name: str, key: str) -> dict[str, object]:
    data: Any = manifests["ConfigMap", name]["data"]
    found: dict[str, object] = yaml.safe_load(data[key])  # noqa: TID251 - our own
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_programs_take_the_settings(variant: str) -> None:
    made = objects(template(*VARIANTS[variant]))
    agent = settings.parse({**config(made, "ztunnel", "agent.yaml"), "node": "node-1"}, {})
    assert agent.sources.kubernetes
    assert agent.cni.enabled is (variant != "bare")
    assert agent.probes.enabled is (variant != "bare")
    assert agent.workers == (2 if variant == "full" else 1)
    if variant == "istiod":
        assert agent.ca.address == "istiod.istio-system.svc:15012"
        return
    server = ca_settings.parse(config(made, "ztunnel-ca", "ca.yaml"), {})
    assert agent.ca.address is not None
    host, _, port = agent.ca.address.rpartition(":")
    assert host in server.listen.names
    assert int(port) == server.listen.port
    assert server.agents == (f"{NAMESPACE}/ztunnel",)
    assert (server.trust_domain, server.leaf_hours) == (agent.trust_domain, agent.ca.leaf_hours)
    assert (server.root.given is not None) is (variant == "full")
    assert "*" in server.publish.namespaces
    controller = controller_settings.parse(config(made, "ztunnel-controller", "controller.yaml"), {})
    assert controller.gateways.ca_address == agent.ca.address
    assert controller.gateways.roots_config_map == server.publish.config_map
    assert controller.gateways.image == pod_of(made, "DaemonSet", "ztunnel")["containers"][0]["image"]
    assert controller.nodes.taints is (variant == "full")


@pytest.mark.parametrize(
    "values",
    [
        "agent.tolerationz=1",
        "agent.drainSeconds=soon",
        "trustDomain=UPPER",
        "ca.enabled=false",
        "image.digest=abc",
        "ca.replicas=0",
        "certificates.address=nowhere",
        "agent.updateStrategy.rollingUpdate.maxSurge=1",
    ],
)
def test_values_that_cannot_be_are_refused(values: str) -> None:
    with pytest.raises(ChartRefused, match="schema"):
        template("--set", values)


def test_prometheus_finds_every_component() -> None:
    made = objects(template("--set=podMonitor.enabled=true"))
    for name, kind in (("ztunnel", "DaemonSet"), ("ztunnel-ca", "Deployment"), ("ztunnel-controller", "Deployment")):
        monitor: Any = made["PodMonitor", name]
        workload: Any = made[kind, name]
        labels, ports = workload["spec"]["template"]["metadata"]["labels"], workload["spec"]["template"]["spec"]["containers"][0]["ports"]
        assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert {"name": monitor["spec"]["podMetricsEndpoints"][0]["port"], "containerPort": 15020} in ports
        assert "prometheus.io/scrape" not in workload["spec"]["template"]["metadata"]["annotations"]
    assert "prometheus.io/scrape" in template()


def test_the_schema_knows_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values: object = yaml.safe_load((CHART / "values.yaml").read_text())  # noqa: TID251 - our own

    def unknown(value: object, part: dict[str, Any], path: str) -> list[str]:
        if not isinstance(value, dict) or "properties" not in part:
            return []
        missing = [f"{path}{key}" for key in value if key not in part["properties"]]
        return missing + [
            each for key in value if key in part["properties"] for each in unknown(value[key], part["properties"][key], f"{path}{key}.")
        ]

    assert unknown(values, schema, "") == []


def pod_of(made: dict[tuple[str, str], dict[str, object]], kind: str, name: str) -> Any:
    workload: Any = made[kind, name]
    return workload["spec"]["template"]["spec"]


def test_what_the_agents_container_may() -> None:
    pod = pod_of(objects(template()), "DaemonSet", "ztunnel")
    security = pod["containers"][0]["securityContext"]
    assert security["capabilities"] == {
        "drop": ["ALL"],
        "add": ["SYS_ADMIN", "NET_ADMIN", "SETUID", "SETGID", "SETPCAP", "KILL", "SYS_PTRACE"],
    }
    assert security["readOnlyRootFilesystem"] is True
    assert security["privileged"] is False
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["terminationGracePeriodSeconds"] == 40
    assert "hostNetwork" not in pod
    without = pod_of(objects(template("--set=agent.findByProcesses=false,agent.probes.enabled=false")), "DaemonSet", "ztunnel")
    assert "SYS_PTRACE" not in without["containers"][0]["securityContext"]["capabilities"]["add"]
    assert "hostPID" not in without


@pytest.mark.parametrize("name", ["ztunnel-ca", "ztunnel-controller"])
def test_what_the_other_containers_may(name: str) -> None:
    pod = pod_of(objects(template()), "Deployment", name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_kustomize_says_what_the_chart_says(kube_api: ApiServer) -> None:
    done = subprocess.run([ROOT / "scripts" / "render-deploy", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kube_api.kubectl("apply", "--server-side", "-f", str(ROOT / "deploy" / "kustomize" / "base" / "namespace.yaml"))
    said = kube_api.kubectl("apply", "--server-side", "--dry-run=server", "-k", "deploy/kustomize/base")
    assert "daemonset.apps/ztunnel serverside-applied" in said


def account_token(api: ApiServer, name: str, *, pod: str = "", node: str = "") -> User:
    bound = None
    if pod:
        made: Any = api.pod(NAMESPACE, pod, node=node, address="10.0.9.9", account=name)
        bound = pod, made["metadata"]["uid"]
    return User(f"system:serviceaccount:{NAMESPACE}:{name}", token=api.token(NAMESPACE, name, pod=bound))


def test_the_authority_runs_with_exactly_what_is_deployed(kube_api: ApiServer, tmp_path: Path) -> None:
    kube_api.namespace(NAMESPACE)
    manifests = template()
    kube_api.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=manifests)
    user = account_token(kube_api, "ztunnel-ca")
    (tmp_path / "kubeconfig").write_text(kube_api.kubeconfig(user))
    deployed = config(objects(manifests), "ztunnel-ca", "ca.yaml")
    deployed["kubernetes"] = {"kubeconfig": str(tmp_path / "kubeconfig"), "namespace": NAMESPACE}
    deployed["listen"] = {**dict(deployed["listen"]), "address": "127.0.0.1", "port": 0}  # type: ignore[call-overload]  # JSON
    with authority(tmp_path / "run", deployed) as process:
        assert process.port

        def published() -> bool:
            try:
                found: Any = kube_api.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/ztunnel-ca-root-cert")
            except ApiError as error:
                raise AssertionError(str(error)) from error
            return "BEGIN CERTIFICATE" in found["data"]["root-cert.pem"]

        eventually(published, within=SECONDS)
        assert "is missing" not in process.log()


@pytest.fixture
def installed(kube_api: ApiServer) -> ApiServer:
    kube_api.namespace(NAMESPACE)
    kube_api.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=template())
    return kube_api


def test_an_agent_changes_its_own_nodes_pods_annotation_and_nothing_else(installed: ApiServer) -> None:
    api, namespace = installed, "admission"
    api.namespace(namespace)
    api.delete(f"/api/v1/namespaces/{NAMESPACE}/pods/agent-here")
    agent = account_token(api, "ztunnel", pod="agent-here", node="here")
    api.pod(namespace, "mine", node="here", address="10.0.0.1", labels={"app": "x"}, annotations={"kept": "yes"})
    api.pod(namespace, "others", node="there", address="10.0.0.2")

    def patch(pod: str, metadata: object, user: User = agent) -> None:
        api.request("PATCH", f"/api/v1/namespaces/{namespace}/pods/{pod}", {"metadata": metadata}, user=user)

    enabled = {"annotations": {"ambient.istio.io/redirection": "enabled"}}
    wrong = [
        ("others", enabled, "pods of its own node only"),
        ("mine", {"labels": {"app": "y"}}, "may change nothing of a pod but"),
        ("mine", {"annotations": {"other": "x"}}, "may change nothing of a pod but"),
        ("mine", {"annotations": {"kept": None}}, "may change nothing of a pod but"),
        ("mine", {"annotations": {"kept": "no"}}, "may change nothing of a pod but"),
        ("mine", {"finalizers": ["example.com/x"]}, "may change nothing of a pod but"),
    ]

    def in_force() -> bool:
        # The API server takes a policy into use some moments after it was made.
        try:
            patch("others", enabled)
        except ApiError as error:
            return "pods of its own node only" in str(error)
        return False

    eventually(in_force, within=SECONDS, saying="the admission policy is in force")
    for pod, metadata, reason in wrong:
        with pytest.raises(ApiError, match=reason):
            patch(pod, metadata)
    patch("mine", enabled)
    patch("mine", {"annotations": {"ambient.istio.io/redirection": None}})
    unbound = User(agent.name, token=api.token(NAMESPACE, "ztunnel"))
    with pytest.raises(ApiError, match="pods of its own node only"):
        patch("mine", enabled, unbound)
    # Everybody else changes pods as before.
    patch("others", {"labels": {"app": "z"}}, api.admin)


def test_a_controller_touches_nothing_that_is_not_of_a_gateway(installed: ApiServer) -> None:
    api, namespace = installed, "admission"
    api.namespace(namespace)
    controller = account_token(api, "ztunnel-controller")
    of = gateway("w", namespace=namespace, meta={"uid": "00000000-0000-0000-0000-000000000001"})
    basics = ProxySettingsOfPods(
        image="x", pull_policy="Always", environment=(), roots_config_map="r", requests=(("cpu", "1"),), limits=(("memory", "1Gi"),)
    )
    wanted = {text(each, "kind"): each for each in [*belongings(of, basics.pod_spec), *bindings(of)]}
    roles = "/apis/rbac.authorization.k8s.io/v1"
    inside = f"namespaces/{namespace}"
    paths = {
        "ServiceAccount": f"/api/v1/{inside}/serviceaccounts",
        "Service": f"/api/v1/{inside}/services",
        "Deployment": f"/apis/apps/v1/{inside}/deployments",
        "RoleBinding": f"{roles}/{inside}/rolebindings",
        "ClusterRoleBinding": f"{roles}/clusterrolebindings",
    }

    def ask(verb: str, kind: str, change: tuple[object, ...] = ()) -> None:
        body = deepcopy(wanted[kind])
        if change:
            put(body, change[-1], *map(str, change[:-1]))
        name = text(wanted[kind], "metadata", "name")
        path = paths[kind] if verb == "POST" else f"{paths[kind]}/{name}"
        api.request(verb, path, None if verb == "DELETE" else body, user=controller)

    def in_force() -> bool:
        try:
            ask("POST", "ServiceAccount", ("metadata", "ownerReferences", []))
        except ApiError as error:
            return "only what belongs to a Gateway" in str(error)
        api.delete(f"{paths['ServiceAccount']}/w")
        return False

    eventually(in_force, within=SECONDS, saying="the admission policy is in force")
    pod, volumes = ("spec", "template", "spec"), branches(basics.pod_spec(of), "volumes")
    wrong: list[tuple[str, tuple[object, ...], str]] = [
        ("Service", ("metadata", "ownerReferences", []), "only what belongs to a Gateway"),
        ("ClusterRoleBinding", ("metadata", "name", "another"), "only what belongs to a Gateway"),
        ("ClusterRoleBinding", ("roleRef", "name", ROLE_IN_NAMESPACE), "only the rights of gateways"),
        ("ClusterRoleBinding", ("subjects", [{"kind": "Group", "apiGroup": RBAC, "name": "everybody"}]), "only the rights of gateways"),
        ("RoleBinding", ("subjects", [{"kind": "ServiceAccount", "name": "w", "namespace": "default"}]), "only the rights of gateways"),
        ("Deployment", (*pod, "serviceAccountName", "payments"), "without a way to their node"),
        ("Deployment", (*pod, "hostNetwork", True), "without a way to their node"),
        ("Deployment", (*pod, "hostPID", True), "without a way to their node"),
        ("Deployment", (*pod, "volumes", [*volumes, {"name": "x", "hostPath": {"path": "/"}}]), "without a way to their node"),
        (
            "Deployment",
            (*pod, "initContainers", [{"name": "x", "image": "x", "securityContext": {"privileged": True}}]),
            "way to their node",
        ),
    ]
    for kind, change, reason in wrong:
        with pytest.raises(ApiError, match=reason):
            ask("POST", kind, change)
    for kind in wanted:
        for verb in ("POST", "PATCH", "DELETE"):
            ask(verb, kind)
    # What is somebody else's stays, whatever its name.
    api.ensure(paths["ServiceAccount"], {"metadata": {"name": "w"}})
    for verb in ("PATCH", "DELETE"):
        with pytest.raises(ApiError, match="only what belongs to a Gateway"):
            ask(verb, "ServiceAccount")
