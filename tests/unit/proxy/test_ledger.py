"""What waits to be told of connections: summed by path, each path told apart, and nothing lost on the way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.builders import identity
from ztunnel.dataplane.flow import Direction, FlowEnd, FlowFailure, FlowNews
from ztunnel.mesh.errors import Flag, MeshError, PolicyDenied
from ztunnel.proxy import ledger as module
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.ledger import Ledger


class Book:
    """A ledger, and how often it called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.ledger = Ledger(lambda: self.called.append("news"), lambda: self.called.append("full"))

    def write(self, facts: Facts, number: int = 1, error: MeshError | None = None) -> None:
        """A short connection."""
        account = self.ledger.account(facts)
        account.add(True, True, 10, 0)
        account.end(facts, number, 10, 0, 0.5, error)
        self.ledger.added()


def facts(**but: object) -> Facts:
    made = Facts(Direction.INBOUND, "pod", ("10.0.0.1", 4000), ("10.0.0.2", 15008), source_uid="client", destination_uid="pod")
    made.target, made.mutual_tls, made.trace, made.policy = "10.0.0.2:8080", True, "a trace", "default/p"
    made.source_identity, made.destination_identity = identity(account="client"), identity(account="server")
    made.service, made.service_name, made.service_namespace = "web.default.svc", "web", "default"
    for name, value in but.items():
        setattr(made, name, value)
    return made


def test_records_of_a_path_are_summed_and_their_ends_kept() -> None:
    book = Book()
    # Other identities that say the same are the same: each tunnel has its own.
    book.write(facts())
    book.write(facts(source=("10.0.0.9", 4009)), 2, PolicyDenied("no", "default/p"))
    account = book.ledger.account(facts())
    account.add(True, False, 0, 0)
    account.add(False, False, 0, 7)
    book.ledger.added()
    (news,) = book.ledger.take()
    assert news == FlowNews(
        news.path,
        records=4,
        opened=3,
        changed=1,
        with_up=2,
        up_bytes=20,
        with_down=1,
        down_bytes=7,
        ends=(FlowEnd(1, "10.0.0.1", 4000, "a trace", 10, 0, 0.5),),
        failures=(FlowFailure(2, "10.0.0.9", 4009, "a trace", 10, 0, 0.5, Flag.DENY, "no"),),
    )
    assert (news.path.source_identity, news.path.policy) == ("spiffe://cluster.local/ns/default/sa/client", "default/p")
    assert book.ledger.take() == ()


OTHERS = {
    "direction": Direction.OUTBOUND,
    "pod_uid": "other",
    "destination": ("10.0.0.3", 15008),
    "target": "10.0.0.2:9090",
    "mutual_tls": False,
    "source_uid": "other",
    "destination_uid": "other",
    "source_identity": replace(identity(account="client"), trust_domain="other"),
    "destination_identity": None,
    "service": "other.default.svc",
    "service_name": "other",
    "service_namespace": "other",
    "policy": "",
    "waypoint": "default/waypoint",
}


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_a_path_says_sets_it_apart(name: str) -> None:
    book = Book()
    book.write(facts())
    book.write(facts(**{name: OTHERS[name]}), 2)
    book.write(facts(), 3)
    told = [(str(getattr(news.path, name)), end.number) for news in book.ledger.take() for end in news.ends]
    assert sorted(told, key=lambda each: each[1]) == [
        (str(getattr(facts(), name)), 1),
        (str(OTHERS[name] or ""), 2) if name != "mutual_tls" else ("False", 2),
        (str(getattr(facts(), name)), 3),
    ]


def test_paths_that_are_forgotten_have_told_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REMEMBERED_PATHS", 3)
    book = Book()
    for number in range(10):
        book.write(facts(target=f"10.0.0.2:{number}"), number)
    assert len(book.ledger._accounts) <= 3
    assert sorted(end.number for news in book.ledger.take() for end in news.ends) == list(range(10))


def test_news_are_said_to_be_there_once_until_they_are_taken() -> None:
    book = Book()
    book.ledger.stir()
    book.write(facts())
    book.write(facts())
    assert book.called == ["news"]
    book.ledger.take()
    book.write(facts())
    assert book.called == ["news", "news"]


def test_enough_for_a_message_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FULL", 3)
    book = Book()
    for number in range(3):
        book.write(facts(target=f"10.0.0.2:{number}"))
    assert book.called == ["news", "full"]
