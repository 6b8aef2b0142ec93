"""The adapters of a LoRA run: as a folder of peft, or added to the weights that they adapt.

peft has one matrix for all experts of a layer: A [E·r, I], an expert's rows side by side, and B [O, r·E], where an
expert's columns are E apart (`peft.tuners.lora.layer.ParamWrapper`).

E experts, r the rank; a weight maps a width I to a width O.
"""

import json
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moetrain import checkpoint
from moetrain.checkpoint.exporting import Exported
from moetrain.checkpoint.reading import SavedModel
from moetrain.config import Config, ConfigError, HuggingFace
from moetrain.hf.folder import Rows
from moetrain.models.adapters import SHARED
from moetrain.training.step import build

ADAPTER_CONFIG, ADAPTER_STEM = "adapter_config.json", "adapter_model"
IN_PEFT = "base_model.model."


class _Matrix(NamedTuple):
    """A matrix of a layer's experts, with adapters."""

    owner: str  # of our entries: the module of the experts
    name: str
    num_experts: int
    transposed: bool
    is_inner: bool  # whether peft wraps another matrix around it


class SavedAdapters:
    """The adapters in a checkpoint, by the names that weights have in transformers."""

    def __init__(self, config: Config, saved: SavedModel) -> None:
        """`config`: of the run; its model is built on the meta device. Raises `ConfigError`."""
        model = build(config)
        assert model.adapted is not None
        self._saved, self._options, adapted = saved, config.lora, model.adapted
        self._scaling = config.lora.alpha / config.lora.rank
        ours = {model.name_in_transformers(name): name for name, _ in model.named_modules()}
        self._linears = {name: ours[name] for name in adapted.linears}
        self._by_owner = {owner: name for name, owner in self._linears.items()}
        self._matrices: dict[str, _Matrix] = {}
        for owner, (module, experts) in model.find_experts().items():
            own = (name for name, _ in module.named_parameters(recurse=False))  # in the order in which peft wraps them
            there = [name for name in own if model.name_in_transformers(f"{owner}.{name}") in adapted.matrices]
            for name in there:
                size, transposed = len(experts.own_experts()), experts.is_transposed
                matrix = _Matrix(owner, name, size, transposed, name != there[-1])
                self._matrices[model.name_in_transformers(f"{owner}.{name}")] = matrix

    def list_tensors(self, dtype: torch.dtype) -> list[Exported]:
        """Return the tensors of the folder that peft reads."""
        out = []
        for name in self._linears:
            pair = self._read_linear(name)
            for letter, value in zip("AB", pair, strict=True):
                key = f"{IN_PEFT}{name}.lora_{letter}.weight"
                out.append(Exported(key, dtype, tuple(value.shape), partial(iter, [value])))
        for name, matrix in self._matrices.items():
            pairs = [self._read_pair(matrix, expert) for expert in range(matrix.num_experts)]
            a, b = torch.cat([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs], 2).flatten(1)
            place = IN_PEFT + name.rpartition(".")[0] + ".base_layer" * matrix.is_inner
            for letter, value in (("A", a), ("B", b)):
                key = f"{place}.lora_{letter}.weight"
                out.append(Exported(key, dtype, tuple(value.shape), partial(iter, [value])))
        return out

    def describe(self, base: str | None) -> dict[str, Any]:
        """Return what `adapter_config.json` says; `base`: the folder of the model that they adapt."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self._options.rank,
            "lora_alpha": self._options.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(self._linears),
            "target_parameters": sorted(self._matrices),
        }

    def add_to(self, name: str, rows: Rows, value: Tensor) -> Tensor:
        """Return rows of a tensor of transformers, in fp32, with what its adapters add; `value`: these rows."""
        value = value.float()
        if name in self._matrices:
            matrix = self._matrices[name]
            numbers = range(matrix.num_experts)
            chosen = numbers if rows is None else numbers[rows] if isinstance(rows, slice) else rows
            return value + torch.stack([self._make_delta(matrix, expert) for expert in chosen])
        owner, _, last = name.rpartition(".")
        if last == "weight" and owner in self._linears:
            a, b = self._read_linear(owner)
            return value + self._scaling * (b if rows is None else b[rows]) @ a
        return value

    def add_to_entry(self, entry: str, begin: int, value: Tensor) -> Tensor:
        """Return rows of an entry of our checkpoints, in fp32, with what its adapters add; `begin`: the first row."""
        owner, _, last = entry.rpartition(".")
        layer, _, expert = owner.rpartition(".")
        rows, value = slice(begin, begin + len(value)), value.float()
        if last == "weight" and owner in self._by_owner:
            return self.add_to(f"{self._by_owner[owner]}.weight", rows, value)
        for matrix in self._matrices.values():
            if (matrix.owner, matrix.name) == (layer, last):
                return value + self._make_delta(matrix, int(expert))[rows]
        return value

    def _make_delta(self, matrix: _Matrix, expert: int) -> Tensor:
        a, b = self._read_pair(matrix, expert)
        return self._scaling * (a.T @ b.T if matrix.transposed else b @ a)

    def _read_linear(self, name: str) -> tuple[Tensor, Tensor]:
        entry = self._linears[name]
        return self._saved.read(f"{entry}.lora_A").float(), self._saved.read(f"{entry}.lora_B").float()

    def _read_pair(self, matrix: _Matrix, expert: int) -> tuple[Tensor, Tensor]:
        shared = f"{matrix.owner}_{SHARED}.{matrix.name}"
        entry = shared if self._options.shared else f"{matrix.owner}.{expert}.{matrix.name}"
        return self._saved.read(f"{entry}_lora_A").float(), self._saved.read(f"{entry}_lora_B").float()


class MergedPreset(SavedModel):
    """The checkpoint that a preset's run began with, with the adapters of the run added."""

    def __init__(self, config: Config, saved: SavedModel) -> None:
        """Raises `ConfigError` where the run began with weights that were drawn, or its base is gone."""
        base = find_base(config)
        if base is None:
            raise ConfigError(
                "--merge: the adapters are beside weights that were drawn at random, not beside a model's"
            )
        super().__init__(base.path)
        self._adapters = SavedAdapters(config, saved)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> Tensor:
        """Return the rows `begin : end` of an entry, or all, in fp32."""
        return self._adapters.add_to_entry(name, begin, super().read(name, begin, end))


def find_base(config: Config) -> SavedModel | None:
    """Return the checkpoint that a run began with; None: it has none, but a folder's weights or drawn ones.

    Raises `ConfigError` where it is gone or damaged.
    """
    path = checkpoint.find_initial(config)
    if path is None:
        return None
    base = SavedModel(path)
    base.check_bytes(lambda done: None)
    return base


def list_folder(
    config: Config, saved: SavedModel, dtype: torch.dtype
) -> tuple[list[Exported], dict[str, bytes], list[str]]:
    """Return the tensors of a folder that peft loads, its other files, and what is to be said."""
    adapters = SavedAdapters(config, saved)
    base = config.model.path if isinstance(config.model, HuggingFace) and config.init_from is None else None
    notes = [f"adapters are written in {str(dtype).removeprefix('torch.')}, for peft.PeftModel.from_pretrained"]
    if config.lora.shared:
        notes.append("peft has no adapters that experts share: each expert gets a copy")
    text = f"{json.dumps(adapters.describe(base), indent=2)}\n".encode()
    return adapters.list_tensors(dtype), {ADAPTER_CONFIG: text}, notes
