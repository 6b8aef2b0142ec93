"""Gradients of a module whose experts are spread over ranks: scaled, summed over ranks, clipped by their exact norm.

An expert's gradient is complete at its home, that of the sum of the losses of all ranks in the group; it differs from
rank to rank, and ranks of `replicas` hold the same experts. All other parameters are whole on every rank, or sharded by
FSDP2.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from moetrain.distributed import sharded
from moetrain.distributed.comm import Group, all_reduce_sum
from moetrain.distributed.mesh import ExpertGroup
from moetrain.distributed.sharded import global_norm

Reduction = Literal["auto", "sum", "mean"]


class SpreadGradients:
    """Combines the gradients of one module over its ranks; all ranks call each method that communicates."""

    def __init__(
        self,
        module: nn.Module,
        group: ExpertGroup,
        replicas: Group,
        reduction: Reduction,
        find_experts: Callable[[], set[nn.Parameter]],
    ) -> None:
        """Note what the gradients are of.

        Arguments:
            module, group, replicas: the module, the ranks of its experts, and those that hold the same experts.
            reduction: whether gradients are of the sum or the mean of all ranks' losses; "auto": of the mean under DDP
                or FSDP2, else of the sum.
            find_experts: returns the parameters of the experts on this rank.
        """
        self._module, self._group, self._replicas, self._reduction = module, group, replicas, reduction
        self._find_experts = find_experts
        self._is_under_ddp = False
        self._scaled = WeakTensorKeyDictionary()

    def take_experts(self) -> None:
        """Scale the gradients of the experts here, and have DDP leave them alone; call it when they are spread."""
        experts = self._find_experts()
        self.scale_experts(self._list_experts())
        names = [name for name, p in self._module.named_parameters() if p in experts]
        ignored = getattr(self._module, "_ddp_params_and_buffers_to_ignore", [])
        self._module._ddp_params_and_buffers_to_ignore = [*ignored, *names]  # type: ignore[assignment]

    def scale_experts(self, parameters: Iterable[nn.Parameter]) -> None:
        """Scale the gradients of these experts, once, however often it is called: every forward of a layer does, for
        `to_empty` and `load_state_dict(assign=True)` put other parameters in the place of those that were taken."""
        for parameter in parameters:
            if parameter not in self._scaled:
                parameter.register_hook(self._scale)
                self._scaled[parameter] = None

    def look_for_ddp(self) -> None:
        """Note whether a forward of DDP is running; every forward of a layer calls it."""
        active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        self._is_under_ddp = self._is_under_ddp or active is not None

    @property
    def num_ranks(self) -> int:
        """Ranks whose losses the gradients are of."""
        return self._group.size * self._replicas.size()

    @property
    def averages(self) -> bool:
        """Whether gradients are those of the mean of all ranks' losses, not of their sum."""
        if self._reduction != "auto":
            return self._reduction == "mean"
        return self._is_under_ddp or sharded.is_fsdp(self._module)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks in place, and return it."""
        return all_reduce_sum(tensor, self._group.rows, self._replicas)

    def reduce_experts(self) -> None:
        """Sum the experts' gradients over the ranks that hold the same experts."""
        for parameter in self._list_experts():
            if self._replicas.size() > 1 and len(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                all_reduce_sum(parameter.grad, self._replicas)

    def reduce_dense(self) -> None:
        """Sum, or average, the gradients of all parameters but the experts' over the ranks.

        Raises `RuntimeError` where a parameter is sharded by FSDP2, which reduces them itself.
        """
        experts = self._find_experts()
        dense = [p for p in self._module.parameters() if p.requires_grad and p not in experts]
        together: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = defaultdict(list)
        for parameter in dense:
            if sharded.is_sharded(parameter):
                raise RuntimeError("reduce_dense_gradients() is for modules without FSDP2, which does it itself")
            together[parameter.device, parameter.dtype].append(parameter)
        for parameters in together.values():
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = self.sum_over_ranks(torch.cat([grad.flatten() for grad in grads]))
            if self.averages:
                flat /= self.num_ranks
            for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                parameter.grad = part.view_as(parameter)

    @torch.no_grad()
    def clip(self, max_norm: float) -> float:
        """Return the norm over all parameters of the module, each expert's and each dense one counted once, and scale
        all gradients so that it is at most `max_norm`; where it is not finite, leave them as they are."""
        experts, grads = self._find_experts(), []
        for parameter in self._module.parameters():
            if parameter.grad is not None:
                if parameter in experts:
                    copies = self._replicas.size()
                else:
                    copies = self.num_ranks // sharded.count_shards(parameter)
                grads.append((sharded.local_part(parameter.grad), copies))
        device = next(self._module.parameters()).device
        norm = global_norm(grads, device, self.sum_over_ranks)
        if max_norm < norm < float("inf"):
            torch._foreach_mul_([grad for grad, _ in grads], max_norm / (norm + 1e-6))
        return norm

    def _scale(self, grad: Tensor) -> Tensor:
        return grad / self.num_ranks if self.averages else grad

    def _list_experts(self) -> Sequence[nn.Parameter]:
        """Return the experts' parameters in the order of the module, which is the same on every rank."""
        experts = self._find_experts()
        return [p for p in self._module.parameters() if p in experts]
