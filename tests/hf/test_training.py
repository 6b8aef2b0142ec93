"""`model=hf` in our own loop: the steps of transformers and torch alone, at every layout, and runs that go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moetrain import config
from moetrain.config import ConfigError
from moetrain.config.architecture import read_architecture, read_json
from moetrain.config.spec import resolve
from moetrain.data.loader import Sequences
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine
from moetrain.hf.build import build_transformer, separates_documents
from moetrain.hf.model import HFModel, make_inputs
from moetrain.moe.planning.cost import default_costs
from moetrain.training.loop import train
from moetrain.training.step import build, micro_batches, optimizer_step
from moetrain.verify.huggingface import scatter_rows
from tests.grid import sample
from tests.hf import families, folders

FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]
VOCABULARY, LENGTH, SEQUENCES, STEPS, LR = 512, 16, 8, 3, 1e-2
NEAR = 1e-5
LAYOUTS = [  # ranks, ranks of an expert group, recompute, sequences of a micro-batch, engine
    (1, 1, "none", 8, "native"),
    (2, 2, "full", 2, "native"),
    (4, 2, "full", 1, "native"),
    (4, 2, "full", 1, "deepspeed"),
]
PLAIN = ["optim.clip=0.5", "optim.weight_decay=0.1", "optim.eps=0.01", "train.dtype=fp32", "track.wandb=false"]


class RandomSamples:
    """Random tokens, the same ones whoever asks."""

    def samples(self, begin: int, end: int) -> Sequences:
        rows = [np.random.default_rng(n).integers(0, VOCABULARY, LENGTH + 1) for n in range(begin, end)]
        tokens = np.stack(rows)
        return Sequences(tokens, np.zeros_like(tokens), np.zeros_like(tokens), np.arange(begin, end))

    def count_tokens(self, end: int) -> int:
        return end * LENGTH


def options(folder: Path, *more: str) -> list[str]:
    batch = [f"train.global_batch={SEQUENCES}", f"train.seq_len={LENGTH}"]
    return ["model=hf", f"model.path={folder}", *batch, *PLAIN, *more]


def run_steps(mesh: Mesh, overrides: list[str], forced: bool) -> tuple[list[tuple[float, float]], int]:
    """(loss, gradient norm) of each step, and how many experts were lent."""
    spec = resolve(config.load(overrides), mesh.world, VOCABULARY, "fp32")
    engine = build_engine(build(spec), mesh, spec)
    engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))
    for layer in engine.model.layers_of_experts if forced else ():
        layer.planner = scatter_rows
    found, guests = [], 0
    for number in range(STEPS):
        shares = list(micro_batches(spec, mesh, RandomSamples(), number * SEQUENCES))
        step = optimizer_step(engine, spec, shares, LR)
        nats = torch.stack([part.nats.sum() for part in step.parts]).sum() / (SEQUENCES * LENGTH)
        weighted = torch.stack([part.losses.weighted for part in step.parts]).sum()
        found.append((float(all_reduce_sum(nats + weighted)), step.norm))
        guests += sum(len(s.plan.guests()) for part in step.parts for s in part.stats)
    return found, guests


def run_plain(folder: Path) -> list[tuple[float, float]]:
    """The same by transformers and torch alone, in this process."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").train()
    spared = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias") or "embed_tokens" in n]
    decayed = [p for p in model.parameters() if not any(p is other for other in spared)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=0.01)
    found = []
    for number in range(STEPS):
        batch = RandomSamples().samples(number * SEQUENCES, (number + 1) * SEQUENCES)
        tokens = torch.from_numpy(batch.tokens)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_equal_those_of_transformers_and_torch(pool, name: str, tmp_path: Path) -> None:
    model = families.build(name, vocab_size=VOCABULARY, num_hidden_layers=2)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    expected = run_plain(tmp_path)
    for ranks, ep, recompute, micro_batch, engine in LAYOUTS:
        own = [f"train.recompute={recompute}", f"train.micro_batch={micro_batch}", f"engine={engine}"]
        found, guests = pool.run(run_steps, ranks, options(tmp_path, *own), ranks > 1, ep=ep)[0]
        assert np.array(found) == pytest.approx(np.array(expected), rel=NEAR), (ranks, ep, engine)
        assert (guests > 0) == (ep > 1)


def losses(folder: str) -> list[float]:
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row["train/lm_loss"] for row in rows if "train/lm_loss" in row]


def run_train(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


def test_a_run_goes_on_at_another_layout_when_the_folder_is_gone(pool, data: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "deepseek"
    families.build("deepseek_v3", vocab_size=VOCABULARY).save_pretrained(folder)
    steady = ["optim.schedule=wsd", "optim.decay_fraction=0.01", "optim.warmup=0", "optim.lr=1e-3", "optim.min_lr=1e-3"]
    own = [*options(folder, *data, *steady), f"run.dir={tmp_path}", "eval.tokens_per_domain=64", "generate.tokens=2"]
    whole = pool.run(run_train, 1, [*own, "run.name=whole", "train.steps=3"])[0]
    pool.run(run_train, 2, [*own, "run.name=parts", "train.steps=2"], ep=2)
    shutil.rmtree(folder)
    parts = pool.run(run_train, 4, [*own, "run.name=parts", "train.steps=3"], ep=2)[0]
    assert losses(parts) == pytest.approx(losses(whole), rel=NEAR)
    assert (Path(parts) / "model" / "config.json").is_file()


def test_frozen_routers_stay_as_they_are_under_deepspeed(pool, data: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    families.build("qwen3_moe", vocab_size=VOCABULARY).save_pretrained(folder)
    frozen = ["router.freeze=true", "optim.warmup=0", f"run.dir={tmp_path}", "eval.tokens_per_domain=64"]
    own = [*options(folder, *data, *frozen), "generate.tokens=2", "optim.schedule=wsd", "optim.decay_fraction=0.01"]
    whole = pool.run(run_train, 1, [*own, "run.name=whole", "train.steps=3"])[0]
    parts = [*own, "run.name=parts", "engine=deepspeed"]
    pool.run(run_train, 2, [*parts, "train.steps=2"], ep=2)
    assert losses(pool.run(run_train, 1, [*parts, "train.steps=3"])[0]) == pytest.approx(losses(whole), rel=NEAR)
    rounded = [*own, "run.name=rounded", "engine=deepspeed", "train.steps=1", "train.dtype=bf16"]
    saved = Path(pool.run(run_train, 2, rounded, ep=2)[0]) / "checkpoints" / "step_1"
    entries = json.loads((saved / "entries.json").read_text())
    before = {f"model/hf.{name}": value for name, value in folders.load(folder).items() if "mlp.gate.weight" in name}
    for name, value in before.items():
        dtype, _, pieces = entries[name]
        after = torch.cat([load_file(saved / file)[name].flatten() for file, _, _ in pieces])
        assert dtype == "F32"
        assert torch.equal(after, value.flatten())


def test_the_balance_loss_is_that_of_the_global_batch(pool, tmp_path: Path) -> None:
    folders.make("qwen3_moe", tmp_path, vocab_size=VOCABULARY)
    balance = ["balance.coefficient=0.1", "balance.accumulate=exact", "model.weights=random"]
    found = []
    for ranks, ep, recompute, micro_batch, _ in LAYOUTS[:2]:
        own = options(tmp_path, *balance, f"train.recompute={recompute}", f"train.micro_batch={micro_batch}")
        found.append(pool.run(run_steps, ranks, own, False, ep=ep)[0][0])
    assert np.array(found[1]) == pytest.approx(np.array(found[0]), rel=NEAR)


def refuse(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(["model=hf", *overrides])
    return str(caught.value)


def test_what_a_folder_has_decided_cannot_be_set(tmp_path: Path) -> None:
    path = f"model.path={tmp_path}"
    assert refuse(path) == f"{path}: must be a folder with a config.json"
    about: dict[str, Any] = json.loads(Path("tests/config/tiny_qwen3_moe/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert "router.top_k=4: has no effect with model=hf" in refuse(path, "router.top_k=4")
    assert refuse(path, "train.recompute=selective") == "train.recompute=selective: must be none or full for model=hf"
    assert config.load(["model=hf", path]).router.top_k == about["num_experts_per_tok"]
    (tmp_path / "config.json").write_text(json.dumps({**about, "num_local_experts": 0}))
    assert refuse(path) == f"{path}: has no routed experts"


PARTS = ["deepseek_ocr2", "diffusion_gemma", "ernie4_5_vl_moe", "qwen3_omni_moe", "unlimited_ocr"]  # of whole configs
COVERED = [name for name in families.FAMILIES if name not in ("zaya", *PARTS)]


@pytest.mark.parametrize("name", sample(COVERED, 8))
def test_sizes_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    families.config_of(name).save_pretrained(tmp_path)
    found = read_architecture(read_json(tmp_path), name)
    model = HFModel(build_transformer(tmp_path, device="meta"), ("home", None))
    first = model.layers_of_experts[0].experts
    assert (len(found.moe_layers), found.num_experts) == (len(model.layers_of_experts), first.num_experts)
    assert (found.dim, found.expert_hidden) == (first.dim, first.hidden)
    assert len(model.blocks) == found.num_layers
    assert {p for p, _ in model.initial_values(0)} == set(model.parameters())


def test_positions_begin_anew_with_every_document() -> None:
    document: Tensor = torch.tensor([[3, 3, 4, 4, 4, -1]])
    positions = make_inputs(torch.zeros(1, 6, dtype=torch.int64), document)["position_ids"]
    assert positions.tolist() == [[0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize("name", FAMILIES)
def test_documents_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    families.build(name, vocab_size=VOCABULARY).save_pretrained(tmp_path)
    model = build_transformer(tmp_path)
    assert separates_documents(model) == (name != "gpt_oss")  # whose masks do not look at positions
    if name == "gpt_oss":
        return
    tokens = torch.from_numpy(RandomSamples().samples(0, 2).tokens)
    document = (torch.arange(tokens.shape[1]) >= 5).long().expand_as(tokens)
    together = model(**make_inputs(tokens, document)).logits
    torch.testing.assert_close(together[:, 5:], model(**make_inputs(tokens[:, 5:], None)).logits, rtol=1e-4, atol=1e-5)
