"""A transformers model as the engines train it: experts spread, statistics of every layer, cross entropy in pieces.

Routers, attention and norms stay the family's own code. B sequences, L positions, T = B·L tokens, V vocabulary, E
experts of a layer.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moetrain import runs
from moetrain.common.errors import ConfigError
from moetrain.config import Config, HuggingFace
from moetrain.config.core_options import planner_options
from moetrain.distributed.mesh import ExpertGroup
from moetrain.hf.build import WithHead, build_transformer, find_plain_head, separates_documents, unwrap
from moetrain.hf.initial import draw_weights, initialise_buffers, read_weights
from moetrain.hf.layout import is_experts
from moetrain.hf.pinning import PinnedChoices
from moetrain.hf.replay import replay_in_recompute
from moetrain.hf.routed import force_choices
from moetrain.hf.scores import FamilyRouter, find_router
from moetrain.hf.spread import NAME, SpreadDecision, SpreadExperts, register
from moetrain.models.base import AnyChoice, LanguageModel, ReadRows, SpreadableExperts
from moetrain.models.cross_entropy import linear_cross_entropy_at, put_at
from moetrain.moe.adapters import SharedAdapters
from moetrain.moe.kernels.api import DEFAULT_KERNELS, KernelChoice
from moetrain.moe.layer import LayerStats
from moetrain.moe.routing import Choice, Scores
from moetrain.moe.routing.balance import BalancedRouter
from moetrain.moe.routing.base import RecordedChoice

PREFIX = "hf."  # of the transformers model's names in ours
NO_CHOICE = Choice(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
NOISE = re.compile("dropout|jitter")  # in the names of its configuration


class PinnedChoice(Choice):
    """A choice of a forward whose choices are replayed all together."""

    pins: PinnedChoices

    @classmethod
    def add(cls, choice: Choice, pins: PinnedChoices) -> "PinnedChoice":
        """Return `choice` with the `pins` of all layers."""
        made = cls(*choice)
        made.pins = pins
        return made


class HFModel(LanguageModel):
    """The transformers model `hf`, whose experts are ready to be spread."""

    def __init__(
        self,
        inner: nn.Module,
        planner: tuple[str, Any],
        recompute: str = "none",
        source: tuple[Path, bool] | None = None,
    ) -> None:
        """`inner`: as `build_transformer` returns it, on the meta device. `recompute`: none or full. `source`: the
        folder whose weights it begins with, and whether code there is trusted; None: they are drawn.

        Raises `ConfigError` where its experts or the probabilities of its routers are not known.
        """
        super().__init__()
        self.hf = inner
        self.kernel_choice = DEFAULT_KERNELS
        self._source = source
        self._layers: dict[str, SpreadExperts] = {}
        self._routers: dict[str, FamilyRouter] = {}
        self._logits: dict[str, Tensor] = {}  # of the forward under way
        self._passes: dict[str, Pass] = {}
        register()
        modules: dict[str, Any] = {name: module for name, module in inner.named_modules() if is_experts(module)}
        for name, module in modules.items():
            one = SpreadExperts(name, module, ExpertGroup.alone(), planner, None)
            one.regions = [inner.get_submodule(name[:place]) for place, sign in enumerate(name) if sign == "."]
            one.watcher = self
            module._moetrain, module.config._experts_implementation = one, NAME
            self._layers[name], self._routers[name] = one, find_router(inner, name)
            self._routers[name].watch(partial(self._logits.__setitem__, name))
        self._is_plain = find_plain_head(inner) is not None  # the head: its weight alone makes logits
        if recompute == "full":
            replay_in_recompute(self._transformer)
            self._transformer.activation_checkpointing_enable()

    @property
    def _transformer(self) -> Any:
        """The `PreTrainedModel`."""
        return unwrap(self.hf)

    @property
    def _head(self) -> nn.Module | None:
        """What alone makes logits of hidden states."""
        if not self._is_plain:
            return None
        inner = self._transformer
        head: nn.Module = inner.get_output_embeddings() or inner.get_input_embeddings()
        return head

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        inner = self._transformer
        head = inner.get_output_embeddings()
        return head is None or head.weight is inner.get_input_embeddings().weight

    @property
    def attention_width(self) -> int:
        """Heads × the mean width of a key and a value, of a layer with attention."""
        text = self._transformer.config.get_text_config()
        heads = text.num_attention_heads
        if getattr(text, "v_head_dim", None):
            return int(heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim) // 2)
        return int(heads * (getattr(text, "head_dim", None) or text.hidden_size // heads))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The outermost layers that transformers recomputes one by one."""
        return list(self._named_blocks().values())

    def _named_blocks(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for name, module in self.hf.named_modules():
            outer = any(name.startswith(f"{other}.") for other in found)
            if isinstance(module, GradientCheckpointingLayer) and not outer:
                found[name] = module
        return found

    @property
    def routers(self) -> Sequence[BalancedRouter]:
        return list(self._routers.values())

    def freeze_routers(self) -> None:
        for router in self._routers.values():
            router.module.requires_grad_(False)

    def find_embedding(self) -> nn.Module:
        embedding: nn.Module = self._transformer.get_input_embeddings()
        return embedding

    def find_unadapted(self) -> set[nn.Module]:
        head = self._transformer.get_output_embeddings()
        routers = {inner for router in self._routers.values() for inner in router.module.modules()}
        return routers | ({head} if head is not None else set())

    def name_in_transformers(self, name: str) -> str:
        name = name.removeprefix(PREFIX)
        return name.removeprefix("model.") if isinstance(self.hf, WithHead) else name

    def find_layers(self) -> Iterator[tuple[int, SpreadExperts]]:
        blocks = list(self._named_blocks())
        for name, layer in self._layers.items():
            yield next((n for n, block in enumerate(blocks) if name.startswith(f"{block}.")), 0), layer

    def find_experts(self) -> dict[str, tuple[nn.Module, SpreadableExperts]]:
        return {f"{PREFIX}{name}": (one.module, one) for name, one in self._layers.items()}

    def replicated(self) -> list[nn.Parameter]:
        """What transformers keeps in fp32, and norms inside of experts."""
        kept = unwrap(self.hf)._keep_in_fp32_modules_strict or ()
        names = [re.compile(rf"(^|\.){re.escape(name)}($|\.)") for name in sorted(kept)]
        experts = self.expert_parameters()
        found = [p for name, p in self.hf.named_parameters() if p not in experts and any(n.search(name) for n in names)]
        norms = [
            p for one in self._layers.values() if one.layout.norm is not None for p in one.layout.norm.parameters()
        ]
        shared = [p for m in self.modules() if isinstance(m, SharedAdapters) for p in m.parameters()]
        return list(dict.fromkeys([*found, *norms, *shared]))

    def undecayed(self) -> set[nn.Parameter]:
        """Norms, biases and embeddings."""
        embeddings = {p for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        small = {p for name, p in self.named_parameters() if p.ndim <= 1 or name.endswith("bias")}
        return embeddings | small

    def use_kernels(self, choice: KernelChoice) -> None:
        self.kernel_choice = choice
        for layer in self._layers.values():
            layer.kernel_choice = choice

    def tie_weights(self) -> None:
        unwrap(self.hf).tie_weights()

    def compile_dense(self) -> None:
        raise ConfigError("train.compile=true: must be false for model=hf")

    def initial_values(self, seed: int) -> Iterator[tuple[nn.Parameter, ReadRows]]:
        """Drawn by name, or read from the folder."""
        prefix = "model." if isinstance(self.hf, WithHead) else ""
        experts = {name.removeprefix(prefix): one for name, one in self._layers.items()}
        if self._source is None:
            return draw_weights(self._transformer, experts, seed)
        return read_weights(self._transformer, experts, *self._source)

    def initialise_buffers(self) -> None:
        initialise_buffers(self._transformer)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        document: Tensor | None = None,
        domain: Tensor | None = None,
        sample: Tensor | None = None,
        choices: Sequence[AnyChoice] | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, list[LayerStats]]:
        if not len(tokens):
            return self._join_without_tokens(tokens, targets)
        with self._replay(choices), self._told(document):
            return self._compute(make_inputs(tokens, document), targets, positions), self._take_stats()

    def _replay(self, choices: Sequence[AnyChoice] | None) -> AbstractContextManager[None]:
        """The routers choose these inside: those of `count`, or recorded ones."""
        if choices and isinstance(choices[0], PinnedChoice):
            return choices[0].pins.replay()
        recorded = [one.expert_TK for one in choices or () if isinstance(one, RecordedChoice)]
        return force_choices(self.hf, recorded) if recorded else nullcontext()

    def _compute(self, inputs: dict[str, Any], targets: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """Logits; with targets their nats [B, L] fp32, at `positions` alone where these are given."""
        head = self._head
        if targets is not None and head is not None:
            hidden, weight = self._run_base(inputs), head.get_parameter("weight")
            return linear_cross_entropy_at(positions, hidden.to(weight.dtype), weight, targets, self.kernel_choice)
        logits: Tensor = self.hf(**inputs).logits
        if targets is None:
            return logits
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return nats if positions is None else put_at(positions, nats.flatten()[positions], nats.shape)

    @contextmanager
    def _told(self, document: Tensor | None) -> Iterator[None]:
        """Experts know what is padding while the context lasts."""
        real_T = None if document is None or bool((document >= 0).all()) else (document >= 0).flatten()
        for layer in self._layers.values():
            layer.real_T = real_T
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.real_T = None

    @torch.no_grad()
    def count(
        self,
        tokens: Tensor,
        document: Tensor | None,
        domain: Tensor | None,
        sample: Tensor | None,
        choices: Sequence[AnyChoice] | None = None,
    ) -> list[LayerStats]:
        """As `LanguageModel.count`; the choices are those of the family's own code, to be replayed all together."""
        if not len(tokens):
            return self._join_without_tokens(tokens, tokens)[1]
        pins = PinnedChoices()
        with self._replay(choices), pins.record(), self._told(document):
            self._run_base(make_inputs(tokens, document))
        stats = self._take_stats()
        return [replace(s, choice=PinnedChoice.add(s.choice, pins)) for s in stats]

    def _run_base(self, inputs: dict[str, Any]) -> Tensor:
        """[B, L, D] what the head sees."""
        base = self._transformer if isinstance(self.hf, WithHead) else self._transformer.base_model
        hidden: Tensor = base(**inputs)[0]
        return hidden

    def _join_without_tokens(self, tokens: Tensor, targets: Tensor | None) -> tuple[Tensor, list[LayerStats]]:
        """Enter what other ranks enter; transformers takes no empty batch, so one token comes, which no expert gets."""
        one = tokens.new_zeros(1, 1)
        with self._told(one - 1):
            out, stats = self._compute(make_inputs(one, None), None if targets is None else one), self._take_stats()
        none = [replace(s, scores=Scores(*(x[:0] for x in s.scores)), choice=NO_CHOICE, real_T=None) for s in stats]
        return out[:0].expand(0, tokens.shape[1], *out.shape[2:]), none

    def before_experts(self, one: SpreadExperts, hidden_TD: Tensor, top_k: int) -> None:
        """The experts call this at the beginning of a pass."""

    def after_decision(self, one: SpreadExperts, decision: SpreadDecision) -> None:
        """The experts call this when they have planned, which a recompute does not."""
        self._passes[one.name] = Pass(self._logits.pop(one.name), decision, one.real_T)

    def _take_stats(self) -> list[LayerStats]:
        """Of the forward that is over, in the order of the layers.

        Scores are made here and not where logits are heard: nothing that a recompute leaves out may be saved there.
        """
        found = [self._passes[name].describe(self._routers[name]) for name in self._layers]
        self._passes.clear()
        return found


class Pass(NamedTuple):
    """A forward of one layer of experts."""

    logits_TE: Tensor
    decision: SpreadDecision
    real_T: Tensor | None  # bool: tokens that are not padding; None: all

    def describe(self, router: FamilyRouter) -> LayerStats:
        """Return what losses and metrics need of it."""
        scores = router.score(self.logits_TE.clone())  # a view would lose hooks of FSDP
        if not router.has_logits:
            scores = Scores(scores.probs_TE.clamp(min=torch.finfo(scores.probs_TE.dtype).tiny).log(), scores.probs_TE)
        d, num_experts = self.decision, router.num_experts
        expert_N = d.index_TK.flatten()
        token_N = torch.arange(len(d.index_TK), device=expert_N.device).repeat_interleave(d.index_TK.shape[1])
        made_N = None if d.rows_N is None else expert_N < num_experts
        choice = Choice(token_N, expert_N.clamp(max=num_experts - 1), made_N)
        return LayerStats(scores, choice, d.counts_E, d.counts_E, d.plan, d.num_lent, d.clock, self.real_T)


def make_inputs(tokens: Tensor, document: Tensor | None) -> dict[str, Any]:
    """Return what a transformers model is called with; its masks follow from positions that begin anew."""
    inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if document is not None:
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        begins = torch.zeros_like(place)
        begins[:, 1:] = torch.where(document[:, 1:] != document[:, :-1], place[:, 1:], 0)
        inputs["position_ids"] = place - begins.cummax(1).values
    return inputs


def build_hf_model(config: Config) -> HFModel:
    """Build the model of `model.source=hf` on the meta device.

    Raises `ConfigError` where it is not what its `config.json` seems to say, or cannot do what is asked for.
    """
    m = config.model
    assert isinstance(m, HuggingFace)
    inner = build_transformer(runs.model_folder(config), m.trust_remote_code, device="meta")
    planner = config.planner.name, planner_options(config.planner)
    source = (Path(m.path), m.trust_remote_code) if m.weights == "load" else None
    model = HFModel(inner, planner, config.train.recompute, source)
    check_model(config, model, inner)
    return model


def check_model(config: Config, model: HFModel, inner: Any) -> None:
    """Raise `ConfigError` where the model is not what was read of its folder, or cannot do what is asked for."""
    m = config.model
    assert isinstance(m, HuggingFace)
    first, kind = model.layers_of_experts[0].experts, type(unwrap(inner)).__name__
    assert isinstance(first, SpreadExperts)
    found = {
        "num_moe_layers": len(model.layers_of_experts),
        "num_experts": first.num_experts,
        "dim": first.dim,
        "expert_hidden": first.hidden,
        "vocab_size": len(unwrap(inner).get_input_embeddings().weight),
    }
    for field, value in found.items():
        if value != getattr(m, field):
            rule = f"{kind} has {field} {value}, where {getattr(m, field)} was read from its config.json"
            raise ConfigError(f"model.path={m.path}: {rule}; moetrain train does not know this family yet")
    noisy = {k: v for k, v in unwrap(inner).config.to_dict().items() if NOISE.search(k) and isinstance(v, float) and v}
    for name, amount in noisy.items():
        raise ConfigError(f"model.path={m.path}: {name}={amount} in config.json must be 0: layouts would differ by it")
    if config.data.attend_within_documents and not separates_documents(inner):
        raise ConfigError(f"data.attend_within_documents=true: must be false for {kind}, which knows no such mask")
    if config.balance.bias != "none" and any(router.bias is None for router in model.routers):
        raise ConfigError(f"balance.bias={config.balance.bias}: must be none for {kind}, whose routers have no bias")
