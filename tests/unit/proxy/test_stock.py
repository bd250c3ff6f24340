"""The stock of sockets: asked for before it is empty, waited for in order, given up with its pod."""

from __future__ import annotations

import socket
import time
import weakref

from tests.kit.wire import tcp_pair
from ztunnel.node.sockets import IP_BIND_ADDRESS_NO_PORT
from ztunnel.proxy.stock import SocketStock


class Shelf:
    """A stock, what it asked for and what was taken from it."""

    def __init__(self, max_waiting: int = 10) -> None:
        self.asked: list[int] = []
        self.taken: list[socket.socket | None] = []
        self.now = 0.0
        """Each look at it is a second later, unless a test makes it less."""
        self.step = 1.0
        self.stock = SocketStock(self.asked.append, max_waiting, self._clock)

    def _clock(self) -> float:
        self.now += self.step
        return self.now

    def take(self) -> bool:
        return self.stock.take(self.taken.append)

    def deliver(self, count: int) -> list[socket.socket]:
        made = [socket.socket() for _ in range(count)]
        self.stock.receive(made)
        return made

    def close(self) -> None:
        self.stock.close()
        for sock in self.taken:
            if sock is not None:
                sock.close()


def test_asks_once_and_serves_in_order() -> None:
    shelf = Shelf()
    assert shelf.take()
    assert shelf.take()
    assert len(shelf.asked) == 1
    made = shelf.deliver(16)
    assert shelf.taken == made[:2]
    shelf.close()
    assert all(sock.fileno() == -1 for sock in made)


def test_demand_that_outruns_it_doubles_the_batch() -> None:
    shelf = Shelf()
    for _ in range(3):
        shelf.take()
    shelf.deliver(1)
    assert shelf.asked == [16, 64]
    shelf.close()


def test_batches_that_last_for_a_moment_double_up_to_a_bound() -> None:
    shelf = Shelf()
    shelf.step = 0.01
    shelf.take()
    for _ in range(6):
        shelf.deliver(shelf.asked[-1])
        asked = len(shelf.asked)
        while len(shelf.asked) == asked:
            shelf.take()
    assert None not in shelf.taken
    assert shelf.asked == [16, 32, 64, 128, 128, 128, 128]
    shelf.close()


def test_waiting_is_bounded() -> None:
    shelf = Shelf(max_waiting=2)
    assert [shelf.take() for _ in range(3)] == [True, True, False]
    shelf.close()
    assert shelf.taken == [None, None]
    assert not shelf.take()


def test_a_batch_that_could_not_be_made_fails_who_waits_and_is_not_asked_for_at_once() -> None:
    shelf = Shelf()
    shelf.take()
    shelf.deliver(0)
    assert shelf.taken == [None]
    assert shelf.asked == [16]
    shelf.take()
    assert len(shelf.asked) == 2
    shelf.close()


def test_what_a_burst_left_behind_is_given_back() -> None:
    shelf = Shelf(max_waiting=100)
    for _ in range(40):
        shelf.take()
    made = shelf.deliver(100)
    shelf.stock.trim()
    # The burst was within the interval: all of it might still be needed.
    assert sum(sock.fileno() != -1 for sock in made) == 100
    shelf.take()
    shelf.stock.trim()
    assert sum(sock.fileno() != -1 for sock in made) == 41 + 16
    for _ in range(16):
        shelf.take()
    assert None not in shelf.taken
    shelf.close()


def test_a_batch_for_a_pod_that_is_gone_is_closed() -> None:
    shelf = Shelf()
    shelf.stock.close()
    (sock,) = shelf.deliver(1)
    assert sock.fileno() == -1


def test_nothing_of_a_stock_that_is_closed_is_left_to_the_garbage_collector() -> None:
    stock = SocketStock(lambda _count: None, 1, time.monotonic)
    stock.home("10.0.0.1")
    known = weakref.ref(stock)
    stock.close()
    del stock
    assert known() is None


def ended_well() -> socket.socket:
    near, far = tcp_pair()
    near.shutdown(socket.SHUT_WR)
    far.close()
    return near


def ended_from(address: str, server: socket.socket) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((address, 0))
    sock.connect(server.getsockname())
    sock.shutdown(socket.SHUT_WR)
    server.accept()[0].close()
    return sock


def test_what_ended_well_is_taken_again() -> None:
    shelf = Shelf()
    shelf.take()
    shelf.deliver(1)
    sock = ended_well()
    shelf.stock.home("").give_back(sock)
    shelf.take()
    assert shelf.taken[-1] is sock
    shelf.close()


def test_nobody_gets_anothers_address() -> None:
    """Neither at once nor after waiting, unless they bind it themselves."""
    shelf = Shelf()
    with socket.create_server(("127.0.0.1", 0)) as server:
        shelf.stock.home("127.0.0.9").give_back(ended_from("127.0.0.9", server))
        shelf.take()
        shelf.take()
        shelf.stock.home("127.0.0.9").give_back(ended_from("127.0.0.9", server))
        shelf.stock.receive([socket.socket()])
        for sock in shelf.taken:
            assert sock is not None
            sock.connect(server.getsockname())
            assert sock.getsockname()[0] == "127.0.0.1"
    shelf.close()


def test_whoever_comes_from_the_same_address_need_not_bind_it_again() -> None:
    shelf = Shelf()
    shelf.deliver(1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for address in ("127.0.0.8", "127.0.0.9"):
            shelf.stock.home(address).give_back(ended_from(address, server))
        fresh, is_bound = shelf.stock.take_now("127.0.0.9")
        assert fresh is not None
        assert not is_bound, "nobody has bound it yet"
        another, is_bound = shelf.stock.take_now("127.0.0.9")
        assert another is not None
        assert not is_bound, "it was somebody else's"
        same, is_bound = shelf.stock.take_now("127.0.0.9")
        assert same is not None
        assert is_bound
        same.connect(server.getsockname())
        assert same.getsockname()[0] == "127.0.0.9"
        for sock in (fresh, another, same):
            sock.close()
    assert shelf.stock.take_now("127.0.0.9") == (None, False)
    shelf.close()


def test_an_address_that_the_kernel_chose_is_not_kept_for_the_next_connection() -> None:
    """To a socket that was bound once the kernel binds whatever it has chosen, and leaves it so."""
    shelf = Shelf()
    with socket.create_server(("127.0.0.1", 0)) as server:
        shelf.stock.home("127.0.0.9").give_back(ended_from("127.0.0.9", server))
        for _ in range(2):
            shelf.take()
            sock = shelf.taken.pop()
            assert sock is not None
            assert sock.getsockname()[0] == "0.0.0.0"
            sock.connect(server.getsockname())
            sock.shutdown(socket.SHUT_WR)
            server.accept()[0].close()
            shelf.stock.home("").give_back(sock)
        again, is_bound = shelf.stock.take_now("127.0.0.1")
        assert again is not None
        assert not is_bound
        again.close()
    shelf.close()


def test_the_addresses_that_are_remembered_are_bounded() -> None:
    shelf = Shelf()
    first = shelf.stock.home("10.0.0.0")
    for number in range(3000):
        shelf.stock.home(f"10.0.{number >> 8}.{number & 255}")
    assert len(shelf.stock._homes) <= 1024
    sock = ended_well()
    first.give_back(sock)
    assert shelf.stock.take_now("10.0.0.0") == (sock, True), "a home that was forgotten is one for those who come from it"
    sock.close()
    shelf.close()


def test_what_cannot_be_used_again_is_closed() -> None:
    shelf = Shelf()
    near, far = tcp_pair()
    shelf.stock.home("").give_back(near)
    assert near.fileno() == -1
    assert far.recv(1) == b"", "not reset"
    far.close()
    many = [ended_well() for _ in range(17)]
    for sock in many:
        shelf.stock.home("").give_back(sock)
    assert [sock.fileno() == -1 for sock in many] == [False] * 16 + [True], "a batch is enough"
    shelf.close()
    late = ended_well()
    shelf.stock.home("").give_back(late)
    assert late.fileno() == -1, "the pod is gone"


def test_whoever_waits_gets_what_came_back_when_no_new_one_can_be_made() -> None:
    shelf = Shelf()
    shelf.take()
    shelf.take()
    sock = ended_well()
    shelf.stock.home("").give_back(sock)
    shelf.deliver(0)
    assert shelf.taken == [sock, None]
    assert len(shelf.asked) == 1, "the next connection asks again"
    shelf.close()
