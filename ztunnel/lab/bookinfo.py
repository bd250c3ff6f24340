"""The lab's bookstore: `python -I -S bookinfo.py SERVICE VERSION`, stand-alone, standard library only.

Four small services of our own that answer as the images `examples-bookinfo-SERVICE-VERSION` of Istio's sample do, as far as the sample's
walks through a mesh look: productpage asks details and reviews, reviews (v2 and v3) asks ratings. All on port 9080, HTTP/1.1, a thread
per connection. Headers that carry a trace or a user go along. Pod names come from the environment (POD_NAME).
"""

import json
import os
import signal
import socket
import sys
import urllib.request
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError

PORT = 9080
ASK_SECONDS = 3.0
MAX_ANSWER = 1 << 20
IDLE_SECONDS = 60.0
FORWARDED = (
    *("x-request-id", "traceparent", "tracestate", "b3", "x-b3-traceid", "x-b3-spanid", "x-b3-parentspanid", "x-b3-sampled"),
    *("x-b3-flags", "end-user", "user-agent", "authorization", "cookie"),
)
POD = os.environ.get("POD_NAME", socket.gethostname())
COLOURS = {"v2": "black", "v3": "red"}
REVIEWERS = (("Ada", "Two networks, one name, and nobody notices until the last act."), ("Ben", "I laughed at every wrong door."))

UNRATED = {"error": "the ratings cannot be had right now"}

Headers = dict[str, str]
Json = dict[str, object]


class NotAnswered(Exception):
    """Another service did not answer as it should; the text says how."""


def ask(name: str, path: str, headers: Headers) -> object:
    """The JSON that another service answers.

    Raises:
        NotAnswered: an error, another status than 200, or no JSON.
    """
    host = os.environ.get(f"{name.upper()}_HOSTNAME", name)
    request = urllib.request.Request(f"http://{host}:{PORT}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=ASK_SECONDS) as answer:  # noqa: S310 - always http
            found: object = json.loads(answer.read(MAX_ANSWER))
    except (URLError, OSError, ValueError) as error:
        raise NotAnswered(f"{name}: {error}") from error
    return found


def details(_version: str, _headers: Headers) -> object:
    """About the book."""
    return {"id": 0, "author": "Anonymous", "year": 2026, "type": "paperback", "pages": 200, "language": "English"}


def ratings(_version: str, _headers: Headers) -> object:
    """Stars by reviewer."""
    return {"id": 0, "ratings": {"Ada": 5, "Ben": 4}}


def reviews(version: str, headers: Headers) -> object:
    """What reviewers say; with stars in a version's colour from v2 on."""
    found: list[Json] = [{"reviewer": who, "text": words} for who, words in REVIEWERS]
    colour = COLOURS.get(version)
    if colour is not None:
        stars: Json = {}
        try:
            stars = _mapping(_mapping(ask("ratings", "/ratings/0", headers)).get("ratings"))
        except NotAnswered:
            pass  # shown as missing
        for each in found:
            who = str(each["reviewer"])
            each["rating"] = {"stars": stars[who], "color": colour} if who in stars else UNRATED
    return {"id": 0, "podname": POD, "clustername": "lab", "reviews": found}


def productpage(headers: Headers) -> str:
    """The page; what cannot be had is said in its place."""
    lines = ["<!DOCTYPE html>", "<html><head><title>Simple Bookstore App</title></head><body><h1>A Comedy of Meshes</h1>"]
    lines += _section("Book Details", "details", "/details/0", headers, _details_lines)
    lines += _section("Book Reviews", "reviews", "/reviews/0", headers, _reviews_lines)
    return "\n".join([*lines, f"<p>Page served by: {escape(POD)}</p></body></html>", ""])


def _section(title: str, name: str, path: str, headers: Headers, render: Callable[[Json], list[str]]) -> list[str]:
    try:
        body = render(_mapping(ask(name, path, headers)))
    except NotAnswered:
        body = [f"<p>The {name} cannot be had right now.</p>"]
    return [f"<h2>{title}</h2>", *body]


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _details_lines(found: Json) -> list[str]:
    return [f"<p>{escape(key)}: {escape(str(value))}</p>" for key, value in found.items()]


def _reviews_lines(found: Json) -> list[str]:
    lines = [f"<p>Reviews served by: {escape(str(found.get('podname')))}</p>"]
    given = found.get("reviews")
    for each in map(_mapping, given if isinstance(given, list) else []):
        rating = _mapping(each.get("rating"))
        stars = f" ({rating['color']} stars: {rating['stars']})" if "stars" in rating else f" ({rating['error']})" if rating else ""
        lines.append(f"<blockquote>{escape(str(each.get('text')))} {escape(str(each.get('reviewer')))}{escape(stars)}</blockquote>")
    return lines


SERVICES = {"details": details, "ratings": ratings, "reviews": reviews}


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    service, version = "", ""

    def do_GET(self) -> None:
        """Answer."""
        path = self.path.partition("?")[0]
        headers = {name: value for name in FORWARDED if (value := self.headers.get(name))}
        if path == "/health":
            self._answer(200, "text/plain", f"{self.service} is healthy\n")
        elif self.service == "productpage" and path in ("/productpage", "/"):
            self._answer(200, "text/html; charset=utf-8", productpage(headers))
        elif self.service in SERVICES and path.startswith(f"/{self.service}/"):
            self._answer(200, "application/json", json.dumps(SERVICES[self.service](self.version, headers)))
        else:
            self._answer(404, "text/plain", "not found\n")

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class' name
        """One line per request."""
        sys.stdout.write(f"{self.address_string()} {format % args}\n")
        sys.stdout.flush()


class Server(ThreadingHTTPServer):
    """On every address; connections of a test that is over do not keep it."""

    daemon_threads = True
    request_queue_size = 128
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET

    def server_bind(self) -> None:
        """Both families on one socket."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def main() -> None:
    """Serve until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    Handler.service, Handler.version = sys.argv[1:3]
    server = Server(("", int(sys.argv[3]) if len(sys.argv) > 3 else PORT), Handler)
    sys.stdout.write(f"{Handler.service} {Handler.version} on port {server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
