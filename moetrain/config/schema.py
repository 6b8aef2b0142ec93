"""The frozen, typed tree of a run's configuration.

`config.load` composes YAML with Hydra and turns the result into it; `config.resolve` fills in what a start finds out.
Nothing changes a configuration after that.
"""

from pydantic import Field, SerializeAsAny

from moetrain.config.schedules import spread
from moetrain.config.sections.base import Dtype, Section
from moetrain.config.sections.engine import AnyEngine, DeepSpeed, Native
from moetrain.config.sections.model import AnyModel, HuggingFace, Model
from moetrain.config.sections.router import Planner, RouterSection
from moetrain.config.sections.running import Checkpoint, Data, Recovery, Run, Track
from moetrain.config.sections.training import Balance, Dpo, Eval, Generate, Lora, Optim, Parallel, Train

__all__ = [
    "AnyEngine",
    "AnyModel",
    "Balance",
    "Checkpoint",
    "Config",
    "Data",
    "DeepSpeed",
    "Dpo",
    "Dtype",
    "Eval",
    "Generate",
    "HuggingFace",
    "Lora",
    "Model",
    "Native",
    "Optim",
    "Parallel",
    "Planner",
    "Recovery",
    "RouterSection",
    "Run",
    "Track",
    "Train",
]


class Config(Section):
    """Everything that a run can be told."""

    init_from: str | None = Field(
        default=None,
        description="Where a new run takes its weights from, and nothing else: steps, schedule and optimizer begin "
        "anew. A run's folder or name, or a folder step_N of one. The run itself goes on from its own checkpoints. "
        "null: initial weights.",
    )

    run: Run
    train: Train
    dpo: Dpo = Dpo()
    optim: SerializeAsAny[Optim]  # likewise
    parallel: Parallel
    router: SerializeAsAny[RouterSection]  # of a kind's own class, as `config.kinds` makes it
    balance: Balance
    lora: Lora = Lora()
    eval: Eval
    generate: Generate
    checkpoint: Checkpoint
    recovery: Recovery
    track: Track
    model: AnyModel
    data: SerializeAsAny[Data]  # likewise
    planner: SerializeAsAny[Planner]
    engine: AnyEngine

    @property
    def top_k_of_layers(self) -> list[int]:
        return spread(self.router.k_schedule, self.model.num_moe_layers, self.router.top_k, 1)
