"""DestinationRule as it is read: every row of the table, every default, what is refused and what is noted."""

from __future__ import annotations

import re

import pytest

from tests.kit.builders import Json
from tests.kit.mesh_l7 import istio
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.clusters import (
    Balancer,
    HashKey,
    HashSource,
    LoadBalancing,
    LocalitySettings,
    Outlier,
    PoolLimits,
    RetryBudget,
    Warmup,
)
from ztunnel.mesh.manifests.destination_rule import ClientTls, DestinationRuleObject, Pool, Subset, TrafficPolicy
from ztunnel.mesh.manifests.parse import parse

HEADER = {"httpHeaderName": "X-User"}
BY_HEADER = (HashKey(HashSource.HEADER, "x-user"),)


def rule(**spec: object) -> DestinationRuleObject:
    found = parse({**istio("DestinationRule"), "spec": {"host": "web"} | spec}, "test")
    assert isinstance(found, DestinationRuleObject)
    return found


def policy(**blocks: object) -> TrafficPolicy:
    found = rule(trafficPolicy=blocks).policy
    assert found is not None
    return found


def balancing(**fields: object) -> LoadBalancing | None:
    return policy(loadBalancer=fields).balancing


def test_hosts_subsets_and_ports() -> None:
    found = rule(
        host="Web.shop",
        exportTo=[".", "a"],
        trafficPolicy={"loadBalancer": {"simple": "RANDOM"}, "portLevelSettings": [{"port": {"number": 80}, "outlierDetection": {}}]},
        subsets=[{"name": "v1", "labels": {"version": "v1"}}, {"name": "v2", "trafficPolicy": {"tls": {"mode": "DISABLE"}}}],
    )
    assert (found.host, found.export_to) == ("web.shop", (".", "a"))
    assert found.policy == TrafficPolicy(balancing=LoadBalancing(Balancer.RANDOM), ports={80: TrafficPolicy(outlier=Outlier())})
    assert found.subsets == (Subset("v1", {"version": "v1"}), Subset("v2", {}, TrafficPolicy(tls=ClientTls("DISABLE"))))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, LoadBalancing()),
        ({"simple": "UNSPECIFIED"}, LoadBalancing(Balancer.LEAST_REQUEST)),
        ({"simple": "LEAST_CONN"}, LoadBalancing(Balancer.LEAST_REQUEST)),
        ({"simple": "ROUND_ROBIN"}, LoadBalancing(Balancer.ROUND_ROBIN)),
        ({"simple": "PASSTHROUGH"}, LoadBalancing(Balancer.PASSTHROUGH)),
        ({"consistentHash": HEADER}, LoadBalancing(Balancer.RING_HASH, BY_HEADER)),
        ({"consistentHash": {**HEADER, "minimumRingSize": 16}}, LoadBalancing(Balancer.RING_HASH, BY_HEADER, ring_minimum=16)),
        ({"consistentHash": {**HEADER, "ringHash": {"minimumRingSize": 8}}}, LoadBalancing(Balancer.RING_HASH, BY_HEADER, ring_minimum=8)),
        ({"consistentHash": {**HEADER, "maglev": {}}}, LoadBalancing(Balancer.MAGLEV, BY_HEADER, table_size=65537)),
        ({"consistentHash": {**HEADER, "maglev": {"tableSize": 101}}}, LoadBalancing(Balancer.MAGLEV, BY_HEADER, table_size=101)),
        ({"consistentHash": {"useSourceIp": True}}, LoadBalancing(Balancer.RING_HASH, (HashKey(HashSource.SOURCE_IP),))),
        ({"consistentHash": {"httpQueryParameterName": "q"}}, LoadBalancing(Balancer.RING_HASH, (HashKey(HashSource.QUERY, "q"),))),
        (
            {
                "consistentHash": {
                    "httpCookie": {"name": "c", "path": "/", "ttl": "0s", "attributes": [{"name": "SameSite", "value": "Lax"}]}
                }
            },
            LoadBalancing(Balancer.RING_HASH, (HashKey(HashSource.COOKIE, "c", "/", 0.0, (("SameSite", "Lax"),)),)),
        ),
        ({"consistentHash": {"httpCookie": {"name": "c"}}}, LoadBalancing(Balancer.RING_HASH, (HashKey(HashSource.COOKIE, "c"),))),
        ({"warmupDurationSecs": "30s"}, LoadBalancing(warmup=Warmup(30.0))),
        ({"warmup": {"duration": "1m", "minimumPercent": 50, "aggression": 2.5}}, LoadBalancing(warmup=Warmup(60.0, 0.5, 2.5))),
        ({"localityLbSetting": {"enabled": False}}, LoadBalancing(locality=LocalitySettings(enabled=False))),
        (
            {"localityLbSetting": {"distribute": [{"from": "r/z/*", "to": {"r/z/*": 80, "r/y/*": 20}}]}},
            LoadBalancing(locality=LocalitySettings(distribute=(("r/z/*", (("r/z/*", 80), ("r/y/*", 20))),))),
        ),
        (
            {"localityLbSetting": {"failover": [{"from": "a", "to": "b"}], "failoverPriority": ["version"]}},
            LoadBalancing(locality=LocalitySettings(failover=(("a", "b"),), failover_priority=("version",))),
        ),
    ],
)
def test_load_balancers(fields: Json, expected: LoadBalancing) -> None:
    assert balancing(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, Pool()),
        (
            {
                "tcp": {
                    "maxConnections": 1,
                    "connectTimeout": "30ms",
                    "maxConnectionDuration": "1h",
                    "tcpKeepalive": {"time": "2h", "interval": "75s", "probes": 3},
                }
            },
            Pool(PoolLimits(max_connections=1, connect_timeout=0.03, max_connection_duration=3600.0, keepalive=(7200.0, 75.0, 3))),
        ),
        (
            {
                "tcp": {"idleTimeout": "1m"},
                "http": {
                    "http1MaxPendingRequests": 1,
                    "http2MaxRequests": 2,
                    "maxRequestsPerConnection": 3,
                    "maxRetries": 4,
                    "idleTimeout": "5s",
                    "maxConcurrentStreams": 6,
                    "h2UpgradePolicy": "UPGRADE",
                },
            },
            Pool(
                PoolLimits(
                    max_pending=1, max_requests=2, max_requests_per_connection=3, max_retries=4, idle_timeout=5.0, max_concurrent_streams=6
                ),
                "UPGRADE",
            ),
        ),
        ({"http": {"useClientProtocol": True, "http2MaxRequests": 0}}, Pool(client_protocol=True)),
        ({"tcp": {"tcpKeepalive": {}}}, Pool(PoolLimits(keepalive=(7200.0, 75.0, 9)))),
    ],
)
def test_connection_pools(fields: Json, expected: Pool) -> None:
    assert policy(connectionPool=fields).pool == expected


@pytest.mark.parametrize(
    ("block", "fields", "expected"),
    [
        ("outlierDetection", {}, {"outlier": Outlier(5, 0, False, 5, 10.0, 30.0, 10, 0)}),
        (
            "outlierDetection",
            {
                "consecutive5xxErrors": 0,
                "consecutiveGatewayErrors": 3,
                "splitExternalLocalOriginErrors": True,
                "consecutiveLocalOriginFailures": 2,
                "interval": "1s",
                "baseEjectionTime": "2s",
                "maxEjectionPercent": 100,
                "minHealthPercent": 50,
                "outlierDetectionHttpErrorCodes": [418],
            },
            {"outlier": Outlier(0, 3, True, 2, 1.0, 2.0, 100, 50, (418,))},
        ),
        ("outlierDetection", {"consecutiveErrors": 7}, {"outlier": Outlier(consecutive_gateway=7)}),
        ("retryBudget", {}, {"retry_budget": RetryBudget(0.2, 3)}),
        ("retryBudget", {"percent": 12.5, "minRetryConcurrency": 1}, {"retry_budget": RetryBudget(0.125, 1)}),
        ("proxyProtocol", {}, {"proxy_protocol": 1}),
        ("proxyProtocol", {"version": "V2"}, {"proxy_protocol": 2}),
        ("tls", {"mode": "ISTIO_MUTUAL"}, {"tls": ClientTls("ISTIO_MUTUAL")}),
        (
            "tls",
            {"mode": "SIMPLE", "sni": "a", "subjectAltNames": ["b"], "insecureSkipVerify": True, "caCertificates": "system"},
            {"tls": ClientTls("SIMPLE", "a", ("b",), verify=False), "refused": ""},
        ),
        ("tls", {"mode": "MUTUAL", "credentialName": "c"}, {"tls": ClientTls("MUTUAL", credential="c")}),
        (
            "tls",
            {"mode": "SIMPLE", "caCertificates": "/etc/ca.pem"},
            {"refused": "spec.trafficPolicy.tls.caCertificates: files of the proxy's own disk are not read; use credentialName"},
        ),
        (
            "tls",
            {"mode": "SIMPLE", "caCrl": "/x"},
            {"refused": "spec.trafficPolicy.tls.caCrl: files of the proxy's own disk are not read; use credentialName"},
        ),
        ("tunnel", {"targetHost": "a"}, {"refused": "spec.trafficPolicy.tunnel: tunnels through other proxies are not supported"}),
    ],
)
def test_the_other_blocks(block: str, fields: Json, expected: Json) -> None:
    found = policy(**{block: fields})
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("spec", "note"),
    [
        (
            {"workloadSelector": {"matchLabels": {"a": "b"}}},
            "spec.workloadSelector: a rule for chosen sidecars and gateways is not for waypoints",
        ),
        ({"trafficPolicy": {"loadBalancer": {"zoneAwareLbSetting": {}}}}, "zone-aware balancing is not done"),
        ({"trafficPolicy": {"connectionPool": {"http": {"http2KeepAlive": {}}}}}, "PINGs on upstream connections are not sent"),
        ({"trafficPolicy": {"retryBudget": {"budgetInterval": "10s"}}}, "budgets are of the requests of the moment"),
        ({"subsets": [{"name": "a", "trafficPolicy": {"tunnel": {}}}]}, "tunnels through other proxies are not supported"),
    ],
)
def test_what_is_not_done_is_noted(spec: Json, note: str) -> None:
    (found,) = rule(**spec).notes
    assert note in found


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"host": None}, "spec.host: no value"),
        ({"host": "a b"}, "spec.host: not a host"),
        ({"trafficPolcy": {}}, 'unknown field (did you mean "trafficPolicy"?)'),
        ({"exportTo": ["A"]}, "spec.exportTo[0]: not a namespace"),
        ({"subsets": [{"name": "a"}, {"name": "a"}]}, "spec.subsets[1].name: another subset has that name"),
        ({"trafficPolicy": {"portLevelSettings": [{"port": {"number": 0}}]}}, "not a port number"),
        ({"trafficPolicy": {"portLevelSettings": [{"port": {"number": 1}}, {"port": {"number": 1}}]}}, "stand there already"),
        ({"trafficPolicy": {"portLevelSettings": [{"port": {"number": 1}, "portLevelSettings": []}]}}, "unknown field"),
        ({"trafficPolicy": {"loadBalancer": {"simple": "ROUNDROBIN"}}}, "simple: not one of UNSPECIFIED"),
        ({"trafficPolicy": {"loadBalancer": {"simple": "RANDOM", "consistentHash": HEADER}}}, "simple or consistentHash"),
        ({"trafficPolicy": {"loadBalancer": {"consistentHash": {}}}}, "exactly one of httpHeaderName"),
        ({"trafficPolicy": {"loadBalancer": {"consistentHash": {**HEADER, "useSourceIp": True}}}}, "exactly one of httpHeaderName"),
        ({"trafficPolicy": {"loadBalancer": {"consistentHash": {**HEADER, "maglev": {"tableSize": 100}}}}}, "not a prime number"),
        ({"trafficPolicy": {"loadBalancer": {"consistentHash": {**HEADER, "maglev": {}, "ringHash": {}}}}}, "ringHash or maglev"),
        ({"trafficPolicy": {"loadBalancer": {"localityLbSetting": {"distribute": [{"from": "a", "to": {"b": 1}}]}}}}, "add up to 100"),
        (
            {
                "trafficPolicy": {
                    "loadBalancer": {"localityLbSetting": {"distribute": [{"from": "a", "to": {"b": 100}}], "failoverPriority": ["x"]}}
                }
            },
            "distribute, or failover",
        ),
        (
            {"trafficPolicy": {"connectionPool": {"http": {"h2UpgradePolicy": "UPGRADE", "useClientProtocol": True}}}},
            "not with h2UpgradePolicy",
        ),
        ({"trafficPolicy": {"outlierDetection": {"interval": "0s"}}}, "interval: not more than nothing"),
        ({"trafficPolicy": {"outlierDetection": {"maxEjectionPercent": 101}}}, "not a whole number from 0 to 100"),
        ({"trafficPolicy": {"tls": {"mode": "MUTUAL"}}}, "tls.credentialName: required with MUTUAL"),
    ],
)
def test_refusals(spec: Json, message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        rule(**spec)
