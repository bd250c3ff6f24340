"""What follows from Gateways in a lab's cluster: what they own, where they are, and what every object is told."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from tests.kit.builders import HBONE_LISTENER, authorization, gateway, labelled, selecting
from ztunnel.controller.belongings import is_owned_by
from ztunnel.lab.admission import Offered, Rules
from ztunnel.lab.cluster import Cluster, Mint
from ztunnel.lab.gateway_controller import GatewayController
from ztunnel.lab.gateways import Installation
from ztunnel.lab.objects import Key, is_deleting, key_of, labels_of
from ztunnel.lab.processes import Processes
from ztunnel.lab.site import Site
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.tree import Tree, at, branch, branches, put, strings, text, texts
from ztunnel.mesh.waypoints import GATEWAY_NAME, USE_WAYPOINT

WAYPOINT = gateway("waypoint")
SERVICE: Tree = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web", "labels": {USE_WAYPOINT: "waypoint"}},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
}


class Lab:
    """A cluster whose gateways are kept; nothing runs."""

    def __init__(self, state: Path) -> None:
        numbers, times = count(1), count(1)
        mint = Mint(lambda: f"uid-{next(numbers)}", lambda: f"2030-01-01T00:00:{next(times) % 60:02}Z")
        self.cluster = Cluster(Rules(validate=parse), (4,), mint)
        self.site = Site(state, self.cluster, Processes(), {}, (4,), 1, -1)
        self.cluster.bootstrap()
        self.controller = GatewayController(self.site, Installation(Path("/s"), "/code").pod_spec)
        self.controller.bootstrap()

    def apply(self, *bodies: Tree) -> None:
        self.cluster.apply(Offered("f", body) for body in bodies)
        self.settle()

    def settle(self) -> None:
        """As often as the loop would."""
        for _ in range(5):
            before = [str(body) for body in self.cluster]
            self.controller.reconcile()
            if [str(body) for body in self.cluster] == before:
                return
        raise AssertionError("statuses do not come to rest")

    def get(self, kind: str, name: str = "waypoint", namespace: str = "default") -> Tree:
        return self.cluster.get(Key(kind, namespace, name))

    def find(self, kind: str, name: str = "waypoint") -> Tree | None:
        return self.cluster.find(Key(kind, "default", name))

    def pod(self, ready: bool, name: str = "waypoint") -> None:
        """A pod of the gateway's deployment."""
        pod: Tree = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{name}-1", "namespace": "default", "labels": {GATEWAY_NAME: name}},
            "status": {"conditions": [{"type": "Ready", "status": str(ready)}], "podIPs": [{"ip": "10.244.1.2"}]},
        }
        self.cluster.create(pod)
        self.settle()

    def condition(self, kind: str, name: str, type_: str) -> Tree:
        return next((each for each in branches(self.get(kind, name), "status", "conditions") if text(each, "type") == type_), {})


@pytest.fixture(name="lab")
def fixture_lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def test_a_waypoint_gets_an_account_a_service_and_a_deployment(lab: Lab) -> None:
    lab.apply(gateway("waypoint", infrastructure={"labels": {"team": "a"}, "annotations": {"note": "b"}}))
    account, service, deployment = (lab.get(kind) for kind in ("ServiceAccount", "Service", "Deployment"))
    assert labels_of(account)["gateway.istio.io/managed"] == "istio.io-mesh-controller"
    assert [(text(port, "name"), port["port"]) for port in branches(service, "spec", "ports")] == [("status-port", 15021), ("mesh", 15008)]
    assert strings(service, "spec", "selector") == {GATEWAY_NAME: "waypoint"}
    template = branch(deployment, "spec", "template")
    assert (
        strings(template, "metadata", "labels").items()
        >= {
            "istio.io/dataplane-mode": "none",
            "sidecar.istio.io/inject": "false",
            "service.istio.io/canonical-name": "waypoint",
            "gateway.networking.k8s.io/gateway-class-name": "istio-waypoint",
            "team": "a",
        }.items()
    )
    assert strings(template, "metadata", "annotations").items() >= {"note": "b", "prometheus.io/port": "15020"}.items()
    assert text(template, "spec", "serviceAccountName") == "waypoint"
    (container,) = branches(template, "spec", "containers")
    assert texts(container, "command")[1:] == ["-m", "waypoint", "run", "--config", "/s/waypoint.yaml"]
    told = {text(each, "name"): text(each, "value") for each in branches(container, "env")}
    assert (told["WAYPOINT_NAME"], told["WAYPOINT_NAMESPACE"]) == ("waypoint", "default")
    assert told["WAYPOINT_ADMIN_SOCKET"] == "/s/w/$(POD_IP)"
    assert texts(container, "securityContext", "capabilities", "drop") == ["ALL"]


def test_it_has_an_address_once_a_pod_is_ready_and_keeps_it(lab: Lab) -> None:
    lab.apply(WAYPOINT)
    lab.pod(ready=False)
    assert branches(lab.get("Gateway"), "status", "addresses") == []
    programmed = lab.condition("Gateway", "waypoint", "Programmed")
    assert (text(programmed, "status"), text(programmed, "reason")) == ("False", "AddressNotAssigned")
    pod = lab.get("Pod", "waypoint-1")
    ready = [{"type": "Ready", "status": "True"}]
    lab.cluster.update(key_of(pod), text(pod, "metadata", "uid"), lambda body: put(body, ready, "status", "conditions"))
    lab.settle()
    vip = text(lab.get("Service"), "spec", "clusterIP")
    wanted = [{"type": "IPAddress", "value": vip}, {"type": "Hostname", "value": "waypoint.default.svc.cluster.local"}]
    assert branches(lab.get("Gateway"), "status", "addresses") == wanted
    assert text(lab.condition("Gateway", "waypoint", "Programmed"), "status") == "True"
    lab.cluster.finalize(key_of(pod), text(pod, "metadata", "uid"))
    lab.settle()
    assert branches(lab.get("Gateway"), "status", "addresses") == wanted


def test_what_a_gateway_owns_goes_with_it(lab: Lab) -> None:
    lab.apply(WAYPOINT, gateway("other"))
    lab.cluster.delete(Key("Gateway", "default", "waypoint"))
    lab.settle()
    assert [lab.find(kind) for kind in ("ServiceAccount", "Service", "Deployment")] == [None, None, None]
    assert lab.find("Deployment", "other") is not None
    assert is_owned_by(lab.get("Deployment", "other"), ()) is False
    assert is_owned_by(lab.get("Gateway", "other"), ()) is None


def test_what_is_taken_away_comes_back_and_scaling_stays(lab: Lab) -> None:
    lab.apply(WAYPOINT)
    lab.cluster.scale("waypoint", "default", 3)
    lab.cluster.delete(Key("Service", "default", "waypoint"))
    lab.settle()
    assert lab.find("Service") is not None
    assert at(lab.get("Deployment"), "spec", "replicas") == 3


@pytest.mark.parametrize(
    "body",
    [
        gateway("waypoint", class_name="nginx"),
        gateway("waypoint", meta={"labels": {"istio.io/rev": "other"}}),
        gateway("waypoint", addresses=[{"value": "10.0.0.9"}]),
    ],
    ids=["another class", "another revision", "somewhere already"],
)
def test_gateways_of_others_are_left_alone(lab: Lab, body: Tree) -> None:
    lab.apply(body)
    assert lab.find("Deployment") is None
    assert branch(lab.get("Gateway"), "status") == {}


def test_an_ingress_gateway_has_its_class_in_the_names_and_its_listeners_ports(lab: Lab) -> None:
    http: Tree = {"name": "http", "port": 80, "protocol": "HTTP"}
    lab.apply(gateway("front", class_name="istio", listeners=[http, {**http, "name": "b", "hostname": "b.example"}]))
    ports = [(text(port, "name"), port["port"]) for port in branches(lab.get("Service", "front-istio"), "spec", "ports")]
    assert ports == [("status-port", 15021), ("http-80", 80)]
    (container,) = branches(lab.get("Deployment", "front-istio"), "spec", "template", "spec", "containers")
    assert texts(container, "securityContext", "capabilities", "add") == ["NET_BIND_SERVICE"]


def test_a_gateway_that_cannot_be_run_is_said_once(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.apply(gateway("waypoint", infrastructure={"labels": {"-bad-": "x"}}))
    assert lab.find("Deployment") is None
    assert sum("cannot be run" in each.getMessage() for each in caplog.records) == 1


def test_what_somebody_else_made_is_not_taken_over(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.apply(SERVICE, gateway("web"))
    assert labels_of(lab.get("Service", "web")) == {USE_WAYPOINT: "waypoint"}
    assert lab.find("Deployment", "web") is None
    assert "service/web is there already and does not belong to the gateway" in caplog.text


def test_listeners_are_told_and_count_their_routes(lab: Lab) -> None:
    route: Tree = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "r"},
        "spec": {"parentRefs": [{"name": "waypoint"}], "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]},
    }
    lab.apply(WAYPOINT, SERVICE, route)
    (listener,) = branches(lab.get("Gateway"), "status", "listeners")
    assert (text(listener, "name"), listener["attachedRoutes"]) == ("mesh", 1)
    assert {text(each, "type"): text(each, "status") for each in branches(listener, "conditions")}["Accepted"] == "True"
    lab.apply(gateway("waypoint", listeners=[{**HBONE_LISTENER, "port": 80}]))
    (listener,) = branches(lab.get("Gateway"), "status", "listeners")
    accepted = next(each for each in branches(listener, "conditions") if text(each, "type") == "Accepted")
    assert (text(accepted, "reason"), accepted["observedGeneration"]) == ("UnsupportedProtocol", 2)
    assert text(lab.condition("Gateway", "waypoint", "Accepted"), "status") == "True"


def test_a_headless_service_and_its_policies_are_told_that_no_waypoint_serves_them(lab: Lab) -> None:
    policy: Tree = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "deny", "namespace": "default"},
        "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}], "action": "DENY", "rules": [{}]},
    }
    headless: Tree = {**SERVICE, "spec": {**branch(SERVICE, "spec"), "clusterIP": "None"}}
    lab.apply(WAYPOINT, headless, policy)
    lab.pod(ready=True)
    bound = lab.condition("Service", "web", "istio.io/WaypointBound")
    assert (text(bound, "status"), text(bound, "reason")) == ("False", "UnsupportedTrafficType")
    told = lab.condition("AuthorizationPolicy", "deny", "WaypointAccepted")
    assert (text(told, "status"), text(told, "message")) == ("False", "Service default/web is not bound to a waypoint")


def test_a_service_is_told_of_its_waypoint(lab: Lab) -> None:
    lab.apply(SERVICE)
    missing = lab.condition("Service", "web", "istio.io/WaypointBound")
    assert (text(missing, "status"), text(missing, "reason")) == ("False", "WaypointIsNotReady")
    lab.apply(WAYPOINT)
    lab.pod(ready=True)
    bound = lab.condition("Service", "web", "istio.io/WaypointBound")
    assert (text(bound, "status"), text(bound, "reason")) == ("True", "WaypointAccepted")
    assert text(bound, "lastTransitionTime") > text(missing, "lastTransitionTime")
    assert text(bound, "message").startswith("Successfully attached to waypoint default/waypoint")
    lab.cluster.label(Key("Service", "default", "web"), {USE_WAYPOINT: "none"}, overwrite=True)
    lab.settle()
    assert lab.condition("Service", "web", "istio.io/WaypointBound") == {}


def test_policies_are_told_where_they_are_enforced(lab: Lab) -> None:
    rule = [{"to": [{"operation": {"methods": ["GET"]}}]}]
    lab.apply(
        SERVICE,
        authorization("l7", targetRefs=[{"group": "", "kind": "Service", "name": "web"}], rules=rule),
        authorization("l4", selector=selecting(app="web"), rules=rule),
        authorization("good", rules=[{}]),
    )
    lost = lab.condition("AuthorizationPolicy", "l7", "WaypointAccepted")
    assert (text(lost, "status"), text(lost, "reason")) == ("False", "AncestorNotBound")
    assert text(lab.condition("AuthorizationPolicy", "l4", "ZtunnelAccepted"), "reason") == "UnsupportedValue"
    assert text(lab.condition("AuthorizationPolicy", "good", "ZtunnelAccepted"), "status") == "True"
    lab.apply(WAYPOINT)
    lab.pod(ready=True)
    assert text(lab.condition("AuthorizationPolicy", "l7", "WaypointAccepted"), "status") == "True"


def test_routes_are_told_by_parent(lab: Lab) -> None:
    parent = {"group": "", "kind": "Service", "name": "web", "port": 80}
    route: Tree = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "r"},
        "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]},
    }
    lab.apply(SERVICE, WAYPOINT, route)
    lab.pod(ready=True)
    (told,) = branches(lab.get("HTTPRoute", "r"), "status", "parents")
    assert told["parentRef"] == {**parent, "namespace": "default"}
    assert {text(each, "type"): text(each, "status") for each in branches(told, "conditions")} == {
        "Accepted": "True",
        "ResolvedRefs": "True",
        "ResolvedWaypoints": "True",
    }


def test_the_classes_are_there_and_are_told_again_when_somebody_wipes_them(lab: Lab) -> None:
    lab.settle()
    place = Key("GatewayClass", "", "istio-waypoint")
    wiped = lab.cluster.get(place)
    lab.cluster.update(place, text(wiped, "metadata", "uid"), lambda body: put(body, {}, "status"))
    lab.settle()
    (condition,) = branches(lab.cluster.get(place), "status", "conditions")
    assert (text(condition, "type"), text(condition, "status")) == ("Accepted", "True")


def test_a_namespace_takes_its_gateways_along(lab: Lab) -> None:
    lab.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}, labelled(gateway("waypoint", namespace="shop")))
    lab.cluster.delete(Key("Namespace", "", "shop"))
    lab.settle()
    left = [key_of(body) for body in lab.cluster if key_of(body).namespace == "shop"]
    assert left == []
    assert not any(is_deleting(body) for body in lab.cluster)


def istio(kind: str, name: str, spec: Tree, group: str = "networking.istio.io", **labels: str) -> Tree:
    return {"apiVersion": f"{group}/v1", "kind": kind, "metadata": {"name": name, "labels": labels}, "spec": spec}


def test_istios_kinds_are_told_as_well(lab: Lab) -> None:
    ports = [{"number": 80, "name": "http", "protocol": "HTTP"}]
    entry = istio("ServiceEntry", "outer", {"hosts": ["outer.example"], "ports": ports, "resolution": "DNS"})
    target = {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "outer"}
    lab.apply(
        WAYPOINT,
        SERVICE,
        labelled(entry, labels={USE_WAYPOINT: "waypoint"}),
        istio(
            "RequestAuthentication", "tokens", {"targetRefs": [target], "jwtRules": [{"issuer": "i", "jwks": "{}"}]}, "security.istio.io"
        ),
        istio("VirtualService", "web", {"hosts": ["web"], "http": [{"route": [{"destination": {"host": "web"}}]}]}),
        istio("DestinationRule", "web", {"host": "web"}),
    )
    lab.pod(ready=True)
    assert text(lab.condition("ServiceEntry", "outer", "istio.io/WaypointBound"), "status") == "True"
    (address, _) = branches(lab.get("ServiceEntry", "outer"), "status", "addresses")
    assert (text(address, "host"), text(address, "value").startswith("240.240.")) == ("outer.example", True)
    assert text(lab.condition("ServiceEntry", "outer", "Accepted"), "reason") == "Accepted"
    assert text(lab.condition("RequestAuthentication", "tokens", "WaypointAccepted"), "message") == "bound to default/waypoint"
    for kind in ("VirtualService", "DestinationRule"):
        told = branches(lab.get(kind, "web"), "status", "conditions")
        assert told, kind
        assert {text(each, "status") for each in told} == {"True"}, told


def test_an_entry_with_a_wildcard_is_told_that_it_wants_a_waypoint(lab: Lab) -> None:
    ports = [{"number": 80, "name": "http", "protocol": "HTTP"}]
    lab.apply(istio("ServiceEntry", "wild", {"hosts": ["*.example"], "ports": ports, "resolution": "DYNAMIC_DNS"}))
    assert text(lab.condition("ServiceEntry", "wild", "istio.io/WaypointMissing"), "reason") == "NoWaypointForWildcardService"
    lab.apply(WAYPOINT, labelled(lab.get("ServiceEntry", "wild"), labels={USE_WAYPOINT: "waypoint"}))
    lab.pod(ready=True)
    told = branches(lab.get("ServiceEntry", "wild"), "status", "conditions")
    assert "istio.io/WaypointMissing" not in {text(each, "type") for each in told}


def test_backend_tls_policies_are_told_for_the_waypoints_of_their_services(lab: Lab) -> None:
    target = {"group": "", "kind": "Service", "name": "web"}
    policy: Tree = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "BackendTLSPolicy",
        "metadata": {"name": "tls", "namespace": "default"},
        "spec": {
            "targetRefs": [target],
            "validation": {"hostname": "a", "caCertificateRefs": [{"group": "", "kind": "ConfigMap", "name": "gone"}]},
        },
    }
    lab.apply(WAYPOINT, labelled(SERVICE, labels={USE_WAYPOINT: "waypoint"}), policy)
    lab.pod(ready=True)
    (ancestor,) = branches(lab.get("BackendTLSPolicy", "tls"), "status", "ancestors")
    assert text(ancestor, "ancestorRef", "name") == "waypoint"
    assert {text(each, "reason") for each in branches(ancestor, "conditions")} == {"NoValidCACertificate", "InvalidCACertificateRef"}


def test_what_istios_gateways_and_traffic_policies_ask_in_vain(lab: Lab) -> None:
    server = {"port": {"number": 443, "protocol": "HTTPS"}, "hosts": ["*"], "tls": {"mode": "ISTIO_MUTUAL"}}
    lab.apply(istio("Gateway", "front", {"selector": {"a": "b"}, "servers": [server]}))
    policy: Tree = {
        "apiVersion": "gateway.networking.x-k8s.io/v1alpha1",
        "kind": "XBackendTrafficPolicy",
        "metadata": {"name": "retries", "namespace": "default"},
        "spec": {"targetRefs": [{"group": "", "kind": "Service", "name": "web"}], "sessionPersistence": {}},
    }
    lab.apply(WAYPOINT, labelled(SERVICE, labels={USE_WAYPOINT: "waypoint"}), policy)
    lab.pod(ready=True)
    assert "ISTIO_MUTUAL is not supported" in text(lab.condition("Gateway.networking.istio.io", "front", "Accepted"), "message")
    (ancestor,) = branches(lab.get("XBackendTrafficPolicy", "retries"), "status", "ancestors")
    (told,) = branches(ancestor, "conditions")
    assert "sessionPersistence" in text(told, "message")
