"""A listener of Gateway API as a server without its routes: its protocol, its certificate, and what is wrong with either."""

from __future__ import annotations

from collections.abc import Mapping

from ztunnel.mesh.l7.config import GatewayServer, ListenerProtocol, TlsServer
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.grants import NOT_PERMITTED, References
from ztunnel.mesh.l7.listeners import ANY_HOST
from ztunnel.mesh.manifests.gateway import GATEWAY_GROUP, GatewayObject, Listener, ListenerTls, ObjectRef
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import Grantee

MIN_VERSION = "gateway.istio.io/tls-min-version"
"""A TLS option of a listener."""
INVALID_CERTIFICATE = "InvalidCertificateRef"
_PROTOCOLS = {each.value: each for each in ListenerProtocol}
_MIN_VERSIONS = ("TLSV1_2", "TLSV1_3")

Problem = tuple[str, str]
"""A reason of Gateway API, and words."""


def listener_server(
    gateway: GatewayObject, listener: Listener, objects: Mapping[ObjectKey, KubeObject], references: References
) -> GatewayServer:
    """The server of one listener."""
    protocol, tls = _PROTOCOLS.get(listener.protocol), None
    problem: Problem | None = None
    if protocol is None:
        protocol, problem = ListenerProtocol.TCP, ("UnsupportedProtocol", f"protocol {listener.protocol} is not supported")
    elif protocol is ListenerProtocol.HTTPS or (
        protocol is ListenerProtocol.TLS and (listener.tls is None or listener.tls.mode != "Passthrough")
    ):
        found = listener_tls(gateway, listener.tls, objects, references)
        tls, problem = (found, None) if isinstance(found, TlsServer) else (None, found)
    hosts = (listener.hostname or ANY_HOST,)
    return GatewayServer(listener.name, listener.port, protocol, hosts, tls, problem=problem[1] if problem else "")


def reference_problem(gateway: GatewayObject, tls: ListenerTls | None, references: References) -> Problem | None:
    """What is wrong with the settings of a listener that ends TLS, whatever its certificate holds."""
    if tls is None or tls.mode != "Terminate" or not tls.certificates:
        return INVALID_CERTIFICATE, "TLS that ends here needs a certificate (tls.certificateRefs)"
    if len(tls.certificates) > 1:
        return INVALID_CERTIFICATE, "one certificate for each listener is supported"
    least = tls.options.get(MIN_VERSION, "")
    unknown = sorted(tls.options.keys() - {MIN_VERSION})
    if unknown or (least and least not in _MIN_VERSIONS):
        what = f"option {unknown[0][:100]} is not supported" if unknown else f"option {MIN_VERSION}: not one of {', '.join(_MIN_VERSIONS)}"
        return "Invalid", what
    ref = tls.certificates[0]
    if (ref.group, ref.kind) != ("", "Secret"):
        return INVALID_CERTIFICATE, f"certificates of kind {ref.kind} are not supported"
    for each in (ref, *tls.client_roots):
        if not _permitted(each, gateway, references):
            return NOT_PERMITTED, f"no ReferenceGrant permits {each.kind} {each.namespace}/{each.name}"
    return None


def listener_tls(
    gateway: GatewayObject, tls: ListenerTls | None, objects: Mapping[ObjectKey, KubeObject], references: References
) -> TlsServer | Problem:
    """What an HTTPS listener shows and asks for, or why it cannot."""
    problem = reference_problem(gateway, tls, references)
    if problem is not None or tls is None:
        return problem or (INVALID_CERTIFICATE, "")
    ref, least = tls.certificates[0], tls.options.get(MIN_VERSION, "")
    found = Credentials(objects, ref.namespace).secret(ref.name)
    if isinstance(found, str):
        return INVALID_CERTIFICATE, found
    if not (found.certificate and found.key):
        return INVALID_CERTIFICATE, f"Secret {ref.namespace}/{ref.name} has no certificate with its key"
    roots: list[bytes] = []
    for each in tls.client_roots:
        content = Credentials(objects, each.namespace).roots(each.kind, each.name)
        if isinstance(content, str):
            return "InvalidCACertificateRef", content
        roots.append(content)
    return TlsServer(found.certificate, found.key, b"\n".join(roots), least)


def _permitted(ref: ObjectRef, gateway: GatewayObject, references: References) -> bool:
    source = Grantee(GATEWAY_GROUP, "Gateway", gateway.metadata.namespace)
    return references.permitted(source, (ref.group, ref.kind, ref.name), ref.namespace)
