"""Kubeconfigs and pods' own credentials, as kubectl and client-go read them."""

from __future__ import annotations

import base64
import ssl
from pathlib import Path

import pytest
import trio
import yaml

from tests.kit.pki import FakePki
from ztunnel.kube.config import BadConfig, from_files, in_cluster, load
from ztunnel.kube.credentials import Files, Login, Plugin
from ztunnel.kube.errors import KubeError

Json = dict[str, object]


def encoded(content: bytes) -> str:
    return base64.b64encode(content).decode()


def config(cluster: Json | None = None, user: Json | None = None) -> Json:
    return {
        "clusters": [{"name": "c", "cluster": {"server": "https://10.0.0.1:6443/", **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "shop"}}],
        "current-context": "x",
    }


def write(path: Path, body: object) -> Path:
    path.write_text(yaml.dump(body))
    return path


def login(credentials: object) -> Login:
    assert isinstance(credentials, Files)
    return trio.run(credentials.login)


def test_a_kubeconfig_says_where_and_who(tmp_path: Path) -> None:
    pki = FakePki()
    own = pki.credentials()
    user: Json = {"client-certificate-data": encoded(own.chain_pem), "client-key-data": encoded(own.key_pem), "token": "t0k"}
    cluster: Json = {"certificate-authority-data": encoded(pki.root_pem), "tls-server-name": "kube", "proxy-url": "http://proxy:3128"}
    access = from_files([write(tmp_path / "config", config(cluster, user))], "", {})
    assert (access.server, access.namespace, access.server_name, access.proxy) == (
        "https://10.0.0.1:6443",
        "shop",
        "kube",
        "http://proxy:3128",
    )
    given = login(access.credentials)
    assert given == Login("Bearer t0k", own.chain_pem, own.key_pem)
    context = access.tls(given)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1


def test_files_are_relative_to_the_kubeconfig_and_read_again(tmp_path: Path) -> None:
    own = FakePki().credentials()
    directory = tmp_path / "etc"
    directory.mkdir()
    for name, content in (("ca", own.roots_pem), ("cert", own.chain_pem), ("key", own.key_pem), ("token", b"one\n")):
        (directory / name).write_bytes(content)
    user: Json = {"client-certificate": "cert", "client-key": "key", "tokenFile": "token"}
    access = from_files([write(directory / "config", config({"certificate-authority": "ca"}, user))], "", {})

    async def read() -> list[str]:
        seen = [(await access.credentials.login()).authorization]
        (directory / "token").write_text("two\n")
        seen.append((await access.credentials.login()).authorization)
        access.credentials.refused()
        seen.append((await access.credentials.login()).authorization)
        (directory / "token").unlink()
        access.credentials.refused()
        seen.append((await access.credentials.login()).authorization)
        return seen

    assert trio.run(read) == ["Bearer one", "Bearer one", "Bearer two", "Bearer two"]
    access.tls(login(access.credentials))
    assert access.authority() == own.roots_pem


def test_several_files_are_merged_and_the_first_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "one", {"current-context": "mine", "contexts": [{"name": "mine", "context": {"cluster": "c", "user": "u"}}]})
    second = write(tmp_path / "two", config(user={"token": "t"}))
    environ = {"KUBECONFIG": f"{first}:{tmp_path / 'missing'}:{second}"}
    assert load(environ).namespace == "default"
    assert load(environ, context="x").namespace == "shop"
    with pytest.raises(BadConfig, match="no context is called 'y'; there are: mine, x"):
        load(environ, context="y")


def test_impersonation_and_basic_credentials(tmp_path: Path) -> None:
    user: Json = {"username": "me", "password": "secret", "as": "boss", "as-groups": ["a", "b"], "as-uid": "7"}
    access = from_files([write(tmp_path / "config", config(user=user))], "", {})
    assert login(access.credentials).authorization == "Basic " + encoded(b"me:secret")
    assert access.headers == (
        ("Impersonate-User", "boss"),
        ("Impersonate-Group", "a"),
        ("Impersonate-Group", "b"),
        ("Impersonate-Uid", "7"),
    )


def test_an_exec_plugin_is_told_what_it_wants_to_know(tmp_path: Path) -> None:
    plugin: Json = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "./bin/login",
        "args": ["--for", ""],
        "env": [{"name": "A", "value": "b"}],
        "provideClusterInfo": True,
        "installHint": "get it",
        "interactiveMode": "Never",
    }
    extension = {"name": "client.authentication.k8s.io/exec", "extension": {"audience": "x"}}
    cluster: Json = {"certificate-authority-data": encoded(b"pem"), "extensions": [extension]}
    access = from_files([write(tmp_path / "config", config(cluster, {"exec": plugin}))], "", {})
    made = access.credentials
    assert isinstance(made, Plugin)
    assert (made.command, list(made.arguments), dict(made.environment), made.hint) == (
        str(tmp_path / "bin/login"),
        ["--for", ""],
        {"A": "b"},
        "get it",
    )
    assert made.cluster is not None
    assert made.cluster["config"] == {"audience": "x"}
    assert made.cluster["certificate-authority-data"] == encoded(b"pem")


@pytest.mark.parametrize(
    ("environ", "server", "expected"),
    [
        ({"HTTPS_PROXY": "http://p:1"}, "https://10.0.0.1:6443", "http://p:1"),
        ({"https_proxy": "http://p:1", "no_proxy": "10.0.0.1"}, "https://10.0.0.1:6443", ""),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".corp"}, "https://kube.corp", ""),
        ({"HTTPS_PROXY": "http://p:1"}, "https://127.0.0.1:6443", ""),
        ({"HTTPS_PROXY": "http://p:1"}, "https://localhost:6443", ""),
        ({"HTTP_PROXY": "http://p:1"}, "https://10.0.0.1:6443", ""),
    ],
)
def test_the_environment_names_a_proxy(tmp_path: Path, environ: dict[str, str], server: str, expected: str) -> None:
    assert from_files([write(tmp_path / "config", config({"server": server}))], "", environ).proxy == expected


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({**config(), "current-context": ""}, "no current-context"),
        (config({"server": "10.0.0.1"}), "server: not a URL that begins with https://"),
        (config({"server": "http://x"}, {"token": "t"}), "credentials are not sent over plain http"),
        (config({"insecure-skip-tls-verify": True, "certificate-authority": "x"}), "leave one of them out"),
        (config({"insecure-skip-tls-verify": "yes!"}), 'insecure-skip-tls-verify"]: not a boolean'),
        (config({"proxy-url": "socks5://x"}), "only http and https proxies"),
        (config({"certificate-authority-data": "%%%"}), 'certificate-authority-data"]: not base64'),
        (config(user={"auth-provider": {"name": "gcp"}}), "no auth providers any more; use exec"),
        (config(user={"client-certificate": "x"}), 'client-key"]: a client certificate and its key go together'),
        (config(user={"token": 5}), "token: not text"),
        (config(user={"token": "a b"}), "no token"),
        (config(user={"exec": {"command": "x"}}), "exec.apiVersion: required"),
        (config(user={"exec": {"command": "x", "apiVersion": "v9"}}), "exec.apiVersion: not one of"),
        (
            config(user={"exec": {"command": "x", "apiVersion": "client.authentication.k8s.io/v1", "interactiveMode": "Always"}}),
            "wants to ask a person",
        ),
        ([1], "not one mapping"),
        ({"kind": "Pod"}, "not a kubeconfig"),
        ({"clusters": "x"}, "clusters: not a list"),
        ({"contexts": [{"context": {}}]}, "contexts[0].name: required"),
    ],
)
def test_what_cannot_be_used_is_refused_with_file_and_field(tmp_path: Path, body: object, said: str) -> None:
    with pytest.raises(KubeError) as refused:
        from_files([write(tmp_path / "config", body)], "", {})
    assert said in str(refused.value)


def test_text_that_is_no_yaml_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a: [")
    with pytest.raises(BadConfig, match=r"config: line 2"):
        from_files([tmp_path / "config"], "", {})
    with pytest.raises(BadConfig, match="No such file"):
        load({}, tmp_path / "nowhere")
    with pytest.raises(BadConfig, match="this is no pod"):
        load({"HOME": str(tmp_path)})
    (tmp_path / "config").write_bytes(b"#" * (5 << 20))
    with pytest.raises(BadConfig, match="larger than"):
        load({}, tmp_path / "config")


def test_a_pod_has_its_own(tmp_path: Path) -> None:
    own = FakePki().credentials()
    for name, content in (("token", b"abc"), ("namespace", b"mesh"), ("ca.crt", own.roots_pem)):
        (tmp_path / name).write_bytes(content)
    access = in_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}, tmp_path)
    assert (access.server, access.namespace) == ("https://[fd00::1]:443", "mesh")
    assert login(access.credentials) == Login("Bearer abc")
    assert len(access.tls(Login()).get_ca_certs()) == 1
    (tmp_path / "token").unlink()
    with pytest.raises(BadConfig, match="automountServiceAccountToken"):
        in_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, tmp_path)
    with pytest.raises(BadConfig, match="not in a pod"):
        in_cluster({}, tmp_path)


def test_keys_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, other = FakePki().credentials(), FakePki().credentials()
    access = from_files([write(tmp_path / "config", config({"certificate-authority-data": encoded(one.roots_pem)}))], "", {})
    for wrong in (Login("", one.chain_pem, other.key_pem), Login("", b"nonsense", b"nonsense")):
        with pytest.raises(BadConfig, match="cannot be used"):
            access.tls(wrong)
    broken = from_files([write(tmp_path / "config", config({"certificate-authority-data": encoded(b"nonsense")}))], "", {})
    with pytest.raises(BadConfig, match="cannot be used"):
        broken.tls(Login())
    unverified = from_files([write(tmp_path / "config", config({"insecure-skip-tls-verify": True}))], "", {})
    assert unverified.tls(Login()).verify_mode is ssl.CERT_NONE
