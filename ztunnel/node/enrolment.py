"""One pod's way into the mesh and out of it, as a table, and the values that say which pod and how. PURE: no clock, no kernel, no trio.

    wanted → opening → guarded → enrolled → draining → removed
                ↓  ↘___________↗                ↓
              failed (retried)               opening (wanted again)

`next_event` says what the world has to say to a pod in a state; `TABLE` says what that leads to. `pods` carries the actions out
and reports their outcome as events. A pair that is not in the table is a mistake of ours and ends in `failed`, everything let go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto


class State(Enum):
    """Where a pod stands; the values are shown to operators."""

    WANTED = "wanted"
    OPENING = "opening"
    GUARDED = "guarded"  # new connections are captured; those from before enrolment are left alone for a grace period
    ENROLLED = "enrolled"
    DRAINING = "draining"  # nothing new is captured; captured connections may end in peace
    REMOVED = "removed"
    FAILED = "failed"


class Event(Enum):
    """What can happen to a pod."""

    BEGIN = auto()
    GUARD_LOADED = auto()
    FULL_LOADED = auto()
    PROBLEM = auto()  # the action of the last transition failed
    GRACE_OVER = auto()
    UNWANTED = auto()  # it lives on, outside the mesh
    WANTED_AGAIN = auto()
    IDLE = auto()  # drained, or out of time to drain
    GONE = auto()  # its namespace is no more
    REPLACED = auto()  # still wanted, but its namespace is another one now, or none


class Action(Enum):
    """What is to be done in a transition, after the state has changed."""

    NOTHING = auto()
    OPEN = auto()
    REOPEN = auto()  # let everything go, then open
    RECAPTURE = auto()  # rules again, in the foothold that we have
    COMPLETE = auto()  # the full rules
    DRAIN = auto()
    REMOVE = auto()  # rules, listeners, everything
    DROP = auto()  # let everything go; rules die with their namespace
    SWEEP = auto()  # not in our hands: remove what an earlier agent may have left


class Namespace(Enum):
    """What became of the namespace that we hold for a pod."""

    SAME = auto()
    OTHER = auto()
    NONE = auto()


@dataclass(frozen=True, slots=True)
class PodSpec:
    """A pod that is to be in the mesh.

    `strict`: plaintext is never to leave or enter, so that capture is full at once, at the cost of the connections it has.
    `fresh`: the pod has just been made and has no connections that could be hurt: full at once.
    `identity`: whom the data plane is to serve it as; with another one it is let go and opened again.
    """

    uid: str
    name: str
    namespace: str
    addresses: tuple[str, ...]
    strict: bool = False
    fresh: bool = False
    identity: str = ""


@dataclass(frozen=True, slots=True)
class PodStatus:
    """One pod for `ztunnel status`."""

    uid: str
    name: str
    namespace: str
    state: State
    labelled: bool  # wanted in the mesh
    enrolled: bool  # its traffic is being redirected, as far as we know
    captured: bool  # and the last look at the kernel's rules and routes confirmed it
    problem: str  # empty when there is none
    retry_in_seconds: float | None


@dataclass(frozen=True, slots=True)
class EnrolmentCounters:
    """Totals since the agent's start, for metrics."""

    enrolled: int = 0
    removed: int = 0
    failed: int = 0
    replaced: int = 0
    adopted: int = 0
    checked: int = 0
    drifted: int = 0
    healed: int = 0


@dataclass(frozen=True, slots=True)
class EnrolmentSettings:
    """Times of an enrolment.

    Attributes:
        grace_seconds: how long a pod's older connections have to show themselves before everything is captured: longer than TCP's
            first retransmissions, short because a connection may leave in plaintext meanwhile.
        drain_seconds: how long captured connections may live on after their pod left the mesh.
        linger_seconds: how long a draining pod is kept even when it is idle: peers that hear late still come by tunnel.
        drain_poll_seconds: how often to ask whether they have ended.
        drift_seconds: how often a pod's rules and routes are looked at.
        retry_seconds, retry_limit_seconds: first and longest wait after a failure.
        sink_seconds: bound of one call of the data plane.
        threads: how many namespaces are worked on at the same time.
    """

    grace_seconds: float = 5.0
    drain_seconds: float = 60.0
    linger_seconds: float = 0.0
    drain_poll_seconds: float = 0.25
    drift_seconds: float = 10.0
    retry_seconds: float = 0.5
    retry_limit_seconds: float = 15.0
    sink_seconds: float = 5.0
    threads: int = 8


HELD = frozenset((State.GUARDED, State.ENROLLED, State.DRAINING))
"""States in which the pod's namespace is in our hands, and its rules are checked for drift."""

TABLE: dict[tuple[State, Event], tuple[State, Action]] = {
    (State.WANTED, Event.BEGIN): (State.OPENING, Action.OPEN),
    (State.WANTED, Event.UNWANTED): (State.REMOVED, Action.SWEEP),
    (State.WANTED, Event.GONE): (State.REMOVED, Action.NOTHING),
    (State.OPENING, Event.GUARD_LOADED): (State.GUARDED, Action.NOTHING),
    (State.OPENING, Event.FULL_LOADED): (State.ENROLLED, Action.NOTHING),
    (State.OPENING, Event.PROBLEM): (State.FAILED, Action.DROP),
    (State.GUARDED, Event.GRACE_OVER): (State.ENROLLED, Action.COMPLETE),
    (State.GUARDED, Event.UNWANTED): (State.DRAINING, Action.DRAIN),
    (State.GUARDED, Event.GONE): (State.REMOVED, Action.DROP),
    (State.GUARDED, Event.REPLACED): (State.OPENING, Action.REOPEN),
    (State.ENROLLED, Event.UNWANTED): (State.DRAINING, Action.DRAIN),
    (State.ENROLLED, Event.GONE): (State.REMOVED, Action.DROP),
    (State.ENROLLED, Event.REPLACED): (State.OPENING, Action.REOPEN),
    # The drift check finds the rules wanting, and repeats.
    (State.ENROLLED, Event.PROBLEM): (State.ENROLLED, Action.NOTHING),
    (State.DRAINING, Event.WANTED_AGAIN): (State.OPENING, Action.RECAPTURE),
    (State.DRAINING, Event.IDLE): (State.REMOVED, Action.REMOVE),
    (State.DRAINING, Event.GONE): (State.REMOVED, Action.DROP),
    (State.DRAINING, Event.REPLACED): (State.OPENING, Action.REOPEN),
    (State.DRAINING, Event.PROBLEM): (State.DRAINING, Action.NOTHING),
    # Rules that could not be removed must not outlive their listeners: that pod would be cut off.
    (State.REMOVED, Event.PROBLEM): (State.DRAINING, Action.NOTHING),
    (State.REMOVED, Event.BEGIN): (State.WANTED, Action.NOTHING),
    (State.FAILED, Event.BEGIN): (State.OPENING, Action.OPEN),
    (State.FAILED, Event.UNWANTED): (State.REMOVED, Action.SWEEP),
    (State.FAILED, Event.GONE): (State.REMOVED, Action.NOTHING),
    (State.FAILED, Event.PROBLEM): (State.FAILED, Action.NOTHING),
}


@dataclass(frozen=True, slots=True)
class Sight:
    """The world, as far as one pod is concerned, at one moment."""

    wanted: bool
    deleted: bool  # not wanted because it exists no more
    strict: bool
    held: bool  # its namespace is in our hands
    namespace: Namespace
    waiting: bool  # something failed a moment ago, and it is too early to repeat it
    over: bool  # a guarded one's grace, a draining one's deadline
    active: int  # live connections through the proxy; not zero while a draining pod lingers


def transition(state: State, event: Event) -> tuple[State, Action]:
    """The table, with its default."""
    return TABLE.get((state, event), (State.FAILED, Action.DROP))


def next_event(state: State, sight: Sight) -> Event | None:
    """What should happen to a pod now; None when it may stay as it is. The result always is in the table for `state`."""
    match state:
        case State.WANTED | State.FAILED:
            return _before_opening(sight)
        case State.GUARDED | State.ENROLLED:
            return _event_for_namespace(sight) or _while_captured(state, sight)
        case State.DRAINING:
            return _event_for_namespace(sight) or _while_draining(sight)
        case State.OPENING:
            return Event.PROBLEM  # nobody rests here: a step was cancelled half-way
        case State.REMOVED:
            if sight.held:
                return Event.PROBLEM  # likewise
            return Event.BEGIN if sight.wanted else None


def _before_opening(sight: Sight) -> Event | None:
    if not sight.wanted:
        return Event.GONE if sight.deleted else Event.UNWANTED
    return None if sight.waiting else Event.BEGIN


def _event_for_namespace(sight: Sight) -> Event | None:
    if sight.namespace is Namespace.SAME and not sight.deleted:
        return None
    return Event.REPLACED if sight.wanted else Event.GONE


def _while_captured(state: State, sight: Sight) -> Event | None:
    if not sight.wanted:
        return Event.UNWANTED
    complete = state is State.GUARDED and not sight.waiting and (sight.strict or sight.over)
    return Event.GRACE_OVER if complete else None


def _while_draining(sight: Sight) -> Event | None:
    if sight.wanted:
        return Event.WANTED_AGAIN
    return Event.IDLE if not sight.waiting and (sight.over or sight.active == 0) else None


def retry_seconds(failures: int, first_seconds: float, limit_seconds: float, random: Callable[[], float]) -> float:
    """How long to wait after so many failures in a row: doubling up to a limit, and spread by a fifth to both sides.

    Args:
        failures: 1 or more.
        random: uniform in [0, 1).
    """
    plain = min(limit_seconds, first_seconds * 2.0 ** min(failures - 1, 32))
    return plain * (0.8 + 0.4 * random())
