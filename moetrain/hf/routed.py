"""Router replay for models of transformers, whether their experts are spread over ranks or not.

    with record_choices(model) as made:                       # what the routers choose in one forward
        model(input_ids=ids)
    with replay_choices(model, made.experts):                 # the same experts again, with today's probabilities
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()

`read_rollout` brings to this shape what vLLM and SGLang return. Routers stay the family's own code: where one takes the
top-k of a score for each expert, it gets the recorded experts in place of the best ones, and the scores of these; so
gradients flow through fresh probabilities.

T tokens, L layers with experts, E experts, K experts a token, G groups of experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.common.errors import ConfigError
from moetrain.config.architecture import read_architecture
from moetrain.hf.layout import SOMETIMES, is_experts
from moetrain.hf.pinning import ChoiceMode, Site
from moetrain.hf.replay import checkpoint_with_replay
from moetrain.hf.scores import is_recomputed
from moetrain.moe.recorded import ChoiceFacts, find_problem
from moetrain.moe.rollouts import align_routed_experts


class MadeChoices:
    """The choices of one forward."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._found: list[Tensor | None] = [None] * len(layers)

    @property
    def experts(self) -> Tensor:
        """int64 [T, L, K], the tokens in the order of the batch. Raises `RuntimeError` before the forward is over."""
        if not self._found or any(index is None for index in self._found):
            raise RuntimeError("record_choices: a forward through every layer comes first")
        return torch.stack([index for index in self._found if index is not None], 1)

    def keep(self, layer: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A hook of the experts module of `layer`."""
        if not is_recomputed():
            self._found[layer] = _find_index(args, kwargs).detach().clone()


@contextmanager
def record_choices(model: nn.Module) -> Iterator[MadeChoices]:
    """Record the experts that the routers choose in one forward inside. Raises `ConfigError` for a model without."""
    modules = find_experts(model)
    made = MadeChoices(modules)
    with ExitStack() as hooks:
        for layer, module in enumerate(modules):
            hooks.callback(module.register_forward_pre_hook(partial(made.keep, layer), with_kwargs=True).remove)
        yield made


@contextmanager
def replay_choices(model: nn.Module, experts: Tensor, missing: str = "error") -> Iterator[None]:
    """Have the routers choose, in the forwards inside, the `experts` that were recorded.

    Arguments:
        experts: integers [T, L, K], or with a batch and its sequences in place of T; -1 where nothing was recorded, as
            for the token that was sampled last.
        missing: what becomes of such tokens. error: there may be none; route: the router chooses for them.

    Recompute of activations replays the choices too. Raises `ConfigError` where shapes or numbers are not those of
    the model, and `RuntimeError` where its routers choose in another way than by a top-k over scores of the experts.
    """
    modules = find_experts(model)
    num_experts: Any = modules[0].num_experts
    flat_TLK = experts.flatten(0, -3).long()
    if experts.dim() < 3 or flat_TLK.shape[1] != len(modules):
        rule = f"must be [tokens, layers, experts a token], with {len(modules)} layers"
        raise ConfigError(f"experts: {tuple(experts.shape)} {rule}")
    if flat_TLK.numel() and not -1 <= int(flat_TLK.min()) <= int(flat_TLK.max()) < num_experts:
        raise ConfigError(f"experts: {int(flat_TLK.max())} is none of the {num_experts} experts")
    if problem := find_problem(flat_TLK.cpu().numpy()):
        raise ConfigError(f"experts: {problem}")
    absent = int((flat_TLK[:, 0, 0] < 0).sum())
    if missing not in ("error", "route") or (absent and missing == "error"):
        rule = f"{absent} of {len(flat_TLK)} tokens have no recorded choice; route has the router choose for them"
        raise ConfigError(f"missing={missing}: {rule}")
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module._gradient_checkpointing_func = checkpoint_with_replay  # type: ignore[assignment]
    with force_choices(model, flat_TLK.unbind(1)):
        yield


def read_rollout(model: nn.Module, tokens: Sequence[int], routed_experts: Any, start: int = 0) -> Tensor:
    """Return int64 [T, L, K] for the tokens of prompt and completion, of what vLLM or SGLang returned with them.

    The token that was sampled last has no row there: it gets -1. Arguments as for
    `moetrain.moe.rollouts.align_routed_experts`, which raises `ConfigError` for what is of another model.
    """
    inner: Any = model
    about = read_architecture(inner.config.to_dict(), type(model).__name__)
    rows = align_routed_experts(
        tokens,
        routed_experts,
        num_layers=about.num_layers,
        moe_layers=about.moe_layers,
        top_k=about.top_k,
        num_experts=about.num_experts,
        start=start,
    )
    return torch.from_numpy(rows).long()


def describe_choices(model: nn.Module, tokenizer: str = "") -> ChoiceFacts:
    """Return what a file of choices of this model says of it. `tokenizer`: what `hash_tokenizer` returns, if known."""
    inner: Any = model
    about = read_architecture(inner.config.to_dict(), type(model).__name__)
    return ChoiceFacts(inner.config.model_type, about.num_experts, len(about.moe_layers), about.top_k, tokenizer)


@contextmanager
def force_choices(model: nn.Module, layers: Sequence[Tensor]) -> Iterator[None]:
    """Have the routers choose, in the forwards inside, the experts int64 [T, K] of each of the layers.

    Of a token whose row is -1 they choose themselves. Raises `RuntimeError` as `replay_choices` does.
    """
    with ExitStack() as stack:
        mode = _Force()
        for module, expert_TK in zip(find_experts(model), layers, strict=True):
            before = partial(mode.begin, module, expert_TK)
            stack.callback(_find_block(model, module).register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_pre_hook(mode.check, with_kwargs=True).remove)
        stack.enter_context(mode)
        yield


def find_experts(model: nn.Module) -> list[nn.Module]:
    """Return the experts modules that text passes, in order. Raises `ConfigError` where there are none."""
    found = [m for name, m in model.named_modules() if is_experts(m) and not name.endswith(SOMETIMES)]
    if not found:
        raise ConfigError(f"model: {type(model).__name__} is not covered: it has no experts that moetrain.hf knows")
    return found


class _Force(ChoiceMode):
    """Gives routers the experts that are set for their layer, from the start of its block to its experts."""

    def __init__(self) -> None:
        super().__init__()
        self._module: Any = None  # the experts of the layer under way
        self._expert_TK: Tensor | None = None
        self._column = 0  # the next one, where a router takes the best expert again and again

    def begin(self, module: nn.Module, expert_TK: Tensor, *args: Any) -> None:
        """A hook of the block that has router and experts."""
        if not is_recomputed():
            self._module, self._expert_TK, self._column = module, expert_TK, 0

    def check(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A hook of the experts. Raises `RuntimeError` where they have not got what is set."""
        if is_recomputed() or self._expert_TK is None:
            return
        index_TK = _find_index(args, kwargs)
        expert_TK = self._expert_TK.to(index_TK.device)
        self._module = self._expert_TK = None
        same = index_TK.shape == expert_TK.shape and bool(((index_TK == expert_TK) | (expert_TK < 0)).all())
        if not same:
            raise RuntimeError(
                f"recorded choices: {type(module).__name__} got other experts {tuple(index_TK.shape)} than those of "
                f"{tuple(expert_TK.shape)}; its router does not choose by a top-k over scores of all experts"
            )

    def choose(self, site: Site, call: Callable[[], Any], source: Tensor) -> Tensor:
        made: Tensor = call()
        if self._expert_TK is None or source.dim() != 2 or made.dim() != 2:
            return made
        expert_TK, num_experts = self._expert_TK.to(made.device), self._module.num_experts
        if len(source) != len(expert_TK):
            raise RuntimeError(f"recorded choices: of {len(expert_TK)} tokens, but there are {len(source)}")
        if source.shape[1] == num_experts and made.shape == expert_TK.shape:
            return torch.where(expert_TK < 0, made, expert_TK)
        if source.shape[1] == num_experts and made.shape[1] == 1 and self._column < expert_TK.shape[1]:
            self._column += 1
            recorded_T1 = expert_TK[:, self._column - 1 : self._column]
            return torch.where(recorded_T1 < 0, made, recorded_T1)
        if source.shape[1] < num_experts and num_experts % source.shape[1] == 0:
            return _open_groups(source, made.shape[1], expert_TK, num_experts // source.shape[1])
        return made


def _open_groups(score_TG: Tensor, num_open: int, expert_TK: Tensor, size: int) -> Tensor:
    """The groups of `size` experts that a token may choose from: those of its recorded experts before all others."""
    wanted_TG = torch.zeros_like(score_TG, dtype=torch.bool)
    wanted_TG.scatter_(1, expert_TK.clamp(min=0) // size, (expert_TK >= 0))
    return score_TG.masked_fill(wanted_TG, torch.inf).topk(num_open, dim=1).indices


def _find_index(args: Any, kwargs: Any) -> Tensor:
    """The chosen experts, of the arguments of an experts module."""
    found: Tensor = args[1] if len(args) > 1 else kwargs["top_k_index"]
    return found


def _find_block(model: nn.Module, experts: nn.Module) -> nn.Module:
    """The module that the experts are in, and that their router is in too."""
    return next(module for module in model.modules() if any(child is experts for child in module.children()))
