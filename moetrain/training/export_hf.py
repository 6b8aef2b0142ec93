"""A run of `model=hf` as the folder that its weights came from: the same keys, shapes, dtypes and other files."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain import runs
from moetrain.checkpoint.exporting import Exported
from moetrain.checkpoint.reading import SavedModel
from moetrain.config import Config, ConfigError, HuggingFace
from moetrain.config.architecture import CONFIG
from moetrain.config.hugging_face import KEPT
from moetrain.hf.build import WithHead, build_transformer, unwrap
from moetrain.hf.conversion import PIECE_BYTES, Mapped, Read
from moetrain.hf.folder import INDEX, TABLE, Folder, Lazy, Rows, has_weights, open_folder, open_kept
from moetrain.hf.matching import list_default, map_tensors
from moetrain.hf.model import PREFIX
from moetrain.hf.quantized import FP8, MXFP4, dequantise
from moetrain.training import export_lora

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # weights of any kind
MOST_BYTES = 1 << 28  # of a file that is copied


def list_tensors(
    config: Config, saved: SavedModel, dtype: torch.dtype | None
) -> tuple[list[Exported], dict[str, bytes], list[str]]:
    """Return the tensors of the folder, its other files, and what is to be said.

    `dtype`: of parameters; None: each as the folder had it, bfloat16 where that was quantised. Raises `ConfigError`
    where the folder has tensors that the run does not train, and is gone.
    """
    model = config.model
    assert isinstance(model, HuggingFace)
    kept, source = runs.folder_of(config) / KEPT, Path(model.path)
    origin = open_folder(source) if has_weights(source) and (source / CONFIG).is_file() else None
    table = open_kept(kept) or origin
    if config.lora.rank and config.init_from is None:  # its values are needed, too
        if origin is None:
            raise ConfigError(f"model.path={source}: is gone, and with it the weights that the adapters are beside")
        table = origin
    inner = build_transformer(runs.model_folder(config), model.trust_remote_code, device="meta")
    whole = unwrap(inner)
    tensors = list_default(whole) if table is None else dequantise(table)
    mapped = map_tensors(tensors, whole, model.path, compare_tied=False)
    prefix = f"{PREFIX}model." if isinstance(inner, WithHead) else PREFIX
    read: Read = partial(_read, saved, prefix)
    if config.lora.rank:
        read = _read_merged(config, saved, prefix, mapped)
    found = dict(mapped.revert(read))
    lasting = _find_lasting(whole, mapped)
    out = []
    for key, pieces in found.items():
        lazy = tensors[key]
        chosen = _plain(lazy) if dtype is None or key in lasting or not lazy.dtype.is_floating_point else dtype
        out.append(Exported(key, chosen, lazy.shape, partial(iter, pieces)))
    notes = []
    if mapped.carried:
        out += _carry(mapped, origin, source)
        notes.append(
            f"{len(mapped.carried)} tensors that are not trained are those of {source}: {mapped.carried[0]}, ..."
        )
    quantised = [key for key, lazy in tensors.items() if isinstance(lazy, FP8 | MXFP4)]
    if quantised:
        notes.append(f"{len(quantised)} tensors were quantised in {source}; they are written dequantised")
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in out})
    notes.insert(0, f"weights are written in {' and '.join(kinds)}")
    texts = _copy_texts(source if (source / CONFIG).is_file() else kept)
    texts[CONFIG] = _edit_config(texts[CONFIG], bool(quantised), dtype)
    return sorted(out, key=lambda each: _natural(each.key)), texts, notes


def _read(saved: SavedModel, prefix: str, name: str, rows: Rows) -> Tensor:
    """Rows of a tensor of the model, whose experts lie one by one in the checkpoint."""
    if prefix + name in saved.entries:
        return saved.read(prefix + name) if rows is None else saved.read(prefix + name, *_bounds(rows))
    owner, _, last = (prefix + name).rpartition(".")
    experts = range(*_bounds(rows)) if rows is not None else _count_experts(saved, owner, last)
    return torch.stack([saved.read(f"{owner}.{expert}.{last}") for expert in experts])


def _read_merged(config: Config, saved: SavedModel, prefix: str, mapped: Mapped) -> Read:
    """Return what reads rows of the model that the adapters of a LoRA run are beside, with the adapters added."""
    base, adapters = export_lora.find_base(config), export_lora.SavedAdapters(config, saved)

    def read(name: str, rows: Rows) -> Tensor:
        value = mapped.sources[name].read(rows) if base is None else _read(base, prefix, name, rows)
        return adapters.add_to(name, rows, value)

    return read


def _bounds(rows: Rows) -> tuple[int, int]:
    assert rows is not None
    assert not isinstance(rows, slice)
    return rows[0], rows[-1] + 1


def _count_experts(saved: SavedModel, owner: str, last: str) -> range:
    count = 0
    while f"{owner}.{count}.{last}" in saved.entries:
        count += 1
    saved.find(f"{owner}.{max(count - 1, 0)}.{last}")
    return range(count)


def _plain(lazy: Lazy) -> torch.dtype:
    """What a tensor is written in: as it was, or in bfloat16 where it was quantised."""
    return torch.bfloat16 if isinstance(lazy, FP8 | MXFP4) else lazy.dtype


def _find_lasting(whole: Any, mapped: Mapped) -> set[str]:
    """The keys of buffers and of what transformers keeps in fp32, whose dtype is left as it is."""
    strict = [re.compile(rf"(^|\.){re.escape(name)}($|\.)") for name in whole._keep_in_fp32_modules_strict or ()]
    names = {name for name, _ in whole.named_buffers()}
    names |= {name for name in mapped.sources if any(pattern.search(name) for pattern in strict)}
    groups = [group for group in mapped.groups if names & set(group.names.values())]
    return {key for group in groups for keys in group.keys.values() for key in keys}


def _carry(mapped: Mapped, origin: Folder | None, source: Path) -> Iterator[Exported]:
    if origin is None:
        rule = f"is gone, and with it {mapped.carried[0]} and what else of it is not trained but exported"
        raise ConfigError(f"model.path={source}: {rule} ({len(mapped.carried)} tensors)")
    tensors = dequantise(origin)
    for key in mapped.carried:
        if key not in tensors:
            raise ConfigError(f"model.path={source}: has no {key} any more, which is to be exported as it is")
        yield Exported(key, _plain(tensors[key]), tensors[key].shape, partial(_read_lazily, tensors[key]))


def _read_lazily(lazy: Lazy) -> Iterator[Tensor]:
    if not lazy.shape:
        yield lazy.read()
        return
    step = max(1, PIECE_BYTES // max(1, torch.Size(lazy.shape[1:]).numel() * lazy.dtype.itemsize))
    for begin in range(0, lazy.shape[0], step):
        yield lazy.read(slice(begin, begin + step))


def _copy_texts(folder: Path) -> dict[str, bytes]:
    """The files beside the weights."""
    out = {}
    for path in sorted(folder.iterdir()):
        small = path.is_file() and path.stat().st_size <= MOST_BYTES
        if (
            small
            and not path.name.startswith(".")
            and path.suffix not in NOT_COPIED
            and path.name not in (INDEX, TABLE)
        ):
            out[path.name] = path.read_bytes()
    return out


def _edit_config(text: bytes, was_quantised: bool, dtype: torch.dtype | None) -> bytes:
    """Its `config.json`, without what no longer holds; the very same bytes where all of it does."""
    if not was_quantised and dtype is None:
        return text
    about: dict[str, Any] = json.loads(text)
    about.pop("quantization_config", None)
    name = str(dtype or torch.bfloat16).removeprefix("torch.")
    about["dtype" if "torch_dtype" not in about else "torch_dtype"] = name
    return f"{json.dumps(about, indent=2)}\n".encode()


def _natural(key: str) -> list[tuple[int, str]]:
    """Numbers in a key by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
