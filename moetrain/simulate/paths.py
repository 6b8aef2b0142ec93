"""Flows over the spines of a leaf-spine network: ideal spraying, hashed paths, chosen paths with split flows.

A leaf has an uplink to each of S spines and a downlink from each. Spraying loads every uplink of leaf a with
Σ_b D[a, b] / S. Where paths can be chosen, equal flows whose number at every leaf is at most Δ are placed so that no
link carries more than ⌈Δ / S⌉: an edge colouring of the bipartite multigraph of sources and destinations with Δ colours
exists (König), and S classes of colours are the spines. Splitting each flow into S / gcd(Δ, S) equal parts makes S
divide their number, and nothing is lost against spraying. Hashing (ECMP) throws every flow at a spine blindly.

L leaves, S spines, F flows.
"""

import math
from dataclasses import dataclass

import numpy as np

from moetrain.moe.planning.plan import Floats, Ints


@dataclass(frozen=True)
class Flows:
    """Flows between leaves; those inside a leaf use no spine and are left out."""

    source: Ints  # [F]
    destination: Ints  # [F]
    size: Floats  # [F] bytes

    def split(self, parts: int) -> "Flows":
        """Every flow in that many equal parts."""
        source, destination = (np.repeat(x, parts) for x in (self.source, self.destination))
        return Flows(source, destination, np.repeat(self.size / parts, parts))


def flows_of(demand: Floats) -> Flows:
    """One flow for every positive entry of demand [L, L] off the diagonal."""
    off = demand * (1 - np.eye(len(demand)))
    source, destination = np.nonzero(off)
    return Flows(source, destination, off[source, destination])


def busiest_link(flows: Flows, spine: Ints, num_leaves: int, num_spines: int) -> float:
    """Bytes on the fullest uplink or downlink when flow f takes spine[f]."""
    up, down = np.zeros((2, num_leaves * num_spines))
    np.add.at(up, flows.source * num_spines + spine, flows.size)
    np.add.at(down, flows.destination * num_spines + spine, flows.size)
    return float(max(up.max(), down.max()))


def sprayed(flows: Flows, num_leaves: int, num_spines: int) -> float:
    """Bytes on the fullest link under ideal packet spraying: no assignment of paths can have less."""
    up = np.bincount(flows.source, flows.size, num_leaves)
    down = np.bincount(flows.destination, flows.size, num_leaves)
    return float(max(up.max(), down.max())) / num_spines


def hash_paths(flows: Flows, num_spines: int, rng: np.random.Generator) -> Ints:
    """[F] a spine for each flow, thrown blindly as ECMP does."""
    return rng.integers(num_spines, size=len(flows.source))


def choose_paths(flows: Flows, num_leaves: int, num_spines: int) -> Ints:
    """[F] a spine for each flow, so that equal flows load every link with at most ⌈Δ / S⌉ of them.

    Δ: the most flows that leave or enter a leaf. Flows of unequal size are placed as if they were equal.
    """
    colours = colour_edges(flows.source, flows.destination, num_leaves)
    return colours % num_spines


def colour_edges(source: Ints, destination: Ints, num_leaves: int) -> Ints:
    """[F] colours below Δ, no two equal at the source or at the destination of edges that share it (König, 1916).

    Edge by edge; where no colour is free at both ends, a chain of two alternating colours is exchanged.
    """
    degree = max(np.bincount(source, minlength=num_leaves).max(), np.bincount(destination, minlength=num_leaves).max())
    at_source = np.full((num_leaves, degree), -1)  # the edge of each colour
    at_destination = np.full((num_leaves, degree), -1)
    colour = np.full(len(source), -1)
    for edge, (s, d) in enumerate(zip(source.tolist(), destination.tolist(), strict=True)):
        a = int(np.argmax(at_source[s] < 0))
        b = int(np.argmax(at_destination[d] < 0))
        if a != b and at_destination[d, a] >= 0:  # exchange a and b along the chain that begins at d with a
            chain, side, node, want = [], 1, d, a
            while (follow := (at_destination if side else at_source)[node, want]) >= 0:
                chain.append(int(follow))
                node = int(source[follow] if side else destination[follow])
                side, want = 1 - side, (b if want == a else a)
            for e in chain:
                at_source[source[e], colour[e]] = at_destination[destination[e], colour[e]] = -1
            for e in chain:
                colour[e] = b if colour[e] == a else a
                at_source[source[e], colour[e]] = at_destination[destination[e], colour[e]] = e
        colour[edge] = a
        at_source[s, a] = at_destination[d, a] = edge
    return colour


def least_splits(num_flows: int, num_spines: int) -> int:
    """Parts into which each of n equal flows of a leaf is split so that chosen paths equal spraying: S / gcd(n, S)."""
    return num_spines // math.gcd(num_flows, num_spines)


def congestion(demand: Floats, num_spines: int, multipath: str, splits: int, seed: int = 0, draws: int = 8) -> float:
    """How many times as full the fullest link is as under spraying; hashed: mean over `draws`."""
    flows = flows_of(demand)
    if not len(flows.source) or multipath == "spray" or num_spines == 1:
        return 1.0
    ideal, parts = sprayed(flows, len(demand), num_spines), flows.split(splits)
    if multipath == "chosen":
        return busiest_link(parts, choose_paths(parts, len(demand), num_spines), len(demand), num_spines) / ideal
    rng = np.random.default_rng(seed)
    found = [busiest_link(parts, hash_paths(parts, num_spines, rng), len(demand), num_spines) for _ in range(draws)]
    return float(np.mean(found)) / ideal
