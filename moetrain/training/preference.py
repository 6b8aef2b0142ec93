"""Preference pairs: the loss that prefers the chosen answer, and the log-probabilities that it is relative to.

Rafailov et al., "Direct Preference Optimization" (2023), Eq. 7. The implicit reward of an answer is β times its
log-ratio, log p(answer) of the model less that of the reference, which is the model that the run begins with. A batch
has the chosen and the rejected conversations of the same pairs in rows 2n and 2n + 1.

B sequences, L positions, P pairs of a micro-step, N pairs of a split.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from moetrain.config import Dpo
from moetrain.data.loader import Sequences
from moetrain.distributed.comm import all_reduce_sum
from moetrain.observe.metrics import DPO, HELD_OUT_DPO

SUMS = tuple(DPO)  # of `Judged`


class SplitReference(NamedTuple):
    """Of the pairs of a split, chosen and rejected."""

    logp_N2: NDArray[np.float64]  # log p of each answer under the reference
    size_N2: NDArray[np.int64]  # tokens of each conversation as it was read; 0: it was not


Reference = Mapping[str, SplitReference]  # by split


class PairBatch(NamedTuple):
    """Where the answers of a micro-step's pairs are."""

    number_P: NDArray[np.int64]  # of each pair in its split
    source: Tensor  # int64 [targets] places in the flattened nats
    slot: Tensor  # int64 [targets] places in [2, P, S]: the tokens of each answer, and then zeros
    length_2P: Tensor  # fp64 [2, P] targets of each answer
    longest: int  # S

    @classmethod
    def from_sequences(cls, share: Sequences, device: torch.device) -> "PairBatch":
        """Find the answers in rows 2n, chosen, and 2n + 1, rejected."""
        assert share.positions is not None
        length = share.tokens.shape[1] - 1
        row, number = share.positions // max(length, 1), share.document[:, :-1].reshape(-1)[share.positions]
        named = np.stack([row // 2, number], axis=1)
        pairs, pair = np.unique(named, axis=0, return_inverse=True)
        answer = (row % 2) * len(pairs) + pair.reshape(-1)
        order = np.argsort(answer, kind="stable")
        sizes = np.bincount(answer, minlength=2 * len(pairs))
        longest = max(int(sizes.max(initial=0)), 1)
        within = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        found = (share.positions[order], answer[order] * longest + within, sizes.reshape(2, -1).astype(np.float64))
        source, slot, length_2P = (torch.from_numpy(x).to(device) for x in found)
        return cls(pairs[:, 1], source, slot, length_2P, longest)

    def sum_logp(self, nats: Tensor) -> Tensor:
        """Return fp64 [2, P]: log p of each answer, from the nats [B, L] of its tokens. Sums are in one order."""
        values = nats.flatten().index_select(0, self.source).double()
        room = values.new_zeros(2, len(self.number_P), self.longest)
        return -room.put(self.slot, values).sum(-1)


class Judged(NamedTuple):
    """The pairs of a micro-step under the model and the reference."""

    loss: Tensor  # fp64, summed over the pairs
    sums: Tensor  # fp64 [8] without gradient: SUMS, over the pairs


def judge_pairs(nats: Tensor, pairs: PairBatch, reference: SplitReference, options: Dpo) -> Judged:
    """Compare the answers of each pair; `nats` [B, L]: -log p of the tokens, zero where nothing is to be predicted."""
    logp_2P = pairs.sum_logp(nats)
    reference_2P = torch.from_numpy(reference.logp_N2[pairs.number_P].T.copy()).to(logp_2P.device)
    ratio_2P = logp_2P - reference_2P
    loss_P = compute_loss(ratio_2P, pairs.length_2P, options)
    reward_2P = options.beta * ratio_2P.detach()
    margin_P = reward_2P[0] - reward_2P[1]
    likelier_P = (logp_2P[0] > logp_2P[1]).double()
    each = [loss_P.detach(), (margin_P > 0).double(), margin_P, *reward_2P, likelier_P, *logp_2P.detach()]
    return Judged(loss_P.sum(), torch.stack(each).sum(1))


def compute_loss(ratio_2P: Tensor, length_2P: Tensor, options: Dpo) -> Tensor:
    """Return [P] the loss of each pair from the log-ratios of its answers and their numbers of tokens.

    Δ is the log-ratio of the chosen answer less that of the rejected one. sigmoid: Eq. 7, with label smoothing ε
    conservative DPO, -(1 - ε) log σ(βΔ) - ε log σ(-βΔ). sigmoid_norm: the same with log-ratios per token. hinge:
    max(0, 1 - βΔ) (Zhao et al., SLiC-HF, 2023). ipo: (Δ - 1 / 2β)², log-ratios per token (Azar et al., 2023, Eq. 17).
    """
    if options.loss in ("ipo", "sigmoid_norm"):
        ratio_2P = ratio_2P / length_2P
    delta_P = ratio_2P[0] - ratio_2P[1]
    if options.loss == "ipo":
        return (delta_P - 1 / (2 * options.beta)).square()
    if options.loss == "hinge":
        return torch.relu(1 - options.beta * delta_P)
    logit_P, smoothing = options.beta * delta_P, options.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logit_P) - smoothing * F.logsigmoid(-logit_P)


class HeldOutPairs:
    """What an evaluation finds of pairs, summed over its micro-steps and ranks."""

    def __init__(self, reference: SplitReference, options: Dpo, device: torch.device) -> None:
        self._reference, self._options = reference, options
        self._sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=device)

    def add(self, nats: Tensor, part: Sequences) -> None:
        """Count the pairs of a part, whose nats [B, L] are given."""
        pairs = PairBatch.from_sequences(part, nats.device)
        sums = judge_pairs(nats, pairs, self._reference, self._options).sums
        self._sums += torch.cat([sums, sums.new_tensor([len(pairs.number_P)])])

    def collect(self) -> dict[str, float]:
        """Return the metrics, means over all pairs. All ranks call it."""
        *sums, count = all_reduce_sum(self._sums).tolist()
        return {metric: sums[SUMS.index(name)] / max(count, 1) for name, metric in HELD_OUT_DPO.items()}
