"""The registry of metrics: every name that a run records, with its unit, its meaning and where it is drawn.

Whoever writes, reads or draws a metric takes its name from here. docs/metrics.md, the wandb workspace and the units of
the report are made from this file. In a name `layer_LL` stands for an MoE layer, with `model.chain` for one of its
passes, and `DOMAIN` for a domain of the corpus. Imports neither torch nor numpy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

LAYER, DOMAIN = "layer_LL", "DOMAIN"
LAYER_FORM, DOMAIN_FORM = r"layer_\d+(?:_\d+)?", r"[^/]+"
Better = Literal["lower", "higher", ""]


@dataclass(frozen=True)
class Metric:
    name: str  # as in metrics.jsonl, wandb and TensorBoard; may have LAYER or DOMAIN in it
    unit: str  # empty: a plain number
    better: Better  # empty: neither
    meaning: str
    figure: str  # of the report: a key of `report.figures.FIGURES`; empty: not drawn
    good: str  # what a healthy run has

    @property
    def form(self) -> "re.Pattern[str]":
        """Return a pattern that matches the names that this one stands for; a group `layer` or `domain` holds the part
        that varies."""
        text = re.escape(self.name).replace(LAYER, f"(?P<layer>{LAYER_FORM})")
        return re.compile(text.replace(DOMAIN, f"(?P<domain>{DOMAIN_FORM})"))


METRICS: dict[str, Metric] = {}


def define(name: str, unit: str, better: Better, meaning: str, figure: str = "", good: str = "") -> str:
    """Add a metric to the registry and return its name. Raises `ValueError` where it is there already."""
    if name in METRICS:
        raise ValueError(f"the metric {name} is defined twice")
    METRICS[name] = Metric(name, unit, better, meaning, figure, good)
    return name


def for_layer(name: str, layer: str) -> str:
    """Return the metric `name`, which has `layer_LL` in it, of one layer, such as `layer_03`."""
    return name.replace(LAYER, layer)


def for_domain(name: str, domain: str) -> str:
    """Return the metric `name`, which has `DOMAIN` in it, of one domain."""
    return name.replace(DOMAIN, domain)


def layer_prefixes() -> list[str]:
    """Return what the names of metrics of single layers begin with, such as `balance/layer_`."""
    return sorted({name.partition(LAYER)[0] + "layer_" for name in METRICS if LAYER in name})


LOAD_IMAGE = "experts/load"  # a heat map of all layers at sampled steps, only in wandb

LOSS = define(
    "train/loss", "nats/token", "lower",
    "What is minimized: cross entropy, or the loss of preference pairs, plus all router losses, summed over layers, "
    "times their coefficients.",
)  # fmt: skip
LM_LOSS = define("train/lm_loss", "nats/token", "lower", "Cross entropy alone, of pairs over both answers.", "loss")
DOMAIN_LOSS = define(
    "train/DOMAIN/loss", "nats/token", "lower", "Cross entropy of the tokens of one domain.", "loss"
)  # fmt: skip
BALANCE_LOSS = define(
    "train/balance_loss", "", "lower", "Load-balancing loss before its coefficient, mean over layers.", "balance",
    "1 is balanced; at most the number of experts",
)  # fmt: skip
MICRO_BALANCE_LOSS = define(
    "train/micro_balance_loss", "", "lower",
    "Load-balancing loss with the selections of every rank's micro-batch alone; needs `balance.micro_fraction`.",
    good="1 is balanced",
)  # fmt: skip
SEQUENCE_LOSS = define(
    "train/sequence_loss", "", "lower",
    "Load-balancing loss within every sequence; needs `balance.sequence_coefficient`.", good="1 is balanced",
)  # fmt: skip
DEVICE_LOSS = define(
    "train/device_loss", "", "lower", "Load-balancing loss over groups of experts; needs `balance.device_coefficient`.",
    good="1 is balanced; at most the number of groups",
)  # fmt: skip
ENTROPY_LOSS = define(
    "train/entropy_loss", "nats", "",
    "Mean entropy of a token's router probabilities, mean over layers; needs `balance.entropy_coefficient`.",
)  # fmt: skip
Z_LOSS = define(
    "train/z_loss", "", "lower", "Mean squared logsumexp of the router's logits, mean over layers.", "z_loss", "small"
)  # fmt: skip
ROUTER_LOSS = {  # by the name that moe.routing.balance gives it
    "balance": BALANCE_LOSS,
    "micro_balance": MICRO_BALANCE_LOSS,
    "sequence": SEQUENCE_LOSS,
    "device": DEVICE_LOSS,
    "entropy": ENTROPY_LOSS,
    "z": Z_LOSS,
}
DPO = {  # by what training.preference calls it
    "loss": define(
        "dpo/loss", "", "lower", "Loss of preference pairs, the mean over the global batch's pairs.",
        good="begins at log 2 = 0.693 with dpo.loss=sigmoid",
    ),
    "accuracy": define(
        "dpo/accuracy", "share", "higher", "Pairs whose chosen answer has the higher reward.",
        good="rises from 0, where all rewards are equal",
    ),
    "margin": define(
        "dpo/margin", "", "higher", "Reward of the chosen answer less that of the rejected one.", good="rises",
    ),
    "chosen_reward": define(
        "dpo/chosen_reward", "", "higher",
        "`dpo.beta` × (log-probability of the chosen answer less that under the reference).",
        good="not far below 0",
    ),
    "rejected_reward": define("dpo/rejected_reward", "", "lower", "The same of the rejected answer.", good="falls"),
    "likelier": define("dpo/likelier", "share", "higher", "Pairs whose chosen answer has the higher log-probability."),
    "chosen_logp": define("dpo/chosen_logp", "nats", "higher", "Log-probability of the chosen answer."),
    "rejected_logp": define("dpo/rejected_logp", "nats", "", "Log-probability of the rejected answer."),
}  # fmt: skip
HELD_OUT_DPO = {
    "loss": define("dpo/held_out_loss", "", "lower", "Loss of held-out pairs."),
    "accuracy": define(
        "dpo/held_out_accuracy", "share", "higher", "Held-out pairs whose chosen answer has the higher reward.",
    ),
    "margin": define("dpo/held_out_margin", "", "higher", "The margin of held-out pairs."),
    "likelier": define(
        "dpo/held_out_likelier", "share", "higher", "Held-out pairs whose chosen answer is the likelier one.",
    ),
}  # fmt: skip
GRAD_NORM = define(
    "train/grad_norm", "", "", "Global norm of the gradients before clipping; null at a skipped step.", "gradient",
    "a narrow band after the warm-up",
)  # fmt: skip
SKIPPED_STEPS = define(
    "train/skipped_steps", "steps", "lower",
    "Steps skipped since this start, because their loss or gradient was not finite.", good="0",
)  # fmt: skip
LR = define("train/lr", "", "", "Learning rate.", "rate")
TOKENS = define("train/tokens", "tokens", "", "Tokens trained on so far.")

TOKENS_PER_SECOND = define(
    "perf/tokens_per_second", "tokens/s", "higher", "Throughput of all ranks together.", "speed"
)  # fmt: skip
STEP_SECONDS = define(
    "perf/step_seconds", "s", "lower", "One optimizer step, without reading and writing metrics.", "time"
)  # fmt: skip
TIME = {
    "data": define("perf/time/data", "s", "lower", "Reading the batch, part of a step, mean over ranks.", "time"),
    "forward": define("perf/time/forward", "s", "lower", "Forward passes and losses, mean over ranks.", "time"),
    "backward": define(
        "perf/time/backward", "s", "lower", "Backward passes and the reduction of gradients, mean over ranks.", "time"
    ),
    "update": define("perf/time/update", "s", "lower", "Gradient clipping and optimizer, mean over ranks.", "time"),
}
RECORD_SECONDS = define(
    "perf/time/record", "s", "lower", "All recording on rank 0 since the row before.",
    good="at most 1 % of the steps since then, else raise `train.log_every`",
)  # fmt: skip
MFU = define(
    "perf/mfu", "share", "higher",
    "Model FLOPs utilization: forward and backward FLOPs without recompute, as a share of the rate of a large matrix "
    "product that every rank measured at the start.",
)  # fmt: skip
PEAK_MEMORY_GIB = define(
    "perf/peak_memory_gib", "GiB", "lower",
    "Most memory ever allocated (GPU) or resident (CPU), on the fullest rank.", "memory",
)  # fmt: skip
MEMORY_GIB = define(
    "perf/memory_gib", "GiB", "lower",
    "A list: most memory of every rank since the row before (GPU), or resident now (CPU).", "memory", "a plateau",
)  # fmt: skip
CHECKPOINT_STALL_SECONDS = define(
    "perf/checkpoint_stall_seconds", "s", "lower",
    "Time that training waited for a save at its step, including an earlier save that was still in progress.",
    good="a small share of a step",
)  # fmt: skip
PHASE = {  # all MoE layers of a step, mean over ranks
    "route": define("perf/phase/route", "s", "lower", "Choosing experts and exchanging counts.", "time"),
    "plan": define("perf/phase/plan", "s", "lower", "Planning.", "time"),
    "lend": define("perf/phase/lend", "s", "lower", "Starting to lend experts, and waiting for them.", "time"),
    "dispatch": define(
        "perf/phase/dispatch", "s", "lower", "Index tables, gathering of rows, all-to-all to the experts.", "time"
    ),
    "experts": define("perf/phase/experts", "s", "lower", "Grouped GEMMs of the forward pass.", "time"),
    "combine": define("perf/phase/combine", "s", "lower", "All-to-all back, weighted sums.", "time"),
    "backward_lend": define(
        "perf/phase/backward_lend", "s", "lower",
        "Backward: lending experts again, and returning their gradients.", "time",
    ),
    "backward_dispatch": define(
        "perf/phase/backward_dispatch", "s", "lower", "Backward: gradients of the layer's output to the experts.",
        "time",
    ),
    "backward_experts": define(
        "perf/phase/backward_experts", "s", "lower",
        "Backward: grouped GEMMs, and their recompute where rows come in chunks.", "time",
    ),
    "backward_combine": define(
        "perf/phase/backward_combine", "s", "lower", "Backward: gradients of the rows back, and their sums.", "time"
    ),
}  # fmt: skip
WAITED = define(
    "perf/waited", "s", "lower",
    "A list: time that each rank waited for others in the exchanges of the MoE layers; at steps of the load trace.",
    "waited", "0: all arrive together",
)  # fmt: skip
WAITED_FOR = define(
    "perf/waited_for", "s", "lower",
    "A list: time that all others waited for each rank; at steps of the load trace.",
    "waited", "alike; a rank that stands out is slow, or has too many rows",
)  # fmt: skip

IMBALANCE_HOME = define(
    "balance/imbalance_home", "max/mean", "lower",
    "Load of the busiest device over the mean if every expert computed at home, mean over layers.", "imbalance",
    "1 is balanced",
)  # fmt: skip
IMBALANCE_PLANNED = define(
    "balance/imbalance_planned", "max/mean", "lower",
    "Load of the busiest device over the mean after planning, mean over layers: what the devices computed.",
    "imbalance", "1 is balanced",
)  # fmt: skip
GUESTS = define(
    "balance/guests", "copies/step", "",
    "Guests (temporary replicas of experts) lent in a step, all layers and groups.",
    "guests",
)  # fmt: skip
ROWS_MOVED = define(
    "balance/rows_moved", "rows/step", "", "Rows (token copies) computed away from the home of their expert."
)  # fmt: skip
ROWS_MOVED_FRACTION = define(
    "balance/rows_moved_fraction", "share", "", "Rows computed away from home, as a share of all rows.", "moved"
)  # fmt: skip
ROWS_CROSSING_FRACTION = define(
    "balance/rows_crossing_fraction", "share", "lower",
    "Rows computed on another rank than the one that holds their token, as a share of all rows.", "moved",
)  # fmt: skip
LEND_BYTES = define(
    "balance/lend_bytes", "bytes/step", "lower", "Expert weights sent in the forward pass.", "crossing"
)  # fmt: skip
CROSSING_BYTES = define(
    "balance/crossing_bytes", "bytes/step", "lower",
    "Tokens sent to other ranks in the forward pass; as many bytes come back, and both again in the backward pass.",
    "crossing",
)  # fmt: skip
BYTES_INSIDE = define(
    "perf/bytes_inside_nodes", "bytes/step", "lower",
    "Rows, their announcements and gradients sent from rank to rank of a node, forward and backward, all ranks; with "
    "`parallel.exchange=two_level` those on their way to another node, too.",
)  # fmt: skip
BYTES_BETWEEN = define(
    "perf/bytes_between_nodes", "bytes/step", "lower",
    "The same between nodes: equal under every `parallel.exchange`.", good="a small share of those inside",
)  # fmt: skip
SAVED_SECONDS = define(
    "balance/saved_seconds", "s/step", "higher",
    "Predicted computing time of the slowest rank that the plan saves against every expert at home, by `costs.json`.",
    "saved", "more than `perf/phase/lend` + `perf/phase/backward_lend`",
)  # fmt: skip
DEVICE_LOAD_HOME = define(
    "balance/device_load_home", "rows/step", "", "A list: rows of every rank if every expert computed at home.",
    "devices",
)  # fmt: skip
DEVICE_LOAD_PLANNED = define(
    "balance/device_load_planned", "rows/step", "", "A list: rows that every rank computed.", "devices", "alike"
)  # fmt: skip
EXPERTS_PER_TOKEN = define(
    "balance/experts_per_token", "", "",
    "Selections per token, mean over MoE layers and passes, with experts that compute nothing.",
    good="`router.top_k`, unless the router varies",
)  # fmt: skip
DROPPED_FRACTION = define(
    "balance/dropped_fraction", "share", "lower",
    "Selections that exceeded `router.capacity_factor` and were dropped, as a share of all.",
    good="0 without a capacity",
)  # fmt: skip
REPLAYED_FRACTION = define(
    "balance/replayed_fraction", "share", "higher",
    "Selections that are those recorded in `router.replay`, as a share of all; with `router.replay` alone.",
    good="1: no token fell back to its router",
)  # fmt: skip
GAMMA_PHASE = define(
    "balance/gamma_phase", "", "",
    "Phase that the congestion coefficient suggests: 1 surge, 2 stabilization, 3 relaxation; null for 20 rows.",
)  # fmt: skip
DEAD_EXPERTS = define(
    "balance/dead_experts", "experts", "lower",
    "Dead experts of all layers: those that no token selected in the last `track.window` steps.", good="0",
)  # fmt: skip
STARVING_EXPERTS = define(
    "balance/starving_experts", "experts", "lower",
    "Starving experts of all layers: less than a tenth of an even share of those steps' selections, but not none.",
    good="0",
)  # fmt: skip

LAYER_MAX_VIO = define(
    "balance/layer_LL/max_vio", "", "lower",
    "MaxVio: (largest − mean) / mean expert load over the global batch.", "max_vio", "0 is balanced",
)  # fmt: skip
LAYER_MAX_VIO_MICRO = define(
    "balance/layer_LL/max_vio_micro", "", "",
    "MaxVio within a rank's micro-batch, mean over ranks and micro-steps, without experts that compute nothing.",
    "max_vio_micro", "above `max_vio` where experts specialize",
)  # fmt: skip
LAYER_ENTROPY = define(
    "balance/layer_LL/entropy", "share", "",
    "Mean entropy of a token's router probabilities, as a share of log E.", "entropy", "0 decided, 1 undecided",
)  # fmt: skip
LAYER_LOAD_ENTROPY = define(
    "balance/layer_LL/load_entropy", "share", "higher", "Entropy of the expert load, as a share of log E.",
    good="1 is balanced, 0: one expert has all",
)  # fmt: skip
LAYER_DEAD_EXPERTS = define(
    "balance/layer_LL/dead_experts", "experts", "lower", "Experts that no token selected in this step.", "dead", "0"
)  # fmt: skip
LAYER_DEAD_EXPERTS_WINDOW = define(
    "balance/layer_LL/dead_experts_window", "experts", "lower",
    "Dead experts: those that no token selected in the last `track.window` steps.", good="0",
)  # fmt: skip
LAYER_STARVING_EXPERTS = define(
    "balance/layer_LL/starving_experts", "experts", "lower",
    "Experts with less than a tenth of an even share of those steps, but not none.", good="0",
)  # fmt: skip
LAYER_LOGIT_NORM = define(
    "balance/layer_LL/logit_norm", "", "", "Mean L2 norm of a token's router logits.", "logits", "steady"
)  # fmt: skip
LAYER_Z = define("balance/layer_LL/z", "", "lower", "Mean squared logsumexp of the router's logits.", good="small")
LAYER_GAMMA_EFF = define(
    "balance/layer_LL/gamma_eff", "", "", "Congestion coefficient γ̂, [below](#the-congestion-coefficient).", "gamma"
)  # fmt: skip
LAYER_BIAS_MAX = define(
    "balance/layer_LL/bias_max", "gate score", "", "Largest absolute bias of an expert; needs `balance.bias`."
)  # fmt: skip
LAYER_LOAD = define(
    "balance/layer_LL/load", "share", "", "A list: share of the selections of every expert; sums to 1.", "load"
)  # fmt: skip
LAYER_MEANS = {  # metrics of single layers: their mean over layers
    LAYER_MAX_VIO: define("balance/max_vio", "", "lower", "Mean over layers.", good="0 is balanced"),
    LAYER_MAX_VIO_MICRO: define("balance/max_vio_micro", "", "", "Mean over layers."),
    LAYER_ENTROPY: define("balance/entropy", "share", "", "Mean over layers.", good="0 decided, 1 undecided"),
    LAYER_LOAD_ENTROPY: define("balance/load_entropy", "share", "higher", "Mean over layers.", good="1 is balanced"),
    LAYER_LOGIT_NORM: define("balance/logit_norm", "", "", "Mean over layers.", good="steady"),
    LAYER_GAMMA_EFF: define("balance/gamma_eff", "", "", "Mean over layers."),
}
GAMMA_EFF = LAYER_MEANS[LAYER_GAMMA_EFF]

EVAL_LOSS = define("eval/loss", "nats/token", "lower", "Validation loss: cross entropy of held-out text, all domains.")
EVAL_PPL = define("eval/ppl", "", "lower", "Perplexity: the exponential of the validation loss.")
BITS_PER_BYTE = define(
    "eval/bits_per_byte", "bits/byte", "lower",
    "Validation loss for every byte of text: comparable between tokenizers.", "held_out",
)  # fmt: skip
DOMAIN_PPL = define("eval/DOMAIN/ppl", "", "lower", "Perplexity of one domain's held-out text.")
DOMAIN_BITS_PER_BYTE = define(
    "eval/DOMAIN/bits_per_byte", "bits/byte", "lower", "Validation loss of one domain.", "held_out"
)  # fmt: skip
EVAL_MAX_VIO = define(
    "eval/layer_LL/max_vio", "", "lower",
    "MaxVio over all held-out text (MaxVio_global of Loss-Free Balancing).", good="0 is balanced",
)  # fmt: skip
LAYER_DOMAIN_MI = define(
    "specialise/layer_LL/domain_mi", "bits", "higher",
    "Mutual information of domain and chosen expert on held-out text, domains weighted alike.", "information",
    "0: experts know no domains",
)  # fmt: skip
DOMAIN_MI = define("specialise/domain_mi", "bits", "higher", "Mean over layers.")


def table(titles: Mapping[str, str]) -> list[str]:
    """Return the lines of the table of docs/metrics.md. `titles` of the report's figures, by their keys."""
    lines = ["| name | unit | better | what it is | in a healthy run | figure |", "|---|---|---|---|---|---|"]
    for m in METRICS.values():
        figure = titles[m.figure] if m.figure else ""
        lines.append(f"| `{m.name}` | {m.unit} | {m.better} | {m.meaning} | {m.good} | {figure} |")
    return lines
