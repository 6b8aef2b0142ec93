"""`router.replay`: recorded choices come back exactly, at every layout, and what is of something else is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moetrain import cli, config
from moetrain.config import ConfigError
from moetrain.config.spec import resolve
from moetrain.data.loader import Samples, Sequences
from moetrain.data.opening import open_data
from moetrain.data.replay import ReplayLoader, SampleIndex
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.engine import build_engine
from moetrain.moe.planning.cost import default_costs
from moetrain.moe.recorded import ChoiceFacts, RoutedExperts, read_routed_experts
from moetrain.training.record import record_choices, take
from moetrain.training.step import build, micro_batches, optimizer_step
from tests.hf import families
from tests.hf.test_routed import give_experts
from tests.hf.test_training import LAYOUTS, LENGTH, LR, NEAR, SEQUENCES, STEPS, VOCABULARY, RandomSamples, options

STEP = ["train.global_batch=8", "train.seq_len=64", "train.steps=2", "train.dtype=fp32", "optim.eps=0.01"]
TINY = ["model=tiny", "experiment=sft", "data.vocab_size=300", "router.skew=0.5", "router.freeze=false", *STEP]
COSTS = replace(default_costs(), row_forward=1.0, row_backward=2.0)  # everything is worth lending for


@pytest.fixture
def chat(tmp_path: Path) -> list[str]:
    """Overrides that train on conversations of very different lengths, several of which fit into a row."""
    rows = []
    for n in range(90):
        turns = {"user": f"{n} " * (1 + n % 4), "assistant": f"{n} " * (1 + n % 3)}
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns.items()]})
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*TINY, f"data.path={path}", f"data.dir={tmp_path / 'corpora'}", "data.too_long=cut"]


def take_steps(mesh: Mesh, overrides: list[str], samples: Samples | None = None) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, share that was replayed) of each step."""
    settings = config.load(overrides)
    corpus, loader = open_data(settings, replays=True) if samples is None else (None, samples)
    spec = resolve(settings, mesh.world, VOCABULARY if corpus is None else corpus.vocab_size, "fp32")
    engine = build_engine(build(spec), mesh, spec)
    engine.plan_with(COSTS)
    found = []
    for number in range(STEPS if corpus is None else spec.train.steps):
        shares = list(micro_batches(spec, mesh, loader, number * spec.train.global_batch))
        step = optimizer_step(engine, spec, shares, LR)
        nats = all_reduce_sum(torch.stack([part.nats.sum().double() for part in step.parts]).sum())
        weighted = all_reduce_sum(torch.stack([part.losses.weighted for part in step.parts]).sum())
        replayed = all_reduce_sum(torch.stack([torch.as_tensor(part.replayed or 0) for part in step.parts]).sum())
        total = sum(int(counts.sum()) for counts in step.counts)
        found.append((float(nats) / step.size.targets + float(weighted), step.norm, int(replayed) / total))
    return found


def record(mesh: Mesh, overrides: list[str], path: str) -> float:
    """Write what the model chooses before the first step; returns its loss."""
    settings = config.load(overrides)
    corpus, loader = open_data(settings)
    spec = resolve(settings, mesh.world, corpus.vocab_size, "fp32")
    engine = build_engine(build(spec), mesh, spec)
    engine.plan_with(COSTS)
    made = record_choices(spec, mesh, engine.model, corpus, loader)
    if mesh.is_main:
        made.choices.write(Path(path))
    return made.loss


@pytest.mark.parametrize("data", ["packed", "padded", "text"])
def test_a_replay_is_the_recorded_pass_at_every_layout(pool, chat: list[str], data: str, tmp_path: Path) -> None:
    own = {"packed": chat, "padded": [*chat, "data.pack=false"], "text": [*chat, "train.objective=lm"]}[data]
    path = str(tmp_path / "choices.safetensors")
    loss = pool.run(record, 2, [*own, "train.steps=1"], path, ep=2)[0]
    replays = [*own, f"router.replay={path}"]
    (first,) = pool.run(take_steps, 2, [*replays, "train.steps=1"], ep=2)[0]
    assert first[0] == loss  # to the last bit
    assert first[2] == 1.0
    pool.run(record, 1, own, path)
    expected = pool.run(take_steps, 1, replays)[0]
    for ranks, ep, recompute, micro_batch, engine in LAYOUTS[1:] if data == "packed" else LAYOUTS[2:3]:
        more = [f"train.recompute={recompute}", f"train.micro_batch={micro_batch}", f"engine={engine}"]
        found = pool.run(take_steps, ranks, [*replays, *more], ep=ep)[0]
        assert np.array(found) == pytest.approx(np.array(expected), rel=NEAR), (ranks, ep, engine)
        assert all(step[2] == 1.0 for step in found)
    exact = ["balance.coefficient=0.01", "balance.accumulate=exact", "train.micro_batch=2"]
    found = pool.run(take_steps, 2, [*replays, *exact], ep=2)[0]
    assert all(step[2] == 1.0 for step in found)


def test_other_weights_make_the_recorded_choices(pool, chat: list[str], tmp_path: Path) -> None:
    path = tmp_path / "choices.npz"
    pool.run(record, 1, [*chat, "train.seed=5", "train.steps=20"], str(path))
    replays = [*chat, "train.seed=6", "train.steps=1", f"router.replay={path}"]
    (own,) = pool.run(take_steps, 1, [*chat, "train.seed=6", "train.steps=1"])[0]
    (whole,) = pool.run(take_steps, 1, replays)[0]
    found = read_routed_experts(path)
    samples = [
        (found.tokens[e - n : e], found.experts[e - n : e]) for e, n in zip(found.ends, found.lengths, strict=True)
    ]
    RoutedExperts.collect(found.facts, samples[::2]).write(path)
    (half,) = pool.run(take_steps, 1, [*replays, "router.replay_missing=route"])[0]
    assert (own[2], whole[2]) == (0.0, 1.0)
    assert 0.2 < half[2] < 0.8
    assert len({own[0], whole[0], half[0]}) == 3


class DrawnChoices(RandomSamples):
    """Random tokens with random experts, of one group for each token."""

    def samples(self, begin: int, end: int) -> Sequences:
        found, experts = super().samples(begin, end), []
        for number in range(begin, end):
            draw = np.random.default_rng([7, number])
            order = draw.random((LENGTH, 2, 4)).argsort(-1)[..., :2]  # two layers, two of the four experts of a group
            experts.append(order + 4 * draw.integers(0, 2, (LENGTH, 2, 1)))
        return replace(found, experts=np.stack(experts).astype(np.int16))


def run_plain(folder: Path, name: str) -> list[tuple[float, float, float]]:
    """The same by transformers and torch alone, whose experts are told which tokens they get, in this process."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").train()
    spared = [p for n, p in model.named_parameters() if p.ndim == 1 or n.endswith("bias") or "embed_tokens" in n]
    decayed = [p for p in model.parameters() if not any(p is other for other in spared)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": 0.1}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=0.01)
    told: dict[str, torch.Tensor] = {}
    give_experts(model, name, told)
    found = []
    for number in range(STEPS):
        batch = DrawnChoices().samples(number * SEQUENCES, (number + 1) * SEQUENCES)
        assert batch.experts is not None
        told["experts"], tokens = torch.from_numpy(batch.experts).flatten(0, 1).long(), torch.from_numpy(batch.tokens)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm), 1.0))
    return found


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_steps_equal_those_of_transformers_with_forced_experts(pool, name: str, tmp_path: Path) -> None:
    model = families.build(name, vocab_size=VOCABULARY, num_hidden_layers=2)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    expected = run_plain(tmp_path, name)
    for ranks, ep, recompute, micro_batch, engine in LAYOUTS:
        own = [f"train.recompute={recompute}", f"train.micro_batch={micro_batch}", f"engine={engine}"]
        steady = ["balance.coefficient=0", "balance.z_coefficient=0"]
        found = pool.run(take_steps, ranks, options(tmp_path, *own, *steady), DrawnChoices(), ep=ep)[0]
        assert np.array(found) == pytest.approx(np.array(expected), rel=NEAR), (ranks, ep, engine)


def test_samples_are_found_by_their_tokens() -> None:
    experts = np.arange(12).reshape(12, 1, 1) % 8
    lengths = (5, 3, 4)
    parts = zip(
        np.split(np.arange(12), np.cumsum(lengths)[:-1]), np.split(experts, np.cumsum(lengths)[:-1]), strict=True
    )
    index = SampleIndex(RoutedExperts.collect(ChoiceFacts("moetrain", 8, 1, 1), parts), 4)
    assert index.find(np.arange(5, 8)).ravel().tolist() == [5, 6, 7]
    assert index.find(np.arange(5, 9)).ravel().tolist() == [5, 6, 7]  # recorded to the last but one
    assert index.find(np.arange(4)).ravel().tolist() == [0, 1, 2, 3]  # cut to the length of a row
    assert index.find(np.arange(6, 8)).size == 0


def check_replay(overrides: list[str]) -> None:
    settings = config.load(overrides)
    loader = open_data(settings, replays=True)[1]
    assert isinstance(loader, ReplayLoader)
    loader.check(settings.train.steps * settings.train.global_batch)


def refuse(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        check_replay([*overrides])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_of_another_model_or_text_is_refused(pool, chat: list[str], tmp_path: Path, capsys) -> None:
    path = tmp_path / "choices.npz"
    replays = [*chat, f"router.replay={path}"]
    assert refuse(*replays) == f"router.replay={path}: must be an existing file"
    assert cli.main(["train", *replays, f"run.dir={tmp_path}"]) == 2
    assert "must be an existing file" in capsys.readouterr().err
    pool.run(record, 1, chat, str(path))
    begin = f"router.replay={path}: "
    assert refuse(*replays, "router.top_k=3") == f"{begin}recorded with top_k=2, but the model has 3"
    assert refuse(*replays, "model.num_layers=3") == f"{begin}recorded with num_layers=2, but the model has 3"
    assert refuse(*replays, "model.num_experts=16") == f"{begin}recorded with num_experts=8, but the model has 16"
    assert refuse(*replays, "data.vocab_size=280") == f"{begin}recorded with another tokenizer than that of the data"
    assert refuse(*replays, "router.name=top_p").startswith(f"{begin}not for the router top_p, whose tokens choose any")
    found = read_routed_experts(path)
    cut = RoutedExperts.collect(found.facts, [(found.tokens[:4], found.experts[:4])])
    cut.write(path)
    said = refuse(*replays)
    assert " tokens have no recorded choice in training sample 0, which has '<|user|>" in said
    assert said.endswith("; router.replay_missing=route has the router choose for them")
    assert refuse(*chat, "router.replay_missing=route").endswith("has an effect only with router.replay=FILE")


def test_one_batch_is_made_of_single_samples() -> None:
    found, whole = take(DrawnChoices(), [3, 5]), DrawnChoices().samples(0, 6)
    assert np.array_equal(found.tokens, whole.tokens[[3, 5]])
    assert found.sample is not None
    assert found.sample.tolist() == [3, 5]


def test_what_cannot_be_recorded_is_refused(tmp_path: Path, capsys) -> None:
    def fail(*arguments: str) -> str:
        assert cli.main(["record", *arguments]) == 2
        return capsys.readouterr().err.strip().removeprefix("error: ")

    out = ["--out", str(tmp_path / "choices.npz")]
    assert fail("--out", "a.bin") == "--out=a.bin: must end in .npz or .safetensors"
    assert fail("--out", "none/a.npz") == "--out=none/a.npz: must be in an existing folder"
    assert fail(*out) == "record: needs the weights of a RUN, of init_from, or of model=hf model.path=DIR"
    assert fail(*out, "optim.lr=1") == "optim.lr: `moetrain record` does not use it"
