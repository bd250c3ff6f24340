"""The two ends of an exchange, as it sees them, whichever HTTP version they speak; and what each of them tells it.

Traits and not Protocols: compiled, their methods are called many times for every request.
"""

from __future__ import annotations

from mypy_extensions import trait

from waypoint.http.messages import Client, Headers, Request, Response
from waypoint.upstream.outcome import ResetReason


@trait
class RequestUser:
    """Who serves a request: told by the client's side what comes of it."""

    __slots__ = ()

    def request_data(self, data: bytes) -> None:
        """A piece of the body."""
        raise NotImplementedError

    def request_ended(self, trailers: Headers) -> None:
        """The body is complete."""
        raise NotImplementedError

    def client_lost(self, why: str) -> None:
        """Nobody waits for the answer any more. Nothing more is told."""
        raise NotImplementedError

    def client_writable(self) -> None:
        """The client had been slow (`is_full`), and takes more now."""
        raise NotImplementedError


@trait
class ClientStream:
    """One request at the client's side: how it is answered."""

    __slots__ = ()

    @property
    def is_full(self) -> bool:
        """Whether the client does not take what it is sent."""
        raise NotImplementedError

    def interim(self, response: Response) -> None:
        """A 1xx in front of the answer."""
        raise NotImplementedError

    def respond(self, response: Response, ended: bool) -> None:
        """The answer's head; `ended`: it has no body and no trailers. 101 opens both directions for bytes of another protocol."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """A piece of the answer's body."""
        raise NotImplementedError

    def end(self, trailers: Headers) -> None:
        """The answer is complete."""
        raise NotImplementedError

    def reset(self, code: int = 0x2) -> None:
        """Cuts the answer: the client must not take it for a whole one. `code` is HTTP/2's."""
        raise NotImplementedError

    def pause(self) -> None:
        """Takes no more of the request's body until `resume`."""
        raise NotImplementedError

    def resume(self) -> None:
        """Goes on with the request's body."""
        raise NotImplementedError


@trait
class ResponseUser:
    """Who sent a request upstream: told what comes of it."""

    __slots__ = ()

    def upstream_ready(self, stream: ServerStream) -> None:
        """A request that waited for a connection has begun."""
        raise NotImplementedError

    def upstream_interim(self, response: Response) -> None:
        """A 1xx."""
        raise NotImplementedError

    def upstream_response(self, response: Response, ended: bool) -> None:
        """The answer's head."""
        raise NotImplementedError

    def upstream_data(self, data: bytes) -> None:
        """A piece of its body."""
        raise NotImplementedError

    def upstream_ended(self, trailers: Headers) -> None:
        """It is complete."""
        raise NotImplementedError

    def upstream_failed(self, reason: ResetReason, text: str) -> None:
        """There is no answer, or only a part of one; `text` is what the transport said. Nothing more is told."""
        raise NotImplementedError

    def upstream_writable(self) -> None:
        """The endpoint had been slow, and takes more now."""
        raise NotImplementedError


@trait
class ServerStream:
    """One request at the endpoint's side."""

    __slots__ = ()

    @property
    def is_full(self) -> bool:
        """Whether the endpoint does not take what it is sent."""
        raise NotImplementedError

    def send(self, data: bytes) -> None:
        """A piece of the request's body."""
        raise NotImplementedError

    def end(self, trailers: Headers) -> None:
        """The request is complete."""
        raise NotImplementedError

    def pause(self) -> None:
        """Takes no more of the answer's body until `resume`."""
        raise NotImplementedError

    def resume(self) -> None:
        """Goes on."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Nobody wants the answer any more: nothing is told from now on."""
        raise NotImplementedError


@trait
class Service:
    """Where requests of a client's connection go."""

    __slots__ = ()

    def begin(self, stream: ClientStream, request: Request, client: Client, ended: bool) -> RequestUser | None:
        """Takes a request. None: it has been answered and nothing else is to be told of it."""
        raise NotImplementedError

    def refused(self, stream: ClientStream, client: Client, status: int, details: str) -> None:
        """What came was no request: answers it."""
        raise NotImplementedError

    @property
    def is_draining(self) -> bool:
        """Whether connections are to end after what they are doing."""
        raise NotImplementedError
