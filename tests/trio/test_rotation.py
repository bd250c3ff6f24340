"""Rotation on a mock clock: at once, at half-life, again after failures, and never an expired certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from ztunnel.ca.authority import Authority
from ztunnel.ca.root import new_root
from ztunnel.ca.rotation import AT_ONCE, CertificateState, Rotation, next_renewal, retry_delay
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.errors import UpstreamError
from ztunnel.mesh.identity import SpiffeId

START = 1_800_000_000.0
ROOT = new_root("cluster.local", START)
ALICE = SpiffeId("cluster.local", "shop", "alice")
BOB = SpiffeId("cluster.local", "shop", "bob")


def wall_clock() -> float:
    return START + trio.current_time()


@dataclass
class Scripted:
    """A real authority that fails or hangs when told to, and a sink that writes down when it was told what."""

    leaf_hours: float = 24.0
    refuse: bool = False
    hang: bool = False
    skew: float = 0.0
    slow: frozenset[SpiffeId] = frozenset()
    """Never answered."""
    asked: list[tuple[float, str]] = field(default_factory=list)
    told: list[tuple[float, str, bool]] = field(default_factory=list)

    async def obtain(self, identity: SpiffeId, now: float) -> Credentials:
        self.asked.append((trio.current_time(), identity.service_account))
        if self.hang or identity in self.slow:
            await trio.sleep_forever()
        if self.refuse:
            raise UpstreamError("the authority is away")
        return Authority(ROOT, self.leaf_hours).issue(identity, now + self.skew)

    async def sink(self, identity: SpiffeId, credentials: Credentials | None) -> None:
        self.told.append((trio.current_time(), identity.service_account, credentials is not None))

    def rotation(self, jitter: float = 0.5) -> Rotation:
        return Rotation(self, self.sink, wall_clock, lambda: jitter)


@pytest.mark.parametrize(("jitter", "expected"), [(0.0, 145.0), (0.5, 150.0), (1.0, 155.0)])
def test_renewal_is_at_half_of_life_give_or_take(jitter: float, expected: float) -> None:
    assert next_renewal(100.0, 200.0, jitter) == pytest.approx(expected)


@pytest.mark.parametrize(("failures", "expected"), [(1, 1.0), (2, 2.0), (3, 4.0), (8, 128.0), (9, 150.0), (10_000, 150.0)])
def test_retries_back_off_to_a_bound(failures: int, expected: float) -> None:
    assert retry_delay(failures, 0.5) == pytest.approx(expected)
    assert retry_delay(failures, 0.0) == pytest.approx(expected * 0.8)
    assert retry_delay(failures, 1.0) == pytest.approx(expected * 1.2)


async def test_new_identities_are_issued_at_once_and_unwanted_ones_forgotten(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted()
    rotation = script.rotation()
    await rotation.want([BOB, ALICE])
    assert script.told == [(0.0, "alice", True), (0.0, "bob", True)]
    assert [(row.identity, row.state) for row in rotation.status()] == [(ALICE, CertificateState.VALID), (BOB, CertificateState.VALID)]
    await rotation.want([BOB])
    assert script.told[2:] == [(0.0, "alice", False)]
    assert [row.identity for row in rotation.status()] == [BOB]
    assert len(script.asked) == 2


async def test_renewal_at_half_life_for_as_long_as_it_runs(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(leaf_hours=1.0)
    rotation = script.rotation()
    async with trio.open_nursery() as nursery:
        await nursery.start(rotation.run)
        await rotation.want([ALICE])
        await trio.sleep(6000)
        nursery.cancel_scope.cancel()
    moments = [round(moment) for moment, _ in script.asked]
    # 3600 s and 120 s of backdating: half of 3720 s, counted from 120 s before issue.
    assert moments == [0, 1740, 3480, 5220]
    assert all(given for _, _, given in script.told)


async def test_a_failing_authority_does_not_take_a_valid_certificate_away(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(leaf_hours=1.0)
    rotation = script.rotation()
    async with trio.open_nursery() as nursery:
        await nursery.start(rotation.run)
        await rotation.want([ALICE])
        script.refuse = True
        await trio.sleep(2000)
        (row,) = rotation.status()
        assert row.state is CertificateState.FAILING
        assert row.error == "the authority is away"
        assert script.told == [(0.0, "alice", True)]
        await trio.sleep_until(3601)
        assert [(round(moment), given) for moment, _, given in script.told] == [(0, True), (3600, False)]
        assert rotation.status()[0].state is CertificateState.UNAVAILABLE
        script.refuse = False
        await trio.sleep(200)
        assert script.told[-1][2] is True
        assert rotation.status()[0].state is CertificateState.VALID
        nursery.cancel_scope.cancel()
    gaps = [round(later - earlier, 3) for (earlier, _), (later, _) in zip(script.asked[1:], script.asked[2:], strict=False)]
    assert gaps[:5] == [1.0, 2.0, 4.0, 8.0, 16.0]
    assert max(gaps) <= 150.001


async def test_an_authority_that_never_answers_costs_a_deadline_not_the_loop(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(hang=True)
    rotation = script.rotation()
    await rotation.want([ALICE])
    assert trio.current_time() == pytest.approx(10.0)
    (row,) = rotation.status()
    assert row.state is CertificateState.UNAVAILABLE
    assert "did not answer within 10 s" in row.error
    assert script.told == []


async def test_a_certificate_that_is_expired_on_arrival_is_a_failure(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(leaf_hours=1.0, skew=-7200.0)
    rotation = script.rotation()
    await rotation.want([ALICE])
    assert "already expired" in rotation.status()[0].error
    assert script.told == []


async def test_a_certificate_past_its_half_life_on_arrival_is_not_a_loop(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(leaf_hours=1.0, skew=-3000.0)
    rotation = script.rotation()
    async with trio.open_nursery() as nursery:
        await nursery.start(rotation.run)
        await rotation.want([ALICE])
        await trio.sleep(10.5)
        nursery.cancel_scope.cancel()
    assert len(script.asked) == 11


async def test_cancelled_wants_are_finished_by_the_loop(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(hang=True)
    rotation = script.rotation()
    with trio.move_on_after(1):
        await rotation.want([ALICE])
    assert rotation.status()[0].state is CertificateState.PENDING
    script.hang = False
    async with trio.open_nursery() as nursery:
        await nursery.start(rotation.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert script.told == [(1.0, "alice", True)]


async def test_nothing_wanted_wakes_up_now_and_then_only(mock_clock: trio.testing.MockClock) -> None:
    rotation = Scripted().rotation()
    async with trio.open_nursery() as nursery:
        await nursery.start(rotation.run)
        await trio.sleep(600)
        nursery.cancel_scope.cancel()
    assert rotation.status() == []
    assert math.isclose(trio.current_time(), 600)


async def test_an_authority_that_is_slow_for_one_serves_the_others_meanwhile(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(slow=frozenset({ALICE}))
    rotation = script.rotation()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rotation.want, [ALICE, BOB])
        await trio.sleep(1)
        assert script.told == [(0.0, "bob", True)]
    states = {row.identity: row.state for row in rotation.status()}
    assert states == {ALICE: CertificateState.UNAVAILABLE, BOB: CertificateState.VALID}


async def test_no_more_than_so_many_are_asked_for_at_once(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted(hang=True)
    many = [SpiffeId("cluster.local", "shop", f"a{number}") for number in range(3 * AT_ONCE)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script.rotation().want, many)
        for asked in (AT_ONCE, 2 * AT_ONCE, 3 * AT_ONCE):
            await trio.sleep(1)
            assert len(script.asked) == asked
            await trio.sleep(9.5)


async def test_new_roots_renew_everything_within_a_time(mock_clock: trio.testing.MockClock) -> None:
    script = Scripted()
    rotation = script.rotation(jitter=0.5)
    async with trio.open_nursery() as nursery:
        await nursery.start(rotation.run)
        await rotation.want([ALICE, BOB])
        await trio.sleep(100)
        rotation.hasten(300)
        await trio.sleep(149)
        assert len(script.asked) == 2
        await trio.sleep(2)
        assert sorted(script.asked[2:]) == [(250.0, "alice"), (250.0, "bob")]
        await trio.sleep(3600)
        assert len(script.asked) == 4
        nursery.cancel_scope.cancel()
