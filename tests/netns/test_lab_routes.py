"""Routes in a lab's waypoint, on real connections: subsets, faults, both APIs on one service, consumers, entries, and what is closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit import labs
from tests.kit.labs import Lab
from tests.kit.polling import eventually
from ztunnel.mesh.manifests.tree import Tree, branches, text

pytestmark = pytest.mark.slow

MESH = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient, istio.io/use-waypoint: front}}
---
apiVersion: v1
kind: Namespace
metadata: {name: guest, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: front, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080, name: http}]}
---
apiVersion: v1
kind: Service
metadata: {name: other, namespace: shop}
spec: {selector: {app: other}, ports: [{port: 80, targetPort: 8080, name: http}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-v1, namespace: shop, labels: {app: web, version: v1}}
spec: {containers: [{name: echo, image: echo, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-v2, namespace: shop, labels: {app: web, version: v2}}
spec: {containers: [{name: echo, image: echo, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: other, namespace: shop, labels: {app: other}}
spec: {containers: [{name: echo, image: echo, ports: [{containerPort: 8080}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop}
spec: {containers: [{name: curl, image: curlimages/curl}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: guest}
spec: {containers: [{name: curl, image: curlimages/curl}]}
"""
SUBSETS = """
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec:
  host: web
  subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: web, namespace: shop}
spec:
  hosts: [web]
  http:
    - match: [{headers: {end-user: {exact: jason}}}]
      route: [{destination: {host: web, subset: v2}}]
    - match: [{uri: {prefix: /fault}}]
      fault: {abort: {httpStatus: 418, percentage: {value: 100}}}
      route: [{destination: {host: web, subset: v1}}]
    - match: [{uri: {prefix: /lost}}]
      route: [{destination: {host: web, subset: v3}}]
    - route: [{destination: {host: web, subset: v1}}]
      rewrite: {uri: /seen/}
      headers: {request: {set: {x-seen: "yes"}}}
"""
ROUTES = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
    - matches: [{path: {type: Exact, value: /gone}}]
      backendRefs: [{name: gone, port: 80}]
    - matches: [{path: {type: PathPrefix, value: /old}}]
      filters: [{type: RequestRedirect, requestRedirect: {hostname: new.example, statusCode: 301}}]
    - backendRefs: [{name: other, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: guest}
spec:
  parentRefs: [{group: "", kind: Service, name: web, namespace: shop}]
  rules:
    - filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-guest, value: welcome}]}}]
      backendRefs: [{name: web, namespace: shop, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1beta1
kind: ReferenceGrant
metadata: {name: guests, namespace: shop}
spec:
  from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: guest}]
  to: [{group: "", kind: Service}]
"""
CLOSED: Tree = {
    "apiVersion": "networking.istio.io/v1",
    "kind": "DestinationRule",
    "metadata": {"name": "other", "namespace": "shop"},
    "spec": {"host": "other", "trafficPolicy": {"tls": {"mode": "SIMPLE", "caCertificates": "/etc/ca.pem"}}},
}


@pytest.fixture(name="lab", scope="module")
def fixture_lab() -> Iterator[Lab]:
    """A namespace behind a waypoint, and one that is not."""
    with labs.up(MESH) as found:
        yield found


def asked(lab: Lab, path: str = "/", *options: str, service: str = "web", namespace: str = "shop") -> Tree:
    """What the application says of a request."""
    return lab.curl("client", f"http://{service}.shop{path}", *options, namespace=namespace).json()


def status(lab: Lab, path: str, service: str = "web") -> str:
    """Of the answer."""
    return lab.curl("client", f"http://{service}.shop{path}", "-o", "/dev/null", "-w", "%{http_code}", namespace="shop").stdout


def reasons(lab: Lab, kind: str, name: str) -> set[str]:
    """Of an object's conditions."""
    return {text(each, "reason") for each in branches(lab.get(kind, name, "shop"), "status", "conditions")}


def test_virtual_services_and_subsets(lab: Lab) -> None:
    lab.apply(SUBSETS)
    lab.settle()
    assert {str(asked(lab)["pod"]) for _ in range(8)} == {"web-v1"}
    assert {str(asked(lab, "/", "-H", "end-user: jason")["pod"]) for _ in range(8)} == {"web-v2"}
    told = lab.exec("client", "curl", "-sS", "-w", " %{http_code}", "http://web.shop/fault", namespace="shop")
    assert told.stdout == "fault filter abort 418"
    assert status(lab, "/lost") == "503", "a subset that nobody defines"
    rewritten = asked(lab, "/path?a=b")
    headers = {str(name).lower(): value for name, value in dict(rewritten["headers"]).items()}  # type: ignore[call-overload]  # echo's own
    assert headers["x-seen"] == "yes"
    assert str(rewritten["path"]).startswith("/seen/path")
    wanted = {"Accepted", "BackendNotFound", "ResolvedWaypoints"}
    eventually(lambda: reasons(lab, "virtualservice", "web") == wanted, within=30, saying="what became of it")


def test_routes_of_gateway_api_take_over_and_consumers_have_their_own(lab: Lab) -> None:
    lab.apply(ROUTES)
    lab.settle()
    assert asked(lab)["pod"] == "other"
    assert status(lab, "/gone") == "500"
    moved = lab.curl("client", "http://web.shop/old/path?a=b", "-i", namespace="shop").stdout.lower()
    assert moved.startswith("http/1.1 301")
    assert "location: http://new.example/old/path?a=b" in moved
    guest = asked(lab, namespace="guest")
    assert str(guest["pod"]).startswith("web-")
    headers = {str(name).lower(): value for name, value in dict(guest["headers"]).items()}  # type: ignore[call-overload]  # as above
    assert headers["x-guest"] == "welcome"
    lab.delete("httproute", "web", "shop")
    lab.delete("httproute", "web", "guest")
    lab.settle()


def test_what_cannot_be_done_safely_is_closed_and_said(lab: Lab) -> None:
    assert asked(lab, service="other")["pod"] == "other"
    lab.apply([CLOSED])
    lab.settle()
    assert status(lab, "/", "other") == "503"
    eventually(lambda: "PartiallyInvalid" in reasons(lab, "destinationrule", "other"), within=30, saying="what became of it")
    lab.delete("destinationrule", "other", "shop")
    lab.settle()
    assert asked(lab, service="other")["pod"] == "other"


def entry(name: str, **spec: object) -> Tree:
    """A ServiceEntry of the namespace behind the waypoint."""
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "ServiceEntry",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"hosts": [f"{name}.example"], **spec},
    }


def test_entries_behind_the_waypoint(lab: Lab) -> None:
    port = {"number": 80, "name": "http", "protocol": "HTTP"}
    other = lab.address("other", "shop")
    lab.apply(
        [
            entry("fixed", ports=[{**port, "targetPort": 8080}], resolution="STATIC", endpoints=[{"address": other}]),
            entry("named", ports=[port], resolution="DNS", endpoints=[{"address": "other.shop.svc.cluster.local"}]),
            entry("wild", ports=[port], resolution="DYNAMIC_DNS", hosts=["*.cluster.local"], addresses=["192.0.2.9"]),
            entry("plain", ports=[{**port, "number": 8080}], resolution="NONE", addresses=[other]),
        ]
    )
    lab.settle()
    for url in ("http://fixed.example/", "http://named.example/", "http://plain.example:8080/"):
        told = lab.curl("client", url, "-i", namespace="shop")
        assert told.code == 0, (url, told)
        assert "server: istio-envoy" in told.stdout.lower(), url
        assert '"pod": "other"' in told.stdout, url
    for host, code in (("other.shop.svc.cluster.local", "200"), ("elsewhere.example", "404")):
        words = ("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"host: {host}", "http://192.0.2.9/")
        assert lab.exec("client", *words, namespace="shop").stdout == code, host


DOOR = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: door, namespace: shop}
spec:
  gatewayClassName: istio
  listeners: [{name: http, port: 80, protocol: HTTP}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: door, namespace: shop}
spec:
  parentRefs: [{name: door}]
  hostnames: [web.example]
  rules: [{backendRefs: [{name: web, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: inner, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules:
    - filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: x-inner, value: "1"}]}}]
      backendRefs: [{name: web, port: 80}]
"""


def test_an_ingress_gateway_goes_through_the_waypoint_where_the_service_says_so(lab: Lab) -> None:
    lab.apply(DOOR)
    lab.settle()
    address = text(lab.get("service", "door-istio", "shop"), "spec", "clusterIP")

    def asked_from_outside() -> Tree:
        return lab.curl("client", f"http://{address}/", "-H", "host: web.example", namespace="guest").json()

    def inner() -> bool:
        return "x-inner" in {str(name).lower() for name in dict(asked_from_outside()["headers"])}  # type: ignore[call-overload]  # as above

    assert not inner()
    lab.label("service", "web", {"istio.io/ingress-use-waypoint": "true"}, "shop")
    lab.settle()
    assert inner()
    refused = lab.exec("client", "curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", f"http://{address}/", namespace="guest")
    assert refused.stdout == "404", "no route has this host"
