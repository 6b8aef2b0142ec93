"""The logits of a family's own router, and the probabilities that it gives to the experts.

Every family of transformers has its router beside its experts, as `gate` or `router`, and returns the logits first.
What it makes of them differs: a softmax, a sigmoid, a function that its config names, or nothing more. Sigmoids are
divided by their sum, as the balance loss of DeepSeek-V3 (Eq. 18) has it.

T tokens here, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moetrain.common.errors import ConfigError
from moetrain.moe.clock import Clock
from moetrain.moe.layer import LayerStats
from moetrain.moe.options import BalanceOptions
from moetrain.moe.planning.plan import Plan
from moetrain.moe.routing.base import Choice, Scores

NAMES = ("gate", "router")  # of a router beside its experts
FUNCTIONS = ("score_fn", "scoring_function")  # attributes of routers whose function is the config's
SIGMOID = {
    "afmoe",
    "axk1",
    "axk2",
    "bailing_hybrid",
    "beam",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "dots3_note",
    "exaone_moe",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm5_next",
    "glm_moe_dsa",
    "hy_v3",
    "hy_v4",
    "hy_v4_vl",
    "inkling",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lfm2_moe",
    "mimo_v2_flash",
    "minimax_m2",
    "minimax_m3_vl",
    "nemotron_h",
    "solar_open",
}
SOFTMAX = {
    "aria",
    "deepseek_ocr2",
    "deepseek_v2",
    "ernie4_5_moe",
    "ernie4_5_vl_moe",
    "flex_olmo",
    "gpt_oss",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "jamba",
    "lara_mini",
    "mellum",
    "minimax",
    "mistral4",
    "mistral_large4",
    "mixtral",
    "olmoe",
    "openai_privacy_filter",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_vl_moe",
    "qwen4_exp",
    "unlimited_ocr",
}
PROBABILITIES = {"gemma4", "diffusion_gemma"}  # return them in place of the logits
REFUSED = {"zaya": "tokens that skip the experts are given to expert 0"}
BIASES = ("e_score_correction_bias", "expert_bias")  # what the choice adds to the scores


class FamilyRouter:
    """The router of one experts module: its logits, its probabilities and its bias."""

    loss_weights: tuple[float, ...] | None = None  # as `moetrain.moe.routing.Router` has them

    def __init__(self, name: str, module: nn.Module, num_experts: int, bias: tuple[nn.Module, str] | None) -> None:
        """`name`: of the router in the model; `bias`: where the bias of its choice is.

        Raises `ConfigError` where its scores are not known.
        """
        self.name, self.module, self.num_experts = name, module, num_experts
        self.held: Tensor | None = None  # fp32 [E], shares of selections in the last optimizer step
        self._bias = bias
        self._activate = _find_function(name, module)
        self.has_logits = _family(module) not in PROBABILITIES

    @property
    def bias(self) -> Tensor | None:
        """What the family adds to the scores of each expert for the choice, E elements; None: it has no such thing."""
        found: Tensor | None = None if self._bias is None else getattr(*self._bias)
        return found

    @bias.setter
    def bias(self, value: Tensor) -> None:
        assert self._bias is not None
        setattr(*self._bias, value)

    def score(self, logits_TE: Tensor) -> Scores:
        """Return the logits and the probabilities, in fp32 (of fp64: in fp64), with gradient."""
        if logits_TE.dtype != torch.float64:
            logits_TE = logits_TE.float()
        probs_TE = self._activate(logits_TE)
        return Scores(logits_TE, probs_TE)

    def watch(self, tell: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `tell(logits [T, E])` in every forward of the router, but not in a recompute; the handle ends it.

        Where the family returns probabilities in place of the logits, these are told.
        """

        def hear(module: nn.Module, args: Any, output: Any) -> None:
            if not is_recomputed():
                tell(output[0].reshape(-1, output[0].shape[-1]))

        return self.module.register_forward_hook(hear)


@dataclass(eq=False)
class RouterPass:
    """What the losses need of one forward of a router, in the middle of which probabilities must not be computed: a
    recompute would have to do so too."""

    router: FamilyRouter
    logits_TE: Tensor  # with gradient
    plan: Plan
    rank: int  # whose counts are meant

    def collect_stats(self) -> LayerStats:
        """Return the scores and counts as the losses take them; they look neither at the choice nor at times."""
        counts_E = torch.from_numpy(self.plan.counts[self.rank]).to(self.logits_TE.device)
        choice = Choice(counts_E.new_empty(0), counts_E.new_empty(0))
        scores, clock = self.router.score(self.logits_TE), Clock(self.logits_TE.device)
        return LayerStats(scores, choice, counts_E, counts_E, self.plan, 0, clock)


def is_recomputed() -> bool:
    """Whether a backward is computing a forward again, here and now."""
    return torch._C._current_graph_task_id() != -1


def prepare_routers(routers: Sequence[FamilyRouter], options: BalanceOptions) -> None:
    """Give the routers what the losses keep in them. Raises `ConfigError` for losses that they do not have."""
    if options.sequence_coefficient:
        raise ConfigError("balance.sequence_coefficient: not for models of transformers, whose sequences are not known")
    for router in routers:
        kind = f"{type(router.module).__name__} at {router.name}"
        if options.z_coefficient and not router.has_logits:
            raise ConfigError(f"balance.z_coefficient: {kind} gives probabilities, not logits")
        if options.bias != "none" and router.bias is None:
            raise ConfigError(f"balance.bias={options.bias}: {kind} has no {' or '.join(BIASES)}")
        if options.accumulate == "hold":
            router.held = torch.zeros(router.num_experts, device=next(router.module.parameters()).device)


def find_router(model: nn.Module, name: str) -> FamilyRouter:
    """Return the router beside the experts module called `name` in `model`.

    Raises `ConfigError` where there is none, or where it is of a family whose probabilities are not known.
    """
    outer = name.rpartition(".")[0]
    block, experts = model.get_submodule(outer), model.get_submodule(name)
    num_experts: Any = experts.num_experts
    for child in NAMES:
        router = getattr(block, child, None)
        if isinstance(router, nn.Module):
            return FamilyRouter(f"{outer}.{child}".lstrip("."), router, num_experts, _find_bias(block, num_experts))
    raise ConfigError(f"router scores: {type(experts).__name__} at {name} has no {' or '.join(NAMES)} beside it")


def _find_function(name: str, router: Any) -> Callable[[Tensor], Tensor]:
    """What makes probabilities of the logits. Raises `ConfigError`."""
    family = _family(router)
    if family in REFUSED:
        raise ConfigError(f"router scores: not for {type(router).__name__} at {name}: {REFUSED[family]}")
    if family in PROBABILITIES:
        return lambda probs_TE: probs_TE
    named = getattr(router, "expert_selection_fn", None)  # Cohere
    if family in SOFTMAX or named == "softmax":
        return lambda logits_TE: logits_TE.softmax(-1)
    if family in SIGMOID or named == "sigmoid":
        return lambda logits_TE: _normalise(logits_TE.sigmoid())
    for attribute in FUNCTIONS:
        function = getattr(router, attribute, None)
        if function is not None:
            return lambda logits_TE: _normalise(function(logits_TE))
    raise ConfigError(f"router scores: how {type(router).__name__} at {name} makes probabilities is not known")


def _normalise(scores_TE: Tensor) -> Tensor:
    return scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)


def _family(router: nn.Module) -> str:
    """The folder of transformers that the class stands in; of other code, the name of its module."""
    words = type(router).__module__.split(".")
    return words[-2] if words[:2] == ["transformers", "models"] else words[-1]


def _find_bias(block: nn.Module, num_experts: int) -> tuple[nn.Module, str] | None:
    """The module and the name of the tensor that the family adds to the scores of each expert for the choice."""
    for owner in block.modules():
        for key in BIASES:
            value = getattr(owner, key, None)
            if isinstance(value, Tensor) and value.numel() == num_experts:
                return owner, key
    return None
