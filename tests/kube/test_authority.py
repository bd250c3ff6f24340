"""`ztunnel ca` against a real API server: TokenReview, pods, the Secret that replicas share, the ConfigMap, and each right it needs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from cryptography import x509

from tests.kit.authority import AuthorityProcess, authority
from tests.kit.kube_api import ApiError, ApiServer, User
from tests.kit.polling import eventually
from ztunnel.ca.cluster import ConfigMaps
from ztunnel.ca.files import RootError
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.request import IssueError
from ztunnel.hbone.handshake import Credentials
from ztunnel.kube.client import KubeClient
from ztunnel.kube.config import load
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.manifests.tree import at

Rule = Mapping[str, Sequence[str]]

REVIEW: Rule = {"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}
PODS: Rule = {"apiGroups": [""], "resources": ["pods"], "verbs": ["list", "watch"]}
SECRET: Rule = {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "create", "update"]}
BUNDLE: Rule = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "create", "update"]}
RIGHTS = [REVIEW, PODS, SECRET, BUNDLE]
SECONDS = 60.0


@dataclass
class Cluster:
    """A namespace for the authority and its agents, and one with workloads, on two nodes."""

    api: ApiServer
    namespace: str
    directory: Path
    user: User

    def settings(self, **more: object) -> dict[str, object]:
        kubeconfig = self.directory / "kubeconfig"
        kubeconfig.write_text(self.api.kubeconfig(self.user))
        return {
            "agents": [f"{self.namespace}/ztunnel"],
            "kubernetes": {"kubeconfig": str(kubeconfig), "namespace": self.namespace},
            **more,
        }

    @contextmanager
    def replica(self, name: str = "one", **more: object) -> Iterator[AuthorityProcess]:
        with authority(self.directory / name, self.settings(**more), "ca.test") as process:
            yield process

    def pod(self, name: str, account: str, node: str, namespace: str = "") -> tuple[str, str]:
        """Name and UID."""
        namespace = namespace or self.namespace
        self.api.ensure(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": account}})
        made = self.api.pod(namespace, name, node=node, address="10.0.0.1", account=account)
        metadata = made["metadata"]
        assert isinstance(metadata, dict)
        return name, str(metadata["uid"])

    def bundle(self) -> bytes:
        found = self.api.request("GET", f"/api/v1/namespaces/{self.namespace}/configmaps/ztunnel-ca-root-cert")["data"]
        assert isinstance(found, dict)
        return str(found["root-cert.pem"]).encode()

    def obtain(self, process: AuthorityProcess, account: str, token: str, namespace: str = "") -> Credentials:
        roots, file = self.directory / "roots.pem", self.directory / "token"
        target = process.target
        eventually(lambda: roots.write_bytes(self.bundle()), within=SECONDS, saying="the bundle is published")
        file.write_text(token)
        client = RemoteAuthority(target, roots, file, "Kubernetes", 3600)
        identity = SpiffeId("cluster.local", namespace or self.namespace, account)

        async def ask() -> Credentials:
            return await client.obtain(identity, time.time())

        return trio.run(ask)

    def eventually_obtain(self, process: AuthorityProcess, account: str, token: str) -> Credentials:
        """As an agent does, which asks again: a pod that was just made may not have been heard of yet."""

        def ask() -> Credentials | None:
            try:
                return self.obtain(process, account, token)
            except IssueError as error:
                raise AssertionError(f"{error}\n{process.log()}") from error

        return eventually(ask, within=SECONDS, saying=f"a certificate for {account}")


@pytest.fixture
def cluster(kube_api: ApiServer, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    namespace = "ca-" + base64.b32encode(request.node.name.encode()).decode().lower().rstrip("=")[-40:]
    user = kube_api.account(namespace, "ztunnel-ca")
    kube_api.allow(user, RIGHTS)
    yield Cluster(kube_api, namespace, tmp_path, user)
    # Tests of whole meshes share the API server.
    kube_api.kubectl("delete", "pods", "--all", "--namespace", namespace, "--force", "--grace-period=0")


def test_agents_get_what_runs_on_their_node_and_nobody_else_does(cluster: Cluster) -> None:
    agent = cluster.pod("ztunnel-1", "ztunnel", "node-1")
    cart, bank = cluster.pod("cart-0", "cart", "node-1"), cluster.pod("bank-0", "bank", "node-2")
    token = cluster.api.token(cluster.namespace, "ztunnel", audience="istio-ca", pod=agent)
    with cluster.replica() as process:
        credentials = cluster.eventually_obtain(process, "cart", token)
        assert credentials.roots_pem == cluster.bundle()
        process.says(f"certificate issued\tidentity=spiffe://cluster.local/ns/{cluster.namespace}/sa/cart")
        refusals = {
            "reason=not_on_node": ("bank", token),
            "reason=token_refused": ("cart", cluster.api.token(cluster.namespace, "ztunnel", pod=agent)),
            "reason=no_pod": ("cart", cluster.api.token(cluster.namespace, "ztunnel", audience="istio-ca")),
            "reason=not_an_agent": ("cart", cluster.api.token(cluster.namespace, "cart", audience="istio-ca", pod=cart)),
        }
        for said, (account, wrong) in refusals.items():
            with pytest.raises(IssueError, match="request authenticate failure"):
                cluster.obtain(process, account, wrong)
            process.says(said)
        with pytest.raises(IssueError):
            cluster.obtain(process, "cart", cluster.api.static_token)
        process.says("static-user is no service account")
        assert bank
        # A pod that moves in is heard of; the token of an agent that is gone counts no more.
        cluster.pod("bank-1", "bank", "node-1")
        cluster.eventually_obtain(process, "bank", token)
        cluster.api.delete(f"/api/v1/namespaces/{cluster.namespace}/pods/ztunnel-1")

        def refused() -> bool:
            # The API server remembers a good token for some seconds, and the authority hears of the pod a moment later.
            try:
                cluster.obtain(process, "cart", token)
            except IssueError:
                return True
            return False

        eventually(refused, within=SECONDS, saying="the token counts no more")
        assert process.end() == 0


def test_a_workload_gets_a_certificate_of_its_own(cluster: Cluster) -> None:
    waypoint = cluster.pod("waypoint-0", "waypoint", "node-1")
    token = cluster.api.token(cluster.namespace, "waypoint", audience="istio-ca", pod=waypoint)
    with cluster.replica() as process:
        target, roots, file = process.target, cluster.directory / "roots.pem", cluster.directory / "token"
        eventually(lambda: roots.write_bytes(cluster.bundle()), within=SECONDS, saying="the bundle is published")
        file.write_text(token)
        client = RemoteAuthority(target, roots, file, "Kubernetes", 3600, impersonates=False)
        process.says("ready")

        async def ask() -> Credentials:
            return await client.obtain(SpiffeId("cluster.local", cluster.namespace, "waypoint"), time.time())

        def asked() -> Credentials:
            try:
                return trio.run(ask)
            except IssueError as error:
                raise AssertionError(str(error)) from error

        assert eventually(asked, within=SECONDS, saying="a certificate").identity.service_account == "waypoint"


def certificates(pem: bytes) -> set[int]:
    return {each.serial_number for each in x509.load_pem_x509_certificates(pem)}


def test_replicas_share_one_root_and_replace_it_together(cluster: Cluster) -> None:
    token = cluster.api.token(cluster.namespace, "ztunnel", audience="istio-ca", pod=cluster.pod("ztunnel-1", "ztunnel", "node-1"))
    quick = {"root": {"spread_hours": 0.0}}
    with cluster.replica("one", **quick) as one, cluster.replica("two", **quick) as two:
        first = [cluster.eventually_obtain(each, "ztunnel", token) for each in (one, two)]
        assert first[0].roots_pem == first[1].roots_pem
        old = certificates(cluster.bundle())
        assert len(old) == 1
        secret = f"/api/v1/namespaces/{cluster.namespace}/secrets/ztunnel-ca"
        cluster.api.request("PATCH", secret, {"metadata": {"annotations": {"ztunnel.io/rotate": "please"}}})

        def replaced() -> bool:
            bundle = x509.load_pem_x509_certificates(cluster.bundle())
            return len(bundle) == 2 and bundle[0].serial_number not in old and bundle[1].serial_number in old

        eventually(replaced, within=SECONDS, saying="the new root signs, the old one is still trusted")
        signing = x509.load_pem_x509_certificates(cluster.bundle())[0]

        def signed_by_it(process: AuthorityProcess) -> bool:
            leaf = x509.load_pem_x509_certificate(cluster.eventually_obtain(process, "ztunnel", token).chain_pem)
            try:
                leaf.verify_directly_issued_by(signing)
            except Exception as error:
                raise AssertionError(str(error)) from error
            return True

        for each in (one, two):
            eventually(lambda each=each: signed_by_it(each), within=SECONDS, saying="both replicas sign by the new root")  # type: ignore[misc]  # a lambda's default
        annotations = cluster.api.request("GET", secret)["metadata"]
        assert "please" in json.dumps(annotations)


def test_a_bundle_that_somebody_spoils_is_mended_and_goes_everywhere_if_told(cluster: Cluster) -> None:
    cluster.api.allow(cluster.user, [*RIGHTS, {"apiGroups": [""], "resources": ["namespaces"], "verbs": ["list", "watch"]}])
    path = f"/api/v1/namespaces/{cluster.namespace}/configmaps/ztunnel-ca-root-cert"
    other = f"{cluster.namespace}-other"
    with cluster.replica(publish={"namespaces": ["*"]}) as process:
        assert process.port
        eventually(lambda: certificates(cluster.bundle()), within=SECONDS, saying="published")
        good = cluster.bundle()
        cluster.api.request("PATCH", path, {"data": {"root-cert.pem": "spoilt", "more": "kept"}})
        eventually(lambda: cluster.bundle() == good, within=SECONDS, saying="mended")
        assert cluster.api.request("GET", path)["data"] == {"root-cert.pem": good.decode(), "more": "kept"}
        cluster.api.namespace(other)

        def published() -> bool:
            try:
                found = cluster.api.request("GET", f"/api/v1/namespaces/{other}/configmaps/ztunnel-ca-root-cert")
            except ApiError as error:
                raise AssertionError(str(error)) from error
            return found["data"] == {"root-cert.pem": good.decode()}

        eventually(published, within=SECONDS, saying="published in a new namespace")


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([PODS, SECRET, BUNDLE], "the right to create tokenreviews.authentication.k8s.io is missing"),
        ([REVIEW, SECRET, BUNDLE], "the right to watch pods is missing"),
        ([REVIEW, {**PODS, "verbs": ["list"]}, SECRET, BUNDLE], "the right to watch pods is missing"),
        ([REVIEW, PODS, BUNDLE], "the right to get secrets is missing"),
        ([REVIEW, PODS, {**SECRET, "verbs": ["get"]}, BUNDLE], "the right to create secrets is missing"),
        ([REVIEW, PODS, SECRET], "the right to get configmaps is missing"),
        ([REVIEW, PODS, SECRET, {**BUNDLE, "verbs": ["get"]}], "the right to create configmaps is missing"),
    ],
)
def test_a_missing_right_is_named(cluster: Cluster, rules: list[Rule], said: str) -> None:
    cluster.api.allow(cluster.user, rules)
    with cluster.replica() as process:
        if "tokenreviews" in said:
            token = cluster.api.token(cluster.namespace, "ztunnel", audience="istio-ca", pod=cluster.pod("ztunnel-1", "ztunnel", "node-1"))
            with pytest.raises(IssueError):
                cluster.obtain(process, "ztunnel", token)
        process.says(said)
        assert process.process.poll() is None


async def test_the_owners_of_a_namespace_do_not_keep_the_roots_from_others(kube_api: ApiServer) -> None:
    spoilt, other = "roots-a", "roots-b"
    for namespace in (spoilt, other):
        kube_api.namespace(namespace)
    theirs = {"metadata": {"name": "roots"}, "data": {"root-cert.pem": "theirs"}, "immutable": True}
    kube_api.ensure(f"/api/v1/namespaces/{spoilt}/configmaps", theirs)
    async with KubeClient(load({}, kube_api.admin_kubeconfig)) as client:
        with pytest.raises(RootError, match=r"not published everywhere: .*immutable"):
            await ConfigMaps(client, "roots", lambda: (spoilt, other)).publish(b"ours")
    found = kube_api.request("GET", f"/api/v1/namespaces/{other}/configmaps/roots")
    assert at(found, "data", "root-cert.pem") == "ours"
