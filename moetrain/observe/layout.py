"""What a run is, printed at its start: layout, parameters and memory per rank."""

from rich.table import Table
from rich.text import Text

from moetrain import __version__
from moetrain.common.console import RunLogger
from moetrain.config import RunSpec
from moetrain.data.loader import Corpus
from moetrain.distributed.mesh import Mesh
from moetrain.moe.routing import ROUTERS
from moetrain.observe.estimate import GIB, Estimate, short


def describe(config: RunSpec, mesh: Mesh, corpus: Corpus, size: Estimate, logger: RunLogger) -> None:
    m, t = config.model, config.train
    shard = mesh.world // mesh.dp_replicate
    micro = config.micro_batch
    cut = f" (r = {config.r} slices of each expert)" if config.r > 1 else ""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, text in (
        (
            "layout",
            f"{mesh.world} ranks on {mesh.device.type} = dp_replicate {mesh.dp_replicate} × dp_shard {shard}; "
            f"ep {mesh.ep.size}{cut} × expert data {shard // mesh.ep.size}; planner {config.planner.name}, {t.dtype}",
        ),
        (
            "model",
            f"{short(size.total)} parameters, {short(size.active)} active per token; {m.num_layers} layers, "
            f"width {m.dim}, {m.num_experts} experts, top-{config.router.top_k}"
            + ("" if config.router.name == "topk" else f", router {config.router.name}"),
        ),
        (
            "per rank",
            f"{short(size.per_rank)} parameters; about {size.bytes / GIB:.2f} GiB: states {size.states / GIB:.2f}, "
            f"gathered {size.gathered / GIB:.2f}, activations {size.activations / GIB:.2f}",
        ),
        (
            "data",
            f"{corpus.folder}: {corpus.manifest['splits']['train']['tokens']:,} tokens in the domains "
            f"{', '.join(corpus.domains)}",
        ),
        (
            "batch",
            f"{t.global_batch} sequences × {t.seq_len} tokens in {config.micro_steps} "
            f"micro-step(s) of {'up to ' * (t.global_batch % (micro * mesh.world) > 0)}{micro} per rank; "
            f"{t.steps} steps",
        ),
        ("run", f"{config.run.dir}/{config.run.name}"),
    ):
        table.add_row(Text(name, "dim"), text)
    logger.print(f"moetrain {__version__}", style="bold")
    logger.print(table)
    if warning := ROUTERS[config.router.name].warning:
        logger.print(warning, style="yellow")
    logger.print()
