"""Preference tuning: the loss and its gradients are those of pairs one by one, whatever the layout and the packing."""

import json
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain import config
from moetrain.config import Dpo
from moetrain.config.spec import resolve
from moetrain.data import prepare
from moetrain.data.conversations import ChatLoader
from moetrain.data.opening import open_data
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine
from moetrain.engine.base import groups
from moetrain.models.initialise import initialise
from moetrain.moe.planning.cost import default_costs
from moetrain.training.preference import compute_loss
from moetrain.training.reference import compute_reference
from moetrain.training.step import build, micro_batches, optimizer_step
from moetrain.verify.huggingface import scatter_rows
from tests.hf import families
from tests.training.test_train import rows_of, run

STEPS, BATCH, LR, NEAR = 3, 8, 1e-2, 1e-5
LAYOUTS = [  # ranks, ranks of an expert group, recompute, sequences of a micro-batch
    (1, 1, "none", 8),
    (2, 2, "full", 2),
    (4, 2, "none", 2),
]
LOSSES = [Dpo(), Dpo(label_smoothing=0.2, beta=0.5), Dpo(loss="hinge"), Dpo(loss="ipo"), Dpo(loss="sigmoid_norm")]
PLAIN = ["optim.clip=0.5", "optim.weight_decay=0.1", "optim.eps=0.01", "train.dtype=fp32", "track.wandb=false"]
Model = Callable[[Tensor], Tensor]  # tokens [1, n] -> logits [1, n, V]


def pair(number: int) -> dict[str, Any]:
    draw = random.Random(number)
    right, wrong = (" ".join(draw.choices(words, k=draw.randint(1, 9))) for words in (["one", "two"], ["a", "b", "c"]))
    asked = {"role": "user", "content": f"Count {number}."}
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", right), ("rejected", wrong))
    }
    return {"prompt": [asked], **answers}


@pytest.fixture
def pairs(data: list[str], tmp_path: Path) -> list[str]:
    """Overrides that tune on 40 pairs of different lengths."""
    tokenizer = prepare.ensure(config.load(data).data) / "tokenizer.json"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair(number)) + "\n" for number in range(40)))
    places = [f"data.path={path}", f"data.dir={tmp_path / 'corpora'}", f"data.tokenizer={tokenizer}"]
    return ["experiment=dpo", *places, "train.seq_len=64", f"train.global_batch={BATCH}", "dpo.beta=0.5", *PLAIN]


def run_steps(mesh: Mesh, overrides: list[str]) -> tuple[list[tuple[float, float]], int]:
    """(loss, gradient norm) of each step, and how many experts were lent."""
    loaded = config.load(overrides)
    corpus, loader = open_data(loaded)
    spec = resolve(loaded, mesh.world, corpus.vocab_size, "fp32")
    assert isinstance(loader, ChatLoader)
    engine = build_engine(build(spec), mesh, spec)
    engine.plan_with(replace(default_costs(), row_forward=1.0, row_backward=2.0))
    for layer in engine.model.layers_of_experts if mesh.world > 1 else ():
        layer.planner = scatter_rows
    reference = compute_reference(engine.model, corpus, loader, spec, mesh)["train"]
    found, guests = [], 0
    for number in range(STEPS):
        shares = list(micro_batches(spec, mesh, loader, number * BATCH))
        step = optimizer_step(engine, spec, shares, LR, reference=reference)
        sums = torch.stack([part.preference for part in step.parts if part.preference is not None]).sum(0)
        loss, *rest = (all_reduce_sum(sums) / step.size.pairs).tolist()
        assert number or max(map(abs, rest[1:4])) < 1e-6  # margin and rewards before the first update
        found.append((loss, step.norm))
        guests += sum(len(s.plan.guests()) for part in step.parts for s in part.stats)
    return found, guests


def run_plain(overrides: list[str], model: torch.nn.Module, decayed: list[Any], logits: Model) -> list[Any]:
    """The same in this process: each conversation by itself, torch's softmax and AdamW."""
    loaded = config.load(overrides)
    corpus, loader = open_data(loaded)
    documents, targets = corpus.documents("train"), corpus.targets("train")

    def sum_logp(number: int, logits: Model) -> Tensor:
        begin, size, _ = documents[number].tolist()
        tokens = torch.from_numpy(corpus.tokens("train")[begin : begin + size].astype(np.int64))[None]
        logp = logits(tokens[:, :-1])[0].float().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        return logp[torch.from_numpy(targets[begin + 1 : begin + size].copy())].double().sum()

    with torch.no_grad():
        reference = [sum_logp(number, logits) for number in range(len(documents))]
    optimizer = torch.optim.AdamW(decayed, lr=LR, betas=(0.9, 0.95), eps=0.01)
    found = []
    for step in range(STEPS):
        rows = loader.samples(step * BATCH, (step + 1) * BATCH).document[::2]
        numbers = [int(n) for row in rows for n in np.unique(row[row >= 0])]
        losses = []
        for n in numbers:
            ratio = [sum_logp(half, logits) - reference[half] for half in (2 * n, 2 * n + 1)]
            losses.append(-torch.nn.functional.logsigmoid(0.5 * (ratio[0] - ratio[1])))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


@pytest.mark.parametrize("packs", [True, False])
def test_steps_of_a_preset_equal_pairs_one_by_one(pool, pairs: list[str], packs: bool) -> None:
    overrides = [*pairs, "model=tiny", f"data.pack={packs}"]
    corpus, _ = open_data(config.load(overrides))
    spec = resolve(config.load(overrides), 1, corpus.vocab_size, "fp32")
    model = build(spec).to_empty(device="cpu")
    model.tie_weights()
    initialise(model, spec.train.seed)
    expected = run_plain(overrides, model, groups(model, 0.1), lambda tokens: model(tokens)[0])
    for ranks, ep, recompute, micro_batch in LAYOUTS if packs else LAYOUTS[1:2]:
        more = [f"train.recompute={recompute}", f"train.micro_batch={micro_batch}"]
        found, guests = pool.run(run_steps, ranks, [*overrides, *more], ep=ep)[0]
        assert np.array(found) == pytest.approx(np.array(expected), rel=NEAR), (ranks, ep)
        assert (guests > 0) == (ep > 1)


def test_steps_of_a_folder_equal_transformers(pool, pairs: list[str], tmp_path: Path) -> None:
    import transformers

    corpus, _ = open_data(config.load([*pairs, "model=tiny"]))
    families.build("qwen3_moe", vocab_size=corpus.vocab_size).save_pretrained(tmp_path / "hf")
    overrides = [*pairs, "model=hf", f"model.path={tmp_path / 'hf'}"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", experts_implementation="eager").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp.gate.weight" not in name)  # routers are frozen
    spared = {n for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias") or "embed_tokens" in n}
    kinds: dict[bool, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        kinds[name in spared].append(parameter)
    decayed = [{"params": kinds[False], "weight_decay": 0.1}, {"params": kinds[True], "weight_decay": 0.0}]
    expected = run_plain(overrides, model, decayed, lambda tokens: model(input_ids=tokens, use_cache=False).logits)
    for ranks, ep, recompute, micro_batch in LAYOUTS:
        more = [f"train.recompute={recompute}", f"train.micro_batch={micro_batch}"]
        found, guests = pool.run(run_steps, ranks, [*overrides, *more], ep=ep)[0]
        assert np.array(found) == pytest.approx(np.array(expected), rel=NEAR), (ranks, ep)
        assert (guests > 0) == (ep > 1)


def test_a_run_learns_goes_on_and_makes_its_reference_again(pool, pairs: list[str], tmp_path: Path) -> None:
    """Held-out log-ratios are 0 before the first update. A run goes on at another layout with the reference in its
    folder; where that is gone, it is made anew of the weights that the run began with."""
    chosen = [override for override in pairs if not override.startswith("dpo.")]
    pool.run(run, 1, [*chosen, "model=tiny", "train.objective=sft", "train.steps=1", *places(tmp_path, "base")])
    base = [*pairs, "model=tiny", f"init_from={tmp_path / 'runs' / 'base'}", "optim.lr=0.01", "optim.warmup=2"]
    whole = rows_of(pool.run(run, 2, [*base, "train.steps=6", *places(tmp_path, "whole")], ep=2)[0])
    held_out = [row for row in whole if "dpo/held_out_margin" in row]
    assert [row["step"] for row in held_out] == [0, 6]
    assert abs(held_out[0]["dpo/held_out_margin"]) < 1e-6
    assert held_out[1]["dpo/held_out_accuracy"] == 1.0
    steps = [row for row in whole if "dpo/loss" in row]
    assert steps[0]["dpo/loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert steps[-1]["dpo/loss"] < 0.5 * steps[0]["dpo/loss"]
    assert all(row["train/loss"] == row["dpo/loss"] for row in steps)
    log = " ".join((tmp_path / "runs" / "whole" / "log.txt").read_text().split())
    assert "held-out pairs: the chosen answer has the higher reward in 100.0%" in log
    pool.run(run, 2, [*base, "train.steps=3", *places(tmp_path, "part")], ep=2)
    shutil.copytree(tmp_path / "runs" / "part", tmp_path / "runs" / "lost")
    reference = tmp_path / "runs" / "lost" / "reference.npz"
    reference.write_bytes(reference.read_bytes()[:-100])  # no longer an archive
    for name, ranks in (("part", 1), ("lost", 2)):
        more = [*base, "train.steps=6", *places(tmp_path, name)]
        later = [row for row in rows_of(pool.run(run, ranks, more, ep=ranks)[0]) if "dpo/loss" in row][3:]
        for row, expected in zip(later, steps[3:], strict=True):
            assert row["dpo/loss"] == pytest.approx(expected["dpo/loss"], rel=1e-3)
        log = " ".join((tmp_path / "runs" / name / "log.txt").read_text().split())
        assert ("does not have all pairs: made anew" in log) == (name == "lost")


def places(tmp_path: Path, name: str) -> list[str]:
    return [f"run.dir={tmp_path / 'runs'}", f"run.name={name}", "generate.tokens=2", "optim.min_lr=0"]


@pytest.mark.parametrize("options", LOSSES, ids=lambda each: f"{each.loss}-{each.label_smoothing}")
def test_losses_are_those_of_trl(options: Dpo) -> None:
    """TRL has no label smoothing that is the conservative DPO of its paper; there the formula is spelled out."""
    from trl.trainer.dpo_trainer import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 12, generator=generator) < 0.6
    mask[:, -1] = True
    logp, reference = (-torch.rand(8, 12, generator=generator) * mask for _ in range(2))
    found = [x.sum(1).double().view(2, 4) for x in (logp, reference)]
    ours = compute_loss(found[0] - found[1], mask.sum(1).double().view(2, 4), options)
    if options.label_smoothing:
        delta = options.beta * (found[0] - found[1]).diff(dim=0).neg()
        right, wrong = (-torch.nn.functional.logsigmoid(sign * delta[0]) for sign in (1, -1))
        torch.testing.assert_close(ours, 0.8 * right + 0.2 * wrong)
        return
    theirs = DPOTrainer._compute_loss(trainer(options), lambda **_: outputs(logp), inputs(mask, found[1]), False)
    torch.testing.assert_close(ours.mean().float(), theirs.float())


def trainer(options: Dpo) -> Any:
    """What TRL's loss reads of its trainer."""
    same = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=same,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[options.loss],
        loss_weights=[1.0],
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def outputs(logp: Tensor) -> Any:
    return SimpleNamespace(log_probs=logp, entropy=logp, mean_logits=logp, is_top1=logp > 0)


def inputs(mask: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """A batch as TRL's collator makes it: a token of the prompt, then the completion."""
    whole = torch.cat([torch.zeros(8, 1, dtype=torch.bool), mask], dim=1).long()
    found = {"input_ids": torch.ones_like(whole), "attention_mask": torch.ones_like(whole), "completion_mask": whole}
    return found | {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
