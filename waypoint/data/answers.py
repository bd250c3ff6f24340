"""The proxy's own answers on their way to a client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from waypoint.data.ends import ClientStream
from waypoint.data.engine import SERVER, Engine
from waypoint.http import replies
from waypoint.http.messages import Headers, LocalReply, Response

Edit = Callable[[Headers, Response], None]
_BAD: Final = {403: replies.upgrade_refused, 426: replies.low_version}


def answer(engine: Engine, stream: ClientStream, reply: LocalReply, edit: Edit | None = None) -> None:
    """Sends the proxy's own answer; `edit` changes its headers as a route says."""
    headers: Headers = []
    if reply.body:
        headers.append((b"content-length", b"%d" % len(reply.body)))
    headers += reply.headers
    response = Response(reply.status, headers)
    if edit is not None:
        edit(headers, response)
    headers.append((b"date", engine.date()))
    headers.append((b"server", SERVER))
    if reply.body:
        stream.respond(response, ended=False)
        stream.send(reply.body)
        stream.end([])
    else:
        stream.respond(response, ended=True)


def refusal(status: int, details: str) -> LocalReply:
    """The answer to what is no request."""
    make = _BAD.get(status)
    if make is not None:
        return make()
    if status == 431:
        return replies.headers_too_large(20 if details.startswith("http2") else 11)
    if details == "missing_host_header":
        return replies.missing_host()
    if status == 400:
        return replies.malformed(details)
    return LocalReply(status, b"", [], "DPE", details)
