"""A model's answers, on all its ranks: each takes a share of the requests, and all call the model equally often.

Sequences are padded on the right, where a causal model does not look. Padded positions are routed too, and left out of
what is counted of the experts.

T tokens of a rank's batch, E experts of a layer.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moetrain.distributed.comm import all_reduce_sum, gather_texts
from moetrain.distributed.mesh import Mesh
from moetrain.evals.requests import Encoder, EvalRequest
from moetrain.evals.task import ChoiceTask, PromptTask
from moetrain.moe.layer import LayerStats

Advance = Callable[[int], object]  # called with how many more requests are answered


class ExpertCounts:
    """How many tokens each expert of each layer computed, without those that pad."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: list[Tensor] = []

    def add(self, stats: Sequence[LayerStats], is_real_T: Tensor) -> None:
        """Count a forward's selections of the tokens that are real."""
        for number, s in enumerate(stats):
            token_N, expert_N, made_N = s.choice
            keep_N = is_real_T[token_N] if made_N is None else is_real_T[token_N] & made_N
            found_E = torch.bincount(expert_N[keep_N], minlength=len(s.counts_E))
            if number == len(self._layers):
                self._layers.append(torch.zeros_like(found_E))
            self._layers[number] += found_E

    def collect(self) -> list[list[int]]:
        """Return the counts of every layer over all ranks. All ranks call it."""
        return [all_reduce_sum(counts_E).tolist() for counts_E in self._layers]


class Answerer:
    """Has `model` answer on the ranks of `mesh`, with at most `budget` tokens of a rank in a batch.

    `model(tokens, targets)` returns the negative log-likelihood of every target and the layers' statistics,
    `model(tokens)` the logits in place of the former.
    """

    def __init__(self, model: nn.Module, encoder: Encoder, mesh: Mesh, budget: int) -> None:
        self._model, self._encoder, self._mesh, self._budget = model, encoder, mesh, budget
        self.experts = ExpertCounts(mesh.device)
        self.num_cut = 0  # requests of this rank that lost their left part

    @torch.no_grad()
    def score(self, task: ChoiceTask, advance: Advance) -> list[list[float]]:
        """Return the log-likelihood (nats) of each choice of each question, the same on every rank."""
        pairs = [pair for question in task.questions for pair in zip(*question[:2], strict=True)]
        mine = self._share([len(context) + len(continuation) for context, continuation in pairs])
        requests = self._encoder.encode_pairs([pairs[number] for number in mine])
        self.num_cut = sum(request.is_cut for request in requests)
        found: dict[int, float] = {}
        batches = list(self._batches(requests))
        for turn in range(self._most(len(batches))):
            batch = batches[turn] if turn < len(batches) else []
            for place, value in zip(batch, self._score_batch([requests[p] for p in batch]), strict=True):
                found[mine[place]] = value
            advance(len(batch) * self._mesh.world)
        values = iter(self._gather(found, len(pairs)))
        return [[next(values) for _ in question.texts] for question in task.questions]

    @torch.no_grad()
    def write(self, task: PromptTask, advance: Advance) -> list[str]:
        """Return what the model writes after each prompt, up to the stop sequence, the same on every rank.

        The model reads the newest tokens where prompt and text are longer than its sequences.
        """
        contexts = [prompt.context for prompt in task.prompts]
        mine = self._share([len(context) for context in contexts])
        requests = self._encoder.encode_prompts([contexts[number] for number in mine], task.max_tokens)
        self.num_cut = sum(request.is_cut for request in requests)
        waiting = [
            (number, request.tokens, len(request.tokens)) for number, request in zip(mine, requests, strict=True)
        ]
        rows = max(1, self._budget // self._encoder.most)
        active: list[tuple[int, list[int], int]] = []
        found: dict[int, str] = {}
        while self._count_everywhere(len(active) + len(waiting)):
            while waiting and len(active) < rows:
                active.append(waiting.pop(0))
            still = []
            for (number, tokens, begin), drawn in zip(active, self._draw([row[1] for row in active]), strict=True):
                text = self._written(task, [*tokens, drawn][begin:])
                if text is None:
                    still.append((number, [*tokens, drawn], begin))
                else:
                    found[number] = text
            advance((len(active) - len(still)) * self._mesh.world)
            active = still
        return self._gather(found, len(contexts))

    def _written(self, task: PromptTask, drawn: list[int]) -> str | None:
        """What was written, when it has come to its end."""
        ended = drawn[-1] == self._encoder.end_of_text
        text = self._encoder.tokenizer.decode(drawn[:-1] if ended else drawn)
        places = [text.find(stop) for stop in task.stop if stop]
        if any(place >= 0 for place in places):
            return text[: min(place for place in places if place >= 0)]
        return text if ended or len(drawn) >= task.max_tokens else None

    def _share(self, lengths: Sequence[int]) -> list[int]:
        """The requests of this rank, the longest first."""
        order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
        return order[self._mesh.rank :: self._mesh.world]

    def _batches(self, requests: Sequence[EvalRequest]) -> Iterator[list[int]]:
        """Requests of like length, within the budget."""
        batch: list[int] = []
        longest = 0
        for place in sorted(range(len(requests)), key=lambda p: -len(requests[p].tokens)):
            longest = longest or len(requests[place].tokens)
            if batch and (len(batch) + 1) * longest > self._budget:
                yield batch
                batch, longest = [], len(requests[place].tokens)
            batch.append(place)
        if batch:
            yield batch

    def _score_batch(self, batch: Sequence[EvalRequest]) -> list[float]:
        tokens = self._pad([request.tokens for request in batch], 2)
        nats, stats = self._model(tokens[:, :-1], tokens[:, 1:])
        self.experts.add(stats, self._is_real([len(r.tokens) - 1 for r in batch], tokens.shape[1] - 1))
        rows = zip(nats.double(), batch, strict=False)
        return [-float(row[request.begin - 1 : len(request.tokens) - 1].sum()) for row, request in rows]

    def _draw(self, rows: Sequence[list[int]]) -> list[int]:
        """The most likely next token of each row."""
        rows = [row[-self._encoder.most :] for row in rows]
        tokens = self._pad(rows, 1)
        logits, stats = self._model(tokens)
        self.experts.add(stats, self._is_real([len(row) for row in rows], tokens.shape[1]))
        last = torch.tensor([len(row) - 1 for row in rows], dtype=torch.int64, device=tokens.device)
        return logits[: len(rows)][torch.arange(len(rows), device=tokens.device), last].argmax(-1).tolist()

    def _pad(self, rows: Sequence[list[int]], fewest: int) -> Tensor:
        """[B, L] int64; one row of padding alone where there is none, which keeps the ranks in step."""
        longest = max([len(row) for row in rows], default=fewest)
        out = torch.full((max(1, len(rows)), longest), self._encoder.end_of_text, dtype=torch.int64)
        for number, row in enumerate(rows):
            out[number, : len(row)] = torch.tensor(row)
        return out.to(self._mesh.device)

    def _is_real(self, lengths: Sequence[int], longest: int) -> Tensor:
        """[T] bool: which positions of a batch with these lengths are no padding."""
        limits = torch.tensor([*lengths] or [0], device=self._mesh.device)
        return (torch.arange(longest, device=self._mesh.device) < limits[:, None]).flatten()

    def _count_everywhere(self, number: int) -> int:
        return int(all_reduce_sum(torch.tensor(number, device=self._mesh.device)))

    def _most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(map(int, gather_texts(str(number), self._mesh.saving)))

    def _gather(self, found: dict[int, Any], size: int) -> list[Any]:
        """What the ranks found, in the order of the requests."""
        out: dict[int, Any] = {}
        for text in gather_texts(json.dumps([*found.items()]), self._mesh.saving):
            out.update(dict(json.loads(text)))
        return [out[number] for number in range(size)]

    def count_cut(self) -> int:
        """Return how many requests of the last task lost their left part, over all ranks. All ranks call it."""
        return self._count_everywhere(self.num_cut)
