"""Seconds of what travels: exchanges of any byte matrix, gathers and reductions over groups of ranks.

Flows of a collective start together; the fullest link decides. Every device has its links into the NVLink domain and
its network interfaces, both directions at once; a hot receiver's own links are its limit (incast), whatever lies
between. Leaves and spines add to that where a group is wider than a leaf.

R ranks of an expert-parallel group.
"""

from dataclasses import dataclass

import numpy as np

from moetrain.moe.planning.cost import Link
from moetrain.moe.planning.plan import Floats, Ints
from moetrain.simulate.cluster import Cluster
from moetrain.simulate.paths import congestion


@dataclass(frozen=True)
class Exchange:
    """One all-to-all."""

    seconds: float
    inside: float  # bytes that the mean rank sends within its NVLink domain
    between: float  # and between domains


def domain_of(num_ranks: int, cluster: Cluster, stride: int = 1) -> Ints:
    """[R] the NVLink domain of each rank of a group whose ranks are `stride` devices apart."""
    return np.arange(num_ranks, dtype=np.int64) * stride // cluster.domain


def nvlink_rate(cluster: Cluster, message: float) -> float:
    """Bytes a second of one device and direction, with messages of that many bytes to a peer."""
    link = cluster.nvlink
    return link.bandwidth * link.share * message / (message + link.half_message) if message > 0 else link.bandwidth


def network_rate(cluster: Cluster, message: float) -> float:
    link = cluster.network
    whole = link.bandwidth * link.nics * link.share
    return whole * message / (message + link.half_message) if message > 0 else whole


def exchange(bytes_RR: Floats, cluster: Cluster, domain_R: Ints, crossing_R: Floats | None = None) -> Exchange:
    """An all-to-all of bytes [R, R] from each rank to each; what stays on a rank costs nothing.

    `crossing_R` [2, R]: bytes that each rank sends and receives between domains where they are fewer than the matrix
    says: a token that has several destinations in a domain crosses once (the two-level exchange).
    """
    away = bytes_RR * (1 - np.eye(len(bytes_RR)))
    same = domain_R[:, None] == domain_R[None, :]
    near, far = away * same, away * ~same
    inside = np.stack([near.sum(1), near.sum(0)])
    between = np.stack([far.sum(1), far.sum(0)])
    if crossing_R is not None:
        inside = inside + between  # and is forwarded inside the domain to each of its destinations
        between = np.minimum(between, crossing_R)
    peers = max(int((away > 0).sum(1).max()), 1)
    message = float(away.sum(1).max()) / peers
    seconds = 0.0
    if inside.max() > 0:
        seconds = cluster.nvlink.latency + inside.max() / nvlink_rate(cluster, message)
    if between.max() > 0:
        factor = spine_factor(far, cluster)
        network = cluster.network.latency + factor * between.max() / network_rate(cluster, message)
        seconds = max(seconds, network)
    return Exchange(seconds, float(inside[0].mean()), float(between[0].mean()))


def spine_factor(far_RR: Floats, cluster: Cluster) -> float:
    """Slow-down by leaves and spines of bytes [R, R] between domains: 1 where all ranks hang at one leaf."""
    network, num_ranks = cluster.network, len(far_RR)
    devices = np.arange(num_ranks)
    leaf = devices % cluster.devices_per_node if network.rails else devices // network.leaf_devices
    if network.rails:  # a leaf of each rail serves the nodes that fit below it
        pod = devices // cluster.devices_per_node // network.leaf_devices
        leaf = leaf + pod * cluster.devices_per_node
    number = int(leaf.max()) + 1
    demand = np.zeros((number, number))
    np.add.at(demand, (leaf[:, None], leaf[None, :]), far_RR)
    across = demand.sum() - np.trace(demand)
    if network.rails:  # NVLink brings a transfer to the device whose rail leads to its destination: no spine is crossed
        across = demand[pod_pairs(number, cluster.devices_per_node)].sum()
    share = across / max(demand.sum(), 1e-300)
    if share <= 0:
        return 1.0
    slow = network.oversubscription * congestion(demand, network.spines, network.multipath, network.flow_splits)
    return float(max(1.0, share * slow))


def pod_pairs(num_leaves: int, rails: int) -> Floats:
    """[L, L] bool: leaves of different pods, between which only spines lead."""
    pod = np.arange(num_leaves) // rails
    return pod[:, None] != pod[None, :]


def gather_seconds(num_bytes: float, ranks: int, cluster: Cluster, stride: int = 1) -> float:
    """An all-gather that leaves `num_bytes` on each of `ranks` ranks, `stride` devices apart; or a reduce-scatter.

    Rings run through all network interfaces of a domain's members and then over NVLink.
    """
    if ranks <= 1 or num_bytes <= 0:
        return 0.0
    members = max(1, min(ranks, cluster.domain // stride))
    moved = num_bytes * (ranks - 1) / ranks
    inside = nvlink_rate(cluster, num_bytes / ranks)
    if members == ranks:
        return cluster.nvlink.latency + moved / inside
    between = members * network_rate(cluster, num_bytes / ranks) / cluster.network.oversubscription
    return cluster.network.latency + moved / (min(inside, between) if members > 1 else between)


def planner_links(cluster: Cluster, num_ranks: int, message: float) -> tuple[Link, Link]:
    """What the planner is told: links inside a domain and between domains, with messages of that size."""
    inside = Link(cluster.nvlink.latency, nvlink_rate(cluster, message))
    return inside, Link(cluster.network.latency, network_rate(cluster, message))
