"""Record the discrete choices of a model's forward pass, and replay them in another one.

The routers stay the family's own code. What is discrete in them is a top-k, or a maximum whose index is used; a
`TorchFunctionMode` sees each such call. While choices are replayed, the call returns the recorded indices and, as its
values, what stands there in today's input: gradients flow through fresh probabilities of the pinned experts.

A recompute replays every choice of its region, also those of a sparse attention. Another layout of ranks replays those
of the routers alone (`PinnedChoices.part`): the calls whose index, or a column of it, has reached an experts module.
Calls are told apart by their line in the family's code.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moetrain.hf.layout import is_experts

TOP_K = (torch.topk, Tensor.topk)
MAXIMUM = (torch.max, Tensor.max)
ARGMAX = (torch.argmax, Tensor.argmax)

Site = tuple[str, int]  # file and line of a call


class PinnedChoices:
    """The indices of every choice of a forward pass: for each line of code, in the order in which it made them."""

    def __init__(self, indices: dict[Site, list[Tensor]] | None = None, routers: set[Site] | None = None) -> None:
        self.indices = defaultdict(list) if indices is None else indices
        self.routers: set[Site] = set() if routers is None else routers
        self.caught: list[list[Site]] = []  # of each call of an experts module, the choices that it was given
        self.counts: list[Tensor] = []  # and [E] its selections of every expert

    def part(self, begin: int, end: int, total: int) -> "PinnedChoices":
        """The routers' choices for the sequences `begin` to `end` of a batch of `total`, whose tokens come in order."""
        cut = {
            site: [i[len(i) * begin // total : len(i) * end // total] for i in self.indices[site]]
            for site in self.routers
        }
        return PinnedChoices(cut, self.routers)

    @contextmanager
    def record(self, model: nn.Module | None = None) -> Iterator[None]:
        """Add the choices of what runs inside; those of routers are found where `model` is given."""
        with ExitStack() as hooks:
            for module in model.modules() if model is not None else ():
                if is_experts(module):
                    hooks.callback(module.register_forward_pre_hook(self._find_router, with_kwargs=True).remove)
            with _Record(self.indices):
                yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Make the recorded choices again, from the first on, in what runs inside.

        Raises `RuntimeError` where there are more of them than were recorded, or for another number of rows.
        """
        with _Replay(self.indices):
            yield

    def _find_router(self, module: Any, args: Any, kwargs: Any) -> None:
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        last = {site: made[-1] for site, made in self.indices.items()}
        found = [site for site, made in last.items() if _same(index, made)]
        if not found:
            found = [site for site, made in last.items() if any(_same(column, made) for column in index.unbind(-1))]
        self.caught.append(found)
        self.counts.append(count_selections(index, module.num_experts))
        self.routers.update(found)


def count_selections(index_TK: Tensor, num_experts: int) -> Tensor:
    """Return int64 [E] how often each expert is chosen; numbers beyond the last are no selections."""
    index_N = index_TK.flatten().clamp(max=num_experts)
    counts_E = index_N.new_zeros(num_experts + 1)
    return counts_E.scatter_add_(0, index_N, torch.ones_like(index_N))[:-1]


class ChoiceMode(TorchFunctionMode):
    """Has every choice made by `choose(site, call, source)`, which returns its indices.

    The values are gathered by the indices, whether these are new or old: a recompute saves the same tensors.
    """

    def choose(self, site: Site, call: Callable[[], Any], source: Tensor) -> Tensor:
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = partial(func, *args, **kwargs)
        if not (func in TOP_K or func in ARGMAX or (func in MAXIMUM and _has_dimension(args, kwargs))):
            return call()
        source, is_argmax = args[0], func in ARGMAX
        with torch.no_grad():
            index = self.choose(_site(), call if is_argmax else lambda: call()[1], source)
        if is_argmax:
            return index
        if func in TOP_K:
            values = source.gather(_argument(args, kwargs, 2, "dim", -1), index)
            return torch.return_types.topk((values, index))
        dim = _argument(args, kwargs, 1, "dim", -1)
        if _argument(args, kwargs, 2, "keepdim", False):
            values = source.gather(dim, index)
        else:
            values = source.gather(dim, index.unsqueeze(dim)).squeeze(dim)
        return torch.return_types.max((values, index))


class _Record(ChoiceMode):
    def __init__(self, indices: dict[Site, list[Tensor]]) -> None:
        super().__init__()
        self._indices = indices

    def choose(self, site: Site, call: Callable[[], Any], source: Tensor) -> Tensor:
        index = call()
        self._indices.setdefault(site, []).append(index)
        return index


class _Replay(ChoiceMode):
    def __init__(self, indices: dict[Site, list[Tensor]]) -> None:
        super().__init__()
        self._indices = {site: iter(made) for site, made in indices.items()}

    def choose(self, site: Site, call: Callable[[], Any], source: Tensor) -> Tensor:
        if site not in self._indices:
            return call()
        index = next(self._indices[site], None)
        if index is None:
            raise RuntimeError(f"pinned choices: line {site[1]} of {site[0]} makes more of them than were recorded")
        if index.dim() and source.dim() and len(index) != len(source):
            raise RuntimeError(f"pinned choices: recorded for {len(index)} rows, but there are {len(source)} of them")
        return index


def _site() -> Site:
    """The caller of the function that is intercepted, which several modes may have seen."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _same(index: Tensor, made: Tensor) -> bool:
    return index.numel() == made.numel() and torch.equal(index.reshape(-1), made.reshape(-1))


def _argument(args: Any, kwargs: Any, place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _has_dimension(args: Any, kwargs: Any) -> bool:
    """Whether it is a maximum along a dimension, not of a whole tensor or of two of them."""
    return "dim" in kwargs or (len(args) > 1 and isinstance(args[1], int))
