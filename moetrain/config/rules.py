"""What must hold between the fields of a configuration, and between it and the number of ranks.

Mistakes are found at once: neither torch nor compiled code is loaded.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moetrain.common.errors import ConfigError, short
from moetrain.config.core_options import corpus_options, optimizer_options, planner_options, router_options
from moetrain.config.schema import Config, Model
from moetrain.moe.options import find_planner_problem

Rule = Callable[[bool, str, str], None]  # raises for (whether it holds, the field, the rule) unless it does


def check(c: Config) -> None:
    """Raises `ConfigError` for the first rule between fields that does not hold."""

    def rule(holds: bool, field: str, text: str) -> None:
        if not holds:
            value: Any = c
            for part in field.split("."):
                value = getattr(value, part)
            raise ConfigError(f"{field}={short(value)}: {text}")

    if c.run.name is not None:
        place = Path(c.run.name)
        inside = bool(place.parts) and not place.is_absolute() and ".." not in place.parts
        rule(inside, "run.name", "must be the name of a folder below run.dir, without .. and not absolute")
        rule(c.run.name.isprintable(), "run.name", "must have no control characters")
        rule(max(len(os.fsencode(part)) for part in place.parts) <= 200, "run.name", "must have at most 200 bytes")
    named = c.checkpoint.resume not in ("auto", "none")
    rule(c.init_from is None or not named, "init_from", "must be null where checkpoint.resume names a checkpoint")
    m, k = c.model, c.router.top_k
    planner_options(c.planner)
    corpus_options(c.data)
    optimizer_options(c.optim)
    if c.optim.name != "adamw":
        rule(c.engine.name == "native", "optim.name", "must be adamw under engine=deepspeed")
        files = "must be none or cpu: only the states of optim.name=adamw lie in files"
        rule(c.engine.offload != "disk", "engine.offload", files)
    rule(k <= m.num_experts, "router.top_k", f"must be at most model.num_experts={m.num_experts}")
    groups = c.balance.device_groups
    rule((groups or 1) <= m.num_experts, "balance.device_groups", f"must be at most model.num_experts={m.num_experts}")
    if isinstance(m, Model):
        _check_schedule(m, rule)
    for experts, top_k in zip(m.experts_of_layers, c.top_k_of_layers, strict=True):
        most = f"must leave every layer enough experts; one has {experts} for {top_k} per token"
        rule(top_k <= experts, "router.k_schedule" if k <= experts else "model.min_experts", most)
    broken = find_planner_problem(c.planner.name, router_options(c.router), m.num_zero_compute)
    rule(broken is None, "planner.name", broken or "")
    for field, text in _find_broken_router_rules(c):
        rule(False, field, text)
    if c.train.objective != "lm":
        rule(c.data.source == "chat", "train.objective", "needs data=chat, whose conversations say what to learn")
    if c.train.experts_dtype == "fp8":
        _check_fp8(c, rule)
    if c.train.objective == "dpo":
        _check_pairs(c, rule)
    rule(not c.router.freeze or c.balance.bias == "none", "balance.bias", "must be none with router.freeze=true")
    if c.lora.rank:
        _check_lora(c, rule)
    if isinstance(m, Model):
        _check_shape(m, rule)
    else:
        _check_hugging_face(c, rule)
    if c.parallel.ep == 1:
        idle = c.parallel.chunks in (1, "auto")
        rule(idle, "parallel.chunks", "must be 1 or auto with parallel.ep=1, where no rows travel")
    rule(c.optim.min_lr <= c.optim.lr, "optim.min_lr", f"must be at most optim.lr={c.optim.lr}")
    if c.track.tensorboard:
        rule(
            find_spec("tensorboard") is not None,
            "track.tensorboard",
            "needs the package tensorboard: pip install 'moetrain[tensorboard]'",
        )
    if c.checkpoint.remote is not None:
        rule("://" in c.checkpoint.remote, "checkpoint.remote", "must be a URL, such as s3://bucket/runs")
    if c.data.source == "folder":
        rule(c.data.path is not None, "data.path", "must be given for data.source=folder: a folder or a file")
    if c.data.source == "tokens":
        named = bool(getattr(c.data, "sources", None))
        rule(named, "data.sources", "must name a source, such as data.sources.web.path=PATH")
    if c.data.source == "chat":
        sources = getattr(c.data, "sources", None)
        rule(c.data.path is not None or bool(sources), "data.path", "must be given for data=chat, or else data.sources")
        rule(c.data.path is None or not sources, "data.path", "must be null where data.sources are given")
        template = getattr(c.data, "chat_template", None)
        if template is not None and not Path(template).is_file():
            raise ConfigError(f"data.chat_template={template}: must be an existing file")
        rule(find_spec("transformers") is not None, "data.source", "needs transformers: pip install 'moetrain[hf]'")
    if c.data.tokenizer is not None:
        rule(Path(c.data.tokenizer).is_file(), "data.tokenizer", "must be an existing file")


def _check_pairs(c: Config, rule: Rule) -> None:
    """The two sequences of a pair stay together."""
    pairs = "must be even under train.objective=dpo, where two sequences are a pair"
    rule(c.router.replay is None, "router.replay", "must be null under train.objective=dpo")
    rule(c.train.global_batch % 2 == 0, "train.global_batch", pairs)
    rule((c.train.micro_batch or 2) % 2 == 0, "train.micro_batch", pairs)
    rule((c.data.domain_block or 2) % 2 == 0, "data.domain_block", pairs)
    alone = c.data.attend_within_documents or not getattr(c.data, "pack", False)
    rule(alone, "data.pack", "must be false with data.attend_within_documents=false: pairs would see each other")


def _check_schedule(m: Model, rule: Rule) -> None:
    if m.expert_schedule != "uniform":
        rule(
            m.min_experts is not None,
            "model.min_experts",
            f"must be given for model.expert_schedule={m.expert_schedule}",
        )
    if m.min_experts is not None:
        rule(m.num_experts % m.min_experts == 0, "model.min_experts", f"must divide model.num_experts={m.num_experts}")


def _check_shape(m: Model, rule: Rule) -> None:
    rule(m.num_heads % m.num_kv_heads == 0, "model.num_kv_heads", f"must divide model.num_heads={m.num_heads}")
    rule(m.head_dim % 2 == 0, "model.head_dim", "must be even: rotary position embedding rotates pairs")
    rule(m.dim % 8 == 0, "model.dim", "must be a multiple of 8: grouped GEMMs need rows of 16 bytes")
    rule(
        m.expert_hidden % 8 == 0,
        "model.expert_hidden",
        "must be a multiple of 8: grouped GEMMs need rows of 16 bytes",
    )
    rule(
        m.num_dense_layers < m.num_layers,
        "model.num_dense_layers",
        f"must be below model.num_layers={m.num_layers}, so that one layer has experts",
    )


def _check_fp8(c: Config, rule: Rule) -> None:
    """What the experts' products in FP8 need."""
    m = c.model
    rule(isinstance(m, Model), "train.experts_dtype", "must be null for model=hf")
    rule(not c.lora.rank, "train.experts_dtype", "must be null with lora.rank > 0")
    rule(c.train.dtype != "fp32", "train.dtype", "must be bf16 or auto with train.experts_dtype=fp8")
    for field, width in (("model.dim", m.dim), ("model.expert_hidden", m.expert_hidden)):
        rule(width % 16 == 0, field, "must be a multiple of 16 with train.experts_dtype=fp8: rows of 16 bytes")


def _check_lora(c: Config, rule: Rule) -> None:
    if c.lora.targets == ():
        raise ConfigError("lora.targets=[]: must name something, or be null for all that can have adapters")
    rule(
        c.balance.bias == "none",
        "balance.bias",
        "must be none with lora.rank > 0, under which routers stay as they are",
    )
    rule(c.balance.accumulate != "hold", "balance.accumulate", "must be buffer or exact with lora.rank > 0")
    rule(c.engine.name == "native", "engine.name", "must be native with lora.rank > 0: adapters are not under ZeRO yet")
    rule(not c.train.compile, "train.compile", "must be false with lora.rank > 0")


def _check_hugging_face(c: Config, rule: Rule) -> None:
    """What the model of a folder, whose code is transformers', cannot do."""
    packages = find_spec("transformers") is not None
    rule(packages, "model.source", "needs the package transformers: pip install 'moetrain[hf]'")
    rule(c.train.recompute != "selective", "train.recompute", "must be none or full for model=hf")
    rule(not c.train.compile, "train.compile", "must be false for model=hf")
    rule(c.engine.max_rows is None, "engine.max_rows", "must be null for model=hf")
    rule(c.balance.accumulate != "hold", "balance.accumulate", "must be buffer or exact for model=hf")


def _find_broken_router_rules(c: Config) -> Iterator[tuple[str, str]]:
    """Yields (field, rule) for all that the options of the router break."""
    options = router_options(c.router)
    if not options.biased and c.balance.bias != "none":
        yield "balance.bias", f"must be none for the router {c.router.name}, which has no use for a bias"
    if options.equal_layers and isinstance(c.model, Model) and c.model.expert_schedule != "uniform":
        rule = f"must be uniform for the router {c.router.name}, which adds the logits of the layer before"
        yield "model.expert_schedule", rule
    for experts, top_k in zip(c.model.experts_of_layers, c.top_k_of_layers, strict=True):
        for field, rule in replace(options, top_k=top_k).problems(experts + c.model.num_zero_compute):
            yield f"router.{field}", rule
