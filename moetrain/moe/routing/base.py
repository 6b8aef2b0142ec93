"""What a router is: which tokens go to which experts, and with what weight. All of it in fp32.

A router works in three steps, so that activation recompute can replay a choice instead of making it again:
`score` (differentiable), `choose` (no gradient), `weigh` (differentiable, given the choice).
`router(x_TD, carry, place) -> (Routing, carry)` is all three. `carry` is what some routers hand from layer to layer.

T tokens, D model width, E experts, K top-k, N selections (any number a token), B sequences.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moetrain.moe.options import RouterOptions


class Place(NamedTuple):
    """Where the tokens stand: T = B · `length`, sequence after sequence."""

    length: int
    sample_B: Tensor | None = None  # int64: the sequences' global numbers; None outside of training
    group_T: Tensor | None = None  # int64: each token's domain; None: unknown
    real_T: Tensor | None = None  # bool: tokens that are not padding; None: all


class Scores(NamedTuple):
    logits_TE: Tensor  # fp32
    probs_TE: Tensor  # fp32, rows sum to one


class Choice(NamedTuple):
    """Selections by token, ascending; a pair of token and expert at most once."""

    token_N: Tensor  # int64
    expert_N: Tensor  # int64
    chosen_N: Tensor | None = None  # bool: which of them are made, where their number is unknown to the host; None: all

    def within(self, real_T: Tensor) -> "Choice":
        """Returns the choice without the selections of tokens that are not `real_T` (bool)."""
        real_N = real_T[self.token_N]
        return self._replace(chosen_N=real_N if self.chosen_N is None else self.chosen_N & real_N)


class RecordedChoice(NamedTuple):
    """The experts that a router chose in an earlier forward, for every token; -1 for tokens that were not recorded."""

    expert_TK: Tensor  # int64, all of a token's or none
    is_complete: bool  # whether all tokens are recorded but padding

    def complete(self, num_chosen: int, choose: Callable[[], Choice]) -> Choice:
        """Return the recorded experts, and for tokens without those that `choose()` takes now.

        `num_chosen`: experts a token of this layer; there may be columns for more. What is chosen for padding means
        nothing. Raises `RuntimeError` where the router does not choose so many for every token.
        """
        expert_TK = self.expert_TK[:, :num_chosen]
        token_N = torch.arange(len(expert_TK), device=expert_TK.device).repeat_interleave(num_chosen)
        if self.is_complete:
            return Choice(token_N, expert_TK.flatten().clamp(min=0))
        own = choose()
        if len(own.expert_N) != len(token_N):
            raise RuntimeError(f"recorded choices: {num_chosen} experts a token, but the router chooses otherwise")
        is_missing_N = (expert_TK < 0).flatten()
        expert_N = torch.where(is_missing_N, own.expert_N, expert_TK.flatten())
        return Choice(token_N, expert_N, None if own.chosen_N is None else own.chosen_N | ~is_missing_N)

    def count_replayed(self, choice: Choice) -> Tensor:
        """Return int64 [] how many selections of `choice` are the recorded ones."""
        expert_TK = self.expert_TK[:, : len(choice.expert_N) // max(len(self.expert_TK), 1)]
        same_N = choice.expert_N == expert_TK.flatten()
        return (same_N if choice.chosen_N is None else same_N & choice.chosen_N).sum()


class Routing(NamedTuple):
    token_N: Tensor  # int64, ascending; a token may stand in it any number of times
    expert_N: Tensor  # int64
    weight_N: Tensor  # fp32, with gradient
    probs_TE: Tensor  # fp32, with gradient: what the balance loss sees

    def take(self, index_N: Tensor) -> "Routing":
        """Some of the selections."""
        token_N, expert_N, weight_N = (x.index_select(0, index_N) for x in self[:3])
        return Routing(token_N, expert_N, weight_N, self.probs_TE)


INIT_STD = 0.02  # of weights that are drawn where a module is built by itself


class Replicated(nn.Module):
    """A module whose own parameters are kept whole on every rank, in fp32; their gradients are summed over ranks."""

    init_std: float | None = None  # of its matrices; None: that of the model

    @torch.no_grad()
    def reset_parameters(self, std: float = INIT_STD) -> None:
        """Draw all parameters from a normal distribution of this standard deviation, or of the module's own.

        On the meta device nothing is drawn.
        """
        for parameter in self.parameters():
            if not parameter.is_meta:
                parameter.normal_(0.0, std if self.init_std is None else self.init_std)


class Router(Replicated):
    """The base of all routers. A subclass has `logits` and `choose`; `score` and `weigh` follow from the options."""

    Options: ClassVar[type[RouterOptions]] = RouterOptions  # the dataclass of its options
    normalises: ClassVar[bool] = True  # what router.normalise=null means for more than one expert a token
    warning: ClassVar[str] = ""  # said when a run starts

    def __init__(self, dim: int, num_experts: int, options: RouterOptions | None = None, index: int = 0) -> None:
        """`options`: None for the defaults. `index`: how many routers come before it in the model.

        A subclass makes its parameters and then calls `reset_parameters`.
        """
        super().__init__()
        options = options or self.Options()
        self.num_experts, self.options, self.index = num_experts, options, index
        several = self.normalises and options.top_k > 1  # one weight, normalised, is a constant: nothing to learn from
        self.normalise = several if options.normalise is None else options.normalise
        self.k = options.top_k  # selections a token, now
        self.loss_weights: tuple[float, ...] | None = None  # [E] of the balance loss's terms; None: all one
        self.bias: Tensor | None  # fp32 [E], added to the gates where experts are chosen, nowhere else
        self.register_buffer("bias", None)
        self.held: Tensor | None  # fp32 [E], shares of selections in the last optimizer step
        self.register_buffer("held", None)

    @classmethod
    def shared(cls, options: RouterOptions) -> Replicated | None:
        """What all layers' routers share, if anything: a module whose call makes the first one's `carry`."""
        return None

    def at_step(self, step: int, steps: int, seed: int) -> None:
        """Follow a schedule: called before every optimizer step (`step` of `steps` are done), and before evaluation
        and generation. `seed`: the run's, for what is random."""

    def forward(self, x_TD: Tensor, carry: Any = None, place: Place | None = None) -> tuple[Routing, Any]:
        scores, carry = self.score(x_TD, carry, place)
        choice = self.choose(scores, place)
        routing = self.weigh(scores, choice)
        return routing if choice.chosen_N is None else routing.take(choice.chosen_N.nonzero()[:, 0]), carry

    def score(self, x_TD: Tensor, carry: Any = None, place: Place | None = None) -> tuple[Scores, Any]:
        logits_TE, carry = self.logits(x_TD, carry, place)
        if self.options.skew:
            hot = torch.arange(self.num_experts, device=logits_TE.device) < self.options.top_k
            logits_TE = logits_TE + self.options.skew * hot
        return self.scores_of(logits_TE), carry

    def scores_of(self, logits_TE: Tensor) -> Scores:
        if self.options.scores == "softmax":
            return Scores(logits_TE, logits_TE.softmax(-1))
        gates_TE = logits_TE.sigmoid()
        return Scores(logits_TE, gates_TE / gates_TE.sum(-1, keepdim=True))

    def logits(self, x_TD: Tensor, carry: Any, place: Place | None) -> tuple[Tensor, Any]:
        """[T, D] of any dtype -> [T, E] fp32, and what the next router gets as `carry`."""
        raise NotImplementedError

    def choose(self, scores: Scores, place: Place | None = None) -> Choice:
        raise NotImplementedError

    def gates(self, scores: Scores) -> Tensor:
        """[T, E] what weights are made of: softmax or sigmoid of the logits, with gradient."""
        return scores.probs_TE if self.options.scores == "softmax" else scores.logits_TE.sigmoid()

    def weigh(self, scores: Scores, choice: Choice) -> Routing:
        """The chosen experts' gates, a token's summing to one if `normalise`, times `scaling`; else zero."""
        token_N, expert_N, chosen_N = choice
        gate_TE = self.gates(scores)
        place_N = token_N * self.num_experts + expert_N
        made_TE = torch.zeros_like(gate_TE, dtype=torch.bool)
        made_TE.view(-1).scatter_(
            0, place_N, torch.ones_like(place_N, dtype=torch.bool) if chosen_N is None else chosen_N
        )
        weight_TE = torch.where(made_TE, gate_TE, 0.0)
        if self.normalise:
            weight_TE = weight_TE / weight_TE.sum(-1, keepdim=True).clamp(min=1e-20)
        weight_N = weight_TE.view(-1).index_select(0, place_N)
        return Routing(token_N, expert_N, self.options.scaling * weight_N, scores.probs_TE)
