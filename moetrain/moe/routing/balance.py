"""The router losses of one optimizer step: load balance over the global batch and its relatives, z-loss, entropy.

Demons in the Detail (Qwen, ACL 2025): LBL = N_E · Σ_i f̄_i P̄_i, with f̄ the share of selections that went to expert i
and P̄ the mean probability. f̄ is a constant for autograd, so one all-reduce of counts for all layers is all the
communication it takes. Under gradient accumulation the counts of the global batch are, by `balance.accumulate`,

- `buffer`: those of the micro-steps so far (the paper's Alg. 1; exact at the last micro-step only),
- `exact`: those of the whole global batch, from a counting pass before any gradient,
- `hold`: those of the last optimizer step (ours); at the very first step those of `buffer`.

Every rank returns its share of a loss: summed over ranks and micro-steps, with P divided by the tokens of the global
batch, the shares are the loss. Gradients are summed over ranks, never averaged.

Padding counts nowhere: neither in the frequencies, nor in P, nor in the other losses, nor as a token of the batch.

T tokens here, L layers, E experts of a layer, N experts of all layers, one layer after another: layers may differ in
E. B sequences, G groups of experts.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moetrain.distributed.comm import all_reduce_sum
from moetrain.moe.layer import LayerStats
from moetrain.moe.options import BalanceOptions
from moetrain.moe.planning import default_home
from moetrain.moe.routing import Choice


class BalancedRouter(Protocol):
    """What the losses need of a router: a `moetrain.moe.routing.Router`, or that of another library."""

    num_experts: int
    loss_weights: tuple[float, ...] | None

    @property
    def bias(self) -> Tensor | None: ...
    @bias.setter
    def bias(self, value: Tensor) -> None: ...
    @property
    def held(self) -> Tensor | None: ...
    @held.setter
    def held(self, value: Tensor) -> None: ...


class Losses(NamedTuple):
    """Of one micro-step on this rank."""

    weighted: Tensor  # with gradient: the sum of all, each times its coefficient; to be added to the loss
    shares: dict[str, Tensor]  # of each loss before its coefficient, summed over layers; no gradient
    entropy_L: Tensor  # Σ_t entropy of the token's probabilities, nats; no gradient
    z_L: Tensor  # Σ_t logsumexp(logits_t)²; no gradient


class BalanceLoss:
    """The router losses of one optimizer step, micro-step by micro-step; then what routers keep of it."""

    def __init__(
        self,
        options: BalanceOptions,
        routers: Sequence[BalancedRouter],
        tokens_in_batch: int,
        length: int,
        groups: int = 1,
        reduce: Callable[[Tensor], Tensor] = all_reduce_sum,
    ) -> None:
        """`routers`: in the order of the statistics. `tokens_in_batch`: of the global batch,
        without padding; `length`: of a sequence, with it.

        `groups`: how many the experts of a layer form for the device loss, where `balance.device_groups` is null.
        `reduce`: sums counts in place over all ranks that share the global batch.
        """
        self._options, self._routers = options, routers
        self._tokens, self._length = tokens_in_batch, length
        self._groups, self._reduce = options.device_groups or groups, reduce
        self._sizes: list[int] = []
        self._ahead_N: Tensor | None = None  # counts of this rank in micro-steps to come
        self._seen_N: Tensor | None = None  # of all ranks so far; with `exact`, in the whole batch

    @property
    def counts(self) -> list[Tensor]:
        """int64 [E] of every layer: selections on all ranks in the micro-steps so far."""
        assert self._seen_N is not None, "losses() comes first"
        return list(self._seen_N.split(self._sizes))

    @property
    def looks_ahead(self) -> bool:
        """Whether the micro-steps after the first are counted before it: they go through `foresee`."""
        return self._options.scope == "global" and self._options.accumulate == "exact"

    def foresee(self, stats: Sequence[LayerStats]) -> list[Choice]:
        """Count a micro-step to come; the choices that its forward is to replay. No communication."""
        self.count_ahead([s.counts_E for s in stats])
        return [s.choice for s in stats]

    def count_ahead(self, counts: Sequence[Tensor]) -> None:
        """Add the selections of a micro-step to come on this rank, int64 [E] of every layer. No communication."""
        counts_N = torch.cat(list(counts))
        self._ahead_N = counts_N if self._ahead_N is None else self._ahead_N + counts_N

    def losses(self, stats: Sequence[LayerStats]) -> Losses:
        """Of the next micro-step. All ranks call it: it enters one collective, or with `exact` one a step."""
        options, tokens = self._options, self._tokens
        f_N, local_N = self.synchronise(stats)
        probs = [s.real_scores.probs_TE for s in stats]
        prob_N = torch.cat([probs_TE.sum(0) for probs_TE in probs]) / tokens
        weight_N = self._weights(local_N.device)
        decided = bool(options.entropy_coefficient)  # else its graph, of [T, E] in every layer, is spared
        entropy_L = torch.stack([entropy(probs_TE if decided else probs_TE.detach()) for probs_TE in probs])
        z_L = z_sums(stats)
        terms = {
            "balance": (options.coefficient, (weight_N * f_N * prob_N).sum()),
            "z": (options.z_coefficient, z_L.sum() / tokens),
        }
        if options.micro_fraction:
            micro = (weight_N * frequencies(local_N, self._sizes) * prob_N).sum()
            terms["micro_balance"] = (options.coefficient * options.micro_fraction, micro)
        if options.sequence_coefficient:
            sequence = sequence_loss(stats, weight_N.split(self._sizes), self._length, tokens)
            terms["sequence"] = (options.sequence_coefficient, sequence)
        if options.device_coefficient:
            homes = [s.num_experts for s in stats]
            device = (device_weights(f_N, self._sizes, homes, self._groups) * prob_N).sum()
            terms["device"] = (options.device_coefficient, device)
        if options.entropy_coefficient:
            terms["entropy"] = (options.entropy_coefficient, entropy_L.sum() / tokens)
        weighted = torch.stack([coefficient * value for coefficient, value in terms.values()]).sum()
        shares = {name: value.detach() for name, (_, value) in terms.items()}
        return Losses(weighted, shares, entropy_L.detach(), z_L.detach())

    @torch.no_grad()
    def finish(self) -> None:
        """After the update of the weights, once an optimizer step: what routers keep for the next one."""
        options = self._options
        if options.bias != "none":
            for router, counts_E in zip(self._routers, self.counts, strict=True):
                assert router.bias is not None, "add_buffers() comes first"
                router.bias += options.bias_rate * bias_step(counts_E, options.bias)
        if options.accumulate == "hold":
            assert self._seen_N is not None, "losses() comes first"
            f_N = frequencies(self._seen_N, self._sizes)
            for router, f_E in zip(self._routers, f_N.split(self._sizes), strict=True):
                assert router.held is not None, "add_buffers() comes first"
                router.held.copy_(f_E)

    def synchronise(self, stats: Sequence[LayerStats]) -> tuple[Tensor, Tensor]:
        """(fp32 [N] f̄ of the next micro-step, int64 [N] its counts on this rank). All the communication there is."""
        self._sizes = [len(s.counts_E) for s in stats]
        local_N = torch.cat([s.counts_E for s in stats])
        return self._frequencies(local_N), local_N

    def _frequencies(self, local_N: Tensor) -> Tensor:
        if self.looks_ahead:
            if self._seen_N is None:
                self._seen_N = self._reduce(local_N.clone() if self._ahead_N is None else local_N + self._ahead_N)
            return frequencies(self._seen_N, self._sizes)
        counts_N = self._reduce(local_N.clone())
        self._seen_N = counts_N if self._seen_N is None else self._seen_N + counts_N
        basis = {"micro": local_N, "data": counts_N, "global": self._seen_N}
        f_N = frequencies(basis[self._options.scope], self._sizes)
        if self._options.scope == "global" and self._options.accumulate == "hold":
            held_N = torch.cat([router.held for router in self._routers if router.held is not None])
            f_N = torch.where(held_N.sum() > 0, held_N, f_N)
        return f_N

    def _weights(self, device: torch.device) -> Tensor:
        """fp32 [N]: the number of experts of the layer, times what routers with experts of several kinds say."""
        given = tuple(router.loss_weights for router in self._routers) or (None,) * len(self._sizes)
        return _weights(tuple(self._sizes), given, device)


def add_buffers(routers: Sequence[BalancedRouter], options: BalanceOptions) -> None:
    """Give the routers the buffers that the options need; zeros, or on the meta device to be filled with them."""
    for router in routers:
        if options.bias != "none":
            router.bias = torch.zeros(router.num_experts)
        if options.accumulate == "hold":
            router.held = torch.zeros(router.num_experts)


def frequencies(counts_N: Tensor, sizes: Sequence[int]) -> Tensor:
    """fp32 [N] shares of selections, summing to one in every layer, or all zero where nothing was selected."""
    layer_N = _layers(tuple(sizes), counts_N.device)
    total_L = torch.zeros(len(sizes), dtype=torch.float64, device=counts_N.device)
    total_L.index_add_(0, layer_N, counts_N.double())
    return (counts_N / total_L.clamp(min=1)[layer_N]).float()


def bias_step(counts_E: Tensor, rule: str) -> Tensor:
    """fp32 [E]: how the bias changes for a rate of one (Auxiliary-Loss-Free Load Balancing, Wang et al., 2024).

    The error of expert i is its missing load in mean loads, 1 - c_i / c̄; the rule takes it or its sign. In mean loads,
    not in tokens, so that a rate means the same at every batch size.
    """
    counts_E = counts_E.double()
    error_E = 1 - counts_E / counts_E.mean().clamp(min=1e-9)
    return (error_E.sign() if rule == "sign" else error_E).float()


def z_sums(stats: Sequence[LayerStats]) -> Tensor:
    """[L] Σ_t logsumexp(logits_t)²: over the tokens of the batch, what the z-loss is the mean of (ST-MoE, Eq. 5)."""
    squares = ((s.scores.logits_TE.logsumexp(-1).square(), s.real_T) for s in stats)
    return torch.stack([(z_T if real_T is None else z_T * real_T).sum() for z_T, real_T in squares])


def entropy(probs_TE: Tensor) -> Tensor:
    """Σ_t entropy of the token's probabilities, nats. Its gradient is finite where a probability is zero."""
    return -(probs_TE * probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()).sum()


def sequence_loss(stats: Sequence[LayerStats], weights: Sequence[Tensor], length: int, tokens_in_batch: int) -> Tensor:
    """This share of Σ_layers mean_b N_E Σ_i f_bi P_bi, both within sequence b (DeepSeek-V3, Eq. 17 to 20).

    `weights`: N_E of every layer, [E] each; `length`: tokens of a sequence.
    """
    total = []
    for s, weight_E in zip(stats, weights, strict=True):
        probs_BE = s.real_scores.probs_TE.unflatten(0, (-1, length)).sum(1)
        token_N, expert_N, chosen_N = s.choice
        ones_N = torch.ones_like(expert_N) if chosen_N is None else chosen_N.to(expert_N.dtype)
        counts_BE = torch.zeros(probs_BE.shape, dtype=torch.int64, device=expert_N.device)
        counts_BE.view(-1).scatter_add_(0, token_N // length * probs_BE.shape[1] + expert_N, ones_N)
        f_BE = counts_BE / counts_BE.sum(1, keepdim=True).clamp(min=1)
        total.append((weight_E * f_BE * probs_BE).sum())
    return torch.stack(total).sum() / tokens_in_batch


def device_weights(f_N: Tensor, sizes: Sequence[int], homes: Sequence[int], groups: int) -> Tensor:
    """fp32 [N] w with Σ_i w_i P_i = Σ_g f'_g P'_g, summed over layers (DeepSeekMoE, Eq. 15 to 17).

    A group's experts have one home among `groups` devices. f'_g is the mean of N_E · f_i in it, P'_g the sum of P_i.
    Only the first `homes` experts of a layer have a home; f is their share of the selections that have one.
    """
    group_N, scale_N = _groups(tuple(sizes), tuple(homes), groups, f_N.device)
    f_G = torch.zeros(len(sizes) * groups + 1, device=f_N.device).index_add_(0, group_N, f_N)
    total_L = f_G[:-1].view(len(sizes), groups).sum(1).clamp(min=torch.finfo(f_N.dtype).tiny)
    return scale_N * f_G[group_N] / total_L[_layers(tuple(sizes), f_N.device)]


@lru_cache(maxsize=8)
def _layers(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 [N] the layer of each expert."""
    return torch.tensor([layer for layer, size in enumerate(sizes) for _ in range(size)], device=device)


@lru_cache(maxsize=8)
def _weights(sizes: tuple[int, ...], given: tuple[tuple[float, ...] | None, ...], device: torch.device) -> Tensor:
    rows = [weights or (1.0,) * size for weights, size in zip(given, sizes, strict=True)]
    return torch.tensor([size * w for size, row in zip(sizes, rows, strict=True) for w in row], device=device)


@lru_cache(maxsize=8)
def _groups(sizes: tuple[int, ...], homes: tuple[int, ...], groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """([N] each expert's group, counted over layers, the last one for those without a home; [N] N_E / its size)."""
    group, scale = [], []
    for layer, (size, num_homes) in enumerate(zip(sizes, homes, strict=True)):
        home = default_home(num_homes, groups).tolist()
        group += [layer * groups + g for g in home] + [len(sizes) * groups] * (size - num_homes)
        scale += [num_homes / home.count(g) for g in home] + [0.0] * (size - num_homes)
    return torch.tensor(group, device=device), torch.tensor(scale, device=device)
