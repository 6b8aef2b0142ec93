"""Other people's layers, timed beside ours where they are installed: on the same ranks, tokens and widths.

Their own gates choose: the gate's weight picks out the first E columns of its input, and these say which experts. A
gate takes K different experts for a token, so of 95 % into one expert remain 95 % of the tokens: 48 % of all
selections at top-2. Nothing of theirs is replaced.

T tokens here, D width, E experts, K top-k.
"""

import contextlib
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain.bench import cases
from moetrain.bench.cases import BALANCED, LayerShape
from moetrain.bench.cell import Setup
from moetrain.bench.protocol import Grid
from moetrain.bench.tables import Records, Tabulated
from moetrain.bench.timing import measure_spread, read_clock, time_in_turns
from moetrain.common.console import console, errors
from moetrain.distributed.mesh import Mesh
from moetrain.engine.precision import DTYPES

HOT = "95 % into 1"
TITLE = "Peers, through their own gates; speed as % of our balanced layer and of the bare GEMMs, in pairs"
COLUMNS = ("peer", "layer", "routing", "into the first", "ranks", "ms", "% of balanced", "% of the GEMMs")
SETTLE = 3
Layer = Callable[[Tensor], Tensor]


def measure_peers(mesh: Mesh, grid: Grid) -> Records:
    """Return one record for every shape, peer and routing; a line on the terminal for each peer that is missing."""
    found: Records = []
    for shape in grid.shapes:
        setup = None
        for name, build in (("deepspeed", _build_deepspeed), ("transformers", _build_transformers)):
            try:
                with contextlib.redirect_stdout(sys.stderr):  # they print
                    version = importlib.import_module(name).__version__
                    module = build(shape, mesh)
            except ImportError as error:
                if mesh.is_main:
                    errors.print(f"{name}: left out, {error}")
                continue
            setup = setup or Setup.prepare(mesh, shape, grid.seed)
            for scenario in (BALANCED, HOT):
                found.append({"planner": f"{name} {version}", **_measure(mesh, grid, setup, module, scenario)})
    return found


def _measure(mesh: Mesh, grid: Grid, setup: Setup, module: nn.Module, scenario: str) -> dict[str, Any]:
    """Return the record of one peer under one routing, without its name."""
    shape, device = setup.shape, mesh.device
    expert_TK = choose_experts(scenario, shape, np.random.default_rng((grid.seed, mesh.rank)))
    x_TD = _mark_choices(setup.inputs.x_TD, torch.from_numpy(expert_TK).to(device), shape.experts)

    def time_pass() -> tuple[float, float]:
        began = read_clock(device)
        y_TD = module(x_TD)
        between = read_clock(device)
        y_TD.backward(setup.inputs.upstream_TD)
        ended = read_clock(device)
        x_TD.grad = None
        module.zero_grad(set_to_none=True)
        return between - began, ended - began

    passes = [setup.gemms.time_pass, setup.reference.time_pass, time_pass]
    for _ in range(SETTLE):
        for warm_up in passes:
            warm_up()
    times = time_in_turns(passes, grid.repeats, mesh.ep, device)
    gemm, balanced, this = times[:, :, 1].T
    return {
        "scenario": scenario,
        "ranks": mesh.ep.size,
        **vars(shape),
        "forward_ms": 1e3 * float(np.median(times[:, 2, 0])),
        "total_ms": 1e3 * float(np.median(this)),
        "percent_of_balanced": 100 * float(np.median(balanced / this)),
        "spread": 100 * measure_spread(balanced / this),
        "percent_of_gemm": 100 * float(np.median(gemm / this)),
        "percent_into_first": 100 * float((expert_TK == 0).mean()),
    }


def choose_experts(scenario: str, shape: LayerShape, rng: np.random.Generator) -> np.ndarray:
    """Return [T, K]: different experts for each token: the first as the scenario has it, the others anywhere."""
    share = cases.find_shares(scenario, 1, shape.experts)[0]
    if scenario == BALANCED:
        step = rng.permutation(shape.tokens)[:, None] * shape.top_k + np.arange(shape.top_k)
        return step % shape.experts
    key_TE = rng.random((shape.tokens, shape.experts))
    key_TE[np.arange(shape.tokens), rng.choice(shape.experts, shape.tokens, p=share)] = 2
    return np.argsort(-key_TE, 1)[:, : shape.top_k]


def _mark_choices(x_TD: Tensor, expert_TK: Tensor, num_experts: int) -> Tensor:
    """Return the tokens with the logits of their experts in the first columns, the first choice highest."""
    marked_TD = x_TD.detach().clone()
    marked_TD[:, :num_experts] = 0
    logit_TK = torch.linspace(8, 6, expert_TK.shape[1], device=x_TD.device).to(x_TD.dtype).expand(expert_TK.shape)
    return marked_TD.scatter_(1, expert_TK, logit_TK).requires_grad_()


class _SwiGLU(nn.Module):
    """One expert as DeepSpeed wants it."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class _FirstOutput(nn.Module):
    """Returns the first of what a layer returns, for tokens without a batch dimension."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TD: Tensor) -> Tensor:
        out = self.layer(x_TD[None])
        return (out[0] if isinstance(out, tuple) else out)[0]


def _build_deepspeed(shape: LayerShape, mesh: Mesh) -> nn.Module:
    """Return `deepspeed.moe.layer.MoE`, expert-parallel, nothing dropped."""
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False  # compiles for a minute
    deepspeed.init_distributed(dist_backend=mesh.backend, verbose=False)
    with torch.device(mesh.device):
        layer = importlib.import_module("deepspeed.moe.layer").MoE(
            shape.dim,
            _SwiGLU(shape.dim, shape.hidden),
            num_experts=shape.experts,
            ep_size=mesh.ep.size,
            k=shape.top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )
    layer.set_deepspeed_parallelism()
    return _draw_weights(layer, layer.deepspeed_moe.gate.wg.weight, shape)


def _build_transformers(shape: LayerShape, mesh: Mesh) -> nn.Module:
    """Return the sparse block of Qwen3-MoE with grouped GEMMs: all experts on each rank, nothing travels."""
    config = importlib.import_module("transformers").Qwen3MoeConfig(
        hidden_size=shape.dim,
        moe_intermediate_size=shape.hidden,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    with torch.device(mesh.device):
        modeling = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        layer = modeling.Qwen3MoeSparseMoeBlock(config)
    return _draw_weights(layer, layer.gate.weight, shape)


def _draw_weights(layer: nn.Module, gate_ED: nn.Parameter, shape: LayerShape) -> nn.Module:
    """Give a layer random weights, and a gate that reads the first columns; return it in the dtype of `shape`."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.03)
        gate_ED.copy_(torch.eye(*gate_ED.shape))
    return _FirstOutput(layer.to(DTYPES[shape.dtype]))


def publish(found: Records, out: Path | None) -> None:
    """Print the results; with a folder, add them to its layer.md."""
    if not found:
        return
    rows = [
        [
            r["planner"],
            f"{r['dtype']}, {r['experts']} experts",
            r["scenario"],
            f"{r['percent_into_first']:.0f} %",
            "all experts on each rank, nothing travels" if "transformers" in r["planner"] else f"{r['ranks']} ranks",
            f"{r['total_ms']:,.0f}",
            f"{r['percent_of_balanced']:.1f} ±{r['spread'] / 2:.1f}",
            f"{r['percent_of_gemm']:.1f}",
        ]
        for r in found
    ]
    table = Tabulated(TITLE, COLUMNS, rows, num_left=5)
    console.print(table.render())
    if out is not None:
        with (out / "layer.md").open("a") as file:
            file.write(f"\n{table.markdown()}\n")
