"""The model: one of ours, of a shape that is set, or that of a Hugging Face folder; told apart by `model.source`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from moetrain.config.schedules import spread
from moetrain.config.sections.base import NonNegative, Positive, PositiveFloat, Section, Shape, core_field
from moetrain.moe.options import ZeroComputeOptions

SOURCE = (
    "Where the model comes from. preset: a transformer of ours, of the shape that is set. hf: a folder of Hugging "
    "Face; choose it by the group, `model=hf`."
)
READ = "Read from the folder's config.json, not to be set: "


class Model(Section):
    """The shape of the transformer; a preset, `model=small`, sets all of it (docs/model.md)."""

    source: Literal["preset"] = Field(default="preset", description=SOURCE)
    dim: Positive = Field(description="Width of the model, D; a multiple of 8.")
    num_layers: Positive = Field(description="Number of transformer layers.")
    num_heads: Positive = Field(description="Number of attention heads.")
    num_kv_heads: Positive = Field(
        description="Number of heads of keys and values (grouped-query attention); it divides `model.num_heads`."
    )
    head_dim: Positive = Field(description="Width of an attention head; even.")
    num_experts: Positive = Field(
        description="Routed experts per MoE layer, those of `zero_experts` and the like not included; the mean over "
        "layers where `model.expert_schedule` varies it."
    )
    expert_hidden: Positive = Field(description="Hidden width of an expert, H; a multiple of 8.")
    num_shared_experts: NonNegative = Field(description="Experts per MoE layer that every token passes through.")
    num_dense_layers: NonNegative = Field(
        description="Number of first layers that have a dense MLP in place of experts."
    )
    dense_hidden: Positive = Field(description="Hidden width of the MLP in those dense layers.")
    chain: Positive = Field(
        description="Passes through each MoE layer, each with a router of its own over the same experts "
        "(Chain-of-Experts)."
    )
    zero_experts: int = core_field(ZeroComputeOptions, "zero")
    copy_experts: int = core_field(ZeroComputeOptions, "copy")
    constant_experts: int = core_field(ZeroComputeOptions, "constant")
    expert_schedule: Shape = Field(
        description="How the number of experts varies over depth; the mean stays `model.num_experts` (docs/routers.md)."
    )
    min_experts: Positive | None = Field(
        description="Fewest experts of a layer, of which every layer has a multiple; needed for a "
        "`model.expert_schedule` other than uniform. null: uniform layers."
    )
    vocab_size: Positive | None = Field(
        description="Tokens in the embedding and the output. null: the size of the data's tokenizer."
    )
    qk_norm: Literal["none", "head", "full"] = Field(
        description="RMSNorm on queries and keys. head: within each head (Qwen3). full: over the full width (OLMoE)."
    )
    tied_embeddings: bool = Field(description="Whether the embedding and the output share one matrix.")
    rope_theta: PositiveFloat = Field(description="Base of the rotary position embedding.")
    norm_eps: PositiveFloat = Field(description="Constant that RMSNorm adds to the mean square.")
    init_std: PositiveFloat = Field(description="Standard deviation of the initial weights.")

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers

    @property
    def num_zero_compute(self) -> int:
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def pass_names(self) -> list[str]:
        """layer_LL of every pass through a MoE layer, in order; with more than one pass a layer, layer_LL_P."""
        layers = range(self.num_dense_layers, self.num_layers)
        if self.chain == 1:
            return [f"layer_{layer:02d}" for layer in layers]
        return [f"layer_{layer:02d}_{turn}" for layer in layers for turn in range(self.chain)]

    @property
    def experts_of_layers(self) -> list[int]:
        """Experts that compute, of every MoE layer."""
        return spread(self.expert_schedule, self.num_moe_layers, self.num_experts, self.min_experts or 1)


class HuggingFace(Section):
    """`model=hf`: the model in a folder of Hugging Face (docs/bring-a-hugging-face-model.md)."""

    source: Literal["hf"] = Field(description=SOURCE)
    path: str = Field(description="The folder with config.json, and with the weights and the tokenizer.")
    trust_remote_code: bool = Field(
        default=False, description="Whether code that the folder brings along, named by auto_map, may run."
    )
    weights: Literal["load", "random"] = Field(
        default="load",
        description="Where a new run's weights come from. load: from the folder's safetensors. random: drawn as the "
        "model's own code initializes them, from `train.seed`.",
    )
    dim: Positive = Field(description=f"{READ}width of the model, D.")
    num_layers: Positive = Field(description=f"{READ}number of layers.")
    moe_layers: tuple[NonNegative, ...] = Field(description=f"{READ}numbers of the layers that have experts.")
    num_experts: Positive = Field(description=f"{READ}routed experts per layer.")
    expert_hidden: Positive = Field(description=f"{READ}hidden width of an expert, H.")
    vocab_size: Positive = Field(description=f"{READ}tokens in the embedding and the output.")

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_layers)

    @property
    def num_zero_compute(self) -> int:
        """Experts without computation are a matter of our presets."""
        return 0

    @property
    def pass_names(self) -> list[str]:
        """layer_LL of every layer with experts, in order."""
        return [f"layer_{layer:02d}" for layer in self.moe_layers]

    @property
    def experts_of_layers(self) -> list[int]:
        """Experts of every layer with experts."""
        return [self.num_experts] * self.num_moe_layers


def _source_of(model: Any) -> Any:
    found = model.get("source") if isinstance(model, dict) else getattr(model, "source", None)
    return "preset" if found is None else found


AnyModel = Annotated[Annotated[Model, Tag("preset")] | Annotated[HuggingFace, Tag("hf")], Discriminator(_source_of)]
