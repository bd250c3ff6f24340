"""Every way to the real API server that a kubeconfig can describe, and what goes wrong on it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.connect_proxy import ConnectProxy
from tests.kit.kube_api import ApiServer, User
from tests.kit.pki import FakePki
from ztunnel.kube.client import APPLY_PATCH, KubeClient
from ztunnel.kube.config import Access, in_cluster, load
from ztunnel.kube.credentials import Files
from ztunnel.kube.errors import BadAnswer, Conflict, Forbidden, KubeError, NotFound, Unauthorized, Unreachable
from ztunnel.kube.resources import CONFIG_MAPS, NAMESPACES, SERVICE_ACCOUNTS, Resource

RIGHTS = [{"apiGroups": [""], "resources": ["namespaces"], "verbs": ["get", "list"]}]


@pytest.fixture(scope="module")
def reader(kube_api: ApiServer) -> User:
    """A service account that may read namespaces."""
    user = kube_api.account("access", "reader")
    kube_api.allow(user, RIGHTS)
    return user


def configured(path: Path, api: ApiServer, user: User, *, cluster: dict[str, object] | None = None, who: object = None) -> Access:
    """The access of a kubeconfig, in which the user's part may be another."""
    config: Any = json.loads(api.kubeconfig(user, **(cluster or {})))
    if who is not None:
        config["users"][0]["user"] = who
    file = path / "kubeconfig"
    file.write_text(json.dumps(config))
    return load({}, file)


async def works(access: Access) -> bool:
    async with KubeClient(access) as client:
        return (await client.get(NAMESPACES, "default"))["kind"] == "Namespace"


async def test_by_token_by_certificate_and_on_behalf_of_somebody(kube_api: ApiServer, reader: User, tmp_path: Path) -> None:
    assert await works(configured(tmp_path, kube_api, reader))
    assert await works(configured(tmp_path, kube_api, kube_api.admin))
    admin = json.loads(kube_api.kubeconfig(kube_api.admin))["users"][0]["user"]
    assert await works(configured(tmp_path, kube_api, kube_api.admin, who={**admin, "as": reader.name}))
    with pytest.raises(Forbidden, match="the right to get namespaces is missing"):
        await works(configured(tmp_path, kube_api, kube_api.admin, who={**admin, "as": "nobody"}))


async def test_by_a_program_that_is_asked_again_when_its_token_is_not_taken(kube_api: ApiServer, reader: User, tmp_path: Path) -> None:
    program = tmp_path / "login"
    version = "client.authentication.k8s.io/v1"
    program.write_text(
        "#!/bin/sh\n"
        f"echo asked >>{tmp_path}/asked\n"
        f'printf \'{{"apiVersion":"{version}","kind":"ExecCredential","status":{{"token":"%s"}}}}\' "$(cat {tmp_path}/token)"\n'
    )
    program.chmod(0o755)
    (tmp_path / "token").write_text("stale")
    access = configured(tmp_path, kube_api, reader, who={"exec": {"apiVersion": version, "command": "./login"}})
    async with KubeClient(access) as client:
        with pytest.raises(Unauthorized, match="does not take our credentials"):
            await client.list(NAMESPACES)
        assert (tmp_path / "asked").read_text() == "asked\n" * 2
        (tmp_path / "token").write_text(reader.token)
        assert (await client.list(NAMESPACES))["kind"] == "NamespaceList"


@pytest.mark.parametrize("credentials", ["", "user:pass%20word"])
async def test_through_a_proxy(kube_api: ApiServer, reader: User, tmp_path: Path, credentials: str) -> None:
    with ConnectProxy(credentials.replace("%20", " ")) as proxy:
        at = f"{credentials}@" if credentials else ""
        access = configured(tmp_path, kube_api, reader, cluster={"proxy-url": f"http://{at}127.0.0.1:{proxy.port}"})
        assert await works(access)
        assert proxy.asked == [f"127.0.0.1:{kube_api.port}"]
        if credentials:
            refused = configured(tmp_path, kube_api, reader, cluster={"proxy-url": f"http://127.0.0.1:{proxy.port}"})
            with pytest.raises(Unreachable, match="through 127"):
                await works(refused)


async def test_as_a_pod_has_it_with_a_token_that_is_replaced(kube_api: ApiServer, reader: User, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(kube_api.ca_pem)
    (tmp_path / "namespace").write_text("access")
    (tmp_path / "token").write_text("not yet")
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(kube_api.port)}, tmp_path)
    with pytest.raises(KubeError):
        await works(access)
    (tmp_path / "token").write_text(reader.token)
    assert await works(access)


async def test_a_server_that_is_somebody_else_is_not_talked_to(kube_api: ApiServer, reader: User, tmp_path: Path) -> None:
    stranger = base64.b64encode(FakePki().root_pem).decode()
    with pytest.raises(Unreachable, match="certificate"):
        await works(configured(tmp_path, kube_api, reader, cluster={"certificate-authority-data": stranger}))
    with pytest.raises(Unreachable, match="certificate"):
        await works(configured(tmp_path, kube_api, reader, cluster={"tls-server-name": "elsewhere"}))
    assert await works(configured(tmp_path, kube_api, reader, cluster={"tls-server-name": "kubernetes.default.svc"}))
    trusting: dict[str, object] = {"certificate-authority-data": None, "insecure-skip-tls-verify": True}
    assert await works(configured(tmp_path, kube_api, reader, cluster=trusting))


async def test_an_authority_that_was_replaced_is_believed(kube_api: ApiServer, reader: User, tmp_path: Path) -> None:
    (tmp_path / "ca").write_bytes(FakePki().root_pem)
    access = Access(kube_api.url, Files(token=tmp_path / "token"), authority_file=tmp_path / "ca")
    (tmp_path / "token").write_text(reader.token)
    async with KubeClient(access) as client:
        with pytest.raises(Unreachable):
            await client.list(NAMESPACES)
        (tmp_path / "ca").write_bytes(kube_api.ca_pem)
        assert await client.list(NAMESPACES)


async def test_objects_are_made_changed_and_deleted_and_errors_say_what(kube_api: ApiServer) -> None:
    kube_api.namespace("access")
    async with KubeClient(_admin(kube_api)) as client:
        body: dict[str, object] = {"metadata": {"name": "a"}, "data": {"x": "1"}}
        made: Any = await client.create(CONFIG_MAPS, body, "access")
        with pytest.raises(Conflict) as twice:
            await client.create(CONFIG_MAPS, body, "access")
        assert twice.value.reason == "AlreadyExists"
        patched: Any = await client.patch(CONFIG_MAPS, {"data": {"y": "2"}}, "a", "access")
        assert patched["data"] == {"x": "1", "y": "2"}
        with pytest.raises(Conflict) as stale:
            await client.update(CONFIG_MAPS, made, "a", "access")
        assert stale.value.reason == "Conflict"
        applied: Any = await client.apply(
            CONFIG_MAPS, {"apiVersion": "v1", "kind": "ConfigMap", **body, "data": {"x": "3"}}, "a", "access", manager="test"
        )
        assert applied["data"]["x"] == "3"
        with pytest.raises(Conflict):
            await client.delete(CONFIG_MAPS, "a", "access", "00000000-0000-0000-0000-000000000001")
        await client.delete(CONFIG_MAPS, "a", "access", applied["metadata"]["uid"])
        with pytest.raises(NotFound, match='cannot get configmaps: 404: configmaps "a" not found'):
            await client.get(CONFIG_MAPS, "a", "access")
        token: Any = await client.create(SERVICE_ACCOUNTS, {"spec": {}}, "access", name="reader", subresource="token")
        assert token["status"]["token"]
        with pytest.raises(KubeError, match="cannot patch configmaps"):
            await client.patch(CONFIG_MAPS, {"nonsense": 1}, "a", "access", content_type=APPLY_PATCH)
        with pytest.raises(NotFound):
            await client.list(Resource("nowhere.test", "v1", "things", "Thing"))
        with pytest.raises(BadAnswer):
            await client.raw("/healthz", "see how it is")


def _admin(api: ApiServer) -> Access:
    return load({}, api.admin_kubeconfig)
