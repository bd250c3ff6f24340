"""The authority's service and its client together, over loopback TLS; and the keeper of its roots on a mock clock."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509

from tests.kit.citadel import AGENT, TOKEN, Desk, files
from tests.kit.pki import FakePki
from ztunnel.ca.csr_protocol import PATH, encode_request
from ztunnel.ca.files import RootError
from ztunnel.ca.issuance import Caller, Reason
from ztunnel.ca.keeper import FilePublisher, FileStore, OwnRoots, RootKeeper, Stored
from ztunnel.ca.pods import PodPlace
from ztunnel.ca.remote import RemoteAuthority
from ztunnel.ca.request import IssueError, new_request, validity
from ztunnel.ca.root import Root
from ztunnel.ca.service import MAX_REVIEWS, Limits
from ztunnel.ca.succession import Periods
from ztunnel.hbone.handshake import TlsContexts
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.rpc.client import Target, unary
from ztunnel.rpc.messages import RpcError, Status
from ztunnel.rpc.server import Call
from ztunnel.rpc.tls import client_context

PKI = FakePki()
CART = SpiffeId("cluster.local", "shop", "cart")
BANK = SpiffeId("cluster.local", "shop", "bank")


def client(target: Target, directory: Path, token: str = TOKEN) -> RemoteAuthority:
    roots, tokens = files(directory, PKI, token)
    return RemoteAuthority(target, roots, tokens, "Kubernetes", 3600)


async def test_an_agent_gets_credentials_that_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    caplog.set_level(logging.INFO, "ztunnel")
    async with desk.serving(PKI) as target:
        now = time.time()
        credentials = await client(target, tmp_path).obtain(CART, now)
    TlsContexts(credentials)
    assert credentials.identity == CART
    assert credentials.roots_pem == desk.root.pem
    assert 3500 < validity(credentials).not_after - now < 3700
    assert desk.outcomes == [Reason.ISSUED]
    (line,) = [record for record in caplog.records if record.getMessage() == "certificate issued"]
    told = line.fields  # type: ignore[attr-defined]  # what logs.fields puts there
    assert (str(told["identity"]), str(told["caller"]), told["pod"], told["node"]) == (
        CART.uri,
        "istio-system/ztunnel",
        "ztunnel-1",
        "node-1",
    )
    assert told["serial"] == f"{validity(credentials).serial:x}"
    assert TOKEN not in str(told)


async def test_every_request_has_its_own_key(tmp_path: Path) -> None:
    async with Desk().serving(PKI) as target:
        asked = client(target, tmp_path)
        first, second = await asked.obtain(CART, time.time()), await asked.obtain(CART, time.time())
    assert first.key_pem != second.key_pem


async def test_somebody_who_is_no_agent_gets_its_own(tmp_path: Path) -> None:
    desk = Desk()
    desk.tokens.known["of-cart"] = Caller("shop", "cart", "cart-0", "uid-cart-0")
    async with desk.serving(PKI) as target:
        asked = replace(client(target, tmp_path, "of-cart"), impersonates=False)
        assert (await asked.obtain(CART, time.time())).identity == CART
        with pytest.raises(IssueError):
            await asked.obtain(BANK, time.time())
        with pytest.raises(IssueError, match="refuses a certificate"):
            await replace(asked, impersonates=True).obtain(CART, time.time())
    assert desk.outcomes == [Reason.ISSUED, Reason.BAD_REQUEST, Reason.NOT_AN_AGENT]


@pytest.mark.parametrize(
    ("identity", "token", "reason"),
    [
        (BANK, TOKEN, Reason.NOT_ON_NODE),
        (CART, "stolen", Reason.TOKEN_REFUSED),
        (CART, "x" * 16000, Reason.TOKEN_REFUSED),
        (SpiffeId("other", "shop", "cart"), TOKEN, Reason.BAD_IDENTITY),
    ],
)
async def test_refusals_are_told_apart_by_operators_only(tmp_path: Path, identity: SpiffeId, token: str, reason: Reason) -> None:
    desk = Desk()
    async with desk.serving(PKI) as target:
        with pytest.raises(IssueError, match="request authenticate failure"):
            await client(target, tmp_path, token).obtain(identity, time.time())
    assert desk.outcomes == [reason]


async def ask(target: Target, message: bytes, **metadata: str) -> Status:
    try:
        await unary(target, client_context(PKI.root_pem), PATH, message, metadata, 30)
    except RpcError as error:
        return error.status
    return Status.OK


async def test_what_is_wrong_with_a_request_and_what_with_us() -> None:
    desk = Desk()
    good = encode_request(new_request(CART).csr_pem, 60, CART)
    bearer = f"Bearer {TOKEN}"
    async with desk.serving(PKI) as target:
        assert await ask(target, good) is Status.UNAUTHENTICATED
        assert await ask(target, good, authorization=TOKEN) is Status.UNAUTHENTICATED
        assert await ask(target, good, authorization="Bearer ") is Status.UNAUTHENTICATED
        assert await ask(target, b"\xff", authorization=bearer) is Status.INVALID_ARGUMENT
        assert await ask(target, encode_request(b"x", 0, CART), authorization=bearer) is Status.INVALID_ARGUMENT
        assert await ask(target, encode_request(bytes(20_000), 0, CART), authorization=bearer) is Status.INVALID_ARGUMENT
        assert await ask(target, encode_request(new_request(BANK).csr_pem, 0, CART), authorization=bearer) is Status.INVALID_ARGUMENT
        desk.tokens.away = True
        assert await ask(target, good, authorization=bearer) is Status.UNAVAILABLE
        desk.tokens.away = False
        desk.pods.synced = False
        assert await ask(target, good, authorization=bearer) is Status.UNAVAILABLE
        desk.pods.synced = True
        desk.authority = None
        assert await ask(target, good, authorization=bearer) is Status.UNAVAILABLE
    no_token, bad = Reason.NO_TOKEN, Reason.BAD_REQUEST
    assert desk.outcomes == [no_token, no_token, no_token, bad, bad, bad, bad, Reason.NO_REVIEW, Reason.NOT_SYNCED, Reason.FAILED]


@pytest.mark.parametrize("limits", [Limits(per_address=(0.0, 2.0)), Limits(per_node=(0.0, 2.0))])
async def test_nobody_asks_without_end(limits: Limits) -> None:
    desk = Desk(limits)
    good = encode_request(new_request(CART).csr_pem, 60, CART)
    async with desk.serving(PKI) as target:
        found = [await ask(target, good, authorization=f"Bearer {TOKEN}") for _ in range(4)]
    assert found == [Status.OK, Status.OK, Status.RESOURCE_EXHAUSTED, Status.RESOURCE_EXHAUSTED]
    assert desk.outcomes[2:] == [Reason.BUSY, Reason.BUSY]


async def test_who_asks_before_we_have_heard_of_the_pod_is_not_sent_away() -> None:
    desk = Desk(Limits(news_seconds=30.0))
    call = Call(encode_request(new_request(BANK).csr_pem, 60, BANK), {"authorization": f"Bearer {TOKEN}"}, "10.0.0.1")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(desk.service.create_certificate, call)
        await trio.testing.wait_all_tasks_blocked()
        assert desk.outcomes == []
        desk.pods.put(PodPlace("shop", "bank-9", "uid-bank-9", "node-1", "bank"))
    assert desk.outcomes == [Reason.ISSUED]


async def test_who_asks_for_what_never_comes_is_refused_in_time() -> None:
    desk = Desk(Limits(news_seconds=0.2))
    call = Call(encode_request(new_request(BANK).csr_pem, 60, BANK), {"authorization": f"Bearer {TOKEN}"}, "10.0.0.1")
    with pytest.raises(RpcError):
        await desk.service.create_certificate(call)
    assert desk.outcomes == [Reason.NOT_ON_NODE]


async def test_the_api_server_is_not_asked_about_any_number_of_tokens_at_once() -> None:
    desk = Desk()
    asked, released, most = 0, trio.Event(), 0

    async def review(token: str) -> Caller:
        nonlocal asked, most
        asked += 1
        most = max(most, asked)
        await released.wait()
        asked -= 1
        return AGENT

    desk.tokens.review = review  # type: ignore[method-assign]  # a slow API server
    good = encode_request(new_request(CART).csr_pem, 60, CART)
    call = Call(good, {"authorization": f"Bearer {TOKEN}"}, "10.0.0.1")
    async with trio.open_nursery() as nursery:
        for _ in range(MAX_REVIEWS + 20):
            nursery.start_soon(desk.service.create_certificate, call)
        await trio.testing.wait_all_tasks_blocked()
        assert asked == MAX_REVIEWS
        released.set()
    assert most == MAX_REVIEWS
    assert desk.outcomes == [Reason.ISSUED] * (MAX_REVIEWS + 20)


async def test_files_are_read_for_each_request(tmp_path: Path) -> None:
    desk = Desk()
    async with desk.serving(PKI) as target:
        asked = client(target, tmp_path, "not yet")
        with pytest.raises(IssueError):
            await asked.obtain(CART, time.time())
        asked.token_file.write_text(TOKEN)
        assert (await asked.obtain(CART, time.time())).identity == CART
        asked.roots_file.write_bytes(FakePki().root_pem)
        with pytest.raises(MeshError, match="certificate"):
            await asked.obtain(CART, time.time())


@pytest.mark.parametrize(
    ("token", "reason"), [("", "holds no token"), ("a b", "holds no token"), ("ä", "holds no token"), ("x" * 20_000, "larger than")]
)
async def test_files_that_cannot_be_used_are_named(tmp_path: Path, token: str, reason: str) -> None:
    asked = client(Target("127.0.0.1", 1), tmp_path, token)
    with pytest.raises(IssueError, match=f"ca.token_file.*{reason}"):
        await asked.obtain(CART, time.time())
    asked.roots_file.unlink()
    with pytest.raises(IssueError, match=r"ca.roots_file: .*No such file"):
        await asked.obtain(CART, time.time())


async def test_a_server_that_is_no_authority_is_named(tmp_path: Path) -> None:
    from tests.kit.rpc import serving  # noqa: PLC0415 - the desk's own serves the method

    async with serving(PKI, {}) as (target, _):
        with pytest.raises(IssueError, match="is no certificate authority"):
            await client(target, tmp_path).obtain(CART, time.time())


async def test_a_change_of_roots_is_told_once(tmp_path: Path, mock_clock: trio.testing.MockClock) -> None:
    asked = client(Target("127.0.0.1", 1), tmp_path)
    told: list[float] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(asked.follow_roots, lambda seconds: told.append(trio.current_time()))
        await trio.sleep(25)
        asked.roots_file.write_bytes(b"new")
        await trio.sleep(20)
        asked.roots_file.unlink()
        await trio.sleep(20)
        asked.roots_file.write_bytes(b"new")
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert told == [30.0]


# ------------------------------------------------------------------------------------------------------------ the keeper


@dataclass
class Memory:
    """A store and a publisher in memory; other replicas share the store."""

    stored: Stored = field(default_factory=lambda: Stored(None, "0"))
    published: list[bytes] = field(default_factory=list)
    refuse: bool = False
    overtaken: int = 0

    async def read(self) -> Stored:
        if self.refuse:
            raise RootError("the store is away")
        await trio.lowlevel.checkpoint()
        return self.stored

    async def write(self, document: bytes, former: Stored) -> bool:
        await trio.lowlevel.checkpoint()
        if self.overtaken or former.version != self.stored.version:
            self.overtaken = max(0, self.overtaken - 1)
            return False
        self.stored = Stored(document, str(int(former.version) + 1), self.stored.wish)
        return True

    async def publish(self, bundle_pem: bytes) -> None:
        self.published.append(bundle_pem)

    def keeper(self, told: list[Root], spread: float = 100.0) -> RootKeeper:
        source = OwnRoots(self, "cluster.local", Periods(spread=spread, leaf=100.0))
        return RootKeeper(source, self, lambda: 1_800_000_000.0 + trio.current_time(), told.append)


def bundle(pem: bytes) -> int:
    return len(x509.load_pem_x509_certificates(pem))


async def test_replicas_that_start_together_agree_on_one_root(mock_clock: trio.testing.MockClock) -> None:
    memory = Memory()
    told: list[list[Root]] = [[], [], []]
    async with trio.open_nursery() as nursery:
        for each in told:
            await nursery.start(memory.keeper(each).run)
        await trio.sleep(30)
        nursery.cancel_scope.cancel()
    assert [len(each) for each in told] == [1, 1, 1]
    assert len({each[0].pem for each in told}) == 1
    assert set(memory.published) == {told[0][0].pem}


async def test_a_wish_is_fulfilled_step_by_step_by_all_replicas(mock_clock: trio.testing.MockClock) -> None:
    memory = Memory()
    told: list[list[Root]] = [[], []]
    async with trio.open_nursery() as nursery:
        for each in told:
            await nursery.start(memory.keeper(each).run)
        await trio.sleep(15)
        memory.stored = replace(memory.stored, wish="please", version="100")
        await trio.sleep(200)
        nursery.cancel_scope.cancel()
    for each in told:
        first, announced, signing = each
        assert announced.pem == first.pem != signing.pem
        assert bundle(announced.roots_pem) == bundle(signing.roots_pem) == 2
    assert told[0][2].pem == told[1][2].pem
    assert memory.published[-1] == told[0][2].roots_pem


async def test_a_store_that_is_away_changes_nothing(mock_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture) -> None:
    memory, told = Memory(), list[Root]()
    keeper = memory.keeper(told)
    await keeper.look()
    memory.refuse = True
    for _ in range(5):
        await keeper.look()
    assert keeper.root is told[0]
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == ["root not looked after"]
    memory.refuse = False
    memory.stored = Stored(b"nonsense", "5")
    await keeper.look()
    assert keeper.root is told[0]
    assert memory.stored.document == b"nonsense"


@pytest.mark.parametrize(("times", "found"), [(2, 1), (50, 0)])
async def test_somebody_faster_is_waited_for_within_reason(times: int, found: int) -> None:
    memory, told = Memory(overtaken=times), list[Root]()
    await memory.keeper(told).look()
    assert len(told) == found


async def test_a_directory_is_a_store(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "ca")
    empty = await store.read()
    assert empty == Stored(None, empty.version)
    assert await store.write(b"one", empty)
    assert not await store.write(b"two", empty)
    (tmp_path / "ca" / "rotate").write_text("please\n")
    one = await store.read()
    assert (one.document, one.wish) == (b"one", "please")
    assert await store.write(b"two", one)
    assert (tmp_path / "ca" / "authority.json").stat().st_mode & 0o777 == 0o600


async def test_a_bundle_is_published_as_a_file(tmp_path: Path) -> None:
    publisher = FilePublisher(tmp_path / "a" / "roots.pem")
    await publisher.publish(b"one")
    inode = publisher.file.stat().st_ino
    await publisher.publish(b"one")
    assert publisher.file.stat().st_ino == inode
    await publisher.publish(b"two")
    assert publisher.file.read_bytes() == b"two"
    with pytest.raises(RootError):
        await FilePublisher(publisher.file / "below").publish(b"x")


def test_the_agent_of_the_tests_is_what_the_rules_expect() -> None:
    assert str(AGENT) == "istio-system/ztunnel"
