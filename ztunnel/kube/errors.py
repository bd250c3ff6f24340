"""What can go wrong between us and an API server, cut by what the caller does next.

The text of each is for the operator: it names what was asked for, and for a missing right the right.
"""

from __future__ import annotations

from ztunnel.mesh.errors import LocalError


class KubeError(LocalError):
    """The API server could not be asked, or did not do what it was asked for."""


class Unreachable(KubeError):
    """No answer: no connection, a broken one, TLS that failed, or a deadline that passed. Try again."""


class BadAnswer(KubeError):
    """An answer that nobody can use: not JSON, cut off, or larger than its bound. Try again."""


class ApiRefused(KubeError):
    """An answer with a status of 400 or more.

    Attributes:
        status: of HTTP.
        reason: the API's own word for it, e.g. `AlreadyExists`; empty when it gave none.
        retry_after: seconds that the server wants us to wait; None when it did not say.
    """

    def __init__(self, text: str, status: int, reason: str = "", retry_after: float | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after


class Unauthorized(ApiRefused):
    """401: the server does not know us; the credentials were read anew once."""


class Forbidden(ApiRefused):
    """403: we lack a right, which the text names."""


class NotFound(ApiRefused):
    """404: no such object, or no such kind."""


class Conflict(ApiRefused):
    """409: it exists already, or it was changed meanwhile; `reason` tells which."""


class Gone(ApiRefused):
    """410: the version of the past that was asked for is forgotten. List anew."""


class Overloaded(ApiRefused):
    """429 or 5xx: later, after `retry_after` at the earliest."""


def refused(what: str, status: int, message: str, reason: str = "", retry_after: float | None = None) -> ApiRefused:
    """The error for an answer.

    Args:
        what: was asked for, as "list pods".
        message: the server's own.
    """
    kinds = {401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 410: Gone, 429: Overloaded}
    kind = kinds.get(status, Overloaded if status >= 500 else ApiRefused)
    said = " ".join(message.split())[:500]
    if status == 403:
        text = f"the right to {what} is missing: {said}"
    elif status == 401:
        text = f"cannot {what}: the API server does not take our credentials: {said}"
    else:
        text = f"cannot {what}: {status}: {said}"
    return kind(text, status, reason, retry_after)
