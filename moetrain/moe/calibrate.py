"""What this machine does in a second: the costs that the planner decides with, measured.

All ranks measure at the same time, as they work in training. A figure is that of the slowest rank, and every rank gets
the same ones.
"""

import dataclasses
import hashlib
import json
import math
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from moetrain.distributed.comm import Group, Pending, all_gather, barrier, broadcast, broadcast_text, start_all_to_all
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.exchange.guests import Copy, Lending, Returning
from moetrain.moe.kernels.api import PARTS, Backend, KernelChoice
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.planning.cost import Costs, Link, Measured

MANY = 6  # experts lent
FLOPS = 1e10  # of one timed computation on a CPU, if that is 64 to 1024 rows an expert
GPU_ROWS = (512, 4096)  # an expert: a batch of training has about as many on either side
GPU_MESSAGES = 1 << 30  # bytes to all peers together, at most
REPEATS, SECONDS = 15, 0.5  # timed runs: so many, or as many as fit into that time, and 3 at least
LAUNCHES = 4  # runs between two events of a GPU: the host is ahead of all but the first


class Ranks(Protocol):
    """Who measures; a `Mesh` is this."""

    @property
    def ep(self) -> ExpertGroup:
        """The ranks among which experts are spread."""

    @property
    def device(self) -> torch.device: ...

    @property
    def everyone(self) -> Group:
        """All that measure at the same time, `ep` among them."""


class Layer(NamedTuple):
    """What is measured."""

    dim: int
    hidden: int
    experts: int  # of all ranks
    top_k: int
    dtype: torch.dtype

    @property
    def weights(self) -> int:
        """Parameters of an expert."""
        return 3 * self.dim * self.hidden

    def row_bytes(self, ranks: int) -> int:
        """What a selection weighs on a link: a token goes to a rank once, for all its experts there."""
        distinct = ranks * (1 - (1 - 1 / ranks) ** self.top_k) / self.top_k
        return int(self.dim * self.dtype.itemsize * distinct)


class Sizes(NamedTuple):
    """What one timed run works on: large enough for the device that its time is not that of starting it."""

    segments: int  # experts
    rows: tuple[int, int]  # of each of them: few, and many
    message_bytes: tuple[int, int]  # to every peer: what is mostly latency, and what is mostly bandwidth
    product_rows: int  # of a dense product that a transfer is hidden behind

    @classmethod
    def for_layer(cls, layer: Layer, ranks: int, device: str, free_bytes: float) -> "Sizes":
        """`device`: its type. On a GPU as many experts as a rank has, fewer where half of `free_bytes` is too little,
        and links at 64 MiB to each peer; a CPU, where little takes long, is measured at what takes milliseconds."""
        if device != "cuda":
            segments = 4
            many = min(max(64, int(FLOPS / (6 * layer.weights * segments)) // 32 * 32), 1024)
            return cls(segments, (many // 8, many), (1 << 10, 1 << 21), 256)
        row = layer.dtype.itemsize * (8 * layer.dim + 16 * layer.hidden)  # with temporaries in fp32
        expert = (2 * layer.dtype.itemsize + 4) * layer.weights + GPU_ROWS[1] * row
        segments = min(-(-layer.experts // ranks), int(free_bytes / 2 / expert))
        message = min(1 << 26, GPU_MESSAGES // max(1, ranks - 1))
        return cls(max(1, segments), GPU_ROWS, (1 << 10, message), GPU_ROWS[1])


def to_json(costs: Costs, ranks: Ranks) -> str:
    """`ranks`: the ranks that they are of."""
    return json.dumps({"ranks": describe_ranks(ranks), **dataclasses.asdict(costs)}, indent=1)


def from_json(text: str) -> Costs:
    """What `to_json` wrote. Raises `ValueError` where it is something else."""
    costs = of_tree(json.loads(text))
    if costs is None:
        raise ValueError("these are no costs")
    return costs


def of_tree(tree: Any) -> Costs | None:
    """Costs as JSON has them; None where a figure is missing, unknown or impossible. Older ones lack `kernels`."""
    try:
        if not isinstance(tree["ranks"], str):
            return None
        known = {name: value for name, value in tree.items() if name != "ranks"}
        links: dict[str, Link | None] = {name: Link(**tree[name]) for name in ("inside", "between")}
        measured = tuple(Measured(*each) for each in tree.get("kernels", ()))
        links |= {"two_level": Link(**steps) if (steps := tree.get("two_level")) else None}
        costs = Costs(**{**known, **links, "nodes": tuple(tree["nodes"]), "kernels": measured})
        seconds = [x for each in measured for x in each[1:]]
        positive = [costs.row_forward, costs.row_backward, costs.row_bytes, costs.weight_bytes, costs.gradient_bytes]
        positive += [costs.inside.bandwidth, costs.between.bandwidth, costs.lends, *seconds]
        if costs.two_level is not None:
            positive += [costs.two_level.latency, costs.two_level.bandwidth]
        sound = bool(np.isfinite([*costs.vector(), *positive]).all() and (costs.vector() >= 0).all())
        sound = sound and min(positive) > 0 and costs.overlap <= 1 and all(each.part in PARTS for each in measured)
        return costs if sound and all(type(node) is int and node >= 0 for node in costs.nodes) else None
    except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
        return None


def measure(ranks: Ranks, layer: Layer, backend: str | None = None) -> Costs:
    """Costs of a layer on the ranks of `ranks.ep`, with the kernels that were found to be faster (`Costs.kernels`).

    All ranks call it; a few seconds. `backend`: one of `kernels.api.BACKENDS` for the sums and the SwiGLU.
    """
    sizes = Sizes.for_layer(layer, ranks.ep.size, ranks.device.type, min(_gather(ranks, _free_bytes(ranks.device))))
    segments, (few, many) = sizes.segments, sizes.rows
    works = [TimedExperts.for_layer(layer, segments, rows, ranks.device) for rows in (few, many)]
    measured = _compare(ranks, works[1], backend)
    left = frozenset(each.part for each in measured if each.torch_is_faster)
    kernels = works[1].choose(KernelChoice(backend, left))
    (forward_few, backward_few), (forward_many, backward_many) = (
        (_time(ranks, partial(work.forward, kernels)), _time(ranks, partial(work.backward, kernels))) for work in works
    )
    del works
    row_forward = max(forward_many - forward_few, 1e-9) / (segments * (many - few))
    row_backward = max(backward_many - backward_few, 1e-9) / (segments * (many - few))
    padding = (kernels.row_step - 1) / 2  # rows, on average
    nodes = nodes_of(ranks)
    same = [nodes[r] == nodes[ranks.ep.rank] for r in range(ranks.ep.size)]
    same[ranks.ep.rank] = False
    apart = [node != nodes[ranks.ep.rank] for node in nodes]
    inside, between = (_link(ranks, peers, sizes.message_bytes) for peers in (same, apart))
    costs = Costs(
        row_forward=row_forward,
        row_backward=row_backward,
        segment_forward=max(forward_few / segments - few * row_forward, 0.0) + padding * row_forward,
        segment_backward=max(backward_few / segments - few * row_backward, 0.0) + padding * row_backward,
        row_bytes=layer.row_bytes(ranks.ep.size),
        weight_bytes=layer.weights * layer.dtype.itemsize,
        gradient_bytes=layer.weights * layer.dtype.itemsize,
        inside=inside or between or Link(0.0, 1e12),
        between=between or inside or Link(0.0, 1e12),
        overlap=_overlap(ranks, layer, sizes),
        nodes=nodes,
        kernels=measured,
    )
    costs = dataclasses.replace(costs, handling=_handling(ranks, layer, costs))
    costs = from_json(broadcast_text(to_json(costs, ranks), ranks.device, ranks.everyone))
    return dataclasses.replace(costs, nodes=nodes)


def measure_between(ranks: Ranks, layer: Layer, nodes: Sequence[int]) -> Link:
    """Return the link between nodes for rows that travel as they do just now. All ranks call it.

    `nodes`: [R] of the ranks of the expert group, several.
    """
    sizes = Sizes.for_layer(layer, ranks.ep.size, ranks.device.type, min(_gather(ranks, _free_bytes(ranks.device))))
    link = _link(ranks, [node != nodes[ranks.ep.rank] for node in nodes], sizes.message_bytes)
    assert link is not None
    return Link(*json.loads(broadcast_text(json.dumps([link.latency, link.bandwidth]), ranks.device, ranks.everyone)))


def _free_bytes(device: torch.device) -> float:
    """Of a GPU's memory, what torch holds unused included."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + unused)


class TimedExperts(NamedTuple):
    """What is timed: experts of as many rows each, their products, and what is around these."""

    gate_up: Tensor  # [S, 2H, D]
    down: Tensor  # [S, D, H]
    grads: tuple[Tensor, Tensor]  # of both
    x: Tensor  # [M, D]
    inner: Tensor  # [M, 2H]
    outer: Tensor  # [M, H]
    back: Tensor  # [M, D]
    weight: Tensor  # [M]
    bags: Bags
    sizes: list[int]  # [S]

    @classmethod
    def for_layer(cls, layer: Layer, segments: int, rows: int, device: torch.device) -> "TimedExperts":
        """`segments` experts of `rows` rows."""
        dim, hidden, total = layer.dim, layer.hidden, rows * segments
        new: Callable[..., Tensor] = lambda *shape: torch.randn(shape, device=device).mul_(0.1).to(layer.dtype)  # noqa: E731
        gate_up, down, index = new(segments, 2 * hidden, dim), new(segments, dim, hidden), torch.arange(total)
        bags = Bags.group(index.to(device) // 2, (total + 1) // 2, 2)
        grads, weight = (torch.empty_like(gate_up), torch.empty_like(down)), torch.ones(total, device=device)
        inner, outer = new(total, 2 * hidden), new(total, hidden)
        sizes = [rows] * segments
        return cls(gate_up, down, grads, new(total, dim), inner, outer, new(total, dim), weight, bags, sizes)

    def choose(self, choice: KernelChoice) -> Backend:
        """The kernels for these tensors."""
        return choice.choose(self.x.device, self.x.dtype, (self.gate_up, self.down))

    def forward(self, kernels: Backend) -> None:
        rows_MD = self.x.index_select(0, self.bags.row_M)
        kernels.segment_mm(rows_MD, self.gate_up, self.sizes, self.inner, transpose=True)
        kernels.segment_mm(kernels.swiglu(self.inner), self.down, self.sizes, self.back, transpose=True)
        kernels.sum_rows(self.back, self.weight, self.bags)

    def backward(self, kernels: Backend) -> None:
        rows_MD = self.x.index_select(0, self.bags.row_M)
        kernels.segment_mm(rows_MD, self.down, self.sizes, self.outer, transpose=False)
        part = self.inner.clone()
        kernels.swiglu_backward(part, self.outer, self.weight)
        kernels.segment_mm(part, self.gate_up, self.sizes, self.back, transpose=False)
        kernels.segment_outer(part, rows_MD, self.sizes, self.grads[0], add=False)
        kernels.segment_outer(rows_MD, self.outer, self.sizes, self.grads[1], add=False)
        kernels.sum_rows(self.back, None, self.bags)

    def sums(self, kernels: Backend) -> None:
        kernels.sum_rows(self.back, self.weight, self.bags)
        kernels.sum_rows(self.back, None, self.bags)

    def swiglu(self, kernels: Backend) -> None:
        kernels.swiglu(self.inner)
        kernels.swiglu_backward(self.inner.clone(), self.outer, self.weight)

    def products(self, kernels: Backend) -> None:
        kernels.segment_mm(self.x, self.gate_up, self.sizes, self.inner, transpose=True)
        kernels.segment_mm(self.outer, self.down, self.sizes, self.back, transpose=True)
        kernels.segment_mm(self.x, self.down, self.sizes, self.outer, transpose=False)
        kernels.segment_mm(self.inner, self.gate_up, self.sizes, self.back, transpose=False)
        kernels.segment_outer(self.inner, self.x, self.sizes, self.grads[0], add=False)
        kernels.segment_outer(self.x, self.outer, self.sizes, self.grads[1], add=False)


def _compare(ranks: Ranks, work: TimedExperts, backend: str | None) -> tuple[Measured, ...]:
    """The parts that every rank has kernels of our own for, beside torch's."""
    parts = {"sums": work.sums, "swiglu": work.swiglu, "products": work.products}
    own = work.choose(KernelChoice(backend))
    here = torch.tensor([int(own.has_own(part)) for part in parts], device=ranks.device)
    everywhere = all_gather(here, ranks.everyone).amin(0).tolist()

    alone = torch.get_num_threads() == 1  # then others, which take turns with this thread, do not disturb
    found = []
    for (part, run), there in zip(parts.items(), everywhere, strict=True):
        if there:
            seconds = []
            for kernels in (own, work.choose(KernelChoice(backend, frozenset([part])))):
                seconds.append(_time(ranks, partial(run, kernels), time.thread_time if alone else time.perf_counter))
            found.append([part, *seconds])
    text = broadcast_text(json.dumps(found), ranks.device, ranks.everyone)
    return tuple(Measured(*each) for each in json.loads(text))


def _link(ranks: Ranks, peers: list[bool], message_bytes: tuple[int, int]) -> Link | None:
    """The link to each of `peers` [R], all at once, with messages of two sizes; None where there are none."""
    times = []
    for size in message_bytes:
        splits = [size if peer else 0 for peer in peers]
        message = torch.ones(sum(splits), dtype=torch.uint8, device=ranks.device)
        times.append(
            _time(ranks, lambda m=message, s=splits: start_all_to_all(m, s, s, ranks.ep.rows).wait())  # type: ignore[misc]
        )
    count = max(_gather(ranks, sum(peers)))
    if not count:
        return None
    return Link(times[0], count * message_bytes[1] / max(times[1] - times[0], times[1] / 2))


def _overlap(ranks: Ranks, layer: Layer, sizes: Sizes) -> float:
    """Share of a transfer that passes while experts are computed: both take equally long, apart and together."""
    splits = [0 if r == ranks.ep.rank else 8 * sizes.message_bytes[1] // ranks.ep.size for r in range(ranks.ep.size)]
    message = torch.ones(sum(splits), dtype=torch.uint8, device=ranks.device)
    new: Callable[..., Tensor] = lambda *shape: torch.randn(shape, device=ranks.device).to(layer.dtype)  # noqa: E731
    x, weight = new(sizes.product_rows, layer.dim), new(layer.dim, layer.hidden)
    out = new(sizes.product_rows, layer.hidden)
    send: Callable[[], Pending] = lambda: start_all_to_all(message, splits, splits, ranks.ep.lend)  # noqa: E731
    travelling = _time(ranks, lambda: send().wait())
    count = max(1, round(travelling / _time(ranks, lambda: torch.mm(x, weight, out=out))))

    def compute() -> None:
        for _ in range(count):
            torch.mm(x, weight, out=out)

    def both() -> None:
        pending = send()
        compute()
        pending.wait()

    computing = _time(ranks, compute)
    return min(max((computing + travelling - _time(ranks, both)) / min(computing, travelling), 0.0), 1.0)


def _handling(ranks: Ranks, layer: Layer, costs: Costs) -> float:
    """Seconds that one more guest takes, lent and its gradient back home, besides its bytes' travel."""
    if ranks.ep.size == 1:
        return 0.0
    shapes = (MANY, 2 * layer.hidden, layer.dim), (MANY, layer.dim, layer.hidden)
    weights = [torch.zeros(shape, dtype=layer.dtype, device=ranks.device) for shape in shapes]

    def lend(copies: list[Copy]) -> None:
        lending = Lending(weights, 0, copies, ranks.ep)
        lending.relay()
        returning = Returning(lending.finish(), copies, weights[0], layer.weights, ranks.ep)
        returning.finish(weights, 0, ())

    one, many = (_time(ranks, lambda n=n: lend([(e, 0, 1) for e in range(n)])) for n in (1, MANY))  # type: ignore[misc]
    link = costs.between if costs.nodes[0] != costs.nodes[1] else costs.inside
    return max((many - one) / (MANY - 1) - (costs.weight_bytes + costs.gradient_bytes) / link.bandwidth, 0.0)


def _time(ranks: Ranks, work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the slowest rank; on each the quickest of several after a warm-up: others disturb, nothing helps.

    `clock`: of the host; a GPU has its own.
    """
    on_gpu = ranks.device.type == "cuda"
    runs = LAUNCHES if on_gpu else 1

    def once() -> float:
        barrier(ranks.everyone)
        return (_device_seconds(work, runs) if on_gpu else _host_seconds(work, clock)) / runs

    once()
    fitting = torch.tensor(min(max(int(SECONDS / once() / runs), 3), REPEATS), device=ranks.device)
    repeats = int(broadcast(fitting, ranks.everyone))  # the same on all: every run enters a barrier
    return max(_gather(ranks, min(once() for _ in range(repeats))))


def _host_seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    work()
    return clock() - began


def _device_seconds(work: Callable[[], object], runs: int) -> float:
    """By the GPU's own clock: the host's way to the device and back is not in it."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(runs):
        work()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / 1e3


def _gather(ranks: Ranks, value: float) -> list[float]:
    local: Tensor = torch.tensor([value], dtype=torch.float64, device=ranks.device)
    return all_gather(local, ranks.ep.rows).flatten().tolist()


def nodes_of(ranks: Ranks) -> tuple[int, ...]:
    """[R] the host of each rank of the expert group, numbered from 0."""
    name = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:6], "big")
    hosts = [int(x) for x in _gather(ranks, float(name))]
    order = list(dict.fromkeys(hosts))
    return tuple(order.index(host) for host in hosts)


def describe_ranks(ranks: Ranks) -> str:
    """Returns how many of what kind: costs are of these."""
    return f"{ranks.everyone.size()} on {ranks.device.type}, ep {ranks.ep.size}"
