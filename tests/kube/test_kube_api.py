"""The API server that the other tests ask: real validation, rights and history."""

from __future__ import annotations

import pytest

from tests.kit.kube_api import ApiError, ApiServer


def test_objects_are_validated_kept_and_applied(kube_api: ApiServer) -> None:
    kube_api.namespace("kept", {"istio.io/dataplane-mode": "ambient"})
    pod = kube_api.pod("kept", "a", node="node-1", address="10.0.0.1")
    assert pod["status"] == {**pod["status"], "podIP": "10.0.0.1", "phase": "Running"}  # type: ignore[dict-item]  # JSON
    assert "ambient" in kube_api.kubectl("get", "namespace", "kept", "--show-labels")
    with pytest.raises(ApiError, match="podIP"):
        kube_api.status("kept", "a", address="nonsense")
    assert "created" in kube_api.kubectl("create", "serviceaccount", "-n", "kept", "worker")
    kube_api.delete("/api/v1/namespaces/kept/pods/a")


def test_a_user_has_the_rights_that_it_was_given(kube_api: ApiServer) -> None:
    certified, account = kube_api.user("somebody"), kube_api.account("rights", "agent")
    for user in (certified, account):
        with pytest.raises(ApiError, match="cannot list resource"):
            kube_api.request("GET", "/api/v1/pods", user=user)
        kube_api.allow(user, [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}])
        assert kube_api.request("GET", "/api/v1/pods", user=user)["kind"] == "PodList"


def test_a_token_is_reviewed(kube_api: ApiServer) -> None:
    kube_api.account("rights", "agent")
    token = kube_api.token("rights", "agent", audience="istio-ca")
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token, "audiences": ["istio-ca"]}}
    status = kube_api.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)["status"]
    assert status["authenticated"] is True  # type: ignore[index]  # JSON
