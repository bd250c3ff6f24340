"""No cluster ever gives an endpoint that is not ready, nor an ejected one outside of panic, whatever happens to it in whatever order."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.l7 import cluster, endpoint
from waypoint.upstream.cluster import ClusterAtWork, PickContext
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.localities import Place
from waypoint.upstream.outcome import Outcome
from ztunnel.mesh.l7.clusters import Balancer, Endpoint, LoadBalancing, Locality, LocalitySettings, Outlier, Warmup

LOCALITIES = ("r1/z1/s1", "r1/z2/s1", "r2/z1/s1")
ENDPOINTS: st.SearchStrategy[list[Endpoint]] = st.lists(
    st.builds(
        lambda number, healthy, weight, where: endpoint(f"10.0.0.{number}", healthy=healthy, weight=weight, locality=where),
        st.integers(0, 9),
        st.booleans(),
        st.integers(0, 3),
        st.sampled_from(LOCALITIES),
    ),
    max_size=8,
    unique_by=lambda each: each.address,
)
BALANCING = st.builds(
    LoadBalancing,
    balancer=st.sampled_from([each for each in Balancer if each is not Balancer.PASSTHROUGH]),
    table_size=st.just(251),
    ring_minimum=st.just(64),
    warmup=st.none() | st.just(Warmup(20.0)),
    locality=st.sampled_from([LocalitySettings(), LocalitySettings(distribute=(("r1", (("r1/z1", 70), ("r2", 30))),))]),
)
OUTLIERS = st.builds(
    Outlier, consecutive_5xx=st.just(1), max_ejection_percent=st.sampled_from([10, 50, 100]), min_health_percent=st.sampled_from([0, 50])
)
STEPS = st.lists(st.sampled_from(["fail", "work", "sweep", "retry"]) | ENDPOINTS, max_size=20)


@given(ENDPOINTS, BALANCING, st.none() | OUTLIERS, STEPS, st.integers(0, 2**32))
def test_what_is_chosen_may_be_used(
    first: list[Endpoint], balancing: LoadBalancing, outlier: Outlier | None, steps: list[str | list[Endpoint]], seed: int
) -> None:
    random = Random(seed)
    configured = cluster(*first, balancing=balancing, outlier=outlier)
    at = ClusterAtWork(configured, Place(Locality("r1", "z1", "s1")), 0.0, random.randrange)
    context = PickContext()
    now = 0.0
    for step in steps:
        now += 3.0
        if isinstance(step, list):
            at.update(replace(configured, endpoints=tuple(step)), now)
        elif step == "sweep":
            at.sweep(now)
        chosen = at.pick(context, now)
        if not isinstance(chosen, EndpointAtWork):
            # nobody: only where nobody is ready, all are ejected, or shares leave nothing
            assert balancing.locality.distribute or all(each.ejected for each in at.endpoints)
            continue
        assert chosen.endpoint.healthy
        assert chosen in at.endpoints
        if chosen.ejected:
            assert outlier is not None
            assert outlier.min_health_percent > 0
        context.tried = [*context.tried, chosen][-3:] if step == "retry" else []
        if step in ("fail", "retry"):
            at.done(chosen, Outcome(503), now)
        elif step == "work":
            at.done(chosen, Outcome(200), now)
