"""What a run's checkpoint becomes as a folder of Hugging Face: its tensors, its other files, and what is to be said."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moetrain.checkpoint import exporting, manifest
from moetrain.checkpoint.exporting import Exported
from moetrain.checkpoint.reading import SavedModel
from moetrain.config import Config, ConfigError, HuggingFace
from moetrain.data import prepare
from moetrain.data.loader import Corpus
from moetrain.hf import presets
from moetrain.training import export_lora

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Export(NamedTuple):
    """A folder to be written."""

    tensors: list[Exported]
    texts: dict[str, bytes]  # its other files
    notes: list[str]
    stem: str = exporting.STEM  # of the names of its safetensors


def prepare_export(config: Config, saved: SavedModel, dtype: str | None, merge: bool = False) -> Export:
    """Return what the folder of a run's model holds; no weight is read.

    `dtype`: fp32 or bf16; None: fp32, in which the run keeps its weights, and for `model=hf` that of each tensor in the
    folder which it came from. Of a LoRA run these are its adapters for peft, or with `merge` the model that has them in
    it. Raises `ConfigError` that names the first option of the model which no architecture of transformers has.
    """
    if merge and not config.lora.rank:
        raise ConfigError("--merge: the run has no adapters (lora.rank=0); an export without it has the whole model")
    if config.lora.rank and not merge:
        return Export(*export_lora.list_folder(config, saved, DTYPES[dtype or "fp32"]), stem=export_lora.ADAPTER_STEM)
    if isinstance(config.model, HuggingFace):
        from moetrain.training import export_hf  # transformers takes seconds to load

        return Export(*export_hf.list_tensors(config, saved, DTYPES[dtype] if dtype else None))
    if merge:
        saved = export_lora.MergedPreset(config, saved)
    wanted = DTYPES[dtype or "fp32"]
    about = presets.describe_preset(config, saved.find("embed.weight").shape[0])
    corpus = _find_corpus(config, saved)
    notes = [f"weights are written in {str(wanted).removeprefix('torch.')}"]
    texts, tokens = {}, {}
    if corpus is None:
        notes.append(f"no tokenizer is written: {config.data.dir} has not the corpus that the run was trained on")
    else:
        tokens = {"eos_token_id": corpus.end_of_text}
        texts = _describe_tokenizer(corpus, config.train.seq_len)
    about |= {"dtype": str(wanted).removeprefix("torch."), **tokens}
    texts |= {"config.json": _write_json(about), "generation_config.json": _write_json({"do_sample": True, **tokens})}
    return Export(exporting.list_preset(config, saved, wanted), texts, notes)


def _find_corpus(config: Config, saved: SavedModel) -> Corpus | None:
    """The corpus whose tokenizer the checkpoint was trained with."""
    digest = manifest.read(saved.path).get("data", {}).get("tokenizer")
    for folder in prepare.prepared(config.data):
        if prepare.fingerprint(folder)["tokenizer"] == digest:
            return Corpus(folder)
    return None


def _describe_tokenizer(corpus: Corpus, length: int) -> dict[str, bytes]:
    """The files of the tokenizer, as transformers reads them."""
    end = corpus.tokenizer.id_to_token(corpus.end_of_text)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": Path(corpus.folder, "tokenizer.json").read_bytes(),
        "tokenizer_config.json": _write_json(about),
    }


def _write_json(content: dict[str, Any]) -> bytes:
    return f"{json.dumps(content, indent=2)}\n".encode()
