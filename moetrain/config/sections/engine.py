"""The engines, which shard and update the parameters: one section each, told apart by `engine.name`."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from moetrain.config.sections.base import NonNegative, Positive, Section

NAME = "The kind of engine; choose it by the group, such as `engine=deepspeed`."
GUEST_MEMORY = (
    "MiB per rank for guest weights (temporary replicas of experts) that stay from the forward to the backward pass; "
    "the makespan planner keeps within it. 0: none stays. null: an eighth of the smallest GPU's memory, 1,024 on CPUs."
)
MAX_ROWS = (
    "Most token copies that the experts of a layer compute at a time; more are computed in several parts, which is "
    "slower and needs less memory. null: all at once."
)


class Native(Section):
    """`engine=native`: FSDP2 for the dense parameters and across the data ranks of an expert shard."""

    name: Literal["native"] = Field(description=NAME)
    reshard_after_forward: bool = Field(
        description="Whether gathered parameters are freed between forward and backward: less memory, more traffic."
    )
    offload: Literal["none", "cpu", "disk"] = Field(
        description="Where optimizer states lie. none: on the device. cpu: with the fp32 master weights in host memory "
        "(only on GPUs). disk: like cpu, with AdamW's moments in memory-mapped files."
    )
    offload_dir: str | None = Field(
        description="Folder for the files of `engine.offload=disk`, which vanish with the process. null: the run's."
    )
    guest_memory_mib: NonNegative | None = Field(description=GUEST_MEMORY)
    max_rows: Positive | None = Field(description=MAX_ROWS)


class DeepSpeed(Section):
    """`engine=deepspeed`: DeepSpeed's ZeRO for dense parameters and experts (docs/deepspeed.md)."""

    name: Literal["deepspeed"] = Field(description=NAME)
    zero_stage: Literal[0, 1, 2, 3] = Field(
        description="What ZeRO shards. 0: nothing. 1: optimizer states. 2: also gradients. 3 is refused."
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        description="Where optimizer states and master weights lie. none: on the device. cpu: in host memory, at "
        "stages 1 and 2. nvme is refused."
    )
    extra: dict[str, Any] | None = Field(
        description="More of DeepSpeed's own configuration, merged into the one that moetrain generates. null: nothing."
    )
    guest_memory_mib: NonNegative | None = Field(description=GUEST_MEMORY)
    max_rows: Positive | None = Field(description=MAX_ROWS)


def _engine_name(engine: Any) -> Any:
    return engine.get("name") if isinstance(engine, dict) else getattr(engine, "name", None)


AnyEngine = Annotated[
    Annotated[Native, Tag("native")] | Annotated[DeepSpeed, Tag("deepspeed")], Discriminator(_engine_name)
]
