"""What a request says of itself when it comes, made true: headers that only proxies may write are taken away and written anew.

Clients of the mesh have an identity and are trusted to ask for retries and time limits (`x-envoy-…`, which the retry state takes away
before the request goes on); whoever has none, a gateway's client, is not, and is named in X-Forwarded-For.
Source: Envoy `ConnectionManagerUtility::mutateRequestHeaders` (`use_remote_address` for gateways, not for waypoints); Istio's annotation
for X-Forwarded-Client-Cert.
"""

from __future__ import annotations

from typing import Final

from waypoint.http.messages import Client, Request

FORGED: Final = frozenset(
    (
        b"x-envoy-attempt-count",
        b"x-envoy-auth-partial-body",
        b"x-envoy-decorator-operation",
        b"x-envoy-downstream-service-cluster",
        b"x-envoy-downstream-service-node",
        b"x-envoy-external-address",
        b"x-envoy-internal",
        b"x-envoy-original-dst-host",
        b"x-envoy-original-path",
        b"x-envoy-peer-metadata",
        b"x-envoy-peer-metadata-id",
        b"x-forwarded-client-cert",
        b"x-forwarded-proto",
    )
)
"""Nobody's to say but a proxy's."""
CONTROL: Final = frozenset(
    (
        b"x-envoy-expected-rq-timeout-ms",
        b"x-envoy-force-trace",
        b"x-envoy-hedge-on-per-try-timeout",
        b"x-envoy-ip-tags",
        b"x-envoy-max-retries",
        b"x-envoy-original-url",
        b"x-envoy-retriable-header-names",
        b"x-envoy-retriable-status-codes",
        b"x-envoy-retry-grpc-on",
        b"x-envoy-retry-on",
        b"x-envoy-upstream-alt-stat-name",
        b"x-envoy-upstream-rq-per-try-timeout-ms",
        b"x-envoy-upstream-rq-timeout-alt-response",
        b"x-envoy-upstream-rq-timeout-ms",
    )
)
"""What a trusted client may ask of a proxy."""
_FORGED_BY_STRANGERS: Final = FORGED | CONTROL


def arrive(request: Request, client: Client, own_identity: bytes = b"") -> bool:
    """Makes a request's headers true. Returns whether it has a request id.

    Args:
        own_identity: URI of this proxy, where the application is to be told who asks (X-Forwarded-Client-Cert); else empty.
    """
    stranger = client.identity is None
    taken = _FORGED_BY_STRANGERS if stranger else FORGED
    has_id = False
    forged = False
    for name, _ in request.headers:
        if name == b"x-request-id":
            has_id = True
        elif name in taken:
            forged = True
    if forged:
        request.headers = [line for line in request.headers if line[0] not in taken]
    headers = request.headers
    headers.append((b"x-forwarded-proto", request.scheme))
    if stranger:
        address = client.address.encode()
        forwarded = request.get(b"x-forwarded-for")
        if forwarded is not None:
            headers = request.headers = [line for line in headers if line[0] != b"x-forwarded-for"]
        headers.append((b"x-forwarded-for", address if not forwarded else forwarded + b"," + address))
        headers.append((b"x-envoy-external-address", address))
    elif own_identity and client.identity is not None:
        headers.append((b"x-forwarded-client-cert", b"By=" + own_identity + b";URI=" + client.identity.uri.encode()))
    return has_id
