"""What one optimizer step amounts to, over all micro-steps, layers and ranks: one all-reduce a step.

L layers, E experts of a layer, R ranks of the world, C domains.
"""

import math
import resource
from collections.abc import Sequence

import torch
from torch import Tensor

from moetrain.comm import all_reduce_sum
from moetrain.config import Config
from moetrain.mesh import Mesh
from moetrain.moe.balance import Losses
from moetrain.moe.layer import LayerStats
from moetrain.moe.plan import imbalance
from moetrain.moe.routers import Router

PHASES = ("route", "plan", "lend", "dispatch", "experts", "combine")


class Meter:
    """Adds up one step; `metrics()` reads it on every rank."""

    def __init__(self, config: Config, mesh: Mesh, domains: Sequence[str]) -> None:
        self._config, self._mesh, self._domains = config, mesh, domains
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=mesh.device)  # noqa: E731
        self._nats_C, self._tokens_C = zeros(len(domains)), zeros(len(domains))
        self._losses: list[Losses] = []
        self._plans = zeros(5)  # imbalance at home, planned, guests, rows moved, rows crossing
        self._rows = 0
        self._loads = zeros(2, mesh.world)  # at home, planned
        self._phases = zeros(len(PHASES))
        self._lent_bytes = 0.0
        self._stats: list[LayerStats] = []

    @torch.no_grad()
    def add(
        self,
        nats: Tensor,
        domain: Tensor,
        losses: Losses,
        stats: Sequence[LayerStats],
    ) -> None:
        """One micro-step: nats [B, L] per token, domain [B, L] its label, this rank's shares of the losses."""
        flat = domain.flatten()
        self._nats_C.index_add_(0, flat, nats.flatten().double())
        self._tokens_C += torch.bincount(flat, minlength=len(self._domains))
        self._losses.append(losses)
        self._stats += stats

    def metrics(self, counts: Sequence[Tensor]) -> dict[str, float | list[float]]:
        """Means and sums over the step. `counts`: [E] of every layer. Enters one collective: all ranks call it."""
        m, ep = self._config.model, self._mesh.ep
        expert_bytes = 3 * m.dim * m.expert_hidden * (2 if self._config.train.dtype == "bf16" else 4)
        for s in self._stats:
            home, planned = s.plan.home_loads(), s.plan.loads()
            self._plans += torch.tensor(
                [imbalance(home), imbalance(planned), len(s.plan.guests()), s.plan.moved(), s.plan.crossing()],
                device=self._plans.device,
            )
            self._rows += int(home.sum())
            self._loads[:, self._mesh.rank] += torch.tensor(
                [int(home[ep.rank]), int(planned[ep.rank])], device=self._loads.device
            )
            self._lent_bytes += expert_bytes * s.num_lent
            seconds = s.clock.seconds()
            self._phases += torch.tensor([seconds.get(name, 0.0) for name in PHASES], device=self._phases.device)
        parts = [
            self._nats_C,
            self._tokens_C,
            torch.stack([x.weighted for x in self._losses]).double().sum(0, keepdim=True),
            torch.stack([torch.stack([*x.shares.values()]) for x in self._losses]).double().sum(0),
            torch.stack([x.entropy_L for x in self._losses]).double().sum(0),
            torch.stack([s.kept_E.sum() for s in self._stats]).double().sum(0, keepdim=True),
            self._plans,
            self._loads.flatten(),
        ]
        parts += [
            self._phases,
            torch.tensor([self._rows, self._lent_bytes], device=self._phases.device).double(),
        ]
        parts = [part.cpu() for part in all_reduce_sum(torch.cat(parts)).split([len(p) for p in parts])]
        nats, tokens, weighted, shares, entropy, kept, plans, loads, phases, (rows, lent) = parts
        world, num_plans = self._mesh.world, len(self._stats) * self._mesh.world
        home, planned, guests, moved, crossing = plans.tolist()
        lm_loss = float(nats.sum() / tokens.sum())
        out: dict[str, float | list[float]] = {
            "train/loss": lm_loss + float(weighted),
            "train/lm_loss": lm_loss,
            "balance/imbalance_home": home / num_plans,
            "balance/imbalance_planned": planned / num_plans,
            "balance/guests": guests / self._mesh.ep.size,
            "balance/rows_moved": moved / self._mesh.ep.size,
            "balance/rows_moved_fraction": moved / max(float(rows), 1),
            "balance/rows_crossing_fraction": crossing / max(float(rows), 1),
            "balance/lend_bytes": float(lent) / self._mesh.ep.size,
            "balance/device_load_home": loads[:world].tolist(),
            "balance/device_load_planned": loads[world:].tolist(),
            "perf/peak_memory_gib": peak_memory(self._mesh.device) / 2**30,
        }
        for name, share in zip(self._losses[0].shares, shares.tolist(), strict=True):
            out[f"train/{name}_loss"] = share / len(counts)
        out |= {f"perf/phase/{name}": float(phases[i]) / world for i, name in enumerate(PHASES)}
        for name, spent, count in zip(self._domains, nats.tolist(), tokens.tolist(), strict=True):
            if count:
                out[f"train/{name}/loss"] = spent / count
        rows_L = torch.cat(list(counts)).double().cpu().split([len(c) for c in counts])
        selected = float(sum(row.sum() for row in rows_L))
        out["balance/experts_per_token"] = selected / float(tokens.sum()) / len(counts)
        out["balance/dropped_fraction"] = 1 - float(kept) / max(selected, 1.0)
        for index, (name, row) in enumerate(zip(m.pass_names, rows_L, strict=True)):
            layer = f"balance/{name}"
            share = row / row.sum().clamp(min=1)
            out[f"{layer}/max_vio"] = float(share.max() * len(row) - 1)
            out[f"{layer}/entropy"] = float(entropy[index] / tokens.sum()) / math.log(len(row)) if len(row) > 1 else 0.0
            out[f"{layer}/dead_experts"] = int((row == 0).sum())
            out[f"{layer}/load"] = share.tolist()
        return out


def bias_metrics(routers: Sequence[Router], first: int) -> dict[str, float]:
    """The largest bias of every layer's experts, where they have one; `first`: the number of the first layer."""
    largest = [router.bias.abs().max() for router in routers if router.bias is not None]
    values = torch.stack(largest).tolist() if largest else []
    return {f"balance/layer_{first + index:02d}/bias_max": value for index, value in enumerate(values)}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on the GPU, or that this process ever had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
