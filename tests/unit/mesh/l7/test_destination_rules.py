"""DestinationRules and BackendTLSPolicies on clusters: which rule holds, what overrides what, what closes."""

from __future__ import annotations

import pytest

from tests.kit.builders import Json, namespace, pod, service_manifest
from tests.kit.mesh_l7 import gateway_api, istio, only_cluster, read_all, secret, waypoint
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.backend_tls import BackendTls
from ztunnel.mesh.l7.clusters import Balancer, Cluster, Outlier, Resolution, RetryBudget, UpstreamHttp, UpstreamTls
from ztunnel.mesh.manifests.backend_policies import BackendTlsPolicyObject
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.virtual_hosts import covers, is_visible
from ztunnel.mesh.refused import is_stand_in, stand_in

WEB = service_manifest("web", "10.96.0.1", ports=[{"port": 80, "name": "http"}], selector={"app": "web"})
PEM = "-----BEGIN CERTIFICATE-----"
RANDOM = {"loadBalancer": {"simple": "RANDOM"}}
ROBIN = {"loadBalancer": {"simple": "ROUND_ROBIN"}}


def cluster(*bodies: Json) -> Cluster:
    return only_cluster(waypoint(WEB, *bodies))


def rule(host: str = "web", policy: object = None, **more: object) -> Json:
    spec = {} if policy is None else {"trafficPolicy": policy}
    return istio("DestinationRule", **{"host": host, **spec, **more})  # type: ignore[arg-type]  # by name


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        ([], Balancer.LEAST_REQUEST),
        ([rule("web", RANDOM)], Balancer.RANDOM),
        ([rule("web.default.svc.cluster.local", RANDOM)], Balancer.RANDOM),
        ([rule("*.default.svc.cluster.local", RANDOM)], Balancer.RANDOM),
        ([rule("*.local", RANDOM, name="a"), rule("*.cluster.local", ROBIN, name="b")], Balancer.ROUND_ROBIN),
        ([rule("*.local", RANDOM, name="a"), rule("web", ROBIN, name="b")], Balancer.ROUND_ROBIN),
        ([rule("other", RANDOM)], Balancer.LEAST_REQUEST),
        ([rule("web", RANDOM, namespace="elsewhere")], Balancer.LEAST_REQUEST),
        ([rule("web.default.svc.cluster.local", RANDOM, namespace="elsewhere")], Balancer.LEAST_REQUEST),
        ([rule("web.default.svc.cluster.local", RANDOM, namespace="istio-system")], Balancer.RANDOM),
        ([rule("web.default.svc.cluster.local", RANDOM, namespace="istio-system", exportTo=["."])], Balancer.LEAST_REQUEST),
        ([rule("web.default.svc.cluster.local", RANDOM, namespace="istio-system"), rule("web", ROBIN)], Balancer.ROUND_ROBIN),
        ([rule("web", RANDOM, workloadSelector={"matchLabels": {"a": "b"}})], Balancer.LEAST_REQUEST),
        (
            [rule("web", RANDOM, name="b", created="2026-01-01T00:00:00Z"), rule("web", ROBIN, name="a", created="2026-01-02T00:00:00Z")],
            Balancer.RANDOM,
        ),
        ([rule("web", None, name="a"), rule("web", ROBIN, name="b")], Balancer.ROUND_ROBIN),
        ([rule("web", {**ROBIN, "portLevelSettings": [{"port": {"number": 80}, **RANDOM}]})], Balancer.RANDOM),
        ([rule("web", {**ROBIN, "portLevelSettings": [{"port": {"number": 80}}]})], Balancer.LEAST_REQUEST),
        ([rule("web", {**ROBIN, "portLevelSettings": [{"port": {"number": 81}, **RANDOM}]})], Balancer.ROUND_ROBIN),
    ],
)
def test_which_rule_holds(bodies: list[Json], expected: Balancer) -> None:
    assert cluster(*bodies).balancing.balancer is expected


def test_a_proxy_of_another_namespace_sees_its_own_rules_first() -> None:
    service = service_manifest("web", "10.96.0.1", namespace="shop", ports=[{"port": 80, "name": "http"}])
    own, theirs = rule("web.shop.svc.cluster.local", RANDOM), rule("web", ROBIN, namespace="shop")
    assert only_cluster(waypoint(service, own, theirs, namespace="shop")).balancing.balancer is Balancer.RANDOM
    assert only_cluster(waypoint(service, theirs, namespace="shop")).balancing.balancer is Balancer.ROUND_ROBIN
    hidden = rule("web", ROBIN, namespace="shop", exportTo=["."])
    assert only_cluster(waypoint(service, hidden, namespace="shop")).balancing.balancer is Balancer.LEAST_REQUEST


def test_blocks_of_a_policy_reach_the_cluster() -> None:
    policy = {
        "outlierDetection": {},
        "proxyProtocol": {},
        "retryBudget": {},
        "connectionPool": {"tcp": {"maxConnections": 2}, "http": {"h2UpgradePolicy": "UPGRADE"}},
    }
    found = cluster(rule("web", policy))
    assert (found.outlier, found.proxy_protocol, found.http) == (Outlier(), 1, UpstreamHttp.HTTP2)
    assert (found.limits.max_connections, found.limits.retry_budget) == (2, RetryBudget())
    assert cluster(rule("web", {"connectionPool": {"http": {"useClientProtocol": True}}})).http is UpstreamHttp.CLIENT
    assert cluster(rule("web", {"loadBalancer": {"simple": "PASSTHROUGH"}})).resolution is Resolution.ORIGINAL


def test_labels_go_along_only_for_failover_by_labels() -> None:
    bodies = [namespace("default"), pod("a", "10.0.0.1", labels={"app": "web"})]
    assert cluster(*bodies).endpoints[0].labels == ()
    policy = {"loadBalancer": {"localityLbSetting": {"failoverPriority": ["app"]}}}
    assert cluster(*bodies, rule("web", policy)).endpoints[0].labels == (("app", "web"),)


def test_a_services_own_wish_for_near_endpoints() -> None:
    service = service_manifest("web", "10.96.0.1", ports=[{"port": 80, "name": "http"}], trafficDistribution="PreferClose")
    assert only_cluster(waypoint(service)).balancing.locality.forced == "PreferClose"


@pytest.mark.parametrize(
    ("tls", "secrets", "expected"),
    [
        ({"mode": "ISTIO_MUTUAL"}, [], None),
        ({"mode": "DISABLE"}, [], None),
        ({"mode": "SIMPLE", "sni": "a"}, [], UpstreamTls("a", system_roots=True)),
        ({"mode": "SIMPLE", "credentialName": "c"}, [secret("c", ca_crt=PEM)], UpstreamTls(roots=PEM.encode())),
        (
            {"mode": "SIMPLE", "credentialName": "c"},
            [secret("c", tls_crt=PEM), secret("c-cacert", cacert=PEM)],
            UpstreamTls(roots=PEM.encode()),
        ),
        (
            {"mode": "MUTUAL", "credentialName": "c"},
            [secret("c", tls_crt=PEM, tls_key=PEM)],
            UpstreamTls(system_roots=True, certificate=PEM.encode(), key=PEM.encode()),
        ),
        ({"mode": "MUTUAL", "credentialName": "c"}, [secret("c", ca_crt=PEM)], "Secret c has no certificate with its key"),
        ({"mode": "SIMPLE", "credentialName": "c"}, [secret("c", "other", ca_crt=PEM)], "Secret default/c is not there"),
        ({"mode": "SIMPLE", "credentialName": "c"}, [secret("c", ca_crt="x")], "Secret default/c: ca.crt is not PEM"),
        ({"mode": "SIMPLE", "credentialName": "c"}, [secret("c")], "Secret default/c has no certificates"),
    ],
)
def test_tls_within_the_tunnel(tls: Json, secrets: list[Json], expected: UpstreamTls | str | None) -> None:
    found = cluster(rule("web", {"tls": tls}), *secrets)
    if isinstance(expected, str):
        assert (found.tls, found.refused) == (None, expected)
    else:
        assert (found.tls, found.refused) == (expected, "")


def test_what_cannot_be_done_safely_closes_the_host() -> None:
    assert "tunnels through other proxies" in cluster(rule("web", {"tunnel": {}})).refused


@pytest.mark.parametrize(
    ("spec", "closed"),
    [({"host": "web", "x": 1}, True), ({"host": "other", "x": 1}, False), ({"host": ["web"]}, True), ({"x": 1}, True), ("text", True)],
)
def test_a_refused_rule_closes_its_host(spec: object, closed: bool) -> None:
    body = {**istio("DestinationRule"), "spec": spec}
    with pytest.raises(ManifestError) as caught:
        parse(body, "test")
    found = stand_in(body, caught.value)
    assert is_stand_in(found)
    assert found is not None
    assert bool(only_cluster(waypoint(WEB, more=[found])).refused) is closed
    assert only_cluster(waypoint(WEB, rule("web", RANDOM, name="y"), more=[found])).balancing.balancer is Balancer.RANDOM


def tls_policy(name: str = "p", *, created: str = "", section: str | None = None, target: str = "web", **validation: object) -> Json:
    ref = {"group": "", "kind": "Service", "name": target, **({"sectionName": section} if section else {})}
    known = {"hostname": "a.example", **({} if "caCertificateRefs" in validation else {"wellKnownCACertificates": "System"})}
    return gateway_api("BackendTLSPolicy", name, created=created, targetRefs=[ref], validation={**known, **validation})


def config_map(name: str, **data: str) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {key.replace("_", "."): text for key, text in data.items()},
    }


ROOTS = [{"group": "", "kind": "ConfigMap", "name": "roots"}]


@pytest.mark.parametrize(
    ("bodies", "expected"),
    [
        ([tls_policy()], UpstreamTls("a.example", system_roots=True)),
        ([tls_policy(target="other")], None),
        ([tls_policy(section="https")], None),
        ([tls_policy(), tls_policy("q", section="http", hostname="b.example")], UpstreamTls("b.example", system_roots=True)),
        (
            [tls_policy("b", created="2026-01-01T00:00:00Z"), tls_policy("a", created="2026-01-02T00:00:00Z", hostname="b")],
            UpstreamTls("a.example", system_roots=True),
        ),
        (
            [tls_policy(subjectAltNames=[{"type": "Hostname", "hostname": "c"}, {"type": "URI", "uri": "spiffe://a"}])],
            UpstreamTls("a.example", system_roots=True, names=("c", "spiffe://a")),
        ),
        ([tls_policy(caCertificateRefs=ROOTS), config_map("roots", ca_crt=PEM)], UpstreamTls("a.example", PEM.encode())),
        ([tls_policy(caCertificateRefs=ROOTS)], "BackendTLSPolicy default/p: ConfigMap default/roots is not there"),
        (
            [tls_policy(caCertificateRefs=ROOTS), config_map("roots", other=PEM)],
            "BackendTLSPolicy default/p: ConfigMap default/roots has no certificates in ca.crt",
        ),
        ([tls_policy(), rule("web", {"tls": {"mode": "DISABLE"}})], None),
    ],
)
def test_backend_tls_policies(bodies: list[Json], expected: UpstreamTls | str | None) -> None:
    found = cluster(*bodies)
    assert (found.refused or found.tls) == expected


@pytest.mark.parametrize(
    ("bodies", "accepted", "resolved"),
    [
        ([tls_policy()], "Accepted", "ResolvedRefs"),
        ([tls_policy(caCertificateRefs=ROOTS)], "NoValidCACertificate", "InvalidCACertificateRef"),
        ([tls_policy(caCertificateRefs=[{"group": "a", "kind": "B", "name": "c"}])], "NoValidCACertificate", "InvalidKind"),
        ([tls_policy("a"), tls_policy("b")], "Conflicted", "ResolvedRefs"),
    ],
)
def test_conditions_of_backend_tls_policies(bodies: list[Json], accepted: str, resolved: str) -> None:
    objects = read_all(bodies)
    *_, policy = [each for each in objects.values() if isinstance(each, BackendTlsPolicyObject)]
    assert [each.reason for each in BackendTls(objects).conditions(policy)] == [accepted, resolved]


def test_a_refused_backend_tls_policy_closes_the_services_of_its_namespace() -> None:
    body = tls_policy(hostname=5)
    with pytest.raises(ManifestError) as caught:
        parse(body, "test")
    found = stand_in(body, caught.value)
    assert is_stand_in(found)
    assert found is not None
    assert "spec.validation.hostname: not text" in only_cluster(waypoint(WEB, more=[found])).refused


def test_retry_budgets_by_gateway_api() -> None:
    target = {"group": "", "kind": "Service", "name": "web"}
    constraint = {"budget": {"percent": 30}, "minRetryRate": {"count": 20, "interval": "2s"}}
    body = {
        **gateway_api("XBackendTrafficPolicy", targetRefs=[target], retryConstraint=constraint, sessionPersistence={}),
        "apiVersion": "gateway.networking.x-k8s.io/v1alpha1",
    }
    assert cluster(body).limits.retry_budget == RetryBudget(0.3, 10)
    assert cluster(body, rule("web", {"retryBudget": {}})).limits.retry_budget == RetryBudget()


@pytest.mark.parametrize(
    ("pattern", "host", "expected"),
    [
        ("a.b", "a.b", True),
        ("*.b", "a.b", True),
        ("*.b", "x.a.b", True),
        ("*.b", "b", False),
        ("*", "a", True),
        ("*.b", "*.a.b", True),
        ("*.a.b", "*.b", False),
        ("a.b", "*.b", False),
    ],
)
def test_hosts_with_wildcards(pattern: str, host: str, expected: bool) -> None:
    assert covers(pattern, host) is expected


@pytest.mark.parametrize(
    ("export_to", "expected"), [((), True), (("*",), True), ((".",), False), (("b",), True), (("c",), False), (("~",), False)]
)
def test_visibility(export_to: tuple[str, ...], expected: bool) -> None:
    assert is_visible(export_to, "a", "b") is expected
    assert is_visible((".",), "a", "a")
