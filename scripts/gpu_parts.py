"""What `scripts/gpu_check.py` measures that no command of moetrain does by itself.

python scripts/gpu_parts.py PART FOLDER              writes FOLDER/PART.md and prints it
python scripts/gpu_parts.py PART FOLDER --rehearse   tiny, on any CPU
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_runs import FAILED, Part, compare_devices, compare_ranks
from torch.autograd import DeviceType

from moetrain import config
from moetrain.bench import cases, virtual
from moetrain.bench.cases import BALANCED, LayerShape
from moetrain.bench.cell import Cell, Inputs, build_experts
from moetrain.bench.protocol import Grid
from moetrain.bench.tables import Results, Tabulated
from moetrain.bench.timing import read_clock
from moetrain.common.console import console
from moetrain.data.loader import Sequences
from moetrain.distributed import mesh
from moetrain.engine import build_engine
from moetrain.models.cross_entropy import linear_cross_entropy
from moetrain.moe.clock import Clock
from moetrain.moe.kernels import fp8
from moetrain.moe.kernels.api import Backend, KernelChoice
from moetrain.moe.kernels.bags import Bags
from moetrain.moe.planning.cost import default_costs
from moetrain.moe.planning.plan import Plan
from moetrain.observe.estimate import GIB, estimate, matmul_rate
from moetrain.training.step import build, optimizer_step

RANKS, TOKENS = 8, 8192  # of the cluster that one GPU stands for; of each rank
FP8_ERROR = 0.05  # relative norm: random rounding of both factors by 2 to 3 % each
FASTEST = "fastest"  # what a run takes here
BACKENDS = ("torch", FASTEST)
VOCABULARY = {"gpt-oss-120b": 201_088, "deepseek-v3": 129_280}


def device_facts(device: torch.device, tiny: bool) -> Part:
    """What the machine is, and the rates that everything else is a share of."""
    rows = [["Python, CPU cores", f"{platform.python_version()}, {os.cpu_count()}"]]
    for name in ("torch", "triton", "numpy", "numba", "transformers", "hydra", "pydantic", "wandb"):
        try:
            rows.append([name, __import__(name).__version__])
        except (ImportError, AttributeError) as error:
            rows.append([name, f"none ({error})"])
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        smi = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(smi, capture_output=True, text=True).stdout.strip() if shutil.which(smi[0]) else "?"
        rows.append(["GPU", f"{facts.name}, {facts.multi_processor_count} SMs, compute {facts.major}.{facts.minor}"])
        rows.append(["driver, SM clock now and at most, power", driver])
        rows.append(["memory", "{1:.1f} GiB, {0:.1f} free".format(*(x / GIB for x in torch.cuda.mem_get_info()))])
        rows.append(["CUDA, NCCL", f"{torch.version.cuda}, {'.'.join(map(str, torch.cuda.nccl.version()))}"])
    new = partial(torch.randn, device=device)
    products = [("bf16", 256, 256, 256)] if tiny else [("bf16", 8192, 8192, 8192), ("fp32", 4096, 4096, 4096)]
    for name in () if tiny else ("gpt-oss-120b", "deepseek-v3", "qwen3-30b"):
        dim, hidden, experts, top_k = cases.PRESETS[name]
        products.append(("bf16", TOKENS * RANKS * top_k // experts, 2 * hidden, dim))
    for dtype, m, n, k in products:
        left, right = (
            new(size).to({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]) for size in ((m, k), (k, n))
        )
        out = left.new_empty(m, n)
        rate = 2 * m * n * k / seconds(partial(torch.mm, left, right, out=out), device)
        rows.append([f"product {m} × {k} × {n}, {dtype}", f"{rate / 1e12:,.1f} TFLOP/s"])
    rows.append(["copy, read and written", f"{copy_rate(device, tiny) / 1e12:.2f} TB/s"])
    one, index = new(8), np.arange(4096)
    launch = seconds(lambda: [one.add_(1) for _ in range(1000)], device) / 1000
    upload = seconds(lambda: [torch.from_numpy(index).to(device, non_blocking=True) for _ in range(200)], device) / 200
    rows.append(["launch of an operation", f"{1e6 * launch:.1f} µs"])
    rows.append(["upload of 4096 numbers, pageable", f"{1e6 * upload:.1f} µs"])
    if device.type == "cuda":
        event = seconds(lambda: [torch.cuda.Event(enable_timing=True).record() for _ in range(1000)], device) / 1000
        wait = seconds(lambda: [one.add_(1).sum().item() for _ in range(200)], device) / 200
        rows += [["timing event", f"{1e6 * event:.1f} µs"], ["add, sum, wait for the sum", f"{1e6 * wait:.1f} µs"]]
    return "The machine", ("", "found"), rows, "Products and copies: the quickest of several."


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The quickest of several runs, after one that does not count."""
    times = []
    for _ in range(1 + repeats):
        began = read_clock(device)
        call()
        times.append(read_clock(device) - began)
    return min(times[1:])


def copy_rate(device: torch.device, tiny: bool) -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.empty(1 << (20 if tiny else 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source), device)


def memory_bound(device: torch.device, tiny: bool) -> Part:
    """Sums over rows, SwiGLU and gathers at published shapes, as shares of the rate of a copy; the cross entropy."""
    peak, flops = copy_rate(device, tiny), matmul_rate(device, torch.bfloat16)
    rows = [
        row
        for name in VOCABULARY
        for row in (*kernels_of(name, device, tiny, peak), head_of(name, device, tiny, flops))
    ]
    rows.append(products_of(device, tiny))
    legend = f"bf16, {TOKENS:,} tokens. %: of the rate of a copy, {peak / 1e12:.2f} TB/s, each byte moved once."
    return "What is bound by memory", ("shape", "operation", *BACKENDS), rows, legend


def kernels_of(name: str, device: torch.device, tiny: bool, peak: float) -> list[list[str]]:
    """A row for each operation of the layer `name` that is bound by memory; `peak`: bytes a second of a copy."""
    dim, hidden, _, top_k = (64, 64, 8, 2) if tiny else cases.PRESETS[name]
    tokens = 64 if tiny else TOKENS
    num = tokens * top_k
    new = partial(torch.randn, device=device, dtype=torch.bfloat16)
    rows_MD, gate_up, grad = new(num, dim), new(num, 2 * hidden), new(num, hidden)
    weight = torch.rand(num, device=device)
    bags = Bags.group(torch.randperm(num, device=device) // top_k, tokens, top_k)
    work: dict[str, tuple[int, Callable[[Backend], object]]] = {
        "sum of rows": (2 * dim * (num + tokens), lambda kernels: kernels.sum_rows(rows_MD, weight, bags)),
        "SwiGLU": (6 * hidden * num, lambda kernels: kernels.swiglu(gate_up)),
        "SwiGLU backward": (12 * hidden * num, lambda kernels: kernels.swiglu_backward(gate_up, grad, weight)),
        "gather": (4 * dim * num, lambda _: rows_MD.index_select(0, bags.row_M)),
    }
    rows = []
    for label, (size, call) in work.items():
        rows.append([name, label])
        for backend in BACKENDS:
            choice = KernelChoice(None if backend == FASTEST else backend)
            took = seconds(partial(call, choice.choose(device, torch.bfloat16)), device)
            rows[-1].append(f"{1e3 * took:.3f} ms, {100 * size / took / peak:.0f} %")
    return rows


def products_of(device: torch.device, tiny: bool) -> list[str]:
    """64 segments of OLMoE's width. Does a product of a size that never came before cost the host more?"""
    num, width = (256, 64) if tiny else (TOKENS * 8, 2048)
    rows_MA, weights = (torch.randn(*n, width, device=device, dtype=torch.bfloat16) for n in ((num,), (64, width)))
    out_MB, draw = torch.empty_like(rows_MA), np.random.default_rng(0)
    even, kernels = [num // 64] * 64, KernelChoice().choose(device, torch.bfloat16, (weights,))

    def product(sizes: Callable[[], list[int]]) -> float:
        return seconds(lambda: kernels.segment_mm(rows_MA, weights, sizes(), out_MB, transpose=True), device)

    known, new = product(lambda: even), product(lambda: draw.multinomial(num, np.full(64, 1 / 64)).tolist())
    return ["olmoe", "64 products: sizes that came before | new ones", f"{1e3 * known:.2f} ms", f"{1e3 * new:.2f} ms"]


def fp8_products(device: torch.device, tiny: bool) -> Part:
    """The products of one rank's experts in FP8 against those in bf16: time and error of the forward."""
    rows = []
    for name in VOCABULARY:
        dim, hidden, experts, top_k = (64, 64, 16, 2) if tiny else cases.PRESETS[name]
        slots, num = experts // RANKS, (64 if tiny else TOKENS) * top_k
        new = partial(torch.randn, device=device, dtype=torch.bfloat16)
        sizes = [num // slots] * slots
        for label, width, before in (("gate and up", 2 * hidden, dim), ("down", dim, hidden)):
            source, weights, result = new(num, before), new(slots, width, before).mul_(0.02), new(num, width)
            found, times = [], []
            for is_fp8 in (False, True):
                kernels = KernelChoice(is_fp8=is_fp8).choose(device, torch.bfloat16, (weights,))
                multiply = partial(kernels.segment_mm, source, weights, sizes, result, transpose=True)
                times.append(seconds(multiply, device))
                found.append(result.double())
            operands = source, weights
            quantize = seconds(lambda of=operands: [fp8.quantize_rows(one) for one in of], device)
            values = [one for operand in operands for one in fp8.quantize_rows(operand)]
            alone = "-"
            if fp8.is_supported(device):
                took = seconds(partial(fp8.multiply, *values, sizes, torch.bfloat16), device)
                alone = f"{1e3 * took:.3f} ms"
            error = float((found[1] - found[0]).norm() / found[0].norm())
            if not error < FP8_ERROR:
                FAILED.append(f"{name}, {label}: FP8 is off by {error:.1e}")
            ours = [f"{1e3 * took:.3f} ms" for took in (*times, quantize)]
            rows.append([name, label, *ours, alone, f"{times[0] / times[1]:.2f}", f"{error:.1e}"])
    columns = ("shape", "product", "bf16", "FP8", "of that: rounding", "product alone", "speed, bf16 = 1", "error")
    title = "Experts' products in FP8, one of 8 ranks, balanced"
    return (
        title,
        columns,
        rows,
        f"{TOKENS:,} tokens. Error: norm of the difference from bf16, relative; {FP8_ERROR:g} at most.",
    )


def head_of(name: str, device: torch.device, tiny: bool, flops: float) -> list[str]:
    """The cross entropy of the model's head, as a share of the rate of large products."""
    tokens, dim, vocabulary = (64, 64, 100) if tiny else (TOKENS, cases.PRESETS[name][0], VOCABULARY[name])
    x, head = (torch.randn(n, dim, device=device).mul_(0.02).bfloat16().requires_grad_() for n in (tokens, vocabulary))
    target = torch.randint(vocabulary, (tokens,), device=device)
    took = seconds(lambda: linear_cross_entropy(x, head, target).sum().backward(), device, 1)
    share = 100 * 6 * tokens * dim * vocabulary / took / flops
    return [
        name,
        f"cross entropy and its backward, vocabulary {vocabulary:,}",
        f"{1e3 * took:.1f} ms, {share:.0f} % of GEMMs",
    ]


def layer_trace(device: torch.device, tiny: bool, out: Path) -> Part:
    """One layer, forward and backward, on virtual rank 0 of 8: kernels by time, launches, copies, host syncs."""
    rows, text = [], ["# Kernels of one layer\n"]
    for name in VOCABULARY:
        for scenario in (BALANCED, "95 % into 1"):
            label = f"{name}-{'balanced' if scenario == BALANCED else 'skewed'}"
            dim, hidden, experts, top_k = cases.PRESETS[name]
            shape = LayerShape(TOKENS, dim, hidden, experts, top_k, "bf16")
            row, table = traced(
                LayerShape(64, 64, 64, experts, top_k, "fp32") if tiny else shape, scenario, device, out / label
            )
            rows.append([label, *row])
            text += [f"## {label}: {shape}\n", f"```\n{table}\n```\n"]
            (out / "trace-kernels.md").write_text("\n".join(text))
    columns = ("layer", "forward ms", "backward ms", "GPU busy ms", "launches", "copies", "host syncs", "guests")
    legend = (
        "Virtual rank 0 of 8, planner makespan; what others would send is noise that this GPU writes. The kernels: "
    )
    return "One layer, kernel by kernel", columns, rows, legend + "trace-kernels.md; Chrome traces: the archive."


def traced(shape: LayerShape, scenario: str, device: torch.device, out: Path) -> tuple[list[str], str]:
    """The layer's cells of the table, and its kernels; a Chrome trace goes to trace-NAME.json.gz beside `out`."""
    cell, plan = first_cell(shape, scenario, device)
    for _ in range(3):
        forward, both = cell.time_pass(plan)
    syncs = counted_syncs(lambda: cell.forward(plan).backward(cell.inputs.upstream_TD), device)
    cell.drop_gradients()
    with torch.profiler.profile() as profile:
        with torch.profiler.record_function("forward"):
            y_TD = cell.forward(plan)
            read_clock(device)
        with torch.profiler.record_function("backward"):
            y_TD.backward(cell.inputs.upstream_TD)
            read_clock(device)
    profile.export_chrome_trace(str(out.with_name(f"trace-{out.name}.json.gz")))
    averages = profile.key_averages()
    of_host = [event for event in averages if event.device_type == DeviceType.CPU and event.key.startswith("cu")]
    calls = Counter({event.key: event.count for event in of_host})
    launches = sum(count for name, count in calls.items() if "LaunchKernel" in name)
    busy = sum(event.self_device_time_total for event in on_gpu(averages)) / 1e3
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=25, max_name_column_width=70)
    table += f"\ncalls of the host: {dict(calls)}\nwaits for the device, by line: {syncs}"
    times = [f"{1e3 * forward:.2f}", f"{1e3 * (both - forward):.2f}", f"{busy:.2f}", str(launches)]
    return [*times, str(calls["cudaMemcpyAsync"]), str(sum(syncs.values())), str(len(plan.guests()))], table


def on_gpu(events: Iterable[Any]) -> list[Any]:
    """The kernels and copies among a profile's averages; marks and operations, which contain them, left out."""
    return [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]


def first_cell(shape: LayerShape, scenario: str, device: torch.device) -> tuple[Cell, Plan]:
    """Virtual rank 0's layer, and its plan, with the announcements of all ranks delivered."""
    torch.manual_seed(0)
    grid = Grid([shape], [scenario], ["makespan"], repeats=1, warmup=1, seed=0)
    weights = build_experts(shape, virtual.make_group(0, RANKS, virtual.SharedTraffic(device)), device)
    runner = virtual.Runner(shape, RANKS, grid, Inputs.draw(shape, device), weights, default_costs(), KernelChoice())
    traffic = virtual.SharedTraffic(device)
    cells = [runner.draw_rank(rank, scenario, "makespan", traffic) for rank in range(RANKS)]
    plan = cells[0].plan(cases.count_selections(scenario, RANKS, shape))
    for cell in cells:
        with suppress(virtual.AnnouncementsIncomplete):
            cell.build_tables(plan)
    return cells[0], plan


def counted_syncs(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """How often the host waits for the device, by the line of the program that does."""
    if device.type != "cuda":
        call()
        return {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return dict(Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)))


def whole_step(device: torch.device, tiny: bool, out: Path) -> Part:
    """Steps of training at a real vocabulary: tokens a second, share of the matrix rate, memory, where time goes."""
    rows = []
    layers, length, batch = (2, 64, 2) if tiny else (4, 4096, 2)
    overrides = ["model=tiny", "model.vocab_size=1000"] if tiny else ["model=olmoe_1b7b", f"model.num_layers={layers}"]
    overrides += [f"train.seq_len={length}", f"train.global_batch={batch}", "train.dtype=bf16", "parallel.nproc=1"]
    settings = config.load(overrides)
    vocabulary = settings.model.vocab_size
    assert vocabulary is not None
    with (
        tempfile.TemporaryDirectory() as name,
        mesh.start(rank=0, world=1, init_method=f"file://{name}/rendezvous") as joined,
    ):
        began = read_clock(device)
        spec = config.resolve(settings, 1, vocabulary, "bf16")
        engine = build_engine(build(spec), joined, spec)
        made, size = read_clock(device) - began, estimate(spec)
        peak_rate = matmul_rate(device, engine.dtype)
        generator = np.random.default_rng(0)
        weight_V = 1 / np.arange(1, vocabulary + 1)

        def batch_of_tokens() -> Sequences:
            shape = (batch, length + 1)
            tokens = generator.choice(vocabulary, shape, p=weight_V / weight_V.sum())
            return Sequences(tokens, np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.arange(batch))

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times, losses = [], []
        for _ in range(5 if tiny else 12):
            share, clock = batch_of_tokens(), Clock(device)
            began = read_clock(device)
            done = optimizer_step(engine, spec, [share], 1e-4, clock)
            times.append(read_clock(device) - began)
            losses.append(float(done.parts[0].nats.mean()))
        best = sorted(times[2:])[len(times[2:]) // 2]
        tokens = batch * length
        phases = clock.seconds()
        for stats in done.parts[0].stats:
            for phase, took in stats.clock.seconds().items():
                phases[f"layers' {phase}"] = phases.get(f"layers' {phase}", 0.0) + took
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        rows += [["parameters", f"{size.total / 1e9:.2f}B, made in {made:.1f} s"], ["tokens a step", f"{tokens:,}"]]
        least = f"first {1e3 * times[0]:.0f}, least {1e3 * min(times):.1f}"
        rows.append(["step, median after two", f"{1e3 * best:.1f} ms ({least})"])
        again = seconds(lambda: optimizer_step(engine, spec, [share], 0.0), device, 3)
        rows.append(["the last batch again: the sizes of its products are known", f"{1e3 * again:.1f} ms"])
        rows.append(["tokens a second", f"{tokens / best:,.0f}"])
        mfu = size.flops_per_token * tokens / best / peak_rate
        rows.append(["MFU, of the rate of large products", f"{mfu:.1%} of {peak_rate / 1e12:.1f} TFLOP/s"])
        rows.append(["peak memory, measured and estimated", f"{peak / GIB:.1f} GiB, {size.bytes / GIB:.1f} GiB"])
        rows.append(["loss, first to last", f"{losses[0]:.3f} → {losses[-1]:.3f}"])
        rows += [[f"of the last step: {name}", f"{1e3 * took:.1f} ms"] for name, took in phases.items()]
        if device.type == "cuda":
            with torch.profiler.profile() as profile:
                optimizer_step(engine, spec, [batch_of_tokens()], 1e-4)
                read_clock(device)
            profile.export_chrome_trace(str(out / "trace-step.json.gz"))
            events = sorted(on_gpu(profile.key_averages()), key=lambda e: -e.self_device_time_total)
            rows.append(["GPU busy, a new batch", f"{sum(e.self_device_time_total for e in events) / 1e3:.1f} ms"])
            rows += [[e.key[:60], f"{e.self_device_time_total / 1e3:.1f} ms, {e.count} times"] for e in events[:12]]
    title = f"Whole steps: {' '.join(overrides)}, vocabulary {vocabulary:,}"
    return title, ("", "found"), rows, "Tokens drawn at random, so that the losses only show that it learns."


PARTS: dict[str, Callable[..., Part]] = {
    "device": device_facts,
    "train": compare_devices,
    "ranks": compare_ranks,
    "kernels": memory_bound,
    "fp8": fp8_products,
    "trace": layer_trace,
    "step": whole_step,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    more = (options.folder,) if options.part in ("trace", "step") else ()
    title, columns, rows, legend = PARTS[options.part](device, options.rehearse, *more)
    legend += f" {time.perf_counter() - began:.0f} s."
    table = Tabulated(title, columns, rows)
    results = Results(options.part, options.part.capitalize(), [], [table], [legend])
    console.print(table.render())
    console.print(legend)
    (options.folder / f"{options.part}.md").write_text(results.markdown())
    for failure in FAILED:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
