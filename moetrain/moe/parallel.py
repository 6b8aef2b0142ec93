"""Spread the MoE layers of any module over the ranks of a process group, in a training loop that is not ours.

    handle = moetrain.expert_parallel(model, group)
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in batches:
        with handle.step():
            loss = criterion(model(batch.x), batch.y) + handle.balance_loss()
            loss.backward()
        handle.reduce_dense_gradients()  # DDP and FSDP2 do this themselves
        handle.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

A whole expert lives on its home rank; while a step runs, others may hold a temporary replica of it, a guest. Its
gradient comes home, so that an expert's gradient is complete there: that of the sum of all ranks' losses.

E experts, R ranks of the group.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moetrain.common.errors import ConfigError
from moetrain.common.registry import Options
from moetrain.distributed.comm import Group
from moetrain.distributed.mesh import ExpertGroup, join_group
from moetrain.moe.calibrate import Layer, measure
from moetrain.moe.gradients import Reduction, SpreadGradients
from moetrain.moe.kernels.api import KernelChoice, use_kernels
from moetrain.moe.layer import LayerStats, MoE
from moetrain.moe.options import NEED_NO_COSTS, BalanceOptions, Chunks
from moetrain.moe.planning import check_chunks
from moetrain.moe.planning.cost import Costs
from moetrain.moe.routing.balance import BalancedRouter, BalanceLoss, add_buffers
from moetrain.moe.slices import choose_slices
from moetrain.moe.statistics import LayerStatistics, StatisticsOfStep
from moetrain.moe.whole_weights import (
    broadcast_weights,
    gather_optimizer_state,
    gather_state_dict,
    load_optimizer_state,
    load_state_dict,
)

Recompute = Literal["none", "selective", "full"]
GUEST_PART = 8  # of a GPU's memory, one is for guests, where `guest_memory` does not say
CPU_GUEST_BYTES = 1 << 30


@dataclass(frozen=True)
class MeasuringRanks:
    """Who measures costs."""

    ep: ExpertGroup
    device: torch.device
    everyone: Group


def expert_parallel(
    module: nn.Module,
    group: Any,
    planner: str = "makespan",
    planner_options: Options | Mapping[str, Any] | None = None,
    costs: Costs | None = None,
    *,
    replicas: Any = None,
    guest_slots: int | None = None,
    guest_memory: int | None = None,
    max_rows: int | None = None,
    chunks: Chunks = 1,
    recompute: Recompute = "none",
    reduction: Reduction = "auto",
    balance: BalanceOptions | None = None,
    r: int | None = None,
) -> "ExpertParallel":
    """Spread every MoE layer in `module` over the ranks of `group`, in place. All those ranks call it.

    Parameters and buffers become those of the group's rank 0 first, as DDP does it. Experts' parameters are replaced by
    those of the experts at home here: make the optimizer, and wrap the module in DDP or FSDP2, after this.

    Arguments:
        module: anything with `moetrain.MoE` layers in it; every rank has built it whole.
        group: a `torch.distributed.ProcessGroup`, a device mesh with one axis (`mesh["ep"]`), an `ExpertGroup`, or None
            for this process alone. The default group has to exist; it is never made here.
        planner, planner_options: a key of `moetrain.PLANNERS`, and its options.
        costs: what the planner decides with; None: measured at the first forward, which takes a few seconds.
        replicas: the group or mesh axis of the ranks that hold the same experts as this one, where the world is larger
            than `group`; their experts' gradients are summed in `end_step`.
        guest_slots: guests of a layer that stay on a rank during a step; None: what fits in `guest_memory` bytes, by
            default an eighth of a GPU's memory, or 1 GiB.
        max_rows: rows of a layer that a rank computes at a time, which bounds its memory; None: all.
        chunks: parts in which rows travel and are computed, 1, 2, 4 or 8, so that some travel while others are
            computed; "auto": as the costs have it for each layer. The results are the same.
        recompute: "selective" keeps the tokens that came, no activations of experts; "full" sends tokens again too. A
            checkpoint around the layer needs neither: it replays choices and plan.
        reduction: how gradients of all ranks are combined. "sum": the gradient of the sum of all ranks' losses; "mean":
            of their mean, as DDP and FSDP2 have it; "auto": mean under DDP or FSDP2, else sum.
        balance: the losses that `balance_loss` is made of.
        r: slices that every expert is cut into, each at home on one rank; None: as few as give every rank one. With
            more than one, `group` may have more ranks than a layer has experts.

    Raises `ConfigError`, a `ValueError`, for what does not fit.
    """
    ep = group if isinstance(group, ExpertGroup) else ExpertGroup.from_group(group)
    layers = _find_layers(module)
    if recompute not in ("none", "selective", "full"):
        raise ConfigError(f"recompute={recompute}: must be one of none, selective, full")
    if reduction not in ("auto", "sum", "mean"):
        raise ConfigError(f"reduction={reduction}: must be one of auto, sum, mean")
    needs_costs = costs is None and (check_chunks(chunks) == "auto" or planner not in NEED_NO_COSTS)
    for name, layer in layers.items():
        layer.experts.cut(choose_slices(name, layer.experts, ep.size, r))
    handle = ExpertParallel(module, ep, join_group(replicas), reduction, needs_costs, balance)
    handle._spread(layers, (planner, planner_options), costs, guest_slots, guest_memory, max_rows, recompute)
    for layer in layers.values():
        layer.experts.chunks = chunks
    return handle


def _find_layers(module: nn.Module) -> dict[str, MoE]:
    """Return the layers to spread by name. Raises `ConfigError`."""
    layers = {name: m for name, m in module.named_modules() if isinstance(m, MoE)}
    if not layers:
        raise ConfigError("module: has no moetrain.MoE layer")
    for name, layer in layers.items():
        if layer.experts.ep.size > 1:
            raise ConfigError(f"module: its layer {name or 'itself'} is spread over ranks already")
    return layers


class ExpertParallel:
    """What a training loop needs of a module whose experts are spread; made by `expert_parallel`."""

    def __init__(
        self,
        module: nn.Module,
        group: ExpertGroup,
        replicas: Group,
        reduction: Reduction,
        needs_costs: bool,
        balance: BalanceOptions | None = None,
    ) -> None:
        """Begin a handle without layers; `_take_layers` adds them.

        Arguments:
            module, group, replicas, reduction, balance: as for `expert_parallel`.
            needs_costs: whether costs are to be measured at the first forward.
        """
        self.module, self.group = module, group
        self._replicas = replicas
        self._gradients = SpreadGradients(module, group, replicas, reduction, self.expert_parameters)
        self._statistics = StatisticsOfStep()
        self._options = balance or BalanceOptions()
        self._needs_costs = needs_costs and group.size > 1
        self._measured: dict[Layer, Costs] = {}
        self._layers: dict[str, Any] = {}
        self._names: dict[int, str] = {}  # by id of the layer
        self._slots, self._lends_again = 0, 2
        self._num_micro_steps: int | None = None  # of the step that we are in
        self._found: list[tuple[ReferenceType[MoE], ReferenceType[LayerStats]]] = []  # for the next balance loss
        self._balance: BalanceLoss | None = None

    def _spread(
        self,
        layers: Mapping[str, MoE],
        planner: tuple[str, Options | Mapping[str, Any] | None],
        costs: Costs | None,
        guest_slots: int | None,
        guest_memory: int | None,
        max_rows: int | None,
        recompute: Recompute,
    ) -> None:
        """Keep the experts at home here of every layer, as `expert_parallel` has the arguments."""
        broadcast_weights(self.module, self._replicas, self.group.rows)
        slots = count_slots(self.module, layers.values(), guest_memory) if guest_slots is None else guest_slots
        self._lends_again = 3 if recompute == "full" else 2  # forward, recompute, backward
        for layer in layers.values():
            layer.plan_with(*planner)
            layer.experts.shard(self.group, 0, max_rows, keep_hidden=recompute != "selective")
            layer.recompute, layer.watcher, layer.costs = recompute == "full", self, costs
            add_buffers(layer.routers, self._options)
        self._take_layers(layers, slots)

    def _take_layers(self, layers: Mapping[str, Any], slots: int) -> None:
        """Take these layers, by their names in the module, once their experts are spread; `slots`: guests of a layer
        that stay here during a step."""
        self._layers, self._slots = dict(layers), slots
        self._names = {id(layer): name for name, layer in layers.items()}
        self._gradients.take_experts()

    # What DDP, FSDP2 and optimizers ask for.

    def expert_parameters(self) -> set[nn.Parameter]:
        """The parameters of experts, which differ from rank to rank: `ignored_params` of `fully_shard`. DDP around the
        module leaves them alone by itself."""
        return {p for layer in self._layers.values() for p in layer.experts.parameters()}

    @property
    def num_ranks(self) -> int:
        """Ranks whose losses the gradients are of."""
        return self._gradients.num_ranks

    # A step.

    @contextmanager
    def step(self, num_micro_steps: int = 1) -> Iterator["ExpertParallel"]:
        """`begin_step`, and `end_step` unless the body raises."""
        self.begin_step(num_micro_steps)
        yield self
        self.end_step()

    def begin_step(self, num_micro_steps: int = 1) -> None:
        """Begin an optimizer step of so many forwards and backwards of every layer.

        During a step a guest stays for the micro-steps to come; without one, every backward ends the loans of its
        forward. The results are the same.
        """
        if num_micro_steps < 1:
            raise ConfigError(f"num_micro_steps={num_micro_steps}: must be at least 1")
        self._num_micro_steps, self._balance = num_micro_steps, None
        self._found.clear()
        self._statistics.begin_step()
        for layer in self._layers.values():
            self._set_slots(layer, self._slots)
            layer.step.begin_step(num_micro_steps)

    def end_step(self) -> None:
        """End the step: after its last backward, before the optimizer's update. Sums experts' gradients over `replicas`
        and updates the routers' biases (`BalanceOptions.bias`).

        Raises `RuntimeError` where a layer has had fewer backwards than `begin_step` announced: its guests' gradients
        are not home.
        """
        if self._num_micro_steps is None:
            raise RuntimeError("end_step() comes after begin_step()")
        behind = [name for name, layer in self._layers.items() if layer.experts.residents.has_sums]
        num_announced, self._num_micro_steps = self._num_micro_steps, None
        self._statistics.end_step()
        for layer in self._layers.values():
            self._set_slots(layer, 0)
        if behind:
            raise RuntimeError(
                f"begin_step({num_announced}): the layer {behind[0] or 'itself'} has had fewer backwards; gradients of "
                "its guests are lost"
            )
        self._gradients.reduce_experts()
        if self._balance is not None:
            self._balance.finish()

    def balance_loss(self) -> Tensor:
        """Returns this rank's share of the routers' losses for the forwards since the last call. Every rank of the
        group and its replicas calls it, once in every micro-step, before the backward.

        Add it to the micro-step's share of the loss as it is: shares are of the whole global batch (the ranks and the
        step's micro-steps), and already scaled for the mean over ranks where that is how gradients are combined. Load
        balance goes by the counts of the global batch so far ("Demons in the Detail", Qwen, ACL 2025), per selection: a
        balanced layer has loss `coefficient`. Exact where micro-steps have equally many tokens.
        """
        found = [(layer, stats) for one, two in self._found if (layer := one()) is not None and (stats := two())]
        self._found.clear()
        return self._weigh_losses([layer.router for layer, _ in found], [stats for _, stats in found])

    def _weigh_losses(self, routers: Sequence[BalancedRouter], stats: Sequence[LayerStats]) -> Tensor:
        """Return this rank's share of the losses of one micro-step. Raises `RuntimeError` where there is none."""
        if not stats:
            raise RuntimeError("balance_loss() comes after a forward with gradient and before its backward")
        if self._balance is None or self._num_micro_steps is None:
            self._balance = self._begin_balance(routers, stats[0])
        weighted = self._balance.losses(stats).weighted
        return weighted * self.num_ranks if self.averages else weighted

    def _begin_balance(self, routers: Sequence[BalancedRouter], first: LayerStats) -> BalanceLoss:
        """Return the losses of a step whose micro-steps have as many tokens each as `first`."""
        length, micro_steps = len(first.scores.probs_TE), self._num_micro_steps or 1
        tokens = int(self._gradients.sum_over_ranks(torch.tensor(length, device=first.counts_E.device))) * micro_steps
        sum_over_ranks = self._gradients.sum_over_ranks
        balance = BalanceLoss(self._options, routers, tokens, length, self.group.size, sum_over_ranks)
        if balance.looks_ahead and micro_steps > 1:
            self._count_ahead(balance)
        return balance

    def _count_ahead(self, balance: BalanceLoss) -> None:
        """Count the selections of the micro-steps to come. Raises `ConfigError`: here they are not known."""
        raise ConfigError("balance.accumulate=exact: does not know the micro-steps to come; use buffer or hold")

    def statistics(self) -> list[LayerStatistics]:
        """What each layer has done in this step, in the order of the module's layers; no communication."""
        return self._statistics.list_layers(self._layers)

    # Gradients.

    @property
    def averages(self) -> bool:
        """Whether gradients are those of the mean of all ranks' losses, not of their sum."""
        return self._gradients.averages

    def reduce_dense_gradients(self) -> None:
        """Sum, or average, the gradients of all parameters but the experts' over the ranks. DDP and FSDP2 do it
        themselves, and then this must not be called."""
        self._gradients.reduce_dense()

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Returns the norm over all parameters of the module, each expert's and each dense one counted once, and scales
        all gradients so that it is at most `max_norm`. All ranks call it, when gradients are reduced.

        Where the norm is not finite, gradients stay as they are.
        """
        return self._gradients.clip(max_norm)

    # The whole module's weights.

    def full_state_dict(self) -> dict[str, Tensor]:
        """Returns `module.state_dict()` as it is on one device: all experts, nothing sharded; on every rank, in the
        CPU's memory. All ranks call it."""
        return gather_state_dict(self.module, self._find_owners(), self.group)

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Fill the module from what `full_state_dict` returned, or `state_dict` of the module on one device.

        Raises `KeyError` where a name is missing, `ValueError` where a shape differs.
        """
        load_state_dict(self.module, self._find_owners(), state)

    def full_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any] | None:
        """Returns `optimizer.state_dict()` as it is on one device, of all experts: on rank 0 of the group, in the CPU's
        memory, None on the other ranks. All ranks call it.

        Raises `ConfigError` where the optimizer keeps something for experts that is not one row an expert.
        """
        return gather_optimizer_state(optimizer, self._find_parameter_owners(), self.group)

    def load_full_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Fill the optimizer from what `full_optimizer_state` returned, here or on another number of ranks; every rank
        has `state`, which may be mapped from a file. Raises `ConfigError` where it does not fit."""
        load_optimizer_state(optimizer, self._find_parameter_owners(), state)

    def _find_parameter_owners(self) -> dict[nn.Parameter, Any]:
        return {parameter: layer for layer in self._layers.values() for parameter in layer.experts.parameters()}

    def _find_owners(self) -> dict[str, Any]:
        """Returns the layer of every tensor in `module.state_dict()` that has one entry an expert."""
        tensors = ("gate_up", "down")
        return {f"{name}.experts.{last}".lstrip("."): layer for name, layer in self._layers.items() for last in tensors}

    # What layers tell.

    def before(self, layer: MoE, x_TD: Tensor) -> None:
        """Called at the beginning of a layer's forward: measures costs at the first one."""
        self._gradients.look_for_ddp()
        self._gradients.scale_experts(layer.experts.parameters())
        if layer.costs is None and self._needs_costs:
            experts = layer.experts
            _, width, dim = experts.gate_up.shape
            num, top_k = experts.num_experts * experts.slices, layer.router.options.top_k * experts.slices
            shape = Layer(dim, width // 2, num, top_k, x_TD.dtype)
            use_kernels(layer, self._give_costs(layer, shape, x_TD.device))

    def _give_costs(self, layer: Any, shape: Layer, device: torch.device) -> KernelChoice:
        """Let a layer plan with the costs of its shape, measured at the first one. Returns the kernels they are of."""
        if shape not in self._measured:
            self._measured[shape] = measure(MeasuringRanks(self.group, device, self.group.rows), shape)
        layer.use_costs(self._measured[shape])
        self._set_lends(layer)
        return KernelChoice(left_to_torch=frozenset(self._measured[shape].by_torch))

    def after(self, layer: MoE, stats: LayerStats) -> None:
        """Called at the end of a layer's forward, with its statistics."""
        if stats.scores.probs_TE.requires_grad:
            self._found.append((ref(layer), ref(stats)))
            if len(self._found) > 2 * len(self._layers):
                self._found = [one for one in self._found if one[1]() is not None]
        probs_E = stats.scores.probs_TE.detach().sum(0)
        self._statistics.add_forward(self._names[id(layer)], stats.plan, probs_E, stats.slices)

    def _set_slots(self, layer: Any, slots: int) -> None:
        """How many guests may stay from now on; those that are here go."""
        layer.experts.residents.reset()
        layer.experts.residents.slots = slots
        layer.step.begin_step(1)
        self._set_lends(layer)

    def _set_lends(self, layer: Any) -> None:
        """How often a guest's weights travel: once where it stays."""
        if layer.costs is not None:
            layer.use_costs(replace(layer.costs, lends=1 if layer.experts.residents.slots else self._lends_again))


def count_slots(module: nn.Module, layers: Iterable[Any], memory: int | None) -> int:
    """Return how many guests of a layer fit into `memory` bytes: weights, and gradients adding up in fp32. None: as
    many as by default."""
    if memory is None:
        device = next(module.parameters()).device
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory // GUEST_PART if on_gpu else CPU_GUEST_BYTES
    guest: int = sum(p[0].numel() * (p.element_size() + 4) for layer in layers for p in layer.experts.parameters())
    return memory // max(guest, 1)
