"""Which keys of a folder make which tensors of a transformers model, by its own conversion mapping.

What the loader of transformers does while it reads is done here on names and shapes alone, and strictly: a key that is
missing, unused, of another shape or dtype is an error which names it.
"""

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from moetrain.common.errors import ConfigError
from moetrain.hf.conversion import ConversionGroup, Kind, Mapped, Operations, TensorSource
from moetrain.hf.folder import Lazy, Planned, open_folder, read_config
from moetrain.hf.quantized import dequantise

PIECE_ROWS = 4096  # of tied tensors, compared at a time
ALWAYS_LEFT_OUT = r"rotary_emb\.inv_freq|(^|\.)position_ids$"  # of old files; transformers computes them


def open_weights(path: str | Path, trust_remote_code: bool = False) -> Mapped:
    """Open a folder and match its keys with the tensors of the architecture that its `config.json` names.

    Headers alone are read. Raises `ConfigError` for whatever cannot be right, see `folder.open_folder`,
    `quantized.dequantise` and `map_tensors`.
    """
    folder = open_folder(path)
    return map_tensors(dequantise(folder), build_on_meta(path, trust_remote_code), path)


def build_on_meta(path: str | Path, trust_remote_code: bool = False) -> Any:
    """Return the model that `config.json` in a folder names, on the meta device in fp32.

    Raises `ConfigError` for remote code, unless it is trusted, and for what transformers does not build.
    """
    import transformers

    about = read_config(path)
    if about.get("auto_map") and not trust_remote_code:
        raise ConfigError(f"model.path={path}: has code of its own (auto_map); model.trust_remote_code=true runs it")
    about = {key: value for key, value in about.items() if key != "quantization_config"}
    names = about.get("architectures") or [None]
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are dequantised as they are read
        found = getattr(transformers, str(names[0]), transformers.AutoModelForCausalLM)
        with torch.device("meta"):
            if found is transformers.AutoModelForCausalLM:
                model = found.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
            else:
                model = found._from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever transformers' own code says of a config that it does not take
        reason = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"model.path={path}: {reason[0] if reason else type(error).__name__}") from error
    return model


def list_default(model: Any) -> dict[str, Lazy]:
    """Return the tensors that transformers would save of a model on the meta device, by key; none can be read."""
    tied = set(model.all_tied_weights_keys)
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    saved = core_model_loading.revert_weight_conversion(model, state)
    return {key: Planned(tuple(value.shape), value.dtype) for key, value in saved.items()}


def map_tensors(tensors: Mapping[str, Lazy], model: Any, path: object, compare_tied: bool = True) -> Mapped:
    """Match the tensors of a folder with those of a model.

    Arguments:
        tensors: what the folder has, by key.
        model: a `PreTrainedModel` on the meta device, with all its experts.
        path: the folder, for messages.
        compare_tied: whether tied tensors that the folder has twice are read, to see that they are equal.

    Raises `ConfigError` that names a key which is missing, unused, of another shape or of a dtype that does not fit.
    """
    return _Matching(tensors, model, path, compare_tied).result()


class _Matching:
    """One folder's keys on their way to a model's names."""

    def __init__(self, tensors: Mapping[str, Lazy], model: Any, path: object, compare_tied: bool) -> None:
        self._tensors, self._model, self._path = tensors, model, path
        self._compare_tied = compare_tied
        self._state: dict[str, Tensor] = model.state_dict()
        self._sources: dict[str, TensorSource] = {}
        self._groups: list[ConversionGroup] = []

    def result(self) -> Mapped:
        """Return the match. Raises `ConfigError`."""
        collected, unused = self._collect()
        for name, (converter, keys) in collected.items():
            self._add(name, converter, keys)
        carried = [key for key in unused if self._is_left_out(key)]
        if wrong := [key for key in unused if key not in carried]:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise self._bad(f"{wrong[0]}{more} has no place in {type(self._model).__name__}")
        self._tie()
        if missing := [name for name in self._state if name not in self._sources]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise self._bad(f"no key of the files gives {missing[0]}{more} of {type(self._model).__name__}")
        return Mapped(self._model, self._tensors, self._sources, self._groups, tuple(carried))

    def _collect(self) -> tuple[dict[str, tuple[Any, dict[str, list[str]]]], list[str]]:
        """First name -> (converter or None, keys by pattern), and the keys that match nothing."""
        transforms = conversion_mapping.get_model_conversion_mapping(self._model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self._model.base_model_prefix
        out: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        unused = []
        for key in sorted(self._tensors, key=core_model_loading.dot_natural_key):
            name, pattern = core_model_loading.rename_source_key(key, renamings, converters, prefix, self._state)
            if name not in self._state and key in self._state:
                name, pattern = core_model_loading.rename_source_key(key, [], [], prefix, self._state)
            if name not in self._state:
                unused.append(key)
                continue
            converter = None if pattern is None else by_pattern[pattern]
            known, keys = out.setdefault(name, (converter, {}))
            if known is not converter or (converter is None and keys):
                (other, *_), *_ = keys.values()
                raise self._bad(f"{other} and {key} both give {name}")
            keys.setdefault(pattern or "", []).append(key)
        return out, unused

    def _add(self, name: str, converter: Any, keys: dict[str, list[str]]) -> None:
        """Check a group and add it with the tensors that it makes."""
        operations = () if converter is None else self._settle(converter.operations, name, keys)
        if not operations:
            ((key,),) = keys.values()
            self._add_group(ConversionGroup({"": name}, {"": (key,)}), {name: self._on_meta(key)}, key)
            return
        kind = _find_kind(operations)
        if kind == "list":
            self._check_list(name, converter, keys)
        settled = deepcopy(converter)
        settled.operations = list(operations)
        reverse = settled.reverse_transform()
        forward = Operations(tuple(operations), tuple(converter.source_patterns), tuple(converter.target_patterns))
        backward = Operations(tuple(reverse.operations), tuple(reverse.source_patterns), tuple(reverse.target_patterns))
        ordered = {p: tuple(keys[p]) for p in converter.source_patterns if p in keys}
        example = next(iter(ordered.values()))[0]
        try:
            found = forward.apply({p: [self._on_meta(k) for k in own] for p, own in ordered.items()}, name, self._model)
        except Exception as error:  # whatever an operation says of shapes that it does not take
            raise self._bad(f"{example} and those beside it do not make {name} ({error})") from None
        start = next((p for p in found if p in name), None)
        names = {p: name if start is None else name.replace(start, p, 1) for p in found}
        group = ConversionGroup(names, ordered, kind, forward, backward)
        self._add_group(group, {names[p]: value[0] for p, value in found.items()}, example)

    def _add_group(self, group: ConversionGroup, made: Mapping[str, Tensor], example: str) -> None:
        for name, value in made.items():
            wanted = self._state.get(name)
            if wanted is None:
                raise self._bad(f"{example} has no place in {type(self._model).__name__} as {name}")
            if value.shape != wanted.shape:
                raise self._bad(f"{example} has shape {list(value.shape)}; {name} needs {list(wanted.shape)}")
            if value.is_floating_point() != wanted.is_floating_point() or value.dtype == torch.float8_e4m3fn:
                raise self._bad(f"{example} is {_say(value.dtype)}, which {name}, {_say(wanted.dtype)}, cannot be")
            self._sources[name] = TensorSource(name, tuple(value.shape), value.dtype, group, self._tensors, self._model)
        self._groups.append(group)

    def _settle(self, operations: list[Any], name: str, keys: dict[str, list[str]]) -> tuple[Any, ...]:
        """Decide by the shape in the file whether matrices that may lie either way are to be transposed."""
        if len(operations) > 1 or not isinstance(operations[0], Transpose) or not operations[0].check_dims:
            return tuple(operations)
        (first, second), ((key,),) = (operations[0].dim0, operations[0].dim1), keys.values()
        wanted, found = self._state[name].shape, self._tensors[key].shape
        if len(wanted) > max(first, second) and wanted[first] == wanted[second]:
            raise self._bad(f"{key} has square matrices {list(found[1:])}, which may lie either way")
        return () if found == tuple(wanted) else (Transpose(first, second),)

    def _check_list(self, name: str, converter: Any, keys: dict[str, list[str]]) -> None:
        """Every expert must have a key of every pattern, and those of one pattern the same shape and dtype."""
        count = self._state[name].shape[0]
        (example, *_), *_ = keys.values()
        for pattern in converter.source_patterns:
            numbered = {_number(pattern, key): key for key in keys.get(pattern, ())}
            if not numbered:
                raise self._bad(f"has {example}, but no key for {pattern} beside it")
            for number in range(count):
                if number not in numbered:
                    raise self._bad(f"has no {_renumber(pattern, next(iter(numbered.values())), number)}")
            if len(numbered) != count or len(keys[pattern]) != count:
                extra = keys[pattern][-1]
                raise self._bad(f"{extra} has no place in {name}, which has {count} experts")
            known = self._tensors[keys[pattern][0]]
            for key in keys[pattern]:
                if self._tensors[key].shape != known.shape or self._tensors[key].dtype != known.dtype:
                    own, other = ([*each.shape, _say(each.dtype)] for each in (self._tensors[key], known))
                    raise self._bad(f"{key} is {own}, but {keys[pattern][0]} is {other}")

    def _tie(self) -> None:
        """Give tied tensors the source of what they are tied to, whichever of them the files have."""
        for name, other in self._model.all_tied_weights_keys.items():
            both = [self._sources[each] for each in (other, name) if each in self._sources]
            if len(both) == 2 and self._compare_tied and not _are_equal(*both):
                raise self._bad(f"{name} and {other} are tied by the configuration, but the files have two values")
            if both:
                self._sources.setdefault(name, both[0])
                self._sources.setdefault(other, both[0])

    def _is_left_out(self, key: str) -> bool:
        """Whether transformers leaves a key out without a word, as those of multi-token prediction."""
        patterns = [ALWAYS_LEFT_OUT, *(self._model._keys_to_ignore_on_load_unexpected or ())]
        config = self._model.config.get_text_config()
        layers = getattr(config, "num_hidden_layers", 0) or 0
        for extra in range(getattr(config, "num_nextn_predict_layers", 0) or 0):
            patterns.append(rf"(^|\.)layers\.{layers + extra}\.")
        return any(re.search(pattern, key) for pattern in patterns)

    def _on_meta(self, key: str) -> Tensor:
        return torch.empty(self._tensors[key].shape, dtype=self._tensors[key].dtype, device="meta")

    def _bad(self, rule: str) -> ConfigError:
        return ConfigError(f"model.path={self._path}: {rule}")


def _are_equal(one: TensorSource, other: TensorSource) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    parts = (slice(begin, begin + PIECE_ROWS) for begin in range(0, one.shape[0], PIECE_ROWS))
    return all(torch.equal(one.read(part), other.read(part)) for part in parts)


def _find_kind(operations: tuple[Any, ...]) -> Kind:
    """Whether the rows of what comes out are keys, rows of keys, or neither."""
    first, *rest = operations
    if isinstance(first, MergeModulelist) and first.dim == 0:
        return "list" if all(map(_keeps_rows, rest)) else "whole"
    return "rows" if all(map(_keeps_rows, operations)) else "whole"


def _keeps_rows(operation: Any) -> bool:
    if isinstance(operation, Transpose):
        return not operation.check_dims and min(operation.dim0, operation.dim1) > 0
    return isinstance(operation, Chunk | Concatenate | Interleave | Split) and operation.dim > 0


def _number(pattern: str, key: str) -> int | None:
    """The number of a key's expert, which stands where the pattern has its star."""
    found = _find_star(pattern, key)
    return None if found is None else int(found[1])


def _renumber(pattern: str, key: str, number: int) -> str:
    found = _find_star(pattern, key)
    assert found is not None
    return f"{key[: found.start(1)]}{number}{key[found.end(1) :]}"


def _find_star(pattern: str, key: str) -> re.Match[str] | None:
    """The star may stand for a number alone or for a number in a longer part, as in `experts.3.w1.weight`."""
    before, star, after = pattern.partition("*")
    return re.search(rf"{before}\.?(\d+){after}", key) if star else None


def _say(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
