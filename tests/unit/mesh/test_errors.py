"""Errors carry what peers, operators and dashboards see, apart."""

from __future__ import annotations

from ztunnel.mesh.errors import BadConnect, ConfigError, Flag, ManifestError, PolicyDenied, UntrustedPeer, UpstreamRefused


def test_errors_carry_their_data() -> None:
    assert BadConnect("no").status == 400
    assert BadConnect("no", 503).status == 503
    assert UpstreamRefused("no", 401).status == 401
    assert UpstreamRefused("no").status is None
    denied = PolicyDenied("no", "AuthorizationPolicy default/x")
    assert (denied.policy, denied.flag) == ("AuthorizationPolicy default/x", Flag.DENY)
    assert UntrustedPeer("no").flag is Flag.IDENTITY_ERROR


def test_a_manifest_error_names_object_field_and_reason() -> None:
    error = ManifestError("Pod default/x", "spec.nodeName", "not text")
    assert str(error) == "Pod default/x: spec.nodeName: not text"
    assert (error.subject, error.field, error.reason) == ("Pod default/x", "spec.nodeName", "not text")


def test_all_configuration_problems_at_once() -> None:
    error = ConfigError(["one", "two"])
    assert str(error) == "one; two"
    assert error.problems == ["one", "two"]
