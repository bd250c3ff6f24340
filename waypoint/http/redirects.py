"""Where a redirect sends a client. Source: Gateway API HTTPRequestRedirectFilter, Istio HTTPRedirect, Envoy `newUri`."""

from __future__ import annotations

from waypoint.http.authority import split_authority
from waypoint.http.editing import matched_length, replace_prefix
from waypoint.http.messages import Client, LocalReply, Request
from ztunnel.mesh.l7.routes import PathMatch, Redirect

_WELL_KNOWN = {b"http": 80, b"https": 443}


class CompiledRedirect:
    """The redirect of requests that one match of a route matched."""

    __slots__ = ("_authority", "_derive", "_path", "_port", "_prefix", "_scheme", "_segments", "_skip", "_status", "_whole")

    def __init__(self, redirect: Redirect, match: PathMatch | None) -> None:
        self._status = redirect.status
        self._scheme = None if redirect.scheme is None else redirect.scheme.encode()
        self._authority = None if redirect.authority is None else redirect.authority.encode()
        self._port = redirect.port
        self._derive = redirect.derive_port
        self._path = None if redirect.path is None else redirect.path.encode()
        self._prefix = None if redirect.prefix is None else redirect.prefix.encode()
        self._skip, self._whole, self._segments = matched_length(match)

    def answer(self, request: Request, client: Client) -> LocalReply:
        """The answer, with `location`."""
        path, mark, query = request.path.partition(b"?")
        if self._path is not None:
            path = self._path
        elif self._prefix is not None:
            path = replace_prefix(path, self._prefix, self._skip, whole=self._whole, segments=self._segments)
        if b"?" in path:
            mark = query = b""  # a query of the configuration's own replaces the request's
        scheme = self._scheme or request.scheme
        location = scheme + b"://" + self._host(request, client, scheme) + path + mark + query
        return LocalReply(self._status, b"", [(b"location", location)], "", "direct_response")

    def _host(self, request: Request, client: Client, scheme: bytes) -> bytes:
        host, port = split_authority(request.authority if self._authority is None else self._authority)
        if self._port is not None:
            port = self._port
        elif self._derive == "FROM_PROTOCOL_DEFAULT":
            port = 0
        elif self._derive == "FROM_REQUEST_PORT":
            port = client.service_port
        elif self._derive == "FROM_HOST":
            if self._scheme is not None and port == _WELL_KNOWN.get(request.scheme):
                port = 0
        elif self._authority is None or not port:
            port = 0 if self._scheme is not None else client.service_port
        if not port or port == _WELL_KNOWN.get(scheme):
            return host
        return host + b":" + str(port).encode()
