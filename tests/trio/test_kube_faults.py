"""A list and a watch on bad days: whatever the API server does, the store ends up with what it has, and never hears of half of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from tests.kit.fake_kube import HEAD, Asked, FakeKube, Fault, bookmark, event
from tests.kit.polling import eventually_async
from tests.kit.reflected import BOUNDS, QUICK, Kept, following
from ztunnel.kube.client import Bounds
from ztunnel.kube.credentials import Files
from ztunnel.kube.reflector import Body, Pace, Phase, Reflector

SMALL = Bounds(line_bytes=4096, answer_bytes=64 << 10, answer_seconds=0.5)
IMPATIENT = Pace(page=3, idle_seconds=0.2, backoff_first=0.02, backoff_most=0.2, short_seconds=0.0)


async def until(question: Callable[[], object]) -> None:
    await eventually_async(lambda: question() or None, within=50)


@asynccontextmanager
async def followed(
    fake: FakeKube, pace: Pace = QUICK, bounds: Bounds = BOUNDS, credentials: Files | None = None
) -> AsyncIterator[tuple[Reflector[Body], Kept]]:
    async with fake.serving(), following(fake.access(credentials), pace=pace, bounds=bounds) as both:
        yield both


def filled(*, streams: bool = False) -> FakeKube:
    fake = FakeKube(streams=streams)
    for name in "abcdefg":
        fake.put(name)
    return fake


# ------------------------------------------------------------------------------------------------------------------- faults


async def dropped(asked: Asked) -> None:
    del asked


async def half_a_head(asked: Asked) -> None:
    await asked.stream.send_all(b"HTTP/1.1 20")


async def half_a_json(asked: Asked) -> None:
    await asked.say(b'{"type":"ADDED","object":{"metadata":{"name":"never","resourceVersion":"1')


async def cut_chunk(asked: Asked) -> None:
    await asked.stream.send_all(HEAD % (200, b"Transfer-Encoding: chunked\r\n") + b'20\r\n{"type":"A')


async def no_json(asked: Asked) -> None:
    await asked.say(b"<html>a proxy has something to say</html>\n")


async def no_object(asked: Asked) -> None:
    await asked.say(b"[1, 2, 3]\n")


async def nested(asked: Asked) -> None:
    await asked.say(b'{"type":"ADDED","object":' + b'{"a":' * 500 + b"1" + b"}" * 501 + b"\n")


async def not_unicode(asked: Asked) -> None:
    await asked.say(b'{"type":"ADDED","object":{"metadata":{"name":"\xff\xfe","resourceVersion":"1"}}}\n')


async def endless(asked: Asked) -> None:
    await asked.stream.send_all(HEAD % (200, b""))
    while True:
        await asked.stream.send_all(b"x" * 65536)


async def silent(asked: Asked) -> None:
    await asked.stream.send_all(HEAD % (200, b""))
    await trio.sleep_forever()


async def deaf(asked: Asked) -> None:
    del asked
    await trio.sleep_forever()


async def failed(asked: Asked) -> None:
    await asked.refuse(500, "InternalError")


async def busy(asked: Asked) -> None:
    await asked.refuse(429, "TooManyRequests", b"Retry-After: 0\r\n")


async def stranger(asked: Asked) -> None:
    await asked.refuse(401, "Unauthorized")


async def redirected(asked: Asked) -> None:
    await asked.say(b"", 302, b"Location: http://127.0.0.1:1/\r\n")


async def gone(asked: Asked) -> None:
    await asked.refuse(410, "Expired")


FAULTS: list[Fault] = [
    dropped, half_a_head, half_a_json, cut_chunk, no_json, no_object, nested, not_unicode, endless, silent, deaf, failed, busy, stranger,
    redirected, gone,
]  # fmt: skip
IDS = [fault.__name__ for fault in FAULTS]


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
async def test_a_list_that_fails_is_tried_again(fault: Fault) -> None:
    fake = filled()
    fake.next_list(fault)
    async with followed(fake, IMPATIENT, SMALL) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        assert (kept.names(), kept.wholes) == (list("abcdefg"), 1)
        fake.put("h")
        await until(lambda: kept.names() == list("abcdefgh"))
        # Credentials that were refused are looked at again and tried at once, which is no failure yet.
        assert reflector.counts.failures >= (0 if fault is stranger else 1)


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
async def test_a_page_in_the_middle_that_fails_tells_nobody_of_half_a_set(fault: Fault) -> None:
    fake = filled()

    async def proper(asked: Asked) -> None:
        await fake._list(asked)

    fake.next_list(proper)
    fake.next_list(fault)
    async with followed(fake, IMPATIENT, SMALL) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        assert (kept.names(), kept.wholes) == (list("abcdefg"), 1)


@pytest.mark.parametrize("fault", FAULTS, ids=IDS)
async def test_a_watch_that_fails_goes_on_where_it_was(fault: Fault) -> None:
    fake = filled(streams=FAULTS.index(fault) % 2 == 0)
    async with followed(fake, IMPATIENT, SMALL) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        fake.next_watch(fault)
        # The watch that goes on is stalled soon; the next one meets the fault.
        await until(lambda: not fake._faults)
        fake.put("h")
        fake.drop("a")
        await until(lambda: kept.names() == list("bcdefgh"))
        assert kept.wholes == (2 if fault is gone else 1)


@pytest.mark.parametrize("fault", [half_a_json, no_json, silent, failed, gone], ids=lambda fault: fault.__name__)
async def test_a_stream_of_initial_events_that_breaks_tells_nobody_of_half_a_set(fault: Fault) -> None:
    fake = filled(streams=True)

    async def breaks(asked: Asked) -> None:
        await asked.stream.send_all(HEAD % (200, b""))
        await event(asked, "ADDED", fake.objects["a"])

    fake.next_watch(breaks)
    fake.next_watch(fault)
    async with followed(fake, replace(IMPATIENT, idle_seconds=2.0, broken_streams=100), SMALL) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        assert (kept.names(), kept.wholes, reflector.counts.lists) == (list("abcdefg"), 1, 0)


async def expired(asked: Asked) -> None:
    """As the real server says it when the watch was accepted already."""
    await asked.stream.send_all(HEAD % (200, b""))
    await event(asked, "ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})


@pytest.mark.parametrize("fault", [gone, expired], ids=lambda fault: fault.__name__)
async def test_an_expired_version_means_the_whole_set_anew(fault: Fault) -> None:
    fake = filled()
    async with followed(fake, IMPATIENT) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        fake.next_watch(fault)
        # Nobody will ever tell of this: only the whole set shows it.
        del fake.objects["a"]
        await until(lambda: kept.wholes == 2)
        assert kept.names() == list("bcdefg")
        fake.put("h")
        await until(lambda: kept.names() == list("bcdefgh"))


async def test_pages_that_expire_are_given_up_for_one_answer() -> None:
    fake = filled()

    async def forgets(asked: Asked) -> None:
        await fake._list(asked)
        fake.forget()

    for _ in range(2):
        fake.next_list(forgets)
    async with followed(fake) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        assert kept.names() == list("abcdefg")
        assert "limit" not in fake.lists()[-1].query


async def test_a_server_that_is_busy_is_left_alone_as_long_as_it_wants() -> None:
    fake = filled()

    async def very_busy(asked: Asked) -> None:
        await asked.refuse(429, "TooManyRequests", b"Retry-After: 1\r\n")

    fake.next_list(very_busy)
    async with followed(fake) as (reflector, _kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        first, second = fake.lists()[:2]
        assert second.at - first.at >= 1.0


async def test_a_server_whose_streams_always_break_is_read_in_pages() -> None:
    fake = filled(streams=True)
    for _ in range(IMPATIENT.broken_streams):
        fake.next_watch(dropped)
    async with followed(fake, IMPATIENT) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        assert (kept.names(), kept.wholes, reflector.counts.lists) == (list("abcdefg"), 1, 1)


async def test_a_server_that_ends_every_watch_at_once_is_not_asked_in_a_loop() -> None:
    fake = filled()

    async def ends(asked: Asked) -> None:
        await asked.stream.send_all(HEAD % (200, b""))

    fake.next_watch(fake._watch)  # that with initial events, which is refused
    for _ in range(1000):
        fake.next_watch(ends)
    async with followed(fake, Pace(backoff_first=0.1, backoff_most=10.0)) as (_reflector, _kept):
        await until(lambda: len(fake.watches()) >= 6)
        times = [each.at for each in fake.watches()]
        # The first of them may not be followed by a wait: with list and all it can have lasted long enough.
        assert times[5] - times[2] >= 0.05 + 0.1 + 0.2


async def test_a_token_that_was_replaced_is_read_at_once(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("old\n")
    fake = filled()
    async with followed(fake, credentials=Files(token=token)) as (reflector, kept):
        await until(lambda: reflector.phase is Phase.FOLLOWING)
        token.write_text("new\n")
        fake.next_watch(stranger)
        reflector.client.access.credentials.refused()
        async with following(fake.access(Files(token=token))) as (_other, others):
            await until(lambda: others.names() == list("abcdefg"))
        assert {each.authorization for each in fake.asked} == {"Bearer old", "Bearer new"}
        assert kept.names() == list("abcdefg")


async def test_bookmarks_move_the_place_to_go_on_from() -> None:
    fake = filled()

    async def marks(asked: Asked) -> None:
        await asked.stream.send_all(HEAD % (200, b""))
        await bookmark(asked, 5000)

    fake.next_watch(fake._watch)  # that with initial events, which is refused
    fake.next_watch(marks)
    async with followed(fake) as (reflector, _kept):
        await until(lambda: reflector._version == "5000")
        await until(lambda: any(each.query.get("resourceVersion") == "5000" for each in fake.watches()))
