"""The bookstore's services, as processes, asking each other over loopback."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from ztunnel.lab import bookinfo
from ztunnel.lab.images import command_of

Start = Callable[[str], str]


@pytest.fixture(name="start")
def fixture_start() -> Iterator[Start]:
    """Starts one service on an address of its own; gives its URL."""
    running: list[subprocess.Popen[str]] = []

    def start(image: str) -> str:
        argv = command_of({"image": f"docker.io/istio/{image}:1.20.3"}, {}, {})
        environment = {"POD_NAME": f"{image}-pod", "REVIEWS_HOSTNAME": "127.0.0.1", "DETAILS_HOSTNAME": "127.0.0.1"}
        process = subprocess.Popen([*argv, "0"], env=environment, stdout=subprocess.PIPE, text=True)
        running.append(process)
        assert process.stdout is not None
        port = process.stdout.readline().split()[-1]
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.communicate()


def get(url: str, method: str = "GET") -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_each_answers_for_itself(start: Start) -> None:
    url = start("examples-bookinfo-reviews-v1")
    status, body = get(f"{url}/reviews/0")
    assert status == 200
    assert json.loads(body)["podname"] == "examples-bookinfo-reviews-v1-pod"
    assert "rating" not in json.loads(body)["reviews"][0]
    assert get(f"{url}/productpage")[0] == 404
    assert get(f"{url}/reviews/0", "DELETE")[0] == 501
    page = start("examples-bookinfo-productpage-v1")
    status, body = get(f"{page}/productpage")
    assert status == 200
    assert "<title>Simple Bookstore App</title>" in body
    assert "The reviews cannot be had right now" in body


def test_what_is_shown_of_the_others() -> None:
    found = bookinfo.reviews("v1", {})
    assert isinstance(found, dict)
    lines = "\n".join(bookinfo._reviews_lines({**found, "podname": "reviews-v1-x"}))
    assert "Reviews served by: reviews-v1-x" in lines
    stars: bookinfo.Json = {"reviewer": "A", "text": "b", "rating": {"stars": 5, "color": "red"}}
    assert "(red stars: 5)" in "\n".join(bookinfo._reviews_lines({"podname": "p", "reviews": [stars]}))
