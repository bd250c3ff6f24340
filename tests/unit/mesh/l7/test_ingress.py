"""Ingress gateways: listeners and servers, certificates, host names, routes of both APIs, the way through waypoints."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.kit.builders import Json, authorization, gateway, identity, labelled, mesh, namespace, pod, selecting, service_manifest
from tests.kit.mesh_l7 import gateway_api, hostname, istio, read_all, secret
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.attach import SelectedPods, placed_policies
from ztunnel.mesh.l7.clusters import Endpoint
from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, ProxyConfig, TlsServer
from ztunnel.mesh.l7.ingress import GatewayPods, derive_gateway
from ztunnel.mesh.l7.routes import Backend, TcpRoute
from ztunnel.mesh.l7.security import L7Action, L7Rule
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import RefusedPolicy
from ztunnel.mesh.waypoints import INGRESS_USE_WAYPOINT, USE_WAYPOINT

WHO = ObjectKey("Gateway", "default", "gw")
PODS = GatewayPods("default", "ingress", (("istio", "ingressgateway"),))
PEM = "-----BEGIN CERTIFICATE-----"
PAIR = secret("cert", tls_crt=PEM, tls_key=PEM)
WEB = service_manifest("web", "10.96.0.1", ports=[{"port": 80, "name": "http"}])
CLUSTER = f"outbound|80||{hostname('web')}"
TO_WEB = [{"name": "web", "port": 80}]


def listener(name: str = "http", port: int = 80, protocol: str = "HTTP", **more: object) -> Json:
    return {"name": name, "port": port, "protocol": protocol, **more}


def front(*listeners: Json) -> Json:
    return gateway_api("Gateway", "gw", gatewayClassName="istio", listeners=list(listeners))


def https(**tls: object) -> Json:
    return listener("https", 443, "HTTPS", tls={"certificateRefs": [{"name": "cert"}]} | tls)


def route(
    name: str = "r", *, kind: str = "HTTPRoute", namespace: str = "default", parent: Mapping[str, object] | None = None, **spec: object
) -> Json:
    known = {"parentRefs": [{"name": "gw", "namespace": "default", **(parent or {})}], "rules": [{"backendRefs": TO_WEB}]}
    return {**gateway_api(kind, name, namespace=namespace), "spec": known | spec}


def config(*bodies: Json, pods: GatewayPods | None = None) -> ProxyConfig:
    everything = [WEB, *bodies]
    return derive_gateway(read_all(everything), mesh(*everything), MeshOptions(), WHO, pods)


def server(*bodies: Json, pods: GatewayPods | None = None) -> GatewayServer:
    (only,) = config(*bodies, pods=pods).servers
    return only


def names(found: GatewayServer) -> dict[str, list[str]]:
    """The names of the routes of each host."""
    return {host: [each.name for each in virtual.routes] for virtual in found.virtual_hosts for host in virtual.hosts}


def test_a_listener_and_its_route() -> None:
    found = config(front(listener()), route())
    assert found.identity == identity("default", "gw-istio")
    (only,) = found.servers
    assert (only.name, only.port, only.protocol, only.hosts, only.tls, only.problem) == (
        "http",
        80,
        ListenerProtocol.HTTP,
        ("*",),
        None,
        "",
    )
    (virtual,) = only.virtual_hosts
    assert virtual.hosts == ("*",)
    assert virtual.routes[0].backends == (Backend(CLUSTER),)
    assert found.clusters.keys() == {CLUSTER}


@pytest.mark.parametrize(
    ("own", "spec", "expected"),
    [
        ("", {}, {"*": ["default/r/rule-0"]}),
        ("", {"hostnames": ["a.example", "*.b.example"]}, {"a.example": ["default/r/rule-0"], "*.b.example": ["default/r/rule-0"]}),
        ("*.example", {"hostnames": ["a.example", "a.other"]}, {"a.example": ["default/r/rule-0"]}),
        ("a.example", {"hostnames": ["*.example"]}, {"a.example": ["default/r/rule-0"]}),
        ("a.example", {"hostnames": ["b.example"]}, {}),
        ("a.example", {}, {"a.example": ["default/r/rule-0"]}),
    ],
)
def test_host_names_in_common(own: str, spec: Json, expected: dict[str, list[str]]) -> None:
    listening = listener(hostname=own) if own else listener()
    body = {**route(), "spec": {"parentRefs": [{"name": "gw"}], "rules": [{"backendRefs": TO_WEB}]} | spec}
    assert names(server(front(listening), body)) == expected


def test_what_a_narrow_host_does_not_match_is_for_the_wider_ones() -> None:
    found = server(
        front(listener()),
        route("wide", hostnames=["*.example"]),
        route("narrow", hostnames=["a.example"]),
        route("all"),
    )
    assert list(names(found).items()) == [
        ("a.example", ["default/narrow/rule-0", "default/wide/rule-0", "default/all/rule-0"]),
        ("*.example", ["default/wide/rule-0", "default/all/rule-0"]),
        ("*", ["default/all/rule-0"]),
    ]


@pytest.mark.parametrize(
    ("listening", "parent", "namespace_of_route", "attached"),
    [
        ({}, {}, "default", True),
        ({}, {"sectionName": "http"}, "default", True),
        ({}, {"sectionName": "other"}, "default", False),
        ({}, {"port": 80}, "default", True),
        ({}, {"port": 81}, "default", False),
        ({}, {"name": "other"}, "default", False),
        ({}, {}, "shop", False),
        ({"allowedRoutes": {"namespaces": {"from": "All"}}}, {}, "shop", True),
        ({"allowedRoutes": {"namespaces": {"from": "Selector", "selector": {"matchLabels": {"a": "b"}}}}}, {}, "shop", False),
        ({"allowedRoutes": {"kinds": [{"kind": "GRPCRoute"}]}}, {}, "default", False),
        ({"allowedRoutes": {"kinds": [{"kind": "HTTPRoute"}]}}, {}, "default", True),
    ],
)
def test_who_may_attach(listening: Json, parent: Json, namespace_of_route: str, attached: bool) -> None:
    found = server(front(listener(**listening)), namespace("shop"), route(namespace=namespace_of_route, parent=parent))  # type: ignore[arg-type]  # fields by name
    assert bool(found.virtual_hosts) is attached


@pytest.mark.parametrize(
    ("bodies", "tls", "problem"),
    [
        ([front(https()), PAIR], TlsServer(PEM.encode(), PEM.encode()), ""),
        (
            [front(https(options={"gateway.istio.io/tls-min-version": "TLSV1_3"})), PAIR],
            TlsServer(PEM.encode(), PEM.encode(), min_version="TLSV1_3"),
            "",
        ),
        ([front(https(options={"x.example/y": "z"})), PAIR], None, "option x.example/y is not supported"),
        ([front(https())], None, "Secret default/cert is not there"),
        ([front(https()), secret("cert", tls_crt=PEM)], None, "Secret default/cert has no certificate with its key"),
        ([front(https(certificateRefs=[]))], None, "TLS that ends here needs a certificate (tls.certificateRefs)"),
        ([front(https(certificateRefs=[{"name": "a"}, {"name": "b"}]))], None, "one certificate for each listener is supported"),
        ([front(https(certificateRefs=[{"name": "a", "kind": "Bag"}]))], None, "certificates of kind Bag are not supported"),
        (
            [front(https(certificateRefs=[{"name": "cert", "namespace": "infra"}])), secret("cert", "infra", tls_crt=PEM, tls_key=PEM)],
            None,
            "no ReferenceGrant permits Secret infra/cert",
        ),
        (
            [front(https(frontendValidation={"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "roots"}]})), PAIR],
            None,
            "ConfigMap default/roots is not there",
        ),
        ([front(listener("x", 1, "UDP"))], None, "protocol UDP is not supported"),
        ([front(listener("x", 1, "TLS", tls={"mode": "Terminate"}))], None, "TLS that ends here needs a certificate"),
    ],
)
def test_certificates_and_what_is_wrong_with_them(bodies: list[Json], tls: TlsServer | None, problem: str) -> None:
    found = server(*bodies)
    assert found.tls == tls
    assert found.problem.startswith(problem)
    assert bool(found.problem) is bool(problem)


def test_a_certificate_of_another_namespace_wants_a_grant() -> None:
    ref = {"name": "cert", "namespace": "infra"}
    source = {"group": "gateway.networking.k8s.io", "kind": "Gateway", "namespace": "default"}
    grant = gateway_api("ReferenceGrant", namespace="infra")
    grant["spec"] = {"from": [source], "to": [{"group": "", "kind": "Secret"}]}
    grant["apiVersion"] = "gateway.networking.k8s.io/v1beta1"
    assert server(front(https(certificateRefs=[ref])), secret("cert", "infra", tls_crt=PEM, tls_key=PEM), grant).problem == ""


def test_clients_certificates() -> None:
    roots: Json = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "roots"}, "data": {"ca.crt": PEM}}
    validation = {"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "roots"}]}
    found = server(front(https(frontendValidation=validation)), PAIR, roots)
    assert found.tls == TlsServer(PEM.encode(), PEM.encode(), PEM.encode())


def frontend(**spec: object) -> Json:
    body = front(https())
    body["spec"] = {"gatewayClassName": "istio", "listeners": [https()], "tls": spec}
    return body


ROOT_REF = {"validation": {"caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "roots"}]}}


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ({"frontend": {"default": ROOT_REF}}, True),
        ({"frontend": {"default": {}, "perPort": [{"port": 443, "tls": ROOT_REF}]}}, True),
        ({"frontend": {"default": ROOT_REF, "perPort": [{"port": 443, "tls": {}}]}}, False),
        ({"frontend": {"default": {}, "perPort": [{"port": 444, "tls": ROOT_REF}]}}, False),
    ],
)
def test_clients_certificates_asked_for_by_the_gateway_as_a_whole(spec: Json, asked: bool) -> None:
    roots: Json = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "roots"}, "data": {"ca.crt": PEM}}
    found = server(frontend(**spec), PAIR, roots)
    assert found.tls is not None
    assert bool(found.tls.client_roots) is asked


@pytest.mark.parametrize(
    "spec", [{"backend": {}}, {"frontend": {"default": {"validation": {"mode": "AllowInsecureFallback"}}}}, {"frontend": {"defaults": {}}}]
)
def test_what_a_gateway_would_ask_less_for_is_refused(spec: Json) -> None:
    with pytest.raises(ManifestError, match=r"spec\.tls"):
        server(frontend(**spec))


def test_connections() -> None:
    tcp = server(front(listener("tcp", 9000, "TCP")), route(kind="TCPRoute"))
    assert (tcp.protocol, tcp.tcp_routes) == (
        ListenerProtocol.TCP,
        (TcpRoute("default/r/rule-0", "TCPRoute default/r", (Backend(CLUSTER),)),),
    )
    listening = listener("tls", 443, "TLS", tls={"mode": "Passthrough"}, hostname="*.example")
    tls = server(front(listening), route("r", kind="TLSRoute", hostnames=["a.example"]), route("s", kind="TLSRoute"))
    assert (tls.protocol, [each.sni for each in tls.tcp_routes]) == (ListenerProtocol.TLS, [("a.example",), ("*.example",)])
    anything = server(front(listener("tls", 443, "TLS", tls={"mode": "Passthrough"})), route("r", kind="TLSRoute"))
    assert [each.sni for each in anything.tcp_routes] == [()]


# Istio's


def istio_gateway(*servers: Json, name: str = "ig", **selector: str) -> Json:
    return istio("Gateway", name, selector=selector or {"istio": "ingressgateway"}, servers=list(servers))


def plain(**more: object) -> Json:
    return {"port": {"number": 80, "name": "http", "protocol": "HTTP"}, "hosts": ["*.example"], **more}


def virtual(name: str = "v", *, namespace: str = "default", **spec: object) -> Json:
    known = {"hosts": ["a.example"], "gateways": ["ig"], "http": [{"route": [{"destination": {"host": "web"}}]}]}
    return {**istio("VirtualService", name, namespace=namespace), "spec": known | spec}


def test_a_server_and_its_virtual_services() -> None:
    found = config(istio_gateway(plain()), virtual(), pods=PODS)
    assert found.identity == identity("default", "ingress")
    (only,) = found.servers
    assert (only.name, only.port, only.protocol, only.hosts) == ("default/ig/0", 80, ListenerProtocol.HTTP, ("*.example",))
    assert names(only) == {"a.example": ["default/v/rule-0"]}
    assert only.virtual_hosts[0].routes[0].backends == (Backend(CLUSTER),)


@pytest.mark.parametrize(
    ("serving", "spec", "bound"),
    [
        ({}, {"gateways": ["default/ig"]}, True),
        ({}, {"gateways": ["mesh"]}, False),
        ({}, {"gateways": ["other/ig"]}, False),
        ({}, {"hosts": ["a.other"]}, False),
        ({}, {"hosts": ["*"]}, True),
        ({"hosts": ["shop/*.example"]}, {}, False),
        ({"hosts": ["./a.example"]}, {}, True),
        ({}, {"exportTo": ["shop"]}, False),
        ({}, {"http": [{"match": [{"port": 81}], "route": [{"destination": {"host": "web"}}]}]}, False),
        ({}, {"http": [{"match": [{"gateways": ["ig"]}], "route": [{"destination": {"host": "web"}}]}]}, True),
        ({}, {"http": [{"match": [{"gateways": ["default/ig"]}], "route": [{"destination": {"host": "web"}}]}]}, True),
        ({}, {"http": [{"match": [{"gateways": ["mesh"]}], "route": [{"destination": {"host": "web"}}]}]}, False),
    ],
)
def test_which_virtual_services_are_bound(serving: Json, spec: Json, bound: bool) -> None:
    body = virtual()
    body["spec"] = {"hosts": ["a.example"], "gateways": ["ig"], "http": [{"route": [{"destination": {"host": "web"}}]}]} | spec
    found = names(server(istio_gateway({**plain(), **serving}), body, pods=PODS))
    assert any(found.values()) is bound


def test_which_gateways_select_the_pods() -> None:
    assert config(istio_gateway(plain(), app="other"), pods=PODS).servers == ()
    assert config(istio_gateway(plain())).servers == ()


@pytest.mark.parametrize(
    ("mode", "bodies", "problem"),
    [
        ("SIMPLE", [PAIR], ""),
        ("SIMPLE", [], "Secret default/cert is not there"),
        ("MUTUAL", [PAIR], "Secret cert has no roots (ca.crt) for clients' certificates"),
        ("MUTUAL", [PAIR, secret("cert-cacert", ca_crt=PEM)], ""),
        ("OPTIONAL_MUTUAL", [secret("cert", tls_crt=PEM, tls_key=PEM, ca_crt=PEM)], "OPTIONAL_MUTUAL"),
        ("SIMPLE", [secret("cert", ca_crt=PEM)], "Secret cert has no certificate with its key"),
        ("PASSTHROUGH", [], ""),
    ],
)
def test_tls_of_a_server(mode: str, bodies: list[Json], problem: str) -> None:
    tls = {"mode": mode, "credentialName": "cert"}
    serving: Json = {"port": {"number": 443, "name": "https", "protocol": "HTTPS"}, "hosts": ["*"], "tls": tls}
    protocol = ListenerProtocol.TLS if mode == "PASSTHROUGH" else ListenerProtocol.HTTPS
    found = server(istio_gateway(serving), *bodies, pods=PODS)
    assert found.protocol is protocol
    assert found.problem.startswith(problem)
    assert bool(found.problem) is bool(problem)
    assert (found.tls is not None) is (protocol is ListenerProtocol.HTTPS and not problem)


def test_redirects_to_https_and_connections() -> None:
    assert server(istio_gateway(plain(tls={"httpsRedirect": True})), pods=PODS).redirect_to_https
    to_web = [{"destination": {"host": "web", "port": {"number": 80}}}]
    tcp: Json = {"port": {"number": 9000, "name": "tcp", "protocol": "TCP"}, "hosts": ["*"]}
    body = virtual(tcp=[{"match": [{"port": 9001}], "route": to_web}, {"match": [{"port": 9000}], "route": to_web}], hosts=["*"])
    assert [each.name for each in server(istio_gateway(tcp), body, pods=PODS).tcp_routes] == ["default/v/tcp-1"]
    passed: Json = {"port": {"number": 443, "name": "tls", "protocol": "TLS"}, "hosts": ["*.example"], "tls": {"mode": "PASSTHROUGH"}}
    body = virtual(tls=[{"match": [{"sniHosts": ["a.example", "b.other"]}], "route": to_web}])
    assert [each.sni for each in server(istio_gateway(passed), body, pods=PODS).tcp_routes] == [("a.example",)]
    ended: Json = {
        "port": {"number": 443, "name": "tls", "protocol": "TLS"},
        "hosts": ["*"],
        "tls": {"mode": "SIMPLE", "credentialName": "cert"},
    }
    found = server(istio_gateway(ended), PAIR, pods=PODS)
    assert (found.protocol, found.problem) == (ListenerProtocol.TLS, "")
    assert found.tls is not None


def test_both_apis_on_one_listener() -> None:
    found = server(front(listener()), route(hostnames=["a.example"]), virtual(gateways=["gw"], hosts=["a.example"]))
    assert names(found) == {"a.example": ["default/r/rule-0", "default/v/rule-0"]}


# Policies of the gateway's pods


@pytest.mark.parametrize(
    ("body", "held"),
    [
        (authorization("p", selector=selecting(istio="ingressgateway"), rules=[{"to": [{"operation": {"methods": ["GET"]}}]}]), True),
        (authorization("p", selector=selecting(app="other"), rules=[{}]), False),
        (authorization("p", rules=[{}]), True),
        (authorization("p", namespace="istio-system", rules=[{}]), True),
        (authorization("p", namespace="shop", rules=[{}]), False),
        (authorization("p", targetRefs=[{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "gw"}], rules=[{}]), True),
        (authorization("p", targetRefs=[{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "other"}], rules=[{}]), False),
    ],
)
def test_policies_of_the_gateways_pods(body: Json, held: bool) -> None:
    found = config(istio_gateway(plain()), virtual(), body, pods=PODS)
    (only,) = found.servers
    assert bool(only.virtual_hosts[0].policies) is held
    assert set(only.virtual_hosts[0].policies) == found.policies.keys()


def test_what_a_gateway_cannot_enforce_denies() -> None:
    pods = SelectedPods("default", {"istio": "ingressgateway"}, "istio-system")
    key = ObjectKey("AuthorizationPolicy", "default", "p")
    refused = RefusedPolicy(key, {"istio": "ingressgateway"}, everywhere=False, reason="broken")
    (placed,) = placed_policies([refused], pods)
    assert (placed.selected, placed.value.action, placed.value.rules) == (True, L7Action.DENY, (L7Rule(),))
    assert placed_policies([refused], SelectedPods("default", {}, "istio-system")) == ()


def test_tokens_at_a_gateway() -> None:
    spec = {"selector": selecting(istio="ingressgateway"), "jwtRules": [{"issuer": "i", "jwks": '{"keys": []}'}]}
    body: Json = {"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication", "metadata": {"name": "r"}, "spec": spec}
    found = config(istio_gateway(plain()), virtual(), body, pods=PODS)
    assert found.servers[0].virtual_hosts[0].jwt == ("default/r",)


# Through waypoints


def world(**labels: str) -> list[Json]:
    name = "waypoint.default.svc.cluster.local"
    return [
        namespace("default"),
        labelled(gateway("waypoint"), labels={}) | {"status": {"addresses": [{"type": "Hostname", "value": name}]}},
        service_manifest("waypoint", "10.96.0.9", selector={"app": "waypoint"}, ports=[{"port": 15008}]),
        pod("wp", "10.0.0.9", labels={"app": "waypoint"}),
        labelled(service_manifest("web", "10.96.0.1", ports=[{"port": 80, "name": "http"}]), labels=labels),
    ]


def through(*bodies: Json) -> ProxyConfig:
    everything = [front(listener()), route(), *bodies]
    return derive_gateway(read_all(everything), mesh(*everything), MeshOptions(), WHO)


def test_a_gateway_goes_through_a_waypoint_where_the_service_says_so() -> None:
    cluster = through(*world(**{USE_WAYPOINT: "waypoint", INGRESS_USE_WAYPOINT: "true"})).clusters[CLUSTER]
    assert cluster.endpoints == (Endpoint("10.96.0.1", 80, "uid-wp", identity(), hbone=True, node="node", waypoint=("10.0.0.9", 15008)),)
    assert through(*world(**{USE_WAYPOINT: "waypoint"})).clusters[CLUSTER].endpoints == ()


def test_no_way_leads_through_a_waypoint_to_a_service_without_an_address() -> None:
    labels = {USE_WAYPOINT: "waypoint", INGRESS_USE_WAYPOINT: "true"}
    headless = labelled(service_manifest("web", ports=[{"port": 80, "name": "http"}]), labels=labels)
    cluster = through(*world()[:-1], headless).clusters[CLUSTER]
    assert "has no virtual address by which its waypoint default/waypoint would know it" in cluster.refused


def test_a_waypoint_that_is_missing_closes_the_way() -> None:
    labels = {USE_WAYPOINT: "gone", INGRESS_USE_WAYPOINT: "true"}
    assert 'waypoint "default/gone" is not ready' in through(*world(**labels)).clusters[CLUSTER].refused
