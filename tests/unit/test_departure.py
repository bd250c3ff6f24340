"""When an agent may believe that no other follows: only when the API server has said so."""

from __future__ import annotations

import pytest

from ztunnel.departure import Departure
from ztunnel.kube.reflector import Name

OURS, OTHER = Name("mesh", "ztunnel"), Name("mesh", "other")
THERE: dict[str, object] = {"metadata": {"name": "ztunnel"}}
GOING: dict[str, object] = {"metadata": {"name": "ztunnel", "deletionTimestamp": "2026-01-01T00:00:00Z"}}


@pytest.fixture
def departure() -> Departure:
    return Departure(None, "mesh/ztunnel")  # type: ignore[arg-type]  # never asked here


def test_nothing_is_believed_before_anything_was_heard(departure: Departure) -> None:
    assert not departure.is_final
    departure.replaced({OTHER: False})
    departure.changed(OURS, None)
    assert not departure.is_final, "what never was there is a name that was misspelt"


def test_one_that_is_there_is_no_end(departure: Departure) -> None:
    departure.replaced({OURS: departure.read(THERE), OTHER: departure.read(GOING)})
    departure.changed(OTHER, None)
    assert not departure.is_final


@pytest.mark.parametrize(
    ("seen", "is_final"),
    [
        ([GOING], True),
        ([GOING, THERE], False),
        ([None], True),
        ([None, THERE], False),
        ([THERE, None], True),
    ],
)
def test_marked_deleted_and_another_one_of_its_name(departure: Departure, seen: list[dict[str, object] | None], is_final: bool) -> None:
    departure.replaced({OURS: False})
    for each in seen:
        departure.changed(OURS, None if each is None else departure.read(each))
    assert departure.is_final is is_final


@pytest.mark.parametrize("is_there", [True, False])
def test_a_list_says_it_as_well(departure: Departure, is_there: bool) -> None:
    departure.replaced({OURS: False})
    departure.replaced({OURS: False} if is_there else {})
    assert departure.is_final is not is_there
