"""MeshConfig, Telemetry and what they add up to for a service."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from tests.kit.builders import Json, mesh, metadata, namespace, pod, service_manifest
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.clusters import UpstreamHttp
from ztunnel.mesh.l7.config import PathNormalization, ProxyConfig
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import AuthorizerKind, ExtensionProvider
from ztunnel.mesh.l7.telemetry import AccessLog, Collector, CustomTag, Metric, MetricOverride, TelemetrySettings, Tracing
from ztunnel.mesh.manifests.mesh_config import MeshConfig, ProviderKind
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, parse
from ztunnel.mesh.manifests.telemetry import TelemetryObject
from ztunnel.sources.mesh_config import mesh_config_of


def config_map(text: str) -> Json:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("istio", "istio-system"), "data": {"mesh": text}}


def mesh_config(**members: object) -> MeshConfig:
    found = parse(config_map(yaml.safe_dump(members)), "test")  # not a manifest: ours
    return mesh_config_of({key(found): found}, "istio-system")


def telemetry(name: str, where: str, created: str = "2026-01-01T00:00:00Z", **spec: object) -> Json:
    return {
        "apiVersion": "telemetry.istio.io/v1",
        "kind": "Telemetry",
        "metadata": metadata(name, where, creationTimestamp=created),
        "spec": spec,
    }


def proxy(*bodies: Json, config: MeshConfig | None = None) -> ProxyConfig:
    everything = [
        namespace("shop"),
        namespace("default"),
        service_manifest("web", "10.96.0.1", namespace="shop", ports=[{"port": 80, "name": "http"}]),
        service_manifest("authz", "10.96.0.2", namespace="shop", ports=[{"port": 8000, "name": "http"}], selector={"app": "authz"}),
        pod("authz", "10.0.0.9", namespace="shop", labels={"app": "authz"}),
        *bodies,
    ]
    objects = {key(each): each for each in (parse(body, "test") for body in everything)}
    bound = Bound(frozenset({"shop/web.shop.svc.cluster.local"}))
    waypoint = ObjectKey("Gateway", "default", "waypoint")
    return derive_proxy(objects, mesh(*everything), MeshOptions(), waypoint, bound, mesh_config=config)


def settings(*bodies: Json, config: MeshConfig | None = None) -> TelemetrySettings:
    found = proxy(*bodies, config=config)
    return found.telemetry[found.services[0].telemetry]


SERVICE = {"kind": "Service", "name": "web", "group": ""}


def test_nothing_said_is_metrics_and_propagation_only() -> None:
    found = proxy()
    assert found.telemetry == {"": TelemetrySettings()}
    assert found.services[0].telemetry == ""
    assert found.options.path_normalization is PathNormalization.BASE


def test_metric_overrides_come_in_order_of_their_places() -> None:
    def override(value: str) -> list[object]:
        return [{"overrides": [{"match": {"metric": "REQUEST_COUNT"}, "tagOverrides": {"x": {"value": value}}}]}]

    found = settings(
        telemetry("s", "shop", targetRefs=[SERVICE], metrics=override("'service'")),
        telemetry("m", "istio-system", metrics=override("'mesh'")),
        telemetry("n", "shop", metrics=override("'namespace'")),
        telemetry("w", "default", metrics=override("'waypoint'")),
        telemetry("young", "default", "2026-02-01T00:00:00Z", metrics=override("'young'")),
        telemetry("o", "lab", metrics=override("'other'")),
        telemetry("pods", "shop", selector={"matchLabels": {"a": "b"}}, metrics=override("'pods'")),
    )
    assert [each.tags[0][1] for each in found.overrides] == ["'mesh'", "'waypoint'", "'namespace'", "'service'"]


def test_all_metrics_are_meant_where_none_is_named_and_clients_are_not_ours() -> None:
    found = settings(
        telemetry(
            "m",
            "shop",
            metrics=[
                {
                    "overrides": [
                        {"disabled": True, "match": {"mode": "CLIENT"}},
                        {"tagOverrides": {"source_principal": {"operation": "REMOVE"}}, "match": {"mode": "SERVER"}},
                    ]
                }
            ],
        )
    )
    assert found.overrides == tuple(MetricOverride(metric, tags=(("source_principal", None),)) for metric in Metric)


@pytest.mark.parametrize(
    ("config", "parts", "logs"),
    [
        ({}, [[{}]], (AccessLog(),)),
        ({"accessLogFile": "/dev/stdout"}, [], (AccessLog(),)),
        ({"accessLogFile": "/dev/stdout", "accessLogFormat": "%PATH%"}, [], (AccessLog(template="%PATH%"),)),
        (
            {"accessLogFile": "/dev/stdout", "accessLogEncoding": "JSON", "accessLogFormat": '{"a": "%PATH%"}'},
            [],
            (AccessLog(json=True, fields=(("a", "%PATH%"),)),),
        ),
        ({"accessLogFile": "/dev/stdout"}, [[{"disabled": True}]], ()),
        ({}, [[{"providers": [{"name": "envoy"}]}]], (AccessLog(),)),
        ({}, [[{"filter": {"expression": "response.code >= 500"}}]], (AccessLog(filter="response.code >= 500"),)),
        ({}, [[{"filter": {"expression": "true"}}], [{"match": {"mode": "CLIENT"}, "disabled": True}]], (AccessLog(filter="true"),)),
        ({}, [[{"providers": [{"name": "mine"}]}], [{}]], (AccessLog("mine", json=True, fields=(("m", "%METHOD%"),)),)),
        ({}, [[{"providers": [{"name": "nobody"}]}]], ()),
        ({"defaultProviders": {"accessLogging": ["mine"]}}, [], (AccessLog("mine", json=True, fields=(("m", "%METHOD%"),)),)),
    ],
)
def test_access_logs(config: dict[str, object], parts: list[object], logs: tuple[AccessLog, ...]) -> None:
    mine = {"name": "mine", "envoyFileAccessLog": {"path": "/dev/stdout", "logFormat": {"labels": {"m": "%METHOD%"}}}}
    places = ["istio-system", "shop"]
    bodies = [telemetry("x", places[index], accessLogging=part) for index, part in enumerate(parts)]
    assert settings(*bodies, config=mesh_config(extensionProviders=[mine], **config)).access_logs == logs


def test_tracing() -> None:
    provider = {"name": "otel", "opentelemetry": {"service": "authz.shop.svc.cluster.local", "port": 8000, "http": {"path": "/x"}}}
    config = mesh_config(
        extensionProviders=[provider],
        defaultProviders={"tracing": ["otel"]},
        defaultConfig={"tracing": {"sampling": 5}},
    )
    cluster = "outbound|8000||authz.shop.svc.cluster.local"
    known = Tracing(5, Collector.OTLP_HTTP, "authz.shop.svc.cluster.local:8000", cluster, "/x", "otel")
    assert settings(config=config).tracing == known
    tags = {"a": {"literal": {"value": "b"}}, "h": {"header": {"name": "X-H", "defaultValue": "d"}}, "e": {"environment": {"name": "E"}}}
    found = settings(
        telemetry("m", "istio-system", tracing=[{"randomSamplingPercentage": 100, "customTags": tags}]),
        telemetry("s", "shop", tracing=[{"disableSpanReporting": True, "useRequestIdForTraceSampling": False}]),
        config=config,
    ).tracing
    assert found == replace(
        known,
        percent=100,
        report=False,
        custom_tags=(CustomTag("a", "literal", "b"), CustomTag("h", "header", "x-h", "d"), CustomTag("e", "environment", "E")),
        use_request_id=False,
    )


def test_authorizers_become_clusters_or_a_reason() -> None:
    config = mesh_config(
        pathNormalization={"normalization": "MERGE_SLASHES"},
        extensionProviders=[
            {
                "name": "opa",
                "envoyExtAuthzHttp": {
                    "service": "shop/authz.shop.svc.cluster.local",
                    "port": 8000,
                    "timeout": "0.5s",
                    "pathPrefix": "/check",
                    "failOpen": True,
                    "statusOnError": "503",
                    "includeRequestHeadersInCheck": ["X-Ext-*", "cookie"],
                    "includeAdditionalHeadersInCheck": {"X-A": "b"},
                    "includeRequestBodyInCheck": {"maxRequestBytes": 100, "allowPartialMessage": True},
                    "headersToUpstreamOnAllow": ["x-user"],
                    "headersToDownstreamOnDeny": ["set-cookie"],
                    "headersToDownstreamOnAllow": ["*-time"],
                },
            },
            {"name": "grpc", "envoyExtAuthzGrpc": {"service": "authz.shop.svc.cluster.local", "port": 8000}},
            {"name": "gone", "envoyExtAuthzHttp": {"service": "gone.shop.svc.cluster.local", "port": 80}},
            {"name": "bad", "envoyExtAuthzHttp": {"service": "authz.shop.svc.cluster.local", "prot": 80}},
            {"name": "log", "envoyFileAccessLog": {}},
            {"name": "odd", "lightstep": {}},
            {"name": "odd", "lightstep": {}},
        ],
    )
    found = proxy(config=config)
    cluster = "outbound|8000||authz.shop.svc.cluster.local"

    def text(kind: TextKind, value: str) -> tuple[TextMatch, ...]:
        return (TextMatch(kind, value, ignore_case=True),)

    assert found.providers["opa"] == ExtensionProvider(
        "opa",
        AuthorizerKind.HTTP,
        cluster,
        "authz.shop.svc.cluster.local",
        "/check",
        0.5,
        True,
        503,
        (*text(TextKind.PREFIX, "x-ext-"), *text(TextKind.EXACT, "cookie")),
        (("x-a", "b"),),
        text(TextKind.EXACT, "x-user"),
        text(TextKind.EXACT, "set-cookie"),
        text(TextKind.SUFFIX, "-time"),
        100,
        True,
    )
    assert (found.providers["grpc"].kind, found.providers["grpc"].cluster) == (AuthorizerKind.GRPC, f"{cluster}|grpc")
    assert (found.clusters[cluster].http, found.clusters[f"{cluster}|grpc"].http) == (UpstreamHttp.HTTP1, UpstreamHttp.HTTP2)
    assert found.clusters[cluster].endpoints[0].address == "10.0.0.9"
    assert found.providers["gone"].problem == "there is no service gone.shop.svc.cluster.local with port 80"
    assert "prot: unknown field" in found.providers["bad"].problem
    assert found.providers["log"].problem == "it is no external authorizer"
    assert "not supported: lightstep" in found.providers["odd"].problem
    assert found.options.path_normalization is PathNormalization.MERGE_SLASHES
    assert [problem.split(": ", 1)[1] for problem in config.problems] == [
        'extensionProviders[3].envoyExtAuthzHttp.prot: unknown field (did you mean "port"?)',
        'extensionProviders[6].name: a name that another provider has: "odd"',
    ]


def test_a_mesh_config_that_cannot_be_read_has_defaults_but_the_strictest_paths_and_says_so() -> None:
    strict = PathNormalization.DECODE_AND_MERGE_SLASHES

    def problem(text: str, paths: PathNormalization = PathNormalization.BASE) -> str:
        found = parse(config_map(text), "test")
        config = mesh_config_of({key(found): found}, "istio-system")
        assert config.path_normalization is paths
        return config.problems[0]

    assert "not a mapping" in problem("[]", strict)
    assert "ConfigMap istio-system/istio mesh: line " in problem("{", strict)
    assert "not one of DEFAULT, NONE, BASE" in problem("pathNormalization: {normalization: X}", strict)
    assert "extensionProviders: not a list" in problem("extensionProviders: 5")
    assert "accessLogEncoding: not one of TEXT, JSON" in problem("accessLogEncoding: XML")
    assert mesh_config_of({}, "istio-system") == MeshConfig()
    assert mesh_config(rootNamespace="x").problems == ()
    assert mesh_config(extensionProviders=[{"name": "p", "prometheus": {}}]).providers["p"].kind is ProviderKind.PROMETHEUS


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"metrcs": []}, 'metrcs: unknown field (did you mean "metrics"?)'),
        ({"metrics": [{"overrides": [{"match": {"metric": "X"}}]}]}, "match.metric: not one of ALL_METRICS, REQUEST_COUNT"),
        ({"metrics": [{"overrides": [{"match": {"customMetric": "x"}}]}]}, "customMetric: only Istio's standard metrics exist"),
        ({"metrics": [{"overrides": [{"tagOverrides": {"x": {"value": "a b"}}}]}]}, "tagOverrides.x.value: unknown name 'a'"),
        ({"metrics": [{"overrides": [{"tagOverrides": {"x-y": {"value": "'a'"}}}]}]}, "not the name of a label"),
        ({"accessLogging": [{"filter": {"expression": "x"}}]}, "filter.expression: unknown name 'x'"),
        ({"accessLogging": [{"match": {"mode": "X"}}]}, "match.mode: not one of CLIENT_AND_SERVER"),
        ({"tracing": [{"randomSamplingPercentage": 101}]}, "randomSamplingPercentage: not a number from 0 to 100"),
        ({"tracing": [{"customTags": {"a": {}}}]}, "customTags.a: exactly one of literal, environment, header, formatter"),
    ],
)
def test_what_telemetry_is_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse({**telemetry("x", "shop"), "spec": spec}, "test")
    assert message in str(caught.value)


def test_a_telemetry_object_knows_its_targets() -> None:
    found = parse(telemetry("x", "shop", targetRefs=[SERVICE]), "test")
    assert isinstance(found, TelemetryObject)
    assert found.targets[0].name == "web"


@pytest.mark.parametrize(("value", "tells"), [("true", True), ("false", False), (None, False)])
def test_an_annotation_of_the_gateway_tells_applications_who_asks(value: str | None, tells: bool) -> None:
    annotations = {} if value is None else {"ambient.istio.io/xfcc-include-client-identity": value}
    gateway: Json = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": metadata("waypoint", "default", annotations=annotations),
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
    }
    assert proxy(gateway).options.xfcc is tells
