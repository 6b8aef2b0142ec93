"""What surrounds the training: the run's folder, checkpoints, recovery, tracking, data."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from moetrain.config.sections.base import Fraction, NonNegative, Positive, PositiveFloat, Section


class Run(Section):
    """Where the files of a run are written."""

    name: str | None = Field(
        default=None,
        description="Name of the run's folder below `run.dir`. The same name continues the run. null: a new name from "
        "the time and the planner.",
    )
    dir: str = Field(default="runs", description="Folder that holds the folders of all runs.")


class Checkpoint(Section):
    """When checkpoints are saved, which are kept, and from which one a run continues."""

    every: NonNegative = Field(description="Steps between two checkpoints. 0: only at the end.")
    keep: Positive = Field(description="Number of newest checkpoints that are kept.")
    keep_every: NonNegative = Field(
        description="Checkpoints at multiples of so many steps are kept for good, besides the newest. 0: none."
    )
    resume: str = Field(
        description="Where to start from. auto: the newest checkpoint of the run, if it has one. none: from scratch. "
        "Or the PATH of a folder step_N, also of another run, or its URL in a store."
    )
    remote: str | None = Field(
        default=None,
        description="URL of a folder in a store that fsspec reaches, such as s3://bucket/runs, to which every finished "
        "checkpoint is uploaded, as URL/RUN/step_N; a run without newer ones in its folder continues from there. null: "
        "none (docs/checkpoints.md).",
    )


class Recovery(Section):
    """What happens when a worker fails or a loss is not finite (docs/failures.md)."""

    timeout: PositiveFloat = Field(
        description="Seconds without progress after which a rank names the ranks that it waits for, and ends."
    )
    restarts: NonNegative = Field(
        description="Times in a row that `moetrain train` restarts its workers when they get no further."
    )
    skips: Positive = Field(
        description="Steps in a row that may be skipped because loss or gradient is not finite, before the run goes "
        "back to an earlier state."
    )
    snapshot_every: NonNegative = Field(
        description="Steps between two in-memory checkpoints in the hosts' shared memory. 0: none."
    )


class Track(Section):
    """Experiment tracking, the load trace, alerts and profiling."""

    wandb: bool = Field(
        description="Whether metrics go to wandb: online if you are logged in, else offline. A failure there is "
        "reported and the run continues."
    )
    tensorboard: bool = Field(
        description="Whether event files are written to the run's folder tensorboard/. It needs `pip install "
        "'moetrain[tensorboard]'`."
    )
    project: str | None = Field(
        default=None, description="Project in wandb. null: the variable WANDB_PROJECT, or `moetrain`."
    )
    entity: str | None = Field(
        default=None, description="User or team in wandb. null: as wandb's own environment variables say."
    )
    group: str | None = Field(
        default=None,
        description="Group of runs in wandb. null: as wandb's own environment variables say; runs of a sweep form one.",
    )
    tags: tuple[str, ...] = Field(
        default=(), description="Tags in wandb, such as [first,second]. []: as wandb's own environment variables say."
    )
    job_type: str | None = Field(
        default=None, description="Job type in wandb. null: as wandb's own environment variables say."
    )
    notes: str | None = Field(
        default=None, description="Notes in wandb. null: as wandb's own environment variables say."
    )
    trace_every: NonNegative = Field(
        description="Steps between two samples of the load trace: tokens per step, layer, rank and expert. 0: no trace."
    )
    window: Positive = Field(description="An expert that is not chosen in so many steps counts as dead.")
    alert_imbalance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        description="Largest device load / mean device load after planning above which an alert is raised. null: none."
    )
    profile_from: Positive | None = Field(
        description="Step at which torch.profiler starts on rank 0. null: no profile."
    )
    profile_steps: Positive = Field(description="Number of steps that torch.profiler records.")

    @field_validator("project", "entity", "group", "job_type")
    @classmethod
    def _check_name(cls, value: str | None, info: ValidationInfo) -> str | None:
        """wandb's rules."""
        if value is not None and not 1 <= len(value) <= 128:
            raise ValueError("must have 1 to 128 characters")
        if info.field_name in ("project", "entity") and value is not None and set(value) & set("/\\#?%:"):
            raise ValueError("must not contain any of / \\ # ? % :")
        return value

    @field_validator("tags")
    @classmethod
    def _check_tags(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(1 <= len(tag) <= 64 for tag in value):
            raise ValueError("must be words of 1 to 64 characters")
        return value


class Data(Section):
    """The corpus: its source, its tokenizer and how documents become sequences (docs/your-own-text.md)."""

    source: str = Field(
        description="Where text comes from. local: files of this Python installation. debian: Debian packages, fetched "
        "with apt-get. folder: your own files. tokens: files of tokens that are prepared already, from several "
        "sources. chat: conversations to fine-tune on (docs/post-train.md). Choose these by the group, `data=folder`, "
        "and a corpus of another package that is installed by `data.source=NAME` (docs/library.md)."
    )
    path: str | None = Field(
        description='Your text: a folder of text files (a subfolder is a domain) or JSONL with {"text", "domain"}, '
        "for `data=folder`; a folder with .deb files, for `data=debian`; a file or folder of conversations, for "
        "`data=chat`."
    )
    dir: str = Field(description="Folder in which prepared corpora are kept, one subfolder per setting.")
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] = Field(
        description="Tokens in the vocabulary of the byte-level BPE tokenizer that is trained on the corpus."
    )
    tokenizer: str | None = Field(
        description="PATH of a tokenizer.json to use instead. null: train a tokenizer on the corpus."
    )
    max_bytes_per_domain: Positive | None = Field(
        description="Bytes of text that are taken from each domain, as a fair sample of its documents. null: all."
    )
    dedup: Literal["exact", "near", "none"] = Field(  # the keys of data.corpus.FINGERPRINTS
        description="Which documents are left out as duplicates. exact: equal texts, line ends and outer white space "
        "aside. near: also texts whose middle thousand characters are equal, case and white space aside. "
        "none: none; the preparation then needs no memory for every document."
    )
    on_bad: Literal["error", "skip"] = Field(
        description="What to do with a malformed file or line of `data=folder` or `data=chat`. error: stop. skip: "
        "leave it out and count it."
    )
    on_change: Literal["error", "keep"] = Field(
        default="error",
        description="What to do when a run continues and the text at `data.path` has changed. error: stop. keep: "
        "continue with the corpus that the run was trained on.",
    )
    held_out: Fraction = Field(description="Share of documents that are kept for evaluation and never trained on.")
    attend_within_documents: bool = Field(description="Whether attention stops at document borders within a sequence.")
    domain_block: Positive | None = Field(
        description="So many consecutive sequences come from one domain. null: the domains are mixed."
    )
