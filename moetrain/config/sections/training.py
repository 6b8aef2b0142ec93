"""What is trained and how: steps, optimizer, ranks, balance losses, evaluation, generation."""

from typing import Annotated, Literal

from pydantic import Field

from moetrain.config.sections.base import (
    Dtype,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    PositiveOrAuto,
    Section,
    core_field,
)
from moetrain.moe.options import BalanceOptions, Chunks


class Train(Section):
    """How long and on what batches a model is trained, and in what number format."""

    objective: Literal["lm", "sft", "dpo"] = Field(
        default="lm",
        description="What is learned. lm: to predict all tokens. sft: to predict the tokens that `data=chat` marks as "
        "targets, those of the assistant. dpo: to prefer the chosen answers of `data=chat` to the rejected ones, by "
        "the section `dpo`. Under sft and dpo held-out conversations are evaluated before the first step too "
        "(docs/post-train.md).",
    )
    steps: Positive = Field(description="Number of optimizer steps of the run, those of earlier starts included.")
    seed: NonNegative = Field(
        description="Seed of the weights, the order of the data and the routers' noise. Equal seeds give equal runs on "
        "every layout."
    )
    global_batch: Positive = Field(
        description="Sequences per optimizer step, over all ranks and micro-steps. It must be a multiple of ranks × "
        "`train.micro_batch`."
    )
    micro_batch: Positive | None = Field(
        description="Sequences per rank and micro-step: smaller values need less memory and more micro-steps. null: "
        "global_batch / ranks, in one micro-step."
    )
    seq_len: Annotated[int, Field(ge=2)] = Field(description="Tokens per sequence.")
    recompute: Literal["none", "selective", "full"] = Field(
        description="Activations that the backward pass computes again instead of keeping. none: keep all. selective: "
        "keep only what the experts received. full: keep only the input of every layer and of its experts."
    )
    compile: bool = Field(
        description="Whether attention, norms and dense MLPs go through torch.compile. The experts never do."
    )
    dtype: Dtype = Field(
        description="Number format of the computation; master weights and the optimizer stay in fp32. auto: bf16 where "
        "all ranks multiply it clearly faster, else fp32; the run's config.yaml records which one was chosen."
    )
    experts_dtype: Literal["fp8"] | None = Field(
        default=None,
        description="Number format of the experts' products. fp8: the forward in FP8 (e4m3) with a scale for "
        "each row, on Hopper GPUs, where `train.dtype` is bf16; gradients stay in bf16 (docs/gpu.md). null: that of "
        "`train.dtype`.",
    )
    log_every: Positive = Field(description="Steps between two lines of metrics.")
    threads: Positive | None = Field(description="CPU threads per worker. null: the cores of the host / its workers.")

    @property
    def sequences_of_a_sample(self) -> int:
        """Consecutive sequences that are never split over ranks or micro-steps: two of a pair, else one."""
        return 2 if self.objective == "dpo" else 1

    def split_batch(self, world: int) -> tuple[int, int]:
        """Returns (sequences per rank and micro-step, micro-steps) of `global_batch` on `world` ranks.

        Where shares are uneven, the first is the most that a rank has.
        """
        each = self.sequences_of_a_sample
        micro_batch = self.micro_batch or -(-self.global_batch // (world * each)) * each
        return micro_batch, -(-self.global_batch // (micro_batch * world))


class Dpo(Section):
    """Preference tuning, under `train.objective=dpo`: what a pair's loss is (docs/post-train.md)."""

    beta: PositiveFloat = Field(
        default=0.1,
        description="How strongly the model is held to the reference, β: the reward of an answer is β × its log-ratio.",
    )
    loss: Literal["sigmoid", "sigmoid_norm", "hinge", "ipo"] = Field(
        default="sigmoid",
        description="Loss of a pair. sigmoid: DPO's, -log σ(β × the difference of log-ratios). sigmoid_norm: the same "
        "with log-ratios per token. hinge: SLiC's max(0, 1 - β × the difference). ipo: (the difference per token - "
        "1 / 2β)².",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0,
        description="Share of pairs that are taken to be labeled the wrong way round (conservative DPO). Only for "
        "`dpo.loss=sigmoid` and `sigmoid_norm`.",
    )


class Optim(Section):
    """The optimizer, its learning-rate schedule and gradient clipping."""

    name: str = Field(
        default="adamw",
        description="The optimizer. Besides adamw those of other packages that are installed, under `engine=native` "
        "(docs/library.md).",
    )
    lr: PositiveFloat = Field(description="Highest learning rate, reached after the warm-up.")
    min_lr: NonNegativeFloat = Field(description="Learning rate at the last step; at most `optim.lr`.")
    schedule: Literal["cosine", "wsd"] = Field(
        description="Course of the learning rate after the warm-up. cosine: a half cosine down to `optim.min_lr`. wsd: "
        "constant, then a linear decay over the last `optim.decay_fraction` of the steps."
    )
    warmup: NonNegative = Field(description="Steps over which the learning rate rises linearly to `optim.lr`.")
    decay_fraction: Fraction = Field(
        description="Share of the steps over which the learning rate decays. Only for `optim.schedule=wsd`."
    )
    betas: tuple[Fraction, Fraction] = Field(
        description="Decay rates of AdamW's first and second moment, per optimizer step."
    )
    eps: PositiveFloat = Field(description="Constant that AdamW adds to the root of the second moment.")
    weight_decay: NonNegativeFloat = Field(
        description="AdamW's decoupled weight decay, times the learning rate. It acts on matrices, not on embeddings."
    )
    clip: NonNegativeFloat = Field(
        description="Largest norm of the gradient over all parameters of the model; larger gradients are scaled down "
        "to it. 0: no clipping."
    )
    state_dtype: Literal["fp32", "bf16"] = Field(
        description="Number format of AdamW's two moments; bf16 halves their memory and uses stochastic rounding. "
        "Master weights stay in fp32."
    )


class Parallel(Section):
    """How ranks share the work: dp_replicate × dp_shard ranks, of which `ep` share one set of experts."""

    nproc: Positive | None = Field(
        description="Workers that `moetrain train` starts on this host. null: one per GPU, or 2 without GPUs. torchrun "
        "and Slurm decide it themselves."
    )
    ep: Positive | None = Field(
        description="Ranks that share one set of experts (expert parallelism). null: the largest number that divides "
        "both the ranks of a replica and the experts of every layer. More ranks than experts need `parallel.r` above 1."
    )
    r: PositiveOrAuto = Field(
        default="auto",
        description="Slices of equal hidden width that every expert is cut into, each at home on one rank of "
        "`parallel.ep`: an expert's rows go to r ranks, which compute a part each. auto: 1, or where `parallel.ep` "
        "exceeds the experts the fewest that give every rank one.",
    )
    dp_shard: Positive | None = Field(
        description="Ranks over which the dense parameters are sharded. null: all ranks / `parallel.dp_replicate`; "
        "another value is refused."
    )
    dp_replicate: Positive = Field(
        description="Replicas of the sharded model (hybrid sharding). It must divide the number of ranks."
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        default="auto",
        description="What carries the collectives. auto: NCCL between GPUs; gloo between CPUs and where ranks share a "
        "GPU, which NCCL refuses. nccl: refused where it cannot be used. gloo: GPU tensors go through pinned host "
        "memory, for correctness only (docs/gpu.md).",
    )
    layout: Literal["fixed", "auto"] = Field(
        default="fixed",
        description="How the layout is found. fixed: as the other fields say. auto: `moetrain train` chooses "
        "`parallel.ep`, `parallel.dp_replicate`, `train.recompute`, `engine.reshard_after_forward`, and where "
        "nothing else fits `train.micro_batch`, as far as they are not given: the fastest layout that fits, as the "
        "simulator predicts it. "
        "The run's config.yaml has what was chosen, and a run that goes on keeps it (docs/choose-a-layout.md).",
    )
    cluster: str | None = Field(
        default=None,
        description="The cluster that `parallel.layout=auto` chooses for: a name as `moetrain simulate` has them, or a "
        "YAML file. null: this host, with what `moetrain profile` has measured here.",
    )
    exchange: Literal["flat", "two_level", "auto"] = Field(
        default="flat",
        description="How rows travel between nodes in training; results are equal bit for bit. flat: one message for "
        "every pair of ranks. two_level: inside the node first, then one message for every pair of ranks at the same "
        "place in their nodes; flat, with a line, where nodes have unequal numbers of ranks. auto: the one that the "
        "measured links say is faster (docs/hosts.md).",
    )
    flow_splits: Positive = Field(
        default=1,
        description="Connections, or NCCL communicators, that rows travel on between nodes at the same time: every "
        "message is cut into as many parts, each of which the network may give a path of its own. Results are equal "
        "bit for bit (docs/hosts.md).",
    )
    chunks: Chunks = Field(
        default=1,
        description="Parts in which rows travel to the experts, are computed and return, so that some travel while "
        "others are computed: 1, 2, 4 or 8. auto: the number that takes least by the measured costs, for each layer "
        "and step. The results are the same.",
    )
    uneven: bool = Field(
        default=False,
        description="Whether ranks may get unequal shares of the global batch. It is switched on where a run continues "
        "with fewer ranks than before.",
    )


class Balance(Section):
    """The losses and biases that keep the router balanced."""

    scope: Literal["micro", "data", "global"] = core_field(BalanceOptions, "scope")
    accumulate: Literal["buffer", "exact", "hold"] = core_field(BalanceOptions, "accumulate")
    coefficient: float = core_field(BalanceOptions, "coefficient")
    micro_fraction: float = core_field(BalanceOptions, "micro_fraction")
    sequence_coefficient: float = core_field(BalanceOptions, "sequence_coefficient")
    device_coefficient: float = core_field(BalanceOptions, "device_coefficient")
    device_groups: int | None = core_field(BalanceOptions, "device_groups")
    entropy_coefficient: float = core_field(BalanceOptions, "entropy_coefficient")
    z_coefficient: float = core_field(BalanceOptions, "z_coefficient")
    bias: Literal["none", "sign", "proportional"] = core_field(BalanceOptions, "bias")
    bias_rate: float = core_field(BalanceOptions, "bias_rate")


class Lora(Section):
    """Low-rank adapters (LoRA): the model stays as it is, and small matrices beside its own are trained."""

    rank: NonNegative = Field(
        default=0,
        description="Rank of the low-rank adapters that are trained in place of the model (docs/post-train.md). Of all "
        "other weights there is no gradient and no optimizer state; routers stay as they are. 0: no adapters, the "
        "model itself is trained.",
    )
    alpha: PositiveFloat = Field(
        default=16.0, description="What adapters add is multiplied by `lora.alpha` / `lora.rank`, as in peft."
    )
    targets: tuple[str, ...] | None = Field(
        default=None,
        description="What has adapters: ends of names as transformers has them, such as q_proj for linear layers and "
        "experts.gate_up_proj for matrices of experts; the same names for presets. null: all linear layers but routers "
        "and the output head, and all matrices of experts.",
    )
    shared: bool = Field(
        default=False,
        description="Whether all experts of a layer share one adapter for each matrix. false: each has its own.",
    )


class Eval(Section):
    """Evaluation on held-out text."""

    every: NonNegative = Field(description="Steps between two evaluations on held-out text. 0: only at the end.")
    tokens_per_domain: Positive = Field(description="Held-out tokens that an evaluation reads from each domain.")


class Generate(Section):
    """Text that the model writes at the end of a run and for `moetrain generate`."""

    prompt: str | None = Field(
        description="Text to continue. null: one prompt per domain, taken from held-out documents."
    )
    tokens: Positive = Field(description="Tokens to generate per prompt.")
    temperature: NonNegativeFloat = Field(
        description="Divisor of the logits before a token is drawn. 0: always take the most probable token."
    )
    seed: NonNegative = Field(description="Seed of the draws.")
