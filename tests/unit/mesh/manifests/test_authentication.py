"""PeerAuthentication as it is read."""

from __future__ import annotations

import pytest

from tests.kit.builders import authentication, selecting
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.manifests.authentication import Mode, PeerAuthenticationObject, read_peer_authentication
from ztunnel.mesh.manifests.fields import Field


def read(mode: str | None = None, **spec: object) -> PeerAuthenticationObject:
    return read_peer_authentication(Field("PeerAuthentication default/x", "", authentication("x", mode, **spec)))  # type: ignore[arg-type]  # spec by name


@pytest.mark.parametrize(
    ("text", "mode"),
    [("STRICT", Mode.STRICT), ("PERMISSIVE", Mode.PERMISSIVE), ("DISABLE", Mode.PERMISSIVE), ("UNSET", Mode.UNSET), (None, Mode.UNSET)],
)
def test_modes(text: str | None, mode: Mode) -> None:
    assert read(text).mode is mode


def test_ports_as_yaml_and_json_write_them() -> None:
    ports = {8080: {"mode": "DISABLE"}, "9090": {"mode": "STRICT"}, "7070": {}}
    found = read("STRICT", selector=selecting(app="web"), portLevelMtls=ports)
    assert found.ports == {8080: Mode.PERMISSIVE, 9090: Mode.STRICT, 7070: Mode.UNSET}
    assert found.selector == {"app": "web"}


def test_an_empty_selector_is_none() -> None:
    assert read("STRICT", selector={}).selector is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"mtls": {"mode": "strict"}}, r'spec\.mtls\.mode: not one of UNSET, DISABLE, PERMISSIVE, STRICT: "strict"'),
        ({"mtls": "STRICT"}, r"spec\.mtls: not a mapping"),
        ({"mtls": {"moed": "STRICT"}}, r"spec\.mtls\.moed: unknown field"),
        ({"mtls": {"mode": ["STRICT"]}}, r"spec\.mtls\.mode: not text"),
        ({"mlts": {}}, r"spec\.mlts: unknown field"),
        ({"portLevelMtls": {"80": {"mode": "STRICT"}}}, r"spec\.portLevelMtls: needs a selector"),
        ({"selector": selecting(a="b"), "portLevelMtls": {"http": {}}}, r"spec\.portLevelMtls\.http: not a port number"),
        ({"selector": selecting(a="b"), "portLevelMtls": {True: {}}}, r"spec\.portLevelMtls\[true\]: not a port number"),
        ({"selector": selecting(a="b"), "portLevelMtls": {80: {}, "80": {}}}, r"port 80 is listed twice"),
    ],
)
def test_hostile_documents_are_refused(spec: dict[str, object], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read(**spec)  # type: ignore[arg-type]  # spec by name
