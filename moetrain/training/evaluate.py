"""Held-out loss, for every domain and over all; what experts specialise in; the answers to tasks.

E experts of a layer, N experts of all layers, C domains.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from moetrain.common.console import errors
from moetrain.config import RunSpec
from moetrain.data.held_out import held_out_windows
from moetrain.data.loader import Corpus
from moetrain.distributed.comm import all_reduce_sum
from moetrain.distributed.mesh import Mesh
from moetrain.evals.answer import Answerer
from moetrain.evals.requests import Encoder
from moetrain.evals.results import Result, judge_choices, judge_texts
from moetrain.evals.task import ChoiceTask, Task
from moetrain.models.base import LanguageModel
from moetrain.observe.collect import specialization
from moetrain.observe.collect.health import max_vio
from moetrain.observe.metrics import (
    BITS_PER_BYTE,
    DOMAIN_BITS_PER_BYTE,
    DOMAIN_MI,
    DOMAIN_PPL,
    EVAL_LOSS,
    EVAL_MAX_VIO,
    EVAL_PPL,
    LAYER_DOMAIN_MI,
    for_domain,
    for_layer,
)
from moetrain.observe.scores import HeldOut, Score
from moetrain.training.preference import HeldOutPairs, SplitReference


@torch.no_grad()
def evaluate(
    model: LanguageModel, corpus: Corpus, config: RunSpec, mesh: Mesh, reference: SplitReference | None = None
) -> HeldOut:
    """All ranks call it, and call the model equally often. Losses are means over the tokens to be predicted, of pairs
    over those of the chosen answers. `reference`: of the held-out pairs, which are judged where it is given."""
    device, size = mesh.device, config.micro_batch
    sizes = [router.num_experts for router in model.routers]
    counts_CN = torch.zeros(len(corpus.domains), sum(sizes), device=device)  # experts of all layers
    sums = torch.zeros(len(corpus.domains), 3, dtype=torch.float64, device=device)
    token_bytes = torch.from_numpy(corpus.token_bytes).to(device)
    pairs = None if reference is None else HeldOutPairs(reference, config.dpo, device)
    liked = specialization.TokensOfExperts(len(sizes), len(corpus.domains), mesh)
    for domain in range(len(corpus.domains)):
        windows = held_out_windows(corpus, config, domain)
        for begin in range(0, len(windows.tokens), size * mesh.world):
            mine = slice(begin + mesh.rank * size, begin + (mesh.rank + 1) * size)
            tokens = torch.from_numpy(windows.tokens[mine]).to(device)
            within = windows.attended(config.data.attend_within_documents)
            document = None if within is None else torch.from_numpy(within[mine]).to(device)
            label = torch.from_numpy(windows.domain[mine, :-1]).to(device)
            num_targets, sizes_BL, positions = float(tokens[:, 1:].numel()), token_bytes[tokens[:, 1:]], None
            if windows.target is not None:
                is_target = torch.from_numpy(windows.target[mine, 1:]).to(device)
                sizes_BL, num_targets = sizes_BL * is_target, float(is_target.sum())
                positions = is_target.flatten().nonzero()[:, 0]
            nats, stats = model(tokens[:, :-1], tokens[:, 1:], document, label, positions=positions)
            if pairs is not None:
                pairs.add(nats, windows.select(mine))
            if config.train.objective == "dpo":
                chosen = (torch.arange(len(nats), device=device) % 2 == 0)[:, None] & is_target
                nats, sizes_BL, num_targets = nats * chosen, sizes_BL * chosen, float(chosen.sum())
            sums[domain] += torch.stack([nats.sum().double(), torch.tensor(num_targets, device=device), sizes_BL.sum()])
            counts_CN[domain] += torch.cat([s.counts_E for s in stats])
            liked.add(domain, tokens[:, :-1].flatten(), stats)
    all_reduce_sum(sums)
    all_reduce_sum(counts_CN)
    scores = {
        name: Score(float(nats), int(tokens), int(size_))
        for name, (nats, tokens, size_) in zip(corpus.domains, sums.tolist(), strict=True)
    }
    scores["all"] = Score(*(float(x) for x in sums.sum(0).tolist()))  # type: ignore[arg-type]
    metrics = {EVAL_LOSS: scores["all"].loss, EVAL_PPL: scores["all"].perplexity}
    metrics[BITS_PER_BYTE] = scores["all"].bits_per_byte
    for name in corpus.domains:
        metrics[for_domain(DOMAIN_PPL, name)] = scores[name].perplexity
        metrics[for_domain(DOMAIN_BITS_PER_BYTE, name)] = scores[name].bits_per_byte
    counts = [part.numpy() for part in counts_CN.double().cpu().split(sizes, dim=1)]
    layers = specialization.describe(config.model.pass_names, counts, liked, corpus)
    for layer, counts_CE in zip(layers, counts, strict=True):
        found = bool(counts_CE.sum())
        metrics[for_layer(LAYER_DOMAIN_MI, layer["name"])] = layer["domain_mi"] if found else math.nan
        metrics[for_layer(EVAL_MAX_VIO, layer["name"])] = max_vio(counts_CE.sum(0)) if found else math.nan
    metrics[DOMAIN_MI] = float(np.mean([metrics[for_layer(LAYER_DOMAIN_MI, n["name"])] for n in layers]))
    return HeldOut(scores, metrics | (pairs.collect() if pairs is not None else {}), layers)


def answer_tasks(
    model: LanguageModel,
    corpus: Corpus,
    config: RunSpec,
    mesh: Mesh,
    tasks: Sequence[Task],
    max_length: int | None = None,
    show: bool = False,
) -> list[Result]:
    """Have the model answer `tasks` and return what the answers are worth, the same on every rank. All ranks call it.

    `max_length`: tokens that the model reads at a time; None: `train.seq_len`. `show`: draw a bar on standard error.
    """
    most = max_length or config.train.seq_len
    encoder = Encoder(corpus.tokenizer, corpus.end_of_text, most)
    budget = config.micro_batch * config.train.seq_len
    found = []
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not show) as progress:
        for task in tasks:
            total = sum(len(q.texts) for q in task.questions) if isinstance(task, ChoiceTask) else len(task)
            bar = progress.add_task(task.name, total=total)
            answerer = Answerer(model, encoder, mesh, budget)

            def advance(number: int, bar: TaskID = bar) -> None:
                progress.update(bar, advance=number)

            if isinstance(task, ChoiceTask):
                metrics, answers = judge_choices(task, answerer.score(task, advance))
            else:
                metrics, answers = judge_texts(task, answerer.write(task, advance))
            experts = dict(zip(config.model.pass_names, answerer.experts.collect(), strict=True))
            found.append(Result(task.name, task.shots, task.primary, metrics, answers, experts, answerer.count_cut()))
    return found
