"""`ztunnel join` and `leave` as a user types them, against a real API server."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.kit import kube_crds
from tests.kit.kube_api import ApiServer
from ztunnel.cli.main import main
from ztunnel.mesh.enrolment import MODE_LABEL
from ztunnel.mesh.manifests.tree import strings


@pytest.fixture(name="api")
def fixture_api(kube_api: ApiServer) -> ApiServer:
    kube_crds.define(kube_api)
    kube_api.namespace("joining")
    kube_api.ensure("/api/v1/namespaces/joining/serviceaccounts", {"metadata": {"name": "default"}})
    return kube_api


def typed(api: ApiServer, *words: str) -> str:
    result = CliRunner().invoke(main, [*words, "--kubeconfig", str(api.admin_kubeconfig)])
    assert result.exit_code == 0, result.output
    return result.output


def label(api: ApiServer) -> str | None:
    return strings(api.request("GET", "/api/v1/namespaces/joining"), "metadata", "labels").get(MODE_LABEL)


def test_first_the_plan_then_the_label_and_back(api: ApiServer) -> None:
    api.pod("joining", "web", node="n1", address="10.0.0.7")
    api.pod("joining", "own", node="n1", address="10.0.0.8", labels={MODE_LABEL: "none"})
    said = typed(api, "join", "joining", "--plan")
    assert "namespace joining joins the mesh: 1 of 2 pods change" in said
    assert "go on as they are, untunnelled and unjudged, until they end" in said
    assert "Nothing was changed" in said
    assert label(api) is None
    assert "labeled: istio.io/dataplane-mode=ambient" in typed(api, "join", "joining")
    assert label(api) == "ambient"
    assert "1 of 2 pods change" in typed(api, "leave", "joining", "--plan")
    assert label(api) == "ambient"
    assert "unlabeled: istio.io/dataplane-mode" in typed(api, "leave", "joining")
    assert label(api) is None


def test_a_namespace_that_is_not_there_is_an_error(api: ApiServer, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["join", "nowhere", "--kubeconfig", str(api.admin_kubeconfig)])
    assert result.exit_code != 0
    assert 'namespaces "nowhere" not found' in str(result.exception) + result.output
