"""Every layout trains the same: gradients of one step and weights after three, parameter by parameter.

`python -m tests.system.test_layouts` prints the table of `docs/results`.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain import config
from moetrain.distributed import comm
from moetrain.distributed.mesh import Mesh
from moetrain.moe.exchange import dispatch
from moetrain.moe.exchange import guests as guests_module
from moetrain.moe.slices import join_matrices
from moetrain.training.step import build, micro_batches, optimizer_step
from tests.grid import on_grid

STEPS = 3
GRADIENT, WEIGHT = 2e-5, 1e-4  # fp32 rounding; AdamW divides tiny gradients by their own size, so weights differ more


class Layout(NamedTuple):
    ranks: int
    ep: int
    replicate: int = 1
    planner: str = "home"
    options: tuple[str, ...] = ()


ONE = Layout(1, 1)
LAYOUTS = [
    ONE,
    Layout(2, 1),
    Layout(2, 2, planner="llep"),
    Layout(2, 2, planner="makespan"),
    Layout(4, 2, planner="llep"),
    Layout(4, 4, planner="makespan"),
    Layout(2, 1, replicate=2),
    Layout(4, 2, replicate=2, planner="llep", options=("engine.reshard_after_forward=true",)),
    Layout(4, 4, planner="llep", options=("engine.guest_memory_mib=0",)),
    Layout(4, 4, planner="llep", options=("train.recompute=selective",)),
    Layout(4, 2, planner="makespan", options=("train.recompute=full", "engine.max_rows=20")),
]
UNEVEN = [  # experts, layout: some ranks have fewer experts than others, some none
    (6, Layout(4, 4, planner="home")),
    (6, Layout(4, 4, planner="llep")),
    (6, Layout(4, 4, planner="makespan")),
    (3, Layout(2, 2, planner="llep")),
    (3, Layout(4, 2, planner="llep")),
]
CUT = [  # experts, layout: experts in slices, with whole ones for every rank or without
    (2, Layout(4, 4, planner="makespan", options=("parallel.ep=4",))),
    (2, Layout(4, 2, planner="llep", options=("parallel.r=4", "train.recompute=full"))),
    (3, Layout(4, 4, planner="home", options=("parallel.ep=4", "parallel.r=4", "engine.max_rows=20"))),
]
BASE = ["router.skew=0.5", "balance.accumulate=exact", "optim.warmup=2", "optim.lr=1e-2"]


class Found(NamedTuple):
    gradients: dict[str, Tensor]  # of the first step
    start: dict[str, Tensor]
    weights: dict[str, Tensor]  # after `STEPS` steps
    guests: int
    transfers: int  # all-to-alls that the layers started


def whole(mesh: Mesh, engine: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Global values of tensors like the model's parameters, experts in their order; on every rank."""
    from moetrain.distributed.comm import all_gather
    from moetrain.moe.experts import Experts

    experts = {name: module for name, module in engine.model.named_modules() if isinstance(module, Experts)}
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if (owner := experts.get(name.rpartition(".")[0])) is not None:
            counts = [int((owner.home == r).sum()) for r in range(mesh.ep.size)]
            padded = value.new_zeros(max(counts), *value.shape[1:])
            padded[: len(value)] = value
            parts = all_gather(padded, mesh.ep.rows)
            value = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
            value = join_matrices(name.rpartition(".")[2], value, owner.slices)
        found[name] = value.clone()
    return found


def steps(mesh: Mesh, overrides: list[str]) -> Found:
    """A few whole optimizer steps of the config's engine."""
    from moetrain.data import prepare
    from moetrain.data.loader import Corpus, Loader
    from moetrain.engine.native import NativeEngine

    settings = config.load(overrides)
    corpus = Corpus(prepare.ensure(settings.data))
    settings = config.resolve(settings, mesh.world, corpus.vocab_size, "fp32")
    engine = NativeEngine(build(settings), mesh, settings)
    parameters = dict(engine.model.named_parameters())
    start = whole(mesh, engine, parameters)
    gradients: dict[str, Tensor] = {}
    update = engine.step

    def look(lr: float) -> float:
        if not gradients:
            grads = {n: p.grad if p.requires_grad else torch.zeros_like(p) for n, p in parameters.items()}
            gradients.update(whole(mesh, engine, grads))  # type: ignore[arg-type]
        return update(lr)

    engine.step = look  # type: ignore[method-assign]
    loader, guests, transfers = Loader(corpus, settings.train.seq_len, 0), 0, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal transfers
        transfers += 1
        return comm.start_all_to_all(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        for module in (dispatch, guests_module):
            patch.setattr(module, "start_all_to_all", counted)
        for step in range(STEPS):
            first = step * settings.train.global_batch
            shares = list(micro_batches(settings, mesh, loader, first))
            done = optimizer_step(engine, settings, shares, settings.optim.lr)
            guests += sum(len(s.plan.guests()) for part in done.parts for s in part.stats)
    return Found(gradients, start, whole(mesh, engine, parameters), guests, transfers)


def overrides_of(layout: Layout, micro_steps: int) -> list[str]:
    more = ["planner.min_rows=1", "planner.threshold=1"] if layout.planner == "llep" else []
    size = 12 // (layout.ranks * micro_steps)
    batch = ["train.global_batch=12", f"train.micro_batch={size}"]
    return [*BASE, f"planner={layout.planner}", *more, *batch, *layout.options]


def run(pool: Any, given: list[str], layout: Layout, micro_steps: int) -> list[Found]:
    overrides = [*given, *overrides_of(layout, micro_steps)]
    return pool.run(steps, layout.ranks, overrides, ep=layout.ep, replicate=layout.replicate)


def differences(found: Found, reference: Found) -> tuple[float, float]:
    """Of the worst parameter: gradients, relative to the largest; weights, relative to what training changed."""
    gradient = weight = 0.0
    assert found.weights.keys() == reference.weights.keys() == found.gradients.keys()
    for name, theirs in reference.gradients.items():
        gradient = max(gradient, float((found.gradients[name] - theirs).abs().max() / theirs.abs().max()))
        apart = (found.weights[name] - reference.weights[name]).norm()
        weight = max(weight, float(apart / (reference.weights[name] - reference.start[name]).norm()))
    return gradient, weight


def check(pool: Any, given: list[str], layout: Layout, micro_steps: int, reference: Found) -> None:
    for found in run(pool, given, layout, micro_steps):
        gradient, weight = differences(found, reference)
        assert gradient <= GRADIENT, layout
        assert weight <= WEIGHT, layout
        assert (found.guests > 0) == (layout.planner == "llep") or layout.planner == "makespan"


@pytest.mark.parametrize("micro_steps", [on_grid(1), 3])
def test_weights_and_gradients_are_the_same_on_every_layout(pool, tiny, micro_steps) -> None:
    reference = run(pool, tiny, ONE, 1)[0]
    for layout in LAYOUTS:
        if micro_steps > 1 or not layout.options:
            check(pool, tiny, layout, micro_steps, reference)


def test_homes_may_be_uneven_or_empty(pool, tiny) -> None:
    for num_experts in {number for number, _ in UNEVEN}:
        given = [*tiny, f"model.num_experts={num_experts}"]
        reference = run(pool, given, ONE, 1)[0]
        for layout in (layout for number, layout in UNEVEN if number == num_experts):
            check(pool, given, layout, 3, reference)


def test_experts_may_be_cut_into_slices(pool, tiny) -> None:
    for num_experts in {number for number, _ in CUT}:
        given = [*tiny, f"model.num_experts={num_experts}"]
        reference = run(pool, given, ONE, 1)[0]
        for layout in (layout for number, layout in CUT if number == num_experts):
            for found in run(pool, given, layout, 3):
                gradient, weight = differences(found, reference)
                assert gradient <= GRADIENT, layout
                assert weight <= WEIGHT, layout


def test_routers_stay_equal_where_a_rank_has_no_experts(pool, tiny) -> None:
    """Rounding at random is the same on all ranks, whatever else they hold."""
    given = [*tiny, "model.num_experts=6", "optim.state_dtype=bf16"]
    first, *others = run(pool, given, Layout(4, 4), 1)
    for found in others:
        for name, value in first.weights.items():
            assert torch.equal(found.weights[name], value), name


def same(found: Found, reference: Found) -> bool:
    return all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in zip(found[:3], reference[:3], strict=True)
        for name in theirs
    )


STAY, LEAVE = "engine.guest_memory_mib=1024", "engine.guest_memory_mib=0"


@pytest.mark.parametrize(("slots", "micro_steps"), [(STAY, 3), (LEAVE, 1), on_grid((STAY, 1)), on_grid((LEAVE, 3))])
def test_recompute_changes_nothing(pool, tiny, micro_steps, slots) -> None:
    """Bit for bit, with guests that stay and that do not, a dense layer and a shared expert. What `selective`
    recomputes communicates nothing."""
    given = [*tiny, "model.num_dense_layers=1", "model.num_shared_experts=1", slots]
    layout = Layout(2, 2, planner="llep")
    reference = run(pool, given, layout, micro_steps)
    assert reference[0].guests > 0
    transfers = {}
    for recompute in ("selective", "full"):
        found = run(pool, [*given, f"train.recompute={recompute}"], layout, micro_steps)
        assert all(same(ours, theirs) for ours, theirs in zip(found, reference, strict=True))
        transfers[recompute] = found[0].transfers
    assert transfers["selective"] == reference[0].transfers < transfers["full"]


def test_where_moments_lie_changes_nothing(pool, tiny, tmp_path) -> None:
    """Bit for bit; the files leave nothing behind. In bf16 moments differ by less than their precision."""
    layout = Layout(2, 2, planner="llep")
    reference = run(pool, tiny, layout, 1)
    for options in (["engine.offload=cpu"], ["engine.offload=disk", f"engine.offload_dir={tmp_path}/states"]):
        found = run(pool, [*tiny, *options], layout, 1)
        assert all(same(ours, theirs) for ours, theirs in zip(found, reference, strict=True))
    assert not list((tmp_path / "states").iterdir())
    for found in run(pool, [*tiny, "optim.state_dtype=bf16", "engine.offload=disk"], layout, 1):
        assert 0 < differences(found, reference[0])[1] < 0.01


def compiled_steps(mesh: Mesh, overrides: list[str]) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler warns of its own doings
        return steps(mesh, [*overrides, "train.compile=true"])


def test_compiled_dense_parts_agree(pool, tiny) -> None:
    given = [*tiny, "model.num_layers=1", "model.num_shared_experts=1"]
    reference = run(pool, given, ONE, 1)[0]
    (found,) = pool.run(compiled_steps, 1, [*given, *overrides_of(ONE, 1)], ep=1)
    gradient, weight = differences(found, reference)
    assert gradient <= GRADIENT
    assert weight <= WEIGHT


def main() -> None:
    """Print the table of `docs/results`: every layout against one device."""
    from moetrain.bench.tables import Results, Tabulated
    from moetrain.data import prepare
    from tests.conftest import TINY, write_text
    from tests.pool import Pool

    pool, rows = Pool(), []
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text")
        data = ["data=folder", f"data.path={folder}/text", f"data.dir={folder}/corpora", "data.vocab_size=300"]
        prepare.ensure(config.load(data).data)
        for num_experts in (8, *sorted({number for number, _ in UNEVEN})):
            given = [*TINY, *data, f"model.num_experts={num_experts}"]
            reference = run(pool, given, ONE, 1)[0]
            layouts = LAYOUTS if num_experts == 8 else [layout for number, layout in UNEVEN if number == num_experts]
            for layout in layouts:
                for micro_steps in (1, 3):
                    found = [differences(f, reference) for f in run(pool, given, layout, micro_steps)]
                    gradient, weight = (max(values) for values in zip(*found, strict=True))
                    places = [str(value) for value in (num_experts, *layout[:3], micro_steps, layout.planner)]
                    rows.append([*places, " ".join(layout.options), f"{gradient:.1e}", f"{weight:.1e}"])
    pool.stop()
    title = (
        "Against one rank in one micro-step, fp32, AdamW, the worst parameter on the worst rank. gradient: largest "
        f"difference over the largest gradient, first step. weight: norm of the difference after {STEPS} steps over "
        "the norm of what they changed."
    )
    columns = ("experts", "ranks", "ep", "replicas", "micro-steps", "planner", "options", "gradient", "weight")
    print(Results("layouts", "Layouts", [], [Tabulated(title, columns, rows, num_left=7)], []).markdown())


if __name__ == "__main__":
    main()
