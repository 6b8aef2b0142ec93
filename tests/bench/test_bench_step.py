"""The step benchmark: records are whole, round robin is even, the model stays as it was. And the GEMM benchmark."""

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moetrain import cli, config
from moetrain.bench import gpu, step
from moetrain.bench.protocol import StepOptions
from moetrain.bench.step_peer import Peer
from moetrain.data.loader import Corpus
from moetrain.data.prepare import ensure
from moetrain.distributed.mesh import Mesh
from moetrain.observe.estimate import estimate
from moetrain.training.loop import train
from moetrain.training.step import micro_batches
from tests.pool import Pool

FIELDS = {"ranks", "threads", "device", "dtype", "model", "tokens_per_step", "repeats", "warmup", "by_domain"}
FIELDS |= {"step_ms", "percent_of_ideal", "quartiles", "start", "experts_ms"}
PLANNERS = ["home", "makespan"]


def measured(mesh: Mesh, overrides: list[str], options: StepOptions) -> tuple[list[dict[str, Any]], bool, set[int]]:
    """(records, whether all weights are bit for bit what they were, the domains that this rank reads)."""
    bench = step.Bench.build(config.load(overrides), mesh, options)
    before = {name: weight.detach().clone() for name, weight in bench.engine.model.state_dict().items()}
    found = step.measure_variants(bench, options)
    after = bench.engine.model.state_dict()
    shares = micro_batches(bench.config, mesh, bench.loader, bench.position)
    domains = set(itertools.chain.from_iterable(share.domain.flatten().tolist() for share in shares))
    return found, all(torch.equal(_local(before[name]), _local(after[name])) for name in before), domains


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def test_round_robin_is_the_ideal_and_nothing_drifts(pool: Pool, tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "train.micro_batch=2", "router.skew=2"]
    first, second = pool.run(measured, 2, overrides, StepOptions(PLANNERS, repeats=2, warmup=1, by_domain=True))
    found = first[0]
    assert found == second[0]
    assert first[1]
    assert second[1]
    assert [first[2], second[2]] == [{0}, {1}]
    assert [(r["routing"], r["planner"]) for r in found] == [
        ("round robin", "home"),
        *(("natural", p) for p in PLANNERS),
    ]
    for record in found:
        assert set(record) >= FIELDS
        assert record["step_ms"] > 0
        assert 0 < record["sync_percent"] == 100 * record["sync_ms"] / record["step_ms"] < 100
        assert record["micro_steps"] == 2
    ideal, home, makespan = found
    assert ideal["percent_of_ideal"] == 100
    assert (ideal["imbalance_home"], ideal["imbalance_planned"], ideal["guests"]) == (1, 1, 0)
    assert ideal["rows_crossing_fraction"] == 0.5
    assert home["imbalance_home"] == home["imbalance_planned"] > 1.2
    assert home["guests"] == 0
    assert makespan["imbalance_home"] > 1.2
    assert "round robin | home" in step.tabulate(found).markdown()
    assert len(step.tabulate(found).tables[0].rows) == 3


def test_a_checkpoint_is_where_it_starts(pool: Pool, tiny: list[str]) -> None:
    folder = pool.run(_trained, 1, [*tiny, "run.name=start", "train.steps=2"])[0]
    saved = f"checkpoint.resume={folder}/checkpoints/step_2"
    found, unchanged, domains = pool.run(measured, 1, [*tiny, saved], StepOptions(["home"], repeats=1, warmup=1))[0]
    assert unchanged
    assert domains == {0, 1}
    assert found[1]["start"] == f"{folder}/checkpoints/step_2"


def beside(mesh: Mesh, overrides: list[str]) -> tuple[list[dict[str, Any]], int, float]:
    """(records with a peer, its parameters, its loss on a batch before anything is learned)."""
    bench = step.Bench.build(config.load(overrides), mesh, StepOptions(["home"], repeats=1, warmup=0))
    peer = Peer(bench.config, mesh, bench.shares(0))
    loss = peer.step(bench.shares(0), lr=0.0)
    found = step.measure_variants(bench, StepOptions(["home"], repeats=2, warmup=0, peers=True))
    return found, sum(p.numel() for p in peer.model.parameters()), loss


def test_a_peer_of_the_same_shape_takes_its_turns(pool: Pool, tiny: list[str]) -> None:
    overrides = [*tiny, "model.qk_norm=head", "train.micro_batch=2"]
    (found, size, loss), _ = pool.run(beside, 2, overrides)
    settings = config.load(overrides)
    corpus = Corpus(ensure(settings.data))
    assert size == estimate(config.resolve(settings, 2, corpus.vocab_size, "fp32")).total
    assert loss == pytest.approx(math.log(corpus.vocab_size), rel=0.1)
    ideal, home, peer = found
    assert (ideal["peer"], home["peer"], peer["planner"]) == (None, None, None)
    assert peer["peer"].startswith("transformers")
    assert peer["peer_experts"] in ("grouped_mm", "eager")
    assert peer["times_peer"] == 1
    assert home["times_peer"] > 0
    assert peer["tokens_per_second"] == pytest.approx(1e3 * peer["tokens_per_step"] / peer["step_ms"])
    assert "Our speed over its speed" in step.tabulate(found).markdown()
    assert len(step.tabulate(found).tables[0].rows) == 3


def test_a_missing_peer_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.main(["bench", "step", "--peers"]) == 2
    assert "--peers: needs transformers" in capsys.readouterr().err


def _trained(mesh: Mesh, overrides: list[str]) -> str:
    return str(train(config.load(overrides), mesh))


def test_domains_that_fill_no_sequence_are_left_out(data: list[str]) -> None:
    corpus = Corpus(ensure(config.load(data).data))
    assert [step.choose_domain(corpus, 32, rank) for rank in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--planners", "home,nobody"], "--planners nobody: must be among home"),
        (["--repeats", "0"], "--repeats 0: must be at least 1"),
        (["--warmup", "-1"], "--warmup -1: must be at least 0"),
        (
            ["checkpoint.resume=nowhere"],
            "checkpoint.resume=nowhere: must be auto, none or a folder step_N with a manifest.json",
        ),
        (["--peers", "model.qk_norm=none"], "model.qk_norm=none: must be head with --peers"),
        (["router.top_k=9"], "router.top_k=9: must be at most model.num_experts=8"),
    ],
)
def test_mistakes_are_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "step", *options]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_grouped_gemms_of_a_published_shape(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(gpu.LARGE, "cpu", 64)
    arguments = ["--shape", "gpt-oss-120b", "--scale", "128", "--repeats", "1", "--json", "--out", str(tmp_path)]
    assert cli.main(["bench", "gpu", *arguments]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["dim"], found["hidden"], found["experts_here"], found["rows_here"]) == (16, 16, 16, 64 * 4)
    flops = 2 * found["rows_here"] * 3 * 16 * 16
    assert found["forward_tflops"] == pytest.approx(flops / found["forward_ms"] / 1e9)
    assert {p.name for p in tmp_path.iterdir()} == {"gpu.json", "gpu.md"}


def test_shapes_are_the_published_ones() -> None:
    shape = gpu.scale_preset("kimi-k2", 1)
    assert (shape.tokens, shape.dim, shape.hidden, shape.experts, shape.top_k) == (8192, 7168, 2048, 384, 8)
    assert {gpu.scale_preset(name, 16).dim % 8 for name in ("gpt-oss-120b", "deepseek-v3")} == {0}
