"""From the keys of a folder to the tensors of a transformers model, and back, a few rows at a time.

transformers says in its conversion mapping how keys are renamed, stacked, concatenated, transposed or interleaved. The
same operations run here on the rows that are asked for, where an operation leaves rows apart: on the keys of single
experts, or on rows of fused tensors. An operation that mixes rows runs on whole tensors.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moetrain.hf.folder import Lazy, Rows, find_runs

PIECE_BYTES = 1 << 24  # of the rows that are converted at a time
Kind = Literal["list", "rows", "whole"]
Parts = dict[str, list[Tensor]]  # by pattern
Read = Callable[[str, Rows], Tensor]  # rows of a tensor of the model, by its name


class Operations(NamedTuple):
    """Operations of transformers one after another, and the patterns of what goes in and what comes out."""

    steps: tuple[Any, ...]
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def apply(self, parts: Parts, name: str, model: Any) -> Parts:
        """Return what comes out, by pattern. `name`: of the first target; `model`: its shapes are looked up."""
        found: dict[str, Any] = dict(parts)
        for step in self.steps:
            found = step.convert(
                found,
                source_patterns=list(self.sources),
                target_patterns=list(self.targets),
                full_layer_name=name,
                model=model,
                config=model.config,
                missing_keys=None,
            )
        return {pattern: value if isinstance(value, list) else [value] for pattern, value in found.items()}


@dataclass(frozen=True)
class ConversionGroup:
    """Keys that become tensors of the model together.

    Rows are those of the tensors' first dimension: `list` has a key for each row and pattern, `rows` has the rows of
    each key apart, `whole` mixes them.
    """

    names: Mapping[str, str]  # of the tensors, by the pattern that comes out
    keys: Mapping[str, tuple[str, ...]]  # in their order, by the pattern that goes in
    kind: Kind = "rows"
    forward: Operations | None = None  # None: one key is one tensor
    backward: Operations | None = None

    @property
    def first(self) -> str:
        return next(iter(self.names.values()))


@dataclass(frozen=True)
class TensorSource:
    """A tensor of the model, to be read from a folder."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # what `read` returns
    group: ConversionGroup = field(repr=False)
    tensors: Mapping[str, Lazy] = field(repr=False)  # by key
    model: Any = field(repr=False)  # on the meta device

    def read(self, rows: Rows = None) -> Tensor:
        """Return these rows, or all, in memory of their own; see `folder.Lazy`.

        Beside what is returned it takes the memory of one row or of `PIECE_BYTES`, whichever is more; or of the keys
        as a whole where the family's conversion mixes rows.
        """
        group = self.group
        if group.forward is None:
            ((key,),) = group.keys.values()
            return self.tensors[key].read(rows)
        if group.kind == "whole":
            whole = self._convert({p: [self.tensors[key].read() for key in keys] for p, keys in group.keys.items()})
            return whole if rows is None else torch.cat([whole[a:b] for a, b in find_runs(rows, self.shape[0])])
        wanted = [row for a, b in find_runs(rows, self.shape[0]) for row in range(a, b)]
        out = torch.empty(len(wanted), *self.shape[1:], dtype=self.dtype)
        step = rows_at_once(self)
        for begin in range(0, len(wanted), step):
            piece = wanted[begin : begin + step]
            out[begin : begin + len(piece)] = self._convert(
                {p: self._parts(keys, piece) for p, keys in group.keys.items()}
            )
        return out

    def _parts(self, keys: Sequence[str], rows: list[int]) -> list[Tensor]:
        if self.group.kind == "list":
            return [self.tensors[keys[row]].read() for row in rows]
        return [self.tensors[key].read(rows) for key in keys]

    def _convert(self, parts: Parts) -> Tensor:
        assert self.group.forward is not None
        found = self.group.forward.apply(parts, self.group.first, self.model)
        return next(found[pattern][0] for pattern, name in self.group.names.items() if name == self.name)


@dataclass(frozen=True)
class Mapped:
    """The keys of a folder, matched with the tensors of a model."""

    model: Any  # a `PreTrainedModel` on the meta device
    tensors: Mapping[str, Lazy]  # by key
    sources: Mapping[str, TensorSource]  # of every tensor in the model's state dict, by name; of tied ones the same
    groups: Sequence[ConversionGroup]
    carried: tuple[str, ...]  # keys that transformers leaves out on purpose

    def revert(self, read: Read) -> Iterator[tuple[str, Iterator[Tensor]]]:
        """Yield every key that makes a tensor of the model, and the pieces of its value, from the first row on.

        `read` gives the model's tensors, which need not be those of the folder.
        """
        for group in self.groups:
            for pattern, keys in group.keys.items():
                for place, key in enumerate(keys):
                    yield key, self._revert(group, pattern, place, read)

    def _revert(self, group: ConversionGroup, pattern: str, place: int, read: Read) -> Iterator[Tensor]:
        source = self.sources[group.first]
        if group.kind == "whole":
            pieces: list[Rows] = [None]
        elif group.kind == "list":
            pieces, place = [[place]], 0
        elif not source.shape:
            pieces = [None]
        else:
            step = rows_at_once(source)
            pieces = [range(a, min(a + step, source.shape[0])) for a in range(0, source.shape[0], step)]
        for rows in pieces:
            values = [read(name, rows) for name in group.names.values()]
            if group.backward is None:
                yield values[0]
                continue
            places = group.backward.sources
            parts = dict(zip(places, ([v] for v in values), strict=True)) if len(places) > 1 else {places[0]: values}
            found = group.backward.apply(parts, group.first, self.model)
            assert group.forward is not None
            wanted = group.backward.targets[group.forward.sources.index(pattern)].replace("*", str(place))
            (value,) = found[wanted]
            yield value


def rows_at_once(source: TensorSource) -> int:
    """Return how many rows of a tensor are converted at a time."""
    row = torch.Size(source.shape[1:]).numel() * source.dtype.itemsize
    return max(1, PIECE_BYTES // max(1, row))
