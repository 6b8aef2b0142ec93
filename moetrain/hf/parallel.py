"""`moetrain.hf.expert_parallel`: every experts module of a transformers model under dispatch, planning and lending.

    handle = moetrain.hf.expert_parallel(model, group)
    optimizer = torch.optim.AdamW(model.parameters())
    for batch in batches:
        with handle.step():
            model(**batch).loss.backward()
        handle.reduce_dense_gradients()  # DDP and FSDP2 do this themselves
        handle.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
    handle.save_pretrained("folder")

Routers, attention and losses stay the family's own code.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.common.registry import Options
from moetrain.distributed import sharded
from moetrain.distributed.comm import Group
from moetrain.distributed.mesh import ExpertGroup, join_group
from moetrain.hf.layout import SOMETIMES, is_experts
from moetrain.hf.matching import open_weights
from moetrain.hf.pinning import PinnedChoices
from moetrain.hf.replay import replay_in_recompute
from moetrain.hf.scores import RouterPass, find_router, is_recomputed, prepare_routers
from moetrain.hf.spread import NAME, SpreadDecision, SpreadExperts, register
from moetrain.moe.calibrate import Layer
from moetrain.moe.gradients import Reduction
from moetrain.moe.options import NEED_NO_COSTS, BalanceOptions, Chunks
from moetrain.moe.parallel import ExpertParallel, count_slots
from moetrain.moe.planning import check_chunks
from moetrain.moe.planning.cost import Costs
from moetrain.moe.planning.plan import Plan
from moetrain.moe.routing.balance import BalanceLoss
from moetrain.moe.whole_weights import broadcast_weights, gather_experts


def expert_parallel(
    model: nn.Module,
    group: Any,
    planner: str = "makespan",
    planner_options: Options | Mapping[str, Any] | None = None,
    costs: Costs | None = None,
    *,
    replicas: Any = None,
    guest_slots: int | None = None,
    guest_memory: int | None = None,
    chunks: Chunks = 1,
    reduction: Reduction = "auto",
    balance: BalanceOptions | None = None,
) -> "HFExpertParallel":
    """Spread every experts module in `model` over the ranks of `group`, in place. All those ranks call it.

    Parameters and buffers become those of the group's rank 0 first. Experts' parameters are replaced by those of the
    experts at home here: make the optimizer, and wrap the model in DDP or FSDP2, after this. Recompute
    (`model.gradient_checkpointing_enable()`, before or after) replays choices and plans.

    Arguments:
        model: a `PreTrainedModel`, or any module with one in it; every rank has built it whole, or on the meta device:
            then `model.to_empty(device=...)`, `model.init_weights()` and `handle.load_full_state_dict(state)`, or
            another load, come next, and only the experts at home here ever take memory.
        group, planner, planner_options, costs, replicas, guest_slots, guest_memory, chunks, reduction: as for
            `moetrain.expert_parallel`.
        balance: the losses that `balance_loss` is made of, on the scores of the family's own routers; None: there are
            none, since a loss changes the routers of a model that is trained already.

    Raises `ConfigError`, a `ValueError`, for a model that is not covered or does not fit the group.
    """
    ep = group if isinstance(group, ExpertGroup) else ExpertGroup.from_group(group)
    return HFExpertParallel(
        model,
        _find_experts(model, ep),
        ep,
        join_group(replicas),
        planner=(planner, planner_options),
        costs=costs,
        guest_slots=guest_slots,
        guest_memory=guest_memory,
        chunks=check_chunks(chunks),
        reduction=reduction,
        balance=balance,
    )


class HFExpertParallel(ExpertParallel):
    """What a training loop needs of a transformers model whose experts are spread; made by `expert_parallel`."""

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, Any],
        ep: ExpertGroup,
        replicas: Group,
        *,
        planner: tuple[str, Options | Mapping[str, Any] | None],
        costs: Costs | None,
        guest_slots: int | None,
        guest_memory: int | None,
        chunks: Chunks,
        reduction: Reduction,
        balance: BalanceOptions | None,
    ) -> None:
        needs_costs = costs is None and (planner[0] not in NEED_NO_COSTS or chunks == "auto")
        super().__init__(model, ep, replicas, reduction, needs_costs, balance)
        self._has_balance = balance is not None
        routers = {name: find_router(model, name) for name in modules} if self._has_balance else {}
        prepare_routers(list(routers.values()), self._options)
        broadcast_weights(model, replicas, ep.rows)
        register()
        spread = {}
        for name, module in modules.items():
            spread[name] = SpreadExperts(name, module, ep, planner, costs)
            spread[name].chunks = chunks
            spread[name].regions = [model.get_submodule(name[:end]) for end in _ends(name)]
            spread[name].watcher = self
            if name in routers:
                spread[name].router = routers[name]
                routers[name].watch(partial(self._hear_logits, name))
                module.register_forward_hook(partial(self._end_layer, spread[name]))
            module._moetrain = spread[name]
            module.config._experts_implementation = NAME
        for inner in model.modules():
            if hasattr(inner, "_set_gradient_checkpointing"):
                replay_in_recompute(inner)
        self._guest_memory = guest_memory
        self._counts_slots = guest_slots is None  # at the first step: the device of a model on meta is not known yet
        self._logits: dict[str, Tensor] = {}  # by experts module, of the forward under way
        self._plans: dict[str, Plan] = {}  # likewise
        self._passes: list[ReferenceType[RouterPass]] = []  # for the next balance loss
        self._recorded: list[PinnedChoices] = []  # in this step
        self._replayed: PinnedChoices | None = None  # the last one
        self._take_layers(spread, guest_slots or 0)

    def _find_owners(self) -> dict[str, Any]:
        return {f"{name}.{key}": one for name, one in self._layers.items() for key in one.layout.names}

    @property
    def experts(self) -> list[SpreadExperts]:
        """The experts of each layer, in the order of the model."""
        return list(self._layers.values())

    @property
    def replica_groups(self) -> tuple[Group, ...]:
        """The ranks that hold the same experts as this one."""
        return (self._replicas,)

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of all parameters that have one, of all experts; all ranks call it when reduced."""
        owners, whole = self._find_owners(), {}
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                grad = sharded.gather_whole(parameter.grad)
                if name in owners:
                    whole[name] = gather_experts(grad, owners[name].num_experts, self.group)
                else:
                    whole[name] = grad.clone()
        return whole

    def begin_step(self, num_micro_steps: int = 1) -> None:
        """As `moetrain.moe.parallel.ExpertParallel.begin_step`; choices recorded so far belong to steps before."""
        if self._counts_slots:
            self._slots = count_slots(self.module, self._layers.values(), self._guest_memory)
            self._counts_slots = False
        super().begin_step(num_micro_steps)
        self._passes.clear()
        self._recorded.clear()

    @contextmanager
    def record_choices(self) -> Iterator[PinnedChoices]:
        """Record the experts that the routers choose in one forward inside; usually one without gradient."""
        choices = PinnedChoices()
        with choices.record(self.module):
            yield choices
        self._recorded.append(choices)

    @contextmanager
    def replay_choices(self, choices: PinnedChoices) -> Iterator[None]:
        """Have the routers choose, in one forward inside, the experts that were recorded in another one.

        Everything else is computed afresh: gradients flow through today's probabilities of these experts. Of a recorded
        batch, `choices.part(begin, end, total)` are those of some of its sequences.

        Raises `RuntimeError` where there are more choices than were recorded, or for another number of tokens.
        """
        self._replayed = choices
        with choices.part(0, 1, 1).replay():
            yield

    def balance_loss(self) -> Tensor:
        """As `moetrain.moe.parallel.ExpertParallel.balance_loss`, on the scores of the family's own routers.

        With `accumulate="exact"` and several micro-steps, the choices of all of them (or of all but the first) are
        recorded in this step before the first backward, and replayed.

        Raises `ConfigError` where `expert_parallel` was not given `balance`.
        """
        if not self._has_balance:
            raise ConfigError("balance_loss: none was asked for; moetrain.hf.expert_parallel takes balance=")
        passes = [each for one in self._passes if (each := one()) is not None]
        self._passes.clear()
        return self._weigh_losses([each.router for each in passes], [each.collect_stats() for each in passes])

    def _count_ahead(self, balance: BalanceLoss) -> None:
        to_come = [each for each in self._recorded if each is not self._replayed]
        if len(to_come) != (self._num_micro_steps or 1) - 1:
            raise RuntimeError(
                f"balance.accumulate=exact: {len(to_come)} micro-steps to come were recorded by record_choices(), of "
                f"{self._num_micro_steps} in this step without the one that is under way"
            )
        for choices in to_come:
            balance.count_ahead(choices.counts)

    def join_without_tokens(self) -> Tensor:
        """Enter what the other ranks enter, on a rank that has no tokens for this forward; returns a loss of zero.

        transformers' own code refuses an empty batch, so such a rank calls this in place of the model, and `backward()`
        on what it returns.
        """
        first = next(iter(self._layers.values()))
        carry = torch.zeros((), device=first.gate_up.device, requires_grad=True)
        for one in self._layers.values():
            carry = one.run_empty(carry)
            self._keep_logits(one, carry.expand(0, one.num_experts), carry)
        return carry

    @torch.no_grad()
    def load_pretrained(self, folder: str | Path) -> None:
        """Fill the model from a folder of its family, one that `save_pretrained` wrote or from elsewhere; a rank reads
        its own experts alone, and dequantises them where they are quantised.

        Raises `ConfigError` for a folder that is not right, or is not of this model.
        """
        sources, owners = open_weights(folder).sources, self._find_owners()
        for name, target in self.module.state_dict().items():
            if name not in sources:
                raise ConfigError(f"{folder}: has no {name} of {type(self.module).__name__}")
            rows = owners[name].own_experts() if name in owners else None
            value = sources[name].read(rows)
            if value.shape != target.shape:
                raise ConfigError(f"{folder}: {name} is {tuple(value.shape)}, must be {tuple(target.shape)}")
            sharded.fill(target, value)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Save the model with all its experts, as `model.save_pretrained` does. All ranks call it; rank 0 writes."""
        state = self.full_state_dict()
        if self.group.rank == 0 and self._replicas.rank() == 0:
            inner: Any = self.module
            inner.save_pretrained(folder, state_dict=state, **options)

    def before_experts(self, one: SpreadExperts, hidden_TD: Tensor, top_k: int) -> None:
        """The experts call this at the beginning of a pass: measure costs at the first one."""
        if one.gate_up.is_meta:
            raise ConfigError(
                "model: is on the meta device; model.to_empty(device=...) and a load of weights come first"
            )
        self._gradients.look_for_ddp()
        self._gradients.scale_experts(one.parameters())
        if one.costs is None and self._needs_costs:
            shape = Layer(one.dim, one.hidden, one.num_experts, top_k, one.gate_up.dtype)
            one.kernel_choice = self._give_costs(one, shape, hidden_TD.device)

    def after_decision(self, one: SpreadExperts, decision: SpreadDecision) -> None:
        """The experts call this when they have planned, which a recompute does not."""
        logits_TE, probs_E = self._logits.get(one.name), None
        if one.router is not None and logits_TE is not None:
            probs_E = one.router.score(logits_TE.detach()).probs_TE.sum(0)
        self._statistics.add_forward(one.name, decision.plan, probs_E)
        self._plans[one.name] = decision.plan

    def _hear_logits(self, name: str, logits_TE: Tensor) -> None:
        self._logits[name] = logits_TE

    def _end_layer(self, one: SpreadExperts, module: nn.Module, args: Any, y_TD: Tensor) -> None:
        """A hook of the experts module, whose forward is over."""
        if not is_recomputed():
            self._keep_logits(one, self._logits.pop(one.name), y_TD)

    def _keep_logits(self, one: SpreadExperts, logits_TE: Tensor, y_TD: Tensor) -> None:
        """Keep what the losses need of a forward for as long as the graph of `y_TD` lives."""
        plan = self._plans.pop(one.name)
        if one.router is not None and y_TD.requires_grad:
            found = RouterPass(one.router, logits_TE, plan, self.group.rank)
            y_TD.register_hook(partial(_keep, found))
            self._passes = [each for each in self._passes if each() is not None] + [ref(found)]


def _keep(found: RouterPass, grad: Tensor) -> None:
    """A hook that does nothing: it holds what has to live as long as the graph."""


def _find_experts(model: nn.Module, ep: ExpertGroup) -> dict[str, Any]:
    """Return the modules to spread by name. Raises `ConfigError`."""
    kind = type(model).__name__
    found: dict[str, Any] = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not found:
        raise ConfigError(f"model: {kind} is not covered: none of its modules carries @use_experts_implementation")
    for name, module in found.items():
        if hasattr(module, "_moetrain"):
            raise ConfigError(f"model: {kind} is spread over ranks already")
        num_experts: Any = module.num_experts
        if num_experts % ep.size:
            raise ConfigError(f"group: its {ep.size} ranks do not divide the {num_experts} experts of {name}")
    for name, module in found.items():
        if name.endswith(SOMETIMES):
            module._moetrain_whole = True
    return {name: module for name, module in found.items() if not name.endswith(SOMETIMES)}


def _ends(name: str) -> list[int]:
    """Where the names of the modules around a module end in its own."""
    return [0, *(place for place, letter in enumerate(name) if letter == ".")]
