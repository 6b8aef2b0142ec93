"""What this machine does in a second: the costs that the planner decides with, measured and kept.

All ranks measure at the same time, as they work in training. A figure is that of the slowest rank, and every rank gets
the same ones. They are kept per machine, group and layer shape, and with each run, so that a repeat plans alike.
"""

import dataclasses
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moetrain.comm import all_gather, barrier, broadcast, broadcast_text, start_all_to_all
from moetrain.config import Config
from moetrain.mesh import Mesh
from moetrain.moe import compiled, kernels
from moetrain.moe.cost import Costs, Link
from moetrain.moe.guests import Copy, Lending, Returning

COSTS = "costs.json"  # in a run's folder and in its checkpoints
SEGMENTS, MANY = 4, 6  # experts computed, and lent
FLOPS = 1e10  # of one timed computation, if that is 64 to 1024 rows an expert
MESSAGE_BYTES = (1 << 10, 1 << 21)  # to every peer: what is mostly latency, and what is mostly bandwidth
REPEATS, SECONDS = 15, 0.5  # timed runs: so many, or as many as fit into that time, and 3 at least


class Layer(NamedTuple):
    """What is measured."""

    dim: int
    hidden: int
    top_k: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Config) -> "Layer":
        dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
        return cls(config.model.dim, config.model.expert_hidden, config.router.top_k, dtype)


def folder() -> Path:
    """Where profiles are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetrain" / "profiles"


def obtain(mesh: Mesh, layer: Layer, run: Path, saved: Path | None = None) -> Costs:
    """The costs of the checkpoint `saved` or of the run, if they are of as many ranks of this kind; else the machine's
    stored ones; else measured now. They are written to the run's folder, and kept for the machine."""
    own, stored = run / COSTS, folder() / f"{_key(mesh, layer)}.json"
    places = [*([saved / COSTS] if saved is not None else []), own, stored]
    texts = (p.read_text() for p in places if p.is_file()) if mesh.is_main else ()
    found = next((text for text in texts if json.loads(text).get("ranks") == _ranks(mesh)), "")
    text = broadcast_text(found, mesh.device) or to_json(measure(mesh, layer), mesh)
    if mesh.is_main:
        own.write_text(text)
        if not stored.is_file():
            _write(stored, text)
    return dataclasses.replace(from_json(text), nodes=_nodes(mesh))


def of_checkpoint(saved: Path) -> Costs:
    """The costs that a checkpoint's run was planned with."""
    return from_json((saved / COSTS).read_text())


def _write(path: Path, text: str) -> None:
    """Whole or not at all; where a cache cannot be written, none is kept."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text)
        part.rename(path)
    except OSError:
        return


def keep(mesh: Mesh, layer: Layer, costs: Costs) -> Path:
    """Keep costs as the machine's, in place of what was there. Returns the file."""
    path = folder() / f"{_key(mesh, layer)}.json"
    if mesh.is_main:
        _write(path, to_json(costs, mesh))
    return path


def to_json(costs: Costs, mesh: Mesh) -> str:
    """`mesh`: the ranks that they are of."""
    return json.dumps({"ranks": _ranks(mesh), **dataclasses.asdict(costs)}, indent=1)


def from_json(text: str) -> Costs:
    tree = json.loads(text)
    del tree["ranks"]
    links = {name: Link(**tree[name]) for name in ("inside", "between")}
    return Costs(**{**tree, **links, "nodes": tuple(tree["nodes"])})


def measure(mesh: Mesh, layer: Layer) -> Costs:
    """Costs of a layer on the ranks of `mesh.ep`. All ranks call it; a few seconds."""
    dim, hidden, top_k, dtype = layer
    weights = 3 * dim * hidden
    many = min(max(64, int(FLOPS / (6 * weights * SEGMENTS)) // 32 * 32), 1024)
    few = many // 8
    (forward_many, backward_many), (forward_few, backward_few) = (
        _experts(mesh, dim, hidden, dtype, rows) for rows in (many, few)
    )
    row_forward = max(forward_many - forward_few, 1e-9) / (SEGMENTS * (many - few))
    row_backward = max(backward_many - backward_few, 1e-9) / (SEGMENTS * (many - few))
    padding = (kernels.row_step(dtype, mesh.device) - 1) / 2  # rows, on average
    ranks = mesh.ep.size
    distinct = ranks * (1 - (1 - 1 / ranks) ** top_k) / top_k  # a token goes to a rank once, for all its experts there
    nodes = _nodes(mesh)
    same = [nodes[r] == nodes[mesh.ep.rank] for r in range(mesh.ep.size)]
    same[mesh.ep.rank] = False
    apart = [node != nodes[mesh.ep.rank] for node in nodes]
    inside, between = _link(mesh, same), _link(mesh, apart)
    costs = Costs(
        row_forward=row_forward,
        row_backward=row_backward,
        segment_forward=max(forward_few / SEGMENTS - few * row_forward, 0.0) + padding * row_forward,
        segment_backward=max(backward_few / SEGMENTS - few * row_backward, 0.0) + padding * row_backward,
        row_bytes=int(dim * dtype.itemsize * distinct),
        weight_bytes=weights * dtype.itemsize,
        gradient_bytes=weights * dtype.itemsize,
        inside=inside or between or Link(0.0, 1e12),
        between=between or inside or Link(0.0, 1e12),
        overlap=_overlap(mesh, dim, hidden, dtype),
        nodes=nodes,
    )
    costs = dataclasses.replace(costs, handling=_handling(mesh, dim, hidden, dtype, costs))
    costs = from_json(broadcast_text(to_json(costs, mesh), mesh.device))
    return dataclasses.replace(costs, nodes=nodes)


def _experts(mesh: Mesh, dim: int, hidden: int, dtype: torch.dtype, rows: int) -> tuple[float, float]:
    """Seconds forward and backward of SEGMENTS experts with `rows` rows each, gathering and summing rows included."""
    sizes, total = [rows] * SEGMENTS, rows * SEGMENTS
    new = lambda *shape: torch.randn(shape, device=mesh.device).mul_(0.1).to(dtype)  # noqa: E731
    gate_up, down, x = new(SEGMENTS, 2 * hidden, dim), new(SEGMENTS, dim, hidden), new(total, dim)
    inner, back, outer = new(total, 2 * hidden), new(total, dim), new(total, hidden)
    grads, index = (torch.empty_like(gate_up), torch.empty_like(down)), torch.arange(total, device=mesh.device)
    weight, bags = torch.ones(total, device=mesh.device), kernels.Bags.of(index // 2, (total + 1) // 2, 2)

    def forward() -> None:
        rows_MD = x.index_select(0, index)
        kernels.segment_mm(rows_MD, gate_up, sizes, inner, transpose=True)
        kernels.segment_mm(kernels.swiglu(inner), down, sizes, back, transpose=True)
        kernels.sum_rows(back, weight, bags, dtype)

    def backward() -> None:
        rows_MD = x.index_select(0, index)
        kernels.segment_mm(rows_MD, down, sizes, outer, transpose=False)
        part = inner.clone()
        kernels.swiglu_backward(part, outer, weight)
        kernels.segment_mm(part, gate_up, sizes, back, transpose=False)
        kernels.segment_outer(part, rows_MD, sizes, grads[0], add=False)
        kernels.segment_outer(rows_MD, outer, sizes, grads[1], add=False)
        kernels.sum_rows(back, None, bags, dtype)

    return _time(mesh, forward), _time(mesh, backward)


def _link(mesh: Mesh, peers: list[bool]) -> Link | None:
    """The link to each of `peers` [R], all at once; None where there are none."""
    times = []
    for size in MESSAGE_BYTES:
        splits = [size if peer else 0 for peer in peers]
        message = torch.ones(sum(splits), dtype=torch.uint8, device=mesh.device)
        times.append(
            _time(mesh, lambda m=message, s=splits: start_all_to_all(m, s, s, mesh.ep.rows).wait())  # type: ignore[misc]
        )
    count = max(_gather(mesh, sum(peers)))
    if not count:
        return None
    return Link(times[0], count * MESSAGE_BYTES[1] / max(times[1] - times[0], times[1] / 2))


def _overlap(mesh: Mesh, dim: int, hidden: int, dtype: torch.dtype) -> float:
    """Share of a transfer that passes while experts are computed: both take equally long, apart and together."""
    splits = [0 if r == mesh.ep.rank else 8 * MESSAGE_BYTES[1] // mesh.ep.size for r in range(mesh.ep.size)]
    message = torch.ones(sum(splits), dtype=torch.uint8, device=mesh.device)
    new = lambda *shape: torch.randn(shape, device=mesh.device).to(dtype)  # noqa: E731
    x, weight = new(256, dim), new(dim, hidden)
    out = new(256, hidden)
    send = lambda: start_all_to_all(message, splits, splits, mesh.ep.lend)  # noqa: E731
    travelling = _time(mesh, lambda: send().wait())
    count = max(1, round(travelling / _time(mesh, lambda: torch.mm(x, weight, out=out))))

    def compute() -> None:
        for _ in range(count):
            torch.mm(x, weight, out=out)

    def both() -> None:
        pending = send()
        compute()
        pending.wait()

    computing = _time(mesh, compute)
    return min(max((computing + travelling - _time(mesh, both)) / min(computing, travelling), 0.0), 1.0)


def _handling(mesh: Mesh, dim: int, hidden: int, dtype: torch.dtype, costs: Costs) -> float:
    """Seconds that one more guest takes, lent and its gradient back home, besides its bytes' travel."""
    if mesh.ep.size == 1:
        return 0.0
    weights = [torch.zeros(s, dtype=dtype, device=mesh.device) for s in ((MANY, 2 * hidden, dim), (MANY, dim, hidden))]
    size = sum(w[0].numel() for w in weights)

    def lend(copies: list[Copy]) -> None:
        lending = Lending(weights, 0, copies, mesh.ep)
        lending.relay()
        returning = Returning(lending.finish(), copies, weights[0], size, mesh.ep)
        returning.finish(weights, 0, ())

    one, many = (_time(mesh, lambda n=n: lend([(e, 0, 1) for e in range(n)])) for n in (1, MANY))  # type: ignore[misc]
    link = costs.between if costs.nodes[0] != costs.nodes[1] else costs.inside
    return max((many - one) / (MANY - 1) - (costs.weight_bytes + costs.gradient_bytes) / link.bandwidth, 0.0)


def _time(mesh: Mesh, work: Callable[[], object]) -> float:
    """Seconds of the slowest rank; on each the quickest of several after a warm-up: others disturb, nothing helps."""

    def once() -> float:
        barrier()
        began = time.perf_counter()
        work()
        if mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    once()
    fitting = torch.tensor(min(max(int(SECONDS / once()), 3), REPEATS), device=mesh.device)
    repeats = int(broadcast(fitting))  # the same on all ranks of the world: every run enters a barrier
    return max(_gather(mesh, min(once() for _ in range(repeats))))


def _gather(mesh: Mesh, value: float) -> list[float]:
    local: Tensor = torch.tensor([value], dtype=torch.float64, device=mesh.device)
    return all_gather(local, mesh.ep.rows).flatten().tolist()


def _nodes(mesh: Mesh) -> tuple[int, ...]:
    """[R] the host of each rank of the expert group, numbered from 0."""
    name = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:6], "big")
    hosts = [int(x) for x in _gather(mesh, float(name))]
    order = list(dict.fromkeys(hosts))
    return tuple(order.index(host) for host in hosts)


def _ranks(mesh: Mesh) -> str:
    return f"{mesh.world} on {mesh.device.type}, ep {mesh.ep.size}"


def _key(mesh: Mesh, layer: Layer) -> str:
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_name(mesh.device)
    else:
        device = f"{socket.gethostname()} {os.cpu_count()} cores {torch.get_num_threads()} threads"
    facts = f"{device} {torch.__version__} {compiled.DIGEST} {_nodes(mesh)} {mesh.world} {mesh.ep.size} {layer}"
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
