"""Paths over spines: the theorem about split flows, hashing, and a slow twin of the flow model."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.simulate.cluster import load_cluster
from moetrain.simulate.links import exchange, spine_factor
from moetrain.simulate.paths import (
    Flows,
    busiest_link,
    choose_paths,
    colour_edges,
    congestion,
    flows_of,
    hash_paths,
    least_splits,
    sprayed,
)


def permutations(leaves: int, hosts: int, rng: np.random.Generator) -> Flows:
    """Every host of every leaf sends one flow of one byte; every host receives one."""
    source = np.repeat(np.arange(leaves), hosts)
    destination = rng.permutation(source)
    return Flows(source, destination, np.ones(len(source)))


@given(st.integers(2, 9), st.integers(1, 12), st.integers(1, 8), st.integers(0, 10**6))
def test_split_flows_on_chosen_paths_equal_ideal_spraying(leaves: int, hosts: int, spines: int, seed: int) -> None:
    """The theorem of methods.md §15: S / gcd(n, S) parts a flow are enough, at both ends, for any permutation."""
    flows = permutations(leaves, hosts, np.random.default_rng(seed))
    parts = flows.split(least_splits(hosts, spines))
    chosen = busiest_link(parts, choose_paths(parts, leaves, spines), leaves, spines)
    assert chosen == pytest.approx(sprayed(flows, leaves, spines), rel=1e-9)


@given(st.integers(2, 8), st.integers(1, 10), st.integers(1, 6), st.integers(0, 10**6))
def test_whole_flows_on_chosen_paths_keep_the_bound(leaves: int, hosts: int, spines: int, seed: int) -> None:
    flows = permutations(leaves, hosts, np.random.default_rng(seed))
    chosen = busiest_link(flows, choose_paths(flows, leaves, spines), leaves, spines)
    assert chosen <= math.ceil(hosts / spines)


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6))
def test_a_colouring_is_proper_and_uses_no_more_colours_than_the_degree(leaves: int, edges: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, destination = rng.integers(leaves, size=(2, edges))
    colour = colour_edges(source, destination, leaves)
    degree = max(np.bincount(source).max(), np.bincount(destination).max())
    assert colour.min() >= 0
    assert colour.max() < degree
    for ends in (source, destination):
        assert len(set(zip(ends.tolist(), colour.tolist(), strict=True))) == edges


def test_hashed_paths_collide_as_balls_in_bins_do() -> None:
    leaves, hosts, spines = 8, 64, 16
    rng = np.random.default_rng(0)
    flows = permutations(leaves, hosts, rng)
    ideal = sprayed(flows, leaves, spines)
    found = np.mean([busiest_link(flows, hash_paths(flows, spines, rng), leaves, spines) for _ in range(50)])
    mean = hosts / spines
    expected = mean + math.sqrt(2 * mean * math.log(2 * leaves * spines))  # of 2 L S bins
    assert found == pytest.approx(expected, rel=0.2)
    assert found > 1.5 * ideal
    fewer = [congestion(np.ones((8, 8)), 16, "hashed", splits) for splits in (1, 4, 16)]
    assert fewer[0] > fewer[1] > fewer[2] > 1
    assert congestion(np.ones((8, 8)), 16, "chosen", least_splits(7, 16)) == pytest.approx(1)


def test_a_hot_receiver_is_its_own_limit_and_no_split_helps() -> None:
    cluster = load_cluster("h100", {"network.rails": "false", "network.leaf_devices": "8", "network.spines": "4"})
    demand = np.full((64, 64), 1e6)
    demand[:, 0] += 1e8
    even = exchange(np.full((64, 64), demand.mean()), cluster, np.arange(64) // 8)
    hot = exchange(demand, cluster, np.arange(64) // 8)
    received = demand[8:, 0].sum()
    assert hot.seconds > 10 * even.seconds
    assert hot.seconds == pytest.approx(received / 45e9, rel=0.1)
    for splits in ("1", "8"):
        figures = {"network.multipath": "chosen", "network.flow_splits": splits, "network.rails": "false"}
        chosen = load_cluster("h100", {**figures, "network.leaf_devices": "8", "network.spines": "4"})
        assert exchange(demand, chosen, np.arange(64) // 8).seconds >= hot.seconds


def test_hashed_paths_slow_an_exchange_and_splits_bring_it_back() -> None:
    figures = {"network.rails": "false", "network.leaf_devices": "8", "network.spines": "16"}
    demand, domain = np.full((64, 64), 1e6), np.arange(64) // 8
    ways = {"spray": {}, "hashed": {"network.multipath": "hashed"}}
    ways |= {"hashed, split": {"network.multipath": "hashed", "network.flow_splits": "16"}}
    ways |= {"chosen, split": {"network.multipath": "chosen", "network.flow_splits": "16"}}
    seconds = {
        name: exchange(demand, load_cluster("h100", {**figures, **more}), domain).seconds for name, more in ways.items()
    }
    assert seconds["hashed"] > 1.5 * seconds["hashed, split"] > 1.5 * seconds["spray"]
    assert seconds["chosen, split"] == pytest.approx(seconds["spray"], rel=1e-9)
    one_leaf = load_cluster("h100", {**figures, "network.multipath": "hashed", "network.leaf_devices": "64"})
    assert spine_factor(demand, one_leaf) == 1.0


def finish(flows: Flows, links: list[list[int]], rate: float) -> float:
    """The slow twin: max-min fair rates, recomputed whenever a flow ends. Returns when the last one ends."""
    left, now = flows.size.astype(float).copy(), 0.0
    active = [f for f in range(len(left)) if left[f] > 0]
    while active:
        speed = dict.fromkeys(active, 0.0)
        room = {link: rate for f in active for link in links[f]}
        waiting = set(active)
        while waiting:
            users = {link: sum(link in links[f] for f in waiting) for link in room}
            tight = min((room[link] / n, link) for link, n in users.items() if n)
            for f in [f for f in waiting if tight[1] in links[f]]:
                speed[f] = tight[0]
                waiting.discard(f)
                for link in links[f]:
                    room[link] -= tight[0]
        step = min(left[f] / speed[f] for f in active)
        now += step
        for f in active:
            left[f] -= speed[f] * step
        active = [f for f in active if left[f] > 1e-9]
    return now


@given(st.integers(2, 5), st.integers(0, 10**6))
def test_the_fullest_link_decides_when_an_even_exchange_ends(ranks: int, seed: int) -> None:
    """For skewed exchanges the fullest link is a lower bound, and fair sharing takes at most twice as long."""
    rng = np.random.default_rng(seed)
    for demand, slack in ((np.ones((ranks, ranks)), 1.0), (rng.integers(1, 9, (ranks, ranks)).astype(float), 2.0)):
        flows = flows_of(demand)
        links = [[int(s), ranks + int(d)] for s, d in zip(flows.source, flows.destination, strict=True)]
        bound = max(np.bincount(flows.source, flows.size).max(), np.bincount(flows.destination, flows.size).max())
        assert bound - 1e-6 <= finish(flows, links, 1.0) <= slack * bound + 1e-6
