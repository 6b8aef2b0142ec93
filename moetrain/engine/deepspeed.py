"""The DeepSpeed engine: ZeRO 0, 1 and 2 for dense parameters and experts, optimizer states on the device or the host.

DeepSpeed keeps, reduces and updates two of the three kinds of parameters: dense ones over all ranks, experts over the
ranks that hold the same ones. Routers it never sees (`_Seen`): replicated in fp32, with an optimizer of their own.
Frozen parameters are in no optimizer; their masters, in fp32, are what a checkpoint holds of them.

Gradients are summed, not averaged, and clipped here: DeepSpeed's stage 0 averages the norms of ranks with different
experts, its bf16 optimizer leaves experts out. The model and its autograd graph are those of the native engine.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")  # else it guesses, aloud
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups as parallel

from moetrain.config import DeepSpeed, RunSpec
from moetrain.config.deepspeed import make_settings
from moetrain.distributed.mesh import Mesh
from moetrain.engine.base import Engine, adam_state, groups, guest_slots
from moetrain.engine.entries import MODEL, MOMENTS, Entries, Held, held, of_model
from moetrain.models.base import LanguageModel
from moetrain.models.initialise import initialise
from moetrain.moe.layer import LayerStats


class DeepSpeedEngine(Engine):
    """Owns the model and DeepSpeed's engine around it. `model` comes in on the meta device."""

    def __init__(self, model: LanguageModel, mesh: Mesh, config: RunSpec) -> None:
        super().__init__(model, mesh, config)
        options = config.engine
        assert isinstance(options, DeepSpeed)
        keep_hidden = config.train.recompute != "selective"
        model.shard_experts(mesh.ep, guest_slots(config, mesh), options.max_rows, keep_hidden)
        model.to_empty(device=mesh.device)
        model.tie_weights()
        initialise(model, config.train.seed)
        adam: dict[str, Any] = {
            "lr": config.optim.lr,
            "betas": config.optim.betas,
            "eps": config.optim.eps,
            "fused": True,
        }
        for parameter in model.expert_parameters():
            parameter.allreduce, parameter.group_name = False, _group_name(mesh)  # type: ignore[attr-defined]
        self._own = dict.fromkeys(model.replicated())  # in an order that is the same on every rank
        kinds = groups(model, config.optim.weight_decay)
        own = [g for g in kinds if g["kind"] == "replicated"]
        self._own_adam = torch.optim.AdamW(own or [{"params": []}], **adam)
        seen = [_group(g, mesh) for g in kinds if g["kind"] != "replicated"]
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's
        with _quiet():
            _join(mesh)
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=_Seen(model, mesh),
                optimizer=torch.optim.AdamW(seen, **adam),
                config=make_settings(config, mesh.world),
                dist_init_required=False,
            )
        self._stage = options.zero_stage
        self._adam = self._engine.basic_optimizer
        self._adam.state.clear()  # at stage 0 in bf16 DeepSpeed takes a step with zero gradients, decay included
        self._masters: dict[nn.Parameter, Tensor] = {}
        if self._stage == 0 and self.dtype == torch.bfloat16:
            for low, high in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
                self._masters |= dict(zip(low, high, strict=True))
        self._masters |= {p: p.detach().float() for p in model.parameters() if not p.requires_grad}
        if self.dtype == torch.bfloat16:  # masters are made of rounded weights
            for parameter, read in model.initial_values(config.train.seed):
                value = read(slice(0, len(parameter)))
                for part in self._kinds(False, parameter).values():
                    part.values.copy_(value.flatten()[part.begin : part.begin + len(part.values)])

    def forward(self, *args: Any) -> tuple[Tensor, list[LayerStats]]:
        return self._engine(*args)

    def _backward(self, loss: Tensor, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def _update(self, lr: float, scale: float) -> None:
        for group in (*self.optimizer.param_groups, *self._own_adam.param_groups):
            group["lr"] = lr
        if scale != 1.0:
            torch._foreach_mul_([grad for grad, _ in self._grads()], scale)
        self._engine.step()
        self._own_adam.step()
        self._own_adam.zero_grad()

    def _forget(self) -> None:
        rule = "under engine=deepspeed a step cannot be left out; a lower optim.lr may help"
        raise FloatingPointError(f"the gradient norm is not finite, nothing was updated; {rule}")

    def entries(self, optimizer: bool = True) -> Entries:
        if optimizer:
            self._make_states()
        return of_model(self.model, partial(self._kinds, optimizer))

    def _kinds(self, optimizer: bool, parameter: nn.Parameter) -> dict[str, Held]:
        kinds = (MODEL, *MOMENTS) if optimizer else (MODEL,)
        is_own = parameter in self._own or not parameter.requires_grad
        if is_own or self._stage == 0:
            master = self._masters.get(parameter, parameter)
            state = adam_state(self._own_adam if is_own else self._adam, master) if optimizer else {}
            return {kind: held(master if kind == MODEL else state[kind]) for kind in kinds}
        part = parameter._hp_mapping  # type: ignore[attr-defined]
        if part is None:  # it lies on other ranks
            return {}
        begin, shape = part.lp_fragment_address.start, tuple(parameter.shape)
        return {k: Held(shape, begin, part.get_hp_fragment(None if k == MODEL else k).detach()) for k in kinds}

    def _make_states(self) -> None:
        for optimizer in (self._adam, self._own_adam):
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                adam_state(optimizer, parameter)
        if self._stage > 0:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def restored(self, entries: Entries, step: int) -> None:
        for optimizer in (self._adam, self._own_adam):
            for state in optimizer.state.values():
                state["step"].fill_(step)
        for parameter, master in self._masters.items():
            parameter.copy_(master)
        if self._stage > 0:
            self.optimizer.update_lp_params()

    def _grads(self) -> Iterator[tuple[Tensor, int]]:
        world, optimizer = self.mesh.world, self.optimizer
        yield from ((p.grad, world) for p in self._own if p.grad is not None)
        if self._stage == 0:
            for parameter in self._engine.module.parameters():
                if parameter.grad is not None:
                    yield parameter.grad, world // self.mesh.ep.size if _is_expert(parameter) else world
        elif hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # bf16 at stage 1
            yield from ((grad, 1) for grad in optimizer.fp32_groups_gradient_flat_partition)
        elif optimizer.cpu_offload:
            yield from ((partition.grad, 1) for partition in optimizer.single_partition_of_fp32_groups)
        else:
            yield from ((grad, 1) for parts in optimizer.averaged_gradients.values() for grad in parts)


class _Seen(MoE):
    """What DeepSpeed sees: a model with experts, without routers, which stay fp32 and replicated."""

    def __init__(self, model: LanguageModel, mesh: Mesh) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.num_experts = model.routers[0].num_experts
        self._ep = mesh.ep.size
        self._hidden = set(model.replicated())

    def forward(self, *args: Any) -> tuple[Tensor, list[LayerStats]]:
        return self.model(*args)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return (pair for pair in super().named_parameters(*args, **kwargs) if pair[1] not in self._hidden)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        parallel._create_expert_and_data_parallel(self._ep)


def _group_name(mesh: Mesh) -> str:
    return f"ep_size_{mesh.ep.size}"


def _is_expert(parameter: nn.Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)


def _group(kind: dict, mesh: Mesh) -> dict:
    """A parameter group as DeepSpeed wants it."""
    if kind["kind"] == "expert":
        return {**kind, "moe": True, "name": _group_name(mesh)}
    return {**kind, "name": f"{kind['kind']}-{kind['weight_decay']}"}


def _join(mesh: Mesh) -> None:
    """Use the process group that there is. What DeepSpeed remembers of an earlier one is forgotten."""
    os.environ.setdefault("LOCAL_RANK", str(mesh.rank))  # DeepSpeed insists; torchrun has set it
    parallel._release_process_group_references()
    deepspeed.comm.comm.cdb = None
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would compile for a minute, for little
    deepspeed.init_distributed(dist_backend=mesh.backend, verbose=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed says nothing but warnings of its logger; what it prints is lost."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
