"""Istio's Gateway as it is read."""

from __future__ import annotations

import re

import pytest

from tests.kit.builders import Json
from tests.kit.mesh_l7 import istio
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.istio_gateway import IstioGatewayObject, Server, ServerTls
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, key_of, parse

HTTP = {"number": 80, "name": "http", "protocol": "HTTP"}
HTTPS = {"number": 443, "name": "https", "protocol": "HTTPS"}
FILES = "files of the proxy's own disk are not read; use credentialName"


def server(**fields: object) -> Server:
    body = istio("Gateway", servers=[{"port": HTTP, "hosts": ["a.example"]} | fields], selector={"istio": "ingressgateway"})
    found = parse(body, "test")
    assert key(found) == key_of(body) == ObjectKey("Gateway.networking.istio.io", "default", "x")
    assert isinstance(found, IstioGatewayObject)
    assert found.selector == {"istio": "ingressgateway"}
    (only,) = found.servers
    return only


def test_a_server() -> None:
    hosts = ["A.example", "*", "shop/b.example", "./c.example", "*/d.example"]
    assert server(hosts=hosts).hosts == (
        ("", "a.example"),
        ("", "*"),
        ("shop", "b.example"),
        ("default", "c.example"),
        ("", "d.example"),
    )
    assert server() == Server("default/x/0", 80, "HTTP", (("", "a.example"),))
    assert server(name="front", port={**HTTP, "protocol": "http2"}).protocol == "HTTP2"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"httpsRedirect": True}, ServerTls(redirect=True)),
        ({"mode": "SIMPLE", "credentialName": "c"}, ServerTls("SIMPLE", "c")),
        ({"mode": "SIMPLE", "credentialNames": ["c"]}, ServerTls("SIMPLE", "c")),
        ({"mode": "MUTUAL", "credentialName": "c", "minProtocolVersion": "TLSV1_3"}, ServerTls("MUTUAL", "c", min_version="TLSV1_3")),
        ({"mode": "SIMPLE", "credentialName": "c", "minProtocolVersion": "TLSV1_1"}, ServerTls("SIMPLE", "c")),
        ({}, ServerTls("PASSTHROUGH")),
    ],
)
def test_tls(fields: Json, expected: ServerTls) -> None:
    found = server(port=HTTP if expected.redirect else HTTPS, tls=fields)
    assert (found.tls, found.problem) == (expected, "")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tls": {"mode": "ISTIO_MUTUAL"}}, "tls.mode: ISTIO_MUTUAL is not supported"),
        ({"tls": {"mode": "SIMPLE", "credentialName": "c", "cipherSuites": ["x"]}}, "tls.cipherSuites: not supported"),
        ({"tls": {"mode": "MUTUAL", "credentialName": "c", "subjectAltNames": ["x"]}}, "tls.subjectAltNames: not supported"),
        ({"tls": {"mode": "SIMPLE", "credentialNames": ["a", "b"]}}, "one certificate for each server"),
        ({"tls": {"mode": "SIMPLE", "credentialName": "c", "maxProtocolVersion": "TLSV1_2"}}, "limits below TLS 1.3"),
        ({"tls": {"mode": "SIMPLE", "serverCertificate": "/x", "privateKey": "/y"}}, f"tls.serverCertificate: {FILES}"),
        ({"bind": "10.0.0.1"}, "bind: a server listens on all addresses of its pod"),
        ({"port": {**HTTP, "protocol": "HTTP_PROXY"}}, "HTTP_PROXY is not supported"),
    ],
)
def test_what_cannot_be_done_closes_the_server(fields: Json, problem: str) -> None:
    assert problem in server(**fields).problem


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hosts": []}, "servers[0].hosts: at least one"),
        ({"hosts": ["a/b/c"]}, "not a host"),
        ({"port": {**HTTP, "protocol": "SPDY"}}, "not one of HTTP"),
        ({"port": HTTPS}, "servers[0].tls: required with HTTPS"),
        ({"port": {**HTTPS, "protocol": "TLS"}}, "servers[0].tls: required with TLS"),
        ({"port": HTTPS, "tls": {"mode": "SIMPLE"}}, "credentialName: required with SIMPLE"),
        ({"port": HTTPS, "tls": {"mode": "SOME"}}, "mode: not one of PASSTHROUGH"),
        ({"tsl": {}}, "unknown field"),
    ],
)
def test_refusals(fields: Json, message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        server(**fields)
