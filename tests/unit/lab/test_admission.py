"""What is refused with which words, and what is filled in."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from ztunnel.lab.admission import Offered, Rules, admit
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.tree import Tree, at, branches, put, text

RULES = Rules({"*mysql*": "sleep 1"}, {}, parse)


def _pod(**spec: object) -> Tree:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "echo"}], **spec}}


def _service(**spec: object) -> Tree:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}], **spec}}


def _deployment(**spec: object) -> Tree:
    template = {"metadata": {"labels": {"app": "x"}}, "spec": {"containers": [{"name": "c", "image": "echo"}]}}
    body: Tree = {"selector": {"matchLabels": {"app": "x"}}, "template": template, **spec}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d"}, "spec": body}


def _named(body: Tree, name: object) -> Tree:
    put(body, name, "metadata", "name")
    return body


def _containers(*containers: object) -> Tree:
    return _pod(containers=list(containers))


def test_defaults_are_those_of_the_api_server() -> None:
    pod = admit(Offered("f", _pod()), RULES)
    assert (text(pod, "metadata", "namespace"), text(pod, "status", "phase")) == ("default", "Pending")
    assert (text(pod, "spec", "restartPolicy"), text(pod, "spec", "serviceAccountName")) == ("Always", "default")
    service = admit(Offered("f", _service()), RULES)
    assert text(service, "spec", "type") == "ClusterIP"
    assert branches(service, "spec", "ports") == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    assert at(admit(Offered("f", _deployment()), RULES), "spec", "replicas") == 1
    namespace = admit(Offered("f", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}), RULES)
    assert at(namespace, "metadata", "labels") == {"kubernetes.io/metadata.name": "shop"}


def _secret(**parts: object) -> Tree:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, **parts}


def test_a_secrets_texts_are_stored_as_data() -> None:
    secret = admit(Offered("f", _secret(data={"a": "b25l", "b": "dHdv"}, stringData={"b": "three"})), RULES)
    assert (secret["data"], secret["type"], "stringData" in secret) == ({"a": "b25l", "b": "dGhyZWU="}, "Opaque", False)


def test_admission_does_not_change_what_it_was_given_and_is_idempotent() -> None:
    for body in (_pod(), _service(), _deployment(), _secret(stringData={"a": "b"})):
        before = repr(body)
        once = admit(Offered("f", body), RULES)
        assert repr(body) == before
        assert admit(Offered("f", once), RULES) == once


@pytest.mark.parametrize(
    ("body", "where", "why"),
    [
        ({"apiVersion": "v1", "kind": "Lease", "metadata": {"name": "x"}}, "kind", "the lab has no kind 'Lease'"),
        ({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "x"}}, "kind", "the lab has no kind"),
        (_secret(data={"a": "?"}), "data.a", "is not base64"),
        (_secret(stringData={"a": 1}), "stringData.a", "must be a string"),
        ({"apiVersion": "v2", "kind": "Pod", "metadata": {"name": "x"}}, "apiVersion", "is not one of v1"),
        (_named(_pod(), "Upper"), "metadata.name", "is not a lower-case DNS name"),
        (_named(_pod(), 7), "metadata.name", "is not a lower-case DNS name"),
        ({**_pod(), "metadata": {"name": "p", "labels": {"a": True}}}, "metadata.labels", "quote numbers and booleans"),
        ({**_pod(), "metadata": {"name": "p", "labels": {"a b": "c"}}}, "metadata.labels", "'a b' is not a key"),
        ({**_pod(), "metadata": {"name": "p", "labels": {"a.b/c/d": "c"}}}, "metadata.labels", "is not a key"),
        ({**_pod(), "metadata": {"name": "p", "labels": {"a": "c d"}}}, "metadata.labels.a", "not a label value"),
        ({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "namespace": "x"}}, "metadata.namespace", "has no namespace"),
        (_pod(restartPolicy="Sometimes"), "spec.restartPolicy", "is not one of"),
        (_pod(containers=[]), "spec.containers", "there must be 1 to 16"),
        (_pod(terminationGracePeriodSeconds=-1), "spec.terminationGracePeriodSeconds", "seconds"),
        (_containers({"name": "c", "image": "redis:7"}), "spec.containers[0].image", "--image 'redis=COMMAND'"),
        (_containers({"name": "c", "image": "nginx"}), "spec.containers[0].image", "nginx is not installed"),
        (_containers({"name": "c", "image": "echo"}, {"name": "c", "image": "echo"}), "spec.containers[1].name", "no other container"),
        (_containers({"name": "c", "command": ["sleep", 5]}), "spec.containers[0].command", "must be a list of strings"),
        (
            _containers({"name": "c", "image": "echo", "ports": [{"containerPort": 0}]}),
            "spec.containers[0].ports[0].containerPort",
            "port number",
        ),
        (
            _containers({"name": "c", "image": "echo", "ports": [{"containerPort": 1, "protocol": "SCTP"}]}),
            "spec.containers[0].ports[0].protocol",
            "TCP, UDP",
        ),
        (
            _containers({"name": "c", "image": "echo", "env": [{"name": "A", "value": 1}]}),
            "spec.containers[0].env[0].value",
            "must be a string",
        ),
        (
            _containers({"name": "c", "image": "echo", "env": [{"name": "A", "valueFrom": {"secretKeyRef": {}}}]}),
            "spec.containers[0].env[0].valueFrom",
            "fieldRef",
        ),
        (_service(type="NodePort"), "spec.type", "only knows ClusterIP"),
        (_service(ports=[]), "spec.ports", "there must be 1 to"),
        (_service(ports=[{"port": 80}, {"port": 81}]), "spec.ports[0].name", "is required where a service has several ports"),
        (_service(ports=[{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]), "spec.ports[1]", "another port"),
        (_service(ports=[{"port": 80, "targetPort": True}]), "spec.ports[0].targetPort", "neither a port number nor a port name"),
        (_deployment(replicas=1000), "spec.replicas", "is not a number from 0 to 500"),
        (_deployment(selector={"matchLabels": {"app": "y"}}), "spec.template.metadata.labels", "does not match"),
        (_deployment(selector={}), "spec.selector.matchLabels", "is required"),
        (
            {
                "apiVersion": "security.istio.io/v1",
                "kind": "PeerAuthentication",
                "metadata": {"name": "p"},
                "spec": {"mtls": {"mode": "MAYBE"}},
            },
            "spec.mtls.mode",
            "MAYBE",
        ),
    ],
)
def test_nonsense_is_refused_with_file_object_field_and_reason(body: Tree, where: str, why: str) -> None:
    with pytest.raises(ManifestError) as refused:
        admit(Offered("shop.yaml", body), RULES)
    assert (refused.value.field, refused.value.subject.split(": ")[0]) == (where, "shop.yaml")
    assert why in refused.value.reason


def test_images_may_be_added() -> None:
    admit(Offered("f", _containers({"name": "c", "image": "library/mysql:8"})), RULES)


_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)


@given(
    st.sampled_from(["Pod", "Service", "Deployment", "Namespace", "ServiceAccount", "AuthorizationPolicy", "PeerAuthentication"]),
    st.dictionaries(
        st.sampled_from(["containers", "ports", "template", "selector", "replicas", "restartPolicy", "clusterIP", "rules", "mtls", "type"]),
        _anything,
    ),
    _anything,
)
def test_any_object_is_admitted_or_refused(kind: str, spec: dict[str, object], metadata: object) -> None:
    version = "security.istio.io/v1" if kind.endswith(("Policy", "Authentication")) else "apps/v1" if kind == "Deployment" else "v1"
    for meta in ({"name": "x"}, metadata):
        try:
            admit(Offered("f", {"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}), RULES)
        except ManifestError:
            continue


@pytest.mark.parametrize(
    ("body", "field", "meant"),
    [
        (_service(selectorr={"app": "x"}), "spec.selectorr", "selector"),
        (_service(ports=[{"port": 80, "targetport": 8080}]), "spec.ports[0].targetport", "targetPort"),
        (_pod(nodename="node-1"), "spec.nodename", "nodeName"),
        (_pod(serviceaccountName="client"), "spec.serviceaccountName", "serviceAccountName"),
        ({**_pod(), "spec": {"container": []}}, "spec.container", "containers"),
        (_containers({"name": "c", "imge": "echo"}), "spec.containers[0].imge", "image"),
        (_containers({"name": "c", "image": "echo", "comand": ["x"]}), "spec.containers[0].comand", "command"),
        (
            _containers({"name": "c", "image": "echo", "ports": [{"containerport": 80}]}),
            "spec.containers[0].ports[0].containerport",
            "containerPort",
        ),
        (_containers({"name": "c", "image": "echo", "env": [{"name": "A", "valu": ""}]}), "spec.containers[0].env[0].valu", "value"),
        (_deployment(replica=3), "spec.replica", "replicas"),
        (_deployment(template={"metadata": {"label": {}}}), "spec.template.metadata.label", "labels"),
        (_deployment(template={"metdata": {}}), "spec.template.metdata", "metadata"),
        (
            {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n", "lables": {"istio.io/dataplane-mode": "ambient"}}},
            "metadata.lables",
            "labels",
        ),
        ({"apiVersion": "v1", "kind": "Namespace", "metdata": {"name": "n"}}, "metdata", "metadata"),
    ],
)
def test_a_misspelt_field_is_not_taken_for_nothing(body: Tree, field: str, meant: str) -> None:
    with pytest.raises(ManifestError) as refused:
        admit(Offered("a.yaml", body), RULES)
    assert refused.value.field == field
    assert f"did you mean {meant}" in refused.value.reason


def test_fields_that_the_lab_does_not_use_are_no_mistakes() -> None:
    probe = {"httpGet": {"path": "/", "port": 80}}
    container = {"name": "c", "image": "echo", "livenessProbe": probe, "resources": {"limits": {"cpu": "1"}}, "volumeMounts": []}
    admit(Offered("f", _pod(containers=[container], volumes=[], tolerations=[], securityContext={})), RULES)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "a"}, "automountServiceAccountToken": False}
    admit(Offered("f", account), RULES)


def test_a_container_without_command_and_image_is_told_so() -> None:
    with pytest.raises(ManifestError, match="no command, and no image: give the container a command"):
        admit(Offered("f", _containers({"name": "c"})), RULES)
