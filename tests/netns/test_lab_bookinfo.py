"""The bookstore's walk through a waypoint in a lab, from its manifests: each step and what a user sees of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest

from tests.kit import labs
from tests.kit.labs import SAMPLES, Answer, Lab
from tests.kit.polling import eventually
from ztunnel.mesh.manifests.tree import Tree, branches, strings, text

pytestmark = pytest.mark.slow

BOOKINFO = SAMPLES / "bookinfo"
PAGE = "http://productpage:9080/productpage"
TITLE = "<title>Simple Bookstore App</title>"
RESET = (7, 56)
"""What curl says of a connection that is reset: before it knows that it is connected, or after."""
DENIED = "RBAC: access denied"
PATIENCE = 60.0


@pytest.fixture(name="lab", scope="module")
def fixture_lab() -> Iterator[Lab]:
    """The bookstore in the mesh, in front of it one waypoint for all."""
    with labs.up([BOOKINFO / "bookinfo.yaml", BOOKINFO / "gateway.yaml"]) as found:
        found.label("namespace", "default", {"istio.io/dataplane-mode": "ambient"})
        found.apply(WAYPOINT)
        found.label("namespace", "default", {"istio.io/use-waypoint": "waypoint"})
        found.settle()
        yield found


WAYPOINT = """
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
"""


def ask(lab: Lab, pod: str = "curl", url: str = PAGE, *options: str) -> Answer:
    """Body and status, the status on the last line."""
    return lab.exec(pod, "curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", *options, url)


def answered(lab: Lab, status: int, words: str, pod: str = "curl", *options: str) -> Answer:
    """The first such answer: what was applied is in force a moment after everybody has read it."""

    def found() -> Answer | None:
        answer = ask(lab, pod, PAGE, *options)
        assert answer.stdout.endswith(f"\n{status}"), answer
        assert words in answer.stdout, answer
        return answer

    return eventually(found, within=PATIENCE)


def conditions(body: Tree) -> dict[str, tuple[str, str]]:
    return {text(each, "type"): (text(each, "status"), text(each, "reason")) for each in branches(body, "status", "conditions")}


@pytest.fixture(name="policies")
def fixture_policies(lab: Lab) -> Iterator[None]:
    """Policies that a test applies go with it."""
    yield
    for policy in lab.list("authorizationpolicy"):
        lab.delete("authorizationpolicy", text(policy, "metadata", "name"))
    lab.settle()


def test_services_are_bound_and_answer_by_way_of_it(lab: Lab) -> None:
    assert TITLE in answered(lab, 200, TITLE).stdout
    assert conditions(lab.get("service", "productpage"))["istio.io/WaypointBound"] == ("True", "WaypointAccepted")
    waypoint = lab.get("gateway", "waypoint")
    told = {name: status for name, (status, _) in conditions(waypoint).items()}
    assert told == dict.fromkeys(("Accepted", "Programmed", "ResolvedRefs"), "True")
    address = text(branches(waypoint, "status", "addresses")[0], "value")
    assert address == text(lab.get("service", "waypoint"), "spec", "clusterIP")
    headers = ask(lab, "curl", PAGE, "-i").stdout
    assert "server: istio-envoy" in headers.lower()
    node = text(lab.get("pod", "curl"), "spec", "nodeName")
    eventually(lambda: "waypoint=default/waypoint" in lab.logs(f"node/{node}"), within=PATIENCE)


def test_the_waypoints_process_holds_no_capability_and_its_pod_is_not_captured(lab: Lab) -> None:
    status = lab.exec("deploy/waypoint", "cat", "/proc/self/status").stdout
    held = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\s+(\w+)$", status, re.MULTILINE))
    assert {name: int(held[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == dict.fromkeys(("CapPrm", "CapEff", "CapBnd"), 0)
    assert held["NoNewPrivs"] == "1"
    (pod,) = lab.list("pods", selector="gateway.networking.k8s.io/gateway-name=waypoint")
    assert "ambient.istio.io/redirection" not in strings(pod, "metadata", "annotations")
    assert text(pod, "spec", "serviceAccountName") == "waypoint"


@pytest.mark.usefixtures("policies")
def test_an_l4_policy_sees_the_waypoint_and_an_l7_policy_sees_the_client(lab: Lab) -> None:
    lab.apply([BOOKINFO / "l4-policy.yaml", BOOKINFO / "l7-policy.yaml"])
    lab.settle()
    assert conditions(lab.get("authorizationpolicy", "productpage-waypoint"))["WaypointAccepted"] == ("True", "Accepted")
    assert conditions(lab.get("authorizationpolicy", "productpage-ztunnel"))["ZtunnelAccepted"] == ("True", "Accepted")
    answered(lab, 503, "upstream connect error or disconnect/reset before headers")
    lab.apply(BOOKINFO / "l4-policy-with-waypoint.yaml")
    lab.settle()
    answered(lab, 200, TITLE)
    assert answered(lab, 403, DENIED, "curl", "-X", "DELETE").stdout == f"{DENIED}\n403"
    assert answered(lab, 403, DENIED, "deploy/reviews-v1").stdout == f"{DENIED}\n403"
    others = lab.exec("deploy/reviews-v1", "curl", "-sS", "--max-time", "20", "http://details:9080/details/0")
    assert "author" in others.stdout, "other services are unaffected"
    assert TITLE in browse(lab).stdout, "the gateway goes past the waypoint, and the first policy names it"
    lab.label("service", "productpage", {"istio.io/ingress-use-waypoint": "true"})
    lab.settle()
    eventually(lambda: browse(lab).stdout == f"{DENIED}\n403", within=PATIENCE, saying="the waypoint judges the gateway's requests")
    lab.label("service", "productpage", {"istio.io/ingress-use-waypoint": None})
    lab.settle()
    eventually(lambda: TITLE in browse(lab).stdout, within=PATIENCE)


def browse(lab: Lab) -> Answer:
    """Somebody outside of the mesh, by way of the ingress gateway."""
    options = ("-sS", "--max-time", "20", "-w", "\n%{http_code}")
    return lab.exec("browser", "curl", *options, "http://bookinfo-gateway-istio.default/productpage", namespace="outside")


def test_an_ingress_gateway_leads_into_the_mesh(lab: Lab) -> None:
    assert TITLE in browse(lab).stdout
    assert {name: status for name, (status, _) in conditions(lab.get("gateway", "bookinfo-gateway")).items()}["Programmed"] == "True"
    (parent,) = branches(lab.get("httproute", "bookinfo"), "status", "parents")
    assert text(parent, "controllerName") == "istio.io/gateway-controller"
    (pod,) = lab.list("pods", selector="gateway.networking.k8s.io/gateway-name=bookinfo-gateway")
    assert text(pod, "spec", "serviceAccountName") == "bookinfo-gateway-istio"
    page = next(each for each in lab.list("pods", selector="app=productpage"))
    identity = "src.identity=spiffe://cluster.local/ns/default/sa/bookinfo-gateway-istio"
    eventually(lambda: identity in lab.logs(f"node/{text(page, 'spec', 'nodeName')}"), within=PATIENCE)


@pytest.mark.usefixtures("policies")
def test_who_comes_past_the_waypoint_can_be_refused(lab: Lab) -> None:
    lab.apply(
        """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-by-way-of-the-waypoint}
spec:
  selector: {matchLabels: {app: details}}
  action: DENY
  rules: [{from: [{source: {notPrincipals: [cluster.local/ns/default/sa/waypoint]}}]}]
"""
    )
    lab.settle()
    address = next(text(pod, "status", "podIP") for pod in lab.list("pods", selector="app=details"))
    eventually(lambda: ask(lab, "curl", f"http://{address}:9080/details/0").code in RESET, within=PATIENCE)
    assert "author" in ask(lab, "curl", "http://details:9080/details/0").stdout


@pytest.mark.usefixtures("policies")
def test_request_rules_of_a_selector_policy_close_the_pod(lab: Lab) -> None:
    lab.apply(
        """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: misplaced}
spec:
  selector: {matchLabels: {app: ratings}}
  action: ALLOW
  rules: [{to: [{operation: {methods: [GET]}}]}]
"""
    )
    lab.settle()
    assert conditions(lab.get("authorizationpolicy", "misplaced"))["ZtunnelAccepted"] == ("False", "UnsupportedValue")
    address = next(text(pod, "status", "podIP") for pod in lab.list("pods", selector="app=ratings"))
    eventually(lambda: ask(lab, "curl", f"http://{address}:9080/ratings/0").code in RESET, within=PATIENCE)


def test_a_route_splits_requests_by_weight(lab: Lab) -> None:
    lab.apply(BOOKINFO / "reviews-90-10.yaml")
    lab.settle()
    (parent,) = branches(lab.get("httproute", "reviews"), "status", "parents")
    told = {text(each, "type"): text(each, "status") for each in branches(parent, "conditions")}
    assert told == {"Accepted": "True", "ResolvedRefs": "True", "ResolvedWaypoints": "True"}
    script = "for i in $(seq 100); do curl -s --max-time 20 http://reviews:9080/reviews/0; echo; done"

    def split() -> Counter[str]:
        found = Counter(re.findall(r'"podname": "(reviews-v.)', lab.exec("curl", "sh", "-c", script, within=180).stdout))
        assert found.keys() <= {"reviews-v1", "reviews-v2"}, found
        return found

    counted = eventually(split, within=PATIENCE)
    assert counted.total() == 100
    # Of 100 at 10 %: ten are expected; none, or more than 27, has odds of about one in 40,000.
    assert 1 <= counted["reviews-v2"] <= 27
    lab.delete("httproute", "reviews")


def test_nobody_notices_a_replica_that_goes(lab: Lab) -> None:
    lab.scale("waypoint", 2)
    lab.settle()
    assert len(lab.list("pods", selector="gateway.networking.k8s.io/gateway-name=waypoint")) == 2
    url = "http://details:9080/details/0"
    script = f"while :; do curl -s -o /dev/null --max-time 20 -w '%{{http_code}}\\n' {url}; done"
    asking = lab.start("curl", "sh", "-c", script)
    assert asking.stdout is not None
    statuses = [asking.stdout.readline() for _ in range(20)]
    lab.scale("waypoint", 1)
    lab.settle()
    statuses += [asking.stdout.readline() for _ in range(20)]
    asking.kill()
    rest = asking.stdout.read().splitlines(keepends=True)
    assert Counter([*statuses, *rest]).keys() == {b"200\n"}, Counter(statuses)


@pytest.mark.usefixtures("policies")
def test_a_service_accounts_waypoint_is_on_every_way_to_its_pods(lab: Lab) -> None:
    lab.label("service", "details", {"istio.io/use-waypoint": "none"})
    lab.apply(WAYPOINT.replace("name: waypoint", "name: of-details, labels: {istio.io/waypoint-for: all}"))
    lab.label("serviceaccount", "bookinfo-details", {"istio.io/use-waypoint": "of-details"})
    lab.apply(
        """
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: read-only-details}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: Gateway, name: of-details}]
  action: DENY
  rules: [{to: [{operation: {notMethods: [GET]}}]}]
"""
    )
    lab.settle()
    address = next(text(pod, "status", "podIP") for pod in lab.list("pods", selector="app=details"))
    for url in ("http://details:9080/details/0", f"http://{address}:9080/details/0"):
        eventually(partial(_is_denied, lab, url, "-X", "DELETE"), within=PATIENCE)
        assert "author" in ask(lab, "curl", url).stdout
    assert ask(lab, "curl", "http://ratings:9080/ratings/0", "-X", "DELETE").stdout.endswith("\n501"), "others are not concerned"
    lab.delete("gateway", "of-details")
    lab.label("serviceaccount", "bookinfo-details", {"istio.io/use-waypoint": None})
    lab.label("service", "details", {"istio.io/use-waypoint": None})


def test_without_pods_the_waypoint_is_missed_and_without_labels_it_is_not(lab: Lab) -> None:
    lab.scale("waypoint", 0)
    lab.settle()
    eventually(lambda: ask(lab).code in RESET, within=PATIENCE, saying="it is not done without a waypoint that has no pod")
    assert text(lab.get("gateway", "waypoint"), "metadata", "name") == "waypoint"
    lab.delete("gateway", "waypoint")
    lab.settle()
    assert conditions(lab.get("service", "productpage"))["istio.io/WaypointBound"] == ("False", "WaypointIsNotReady")
    assert ask(lab).code in RESET
    assert lab.list("deployments", selector="gateway.networking.k8s.io/gateway-name=waypoint") == []
    lab.label("namespace", "default", {"istio.io/use-waypoint": None})
    lab.settle()
    assert "istio.io/WaypointBound" not in conditions(lab.get("service", "productpage"))
    eventually(lambda: TITLE in ask(lab).stdout, within=PATIENCE)


def _is_denied(lab: Lab, url: str, *options: str) -> bool:
    return ask(lab, "curl", url, *options).stdout == f"{DENIED}\n403"
