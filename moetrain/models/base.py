"""What engines, training, observation, recovery and checkpoints need of a language model, whoever has written it.

B sequences, L positions, V vocabulary, E experts of a layer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from moetrain.config import Train
from moetrain.distributed.mesh import ExpertGroup
from moetrain.moe.adapters import AdapterSwitch, ExpertAdapters
from moetrain.moe.context import StepContext
from moetrain.moe.exchange.residents import ResidentGuests
from moetrain.moe.kernels.api import KernelChoice, use_kernels
from moetrain.moe.layer import LayerStats
from moetrain.moe.options import Chunks
from moetrain.moe.planning.cost import Costs, Limits
from moetrain.moe.routing import Choice
from moetrain.moe.routing.balance import BalancedRouter
from moetrain.moe.routing.base import RecordedChoice

AnyChoice = Choice | RecordedChoice
ReadRows = Callable[[slice], Tensor]  # the values of some rows of a parameter


@dataclass(frozen=True)
class AdaptedModel:
    """What of a model has adapters: names of linear layers and of the experts' matrices, as transformers has them."""

    linears: tuple[str, ...]
    matrices: tuple[str, ...]
    switch: AdapterSwitch


class SpreadableExperts(Protocol):
    """The experts of one layer: all of them, and after `shard` those whose home is this rank."""

    residents: ResidentGuests
    num_experts: int
    slices: int  # of an expert, which are experts of their own to plans and slots
    adapters: ExpertAdapters | None
    chunks: Chunks  # in which rows travel and are computed

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The parameters of its module that hold one entry an expert, but for adapters; the two matrices first."""

    @property
    def is_transposed(self) -> bool:
        """Whether matrices are [E, in, out], not [E, out, in]."""

    @property
    def limits(self) -> Limits:
        """What a planner is to keep within."""

    def cut(self, slices: int) -> None:
        """Cut every expert into slices, before `shard`. Raises `ConfigError` where they cannot be cut."""

    def shard(
        self, ep: ExpertGroup, guest_slots: int = 0, max_rows: int | None = None, keep_hidden: bool = True
    ) -> None:
        """Keep the experts whose home is `ep.rank`; the arguments are those of `moetrain.Experts.shard`."""

    def own_experts(self) -> list[int]:
        """Return the global numbers of the experts kept here, or of the slices, in the order of their slots."""


class ExpertLayer(Protocol):
    """A layer of experts in a model."""

    costs: Costs | None

    @property
    def experts(self) -> SpreadableExperts:
        """Its experts."""

    @property
    def step(self) -> StepContext:
        """What it knows of the optimizer step."""

    def use_costs(self, costs: Costs) -> None:
        """Have the planner decide with these costs from now on."""


class LanguageModel(nn.Module):
    """The base of the models that the engines train; it is built on the meta device and knows no ranks.

    Parameters are of three kinds: those of experts, whole ones on their home rank; those in `replicated`, whole on
    every rank and kept in fp32; and dense ones.
    """

    adapted: AdaptedModel | None = None  # what of it has adapters; None: it has none
    awaits_checkpoint = False  # whether all its parameters are to be loaded, so that they need no initial values

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
        """[B, L] int64 -> -log p of `targets` [B, L] fp32, or logits [B, L, V] without targets; and statistics.

        `document` [B, L] int: positions attend within equal numbers only, and those below zero are padding, which goes
        to no expert and counts in no statistic; None: causal over everything, no padding. `domain`
        [B, L] and `sample` [B] int64: for routers that look at a token's domain or its sequence's global number.
        `choices`: earlier ones of every pass, to be replayed. `positions` [P] int64: places in the flattened targets
        that are to be predicted; logits of others are not computed, and their -log p is 0; None: all. The statistics
        are those of every pass through every MoE layer, in order.
        """
        raise NotImplementedError

    def count(
        self,
        tokens: Tensor,
        document: Tensor | None,
        domain: Tensor | None,
        sample: Tensor | None,
        choices: Sequence[AnyChoice] | None = None,
    ) -> list[LayerStats]:
        """Run a forward without gradient for the sake of its statistics alone."""
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The modules that are gathered and freed one by one where the model is sharded."""
        raise NotImplementedError

    @property
    def routers(self) -> Sequence[BalancedRouter]:
        """One of every pass, in the order of the statistics."""
        raise NotImplementedError

    def freeze_routers(self) -> None:
        """Leave the weights of all routers, and what they share, out of training."""
        raise NotImplementedError

    def find_embedding(self) -> nn.Module:
        """Return the module that makes vectors of tokens."""
        raise NotImplementedError

    def find_unadapted(self) -> set[nn.Module]:
        """Return the output head, the routers and the modules in them, which have no adapters."""
        raise NotImplementedError

    def name_in_transformers(self, name: str) -> str:
        """Return the name in transformers of a module or a parameter, of the model that this is or is exported as."""
        raise NotImplementedError

    def find_layers(self) -> Iterator[tuple[int, ExpertLayer]]:
        """Yield the number of its block and each layer of experts, in order."""
        raise NotImplementedError

    def find_experts(self) -> dict[str, tuple[nn.Module, SpreadableExperts]]:
        """Return by its name each module whose own parameters have one entry an expert, and the experts in it."""
        raise NotImplementedError

    def replicated(self) -> list[nn.Parameter]:
        """Return what is whole on every rank and kept in fp32, in an order that is the same on all."""
        raise NotImplementedError

    def undecayed(self) -> set[nn.Parameter]:
        """Return the parameters that weight decay leaves alone."""
        raise NotImplementedError

    def initial_values(self, seed: int) -> Iterator[tuple[nn.Parameter, ReadRows]]:
        """Yield every parameter and what reads rows of its initial value; of experts, rows are the slots kept here.

        A value depends on the seed and the parameter's name, not on the layout.
        """
        raise NotImplementedError

    def initialise_buffers(self) -> None:
        """Fill all buffers in place."""
        raise NotImplementedError

    def tie_weights(self) -> None:
        """Make one parameter of those that share one, where moving the model has made two."""

    def compile_dense(self) -> None:
        """Have torch.compile take what is not experts, at the first call."""
        raise NotImplementedError

    def at_step(self, step: int, train: Train) -> None:
        """Bring the schedules of routers to where `step` optimizer steps are done."""

    @property
    def layers_of_experts(self) -> list[ExpertLayer]:
        """The layers of experts, in order."""
        return [layer for _, layer in self.find_layers()]

    def expert_parameters(self) -> set[nn.Parameter]:
        """Return the parameters that have one entry an expert."""
        return {p for module, _ in self.find_experts().values() for p in module.parameters(recurse=False)}

    def use_kernels(self, choice: KernelChoice) -> None:
        """Have everything compute with the kernels of `choice` from now on."""
        use_kernels(self, choice)

    def cut_experts(self, slices: int) -> None:
        """Cut the experts of every layer into slices, before they are sharded. Raises `ConfigError`."""
        for layer in self.layers_of_experts:
            layer.experts.cut(slices)

    def shard_experts(self, ep: ExpertGroup, guest_slots: int, max_rows: int | None, keep_hidden: bool) -> None:
        """Keep the experts whose home is this rank, in every layer; the arguments are those of `Experts.shard`."""
        for layer in self.layers_of_experts:
            layer.experts.shard(ep, guest_slots, max_rows, keep_hidden)
