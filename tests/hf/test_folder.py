"""Folders of Hugging Face: every tensor of the model from the keys of the files, any rows of it, and the way back."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moetrain.common.errors import ConfigError
from moetrain.hf.conversion import Mapped
from moetrain.hf.folder import find_runs
from moetrain.hf.matching import open_weights
from moetrain.hf.quantized import decode_mxfp4
from tests.grid import on_grid
from tests.hf import folders
from tests.hf.families import FAMILIES

# A key an expert, under other names, fused, with biases, tied, transposed, interleaved, and operations that mix rows.
SAMPLE = ("qwen3_moe", "minimax_m2", "gpt_oss", "deepseek_v3", "granitemoe", "aria", "inkling2", "bailing_hybrid")


def revert(weights: Mapped, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the files, made again from those of the model."""
    pieces = weights.revert(lambda name, rows: state[name] if rows is None else state[name][list(rows)])
    return {key: torch.cat(parts) if len(parts := list(found)) > 1 else parts[0] for key, found in pieces}


@pytest.mark.parametrize("name", [name if name in SAMPLE else on_grid(name) for name in FAMILIES])
def test_every_tensor_is_read_and_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("moetrain.hf.conversion.PIECE_BYTES", 20_000)  # two or three experts at a time
    model = folders.make(name, tmp_path)
    weights, state = open_weights(tmp_path), model.state_dict()
    assert weights.sources.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(weights.sources[key].read(), value), key
        if value.dim() and len(value) > 3:
            assert torch.equal(weights.sources[key].read([3, 1, 2]), value[[3, 1, 2]]), key
            assert torch.equal(weights.sources[key].read(slice(1, 3)), value[1:3]), key
            assert weights.sources[key].read([]).shape == (0, *value.shape[1:]), key
    files = folders.load(tmp_path)
    back = revert(weights, state)
    assert back.keys() == files.keys()
    for key, value in files.items():
        assert torch.equal(back[key], value), key


def test_runs_of_rows() -> None:
    assert list(find_runs(None, 5)) == [(0, 5)]
    assert list(find_runs(slice(2, 9), 5)) == [(2, 5)]
    assert list(find_runs([0, 1, 4, 3], 5)) == [(0, 2), (4, 5), (3, 4)]


def test_keys_left_out_on_purpose_are_told(tmp_path: Path) -> None:
    """The layers of multi-token prediction, and what old files have of positions."""
    folders.make("deepseek_v3", tmp_path)
    folders.edit_config(tmp_path, num_nextn_predict_layers=1)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(3), "model.layers.61.hnorm.weight": torch.ones(3)}
    folders.replace(tmp_path, folders.load(tmp_path) | extra)
    assert set(open_weights(tmp_path).carried) == set(extra)


def test_tied_tensors_have_one_source(tmp_path: Path) -> None:
    model = folders.make("qwen3_moe", tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in folders.load(tmp_path)
    sources = open_weights(tmp_path).sources
    assert torch.equal(sources["lm_head.weight"].read([5]), model.lm_head.weight[5:6])
    files = folders.load(tmp_path)
    folders.replace(tmp_path, files | {"lm_head.weight": files["model.embed_tokens.weight"] + 1})
    with pytest.raises(ConfigError, match=r"lm_head\.weight and model\.embed_tokens\.weight are tied"):
        open_weights(tmp_path)


def transpose(path: Path) -> None:
    """As Qwen publishes Qwen3-VL-MoE: fused experts [E, in, out]."""
    files = folders.load(path)
    folders.replace(path, {k: v.transpose(1, 2) if ".experts." in k else v for k, v in files.items()})


def test_transposed_files(tmp_path: Path) -> None:
    model = folders.make_qwen3_vl_moe(tmp_path, hidden=48)
    transpose(tmp_path)
    weights, state = open_weights(tmp_path), model.state_dict()
    assert all(torch.equal(weights.sources[k].read([4, 6]), v[[4, 6]]) for k, v in state.items() if ".experts." in k)
    back, files = revert(weights, state), folders.load(tmp_path)
    assert all(torch.equal(back[key], value) for key, value in files.items())


def test_mxfp4(tmp_path: Path) -> None:
    folders.make("gpt_oss", tmp_path, intermediate_size=32)
    folders.quantise_mxfp4(tmp_path)
    weights, files = open_weights(tmp_path), folders.load(tmp_path)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    theirs = convert_moe_packed_tensors(files[f"{name}_blocks"], files[f"{name}_scales"], dtype=torch.float32)
    assert torch.equal(weights.sources[name].read(), theirs)
    assert torch.equal(weights.sources[name].read([5, 2]), theirs[[5, 2]])
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scales = torch.randint(60, 190, (1, 1, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(decode_mxfp4(every, scales), convert_moe_packed_tensors(every, scales, dtype=torch.float32))


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (24, 40)])
def test_fp8(tmp_path: Path, block: tuple[int, int]) -> None:
    """Also where blocks do not divide the matrix, of which transformers' own rule makes other blocks or an error."""
    folders.make("deepseek_v3", tmp_path)
    folders.quantise_fp8(tmp_path, block)
    weights, files = open_weights(tmp_path), folders.load(tmp_path)
    for name in ("kv_a_proj_with_mqa", "q_b_proj", "o_proj"):
        key = f"model.layers.1.self_attn.{name}.weight"
        values, scales = files[key], files[f"{key}_scale_inv"]
        wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        expected = values.float() * wide[: len(values), : values.shape[1]]
        assert torch.equal(weights.sources[key].read(), expected)
        assert torch.equal(weights.sources[key].read([7, 23]), expected[[7, 23]])
        if all(size % part == 0 for size, part in zip(values.shape, block, strict=True)):
            theirs = Fp8Dequantize(None)._dequantize_one(values, scales, torch.float32)
            assert torch.equal(expected, theirs)
    experts = weights.sources["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.dtype == torch.float32
    assert experts.read([6]).shape == (1, 64, 64)


def cut(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-9])


def swap(path: Path) -> None:
    first, second, *_ = sorted(path.glob("*.safetensors"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def remove(path: Path) -> None:
    sorted(path.glob("*.safetensors"))[2].unlink()


def giant_header(path: Path) -> None:
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def edit_index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "model.safetensors.index.json"
        found = json.loads(file.read_text())
        change(found["weight_map"])
        file.write_text(json.dumps(found))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = folders.load(path)
        change(tensors)
        folders.replace(path, tensors)

    return edit


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.norm.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "config cut": (lambda path: (path / "config.json").write_text('{"a'), "config.json cannot be read"),
    "config a list": (lambda path: (path / "config.json").write_text("[]"), "config.json must hold an object"),
    "unknown family": (lambda path: folders.edit_config(path, model_type="none_such"), "none_such"),
    "own code": (lambda path: folders.edit_config(path, auto_map={"AutoModel": "m.M"}), "auto_map"),
    "another quantisation": (
        lambda path: folders.edit_config(path, quantization_config={"quant_method": "awq"}),
        "awq",
    ),
    "no weights": (lambda path: folders.replace(path, {}) or (path / "model.safetensors").unlink(), "has neither"),
    "shard missing": (remove, "model-00003-of-00008.safetensors is missing"),
    "shard cut": (cut, "model-00002-of-00008.safetensors is damaged or cut"),
    "shards swapped": (swap, "which lies in model-0000"),
    "header too long": (giant_header, "model-00001-of-00008.safetensors is damaged or cut"),
    "index cut": (lambda path: (path / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
    "index of elsewhere": (edit_index(lambda m: m.update({NORM: "../x.safetensors"})), r"not \.\./x"),
    "index of a lost key": (edit_index(lambda m: m.update(nobody=m[NORM])), "nobody is in model-.*, which has it not"),
    "index without a key": (edit_index(lambda m: m.pop(NORM)), f"{NORM}, which model.safetensors.index.json does not"),
    "key missing": (edit_tensors(lambda t: t.pop(NORM)), f"no key of the files gives {NORM}"),
    "expert missing": (edit_tensors(lambda t: t.pop(EXPERT)), f"has no {EXPERT}"),
    "expert too many": (
        edit_tensors(lambda t: t.update({EXPERT.replace("3", "8"): t[EXPERT].clone()})),
        "which has 8 experts",
    ),
    "key unused": (
        edit_tensors(lambda t: t.update(nobody=torch.ones(2))),
        "nobody has no place in Qwen3MoeForCausalLM",
    ),
    "other shape": (edit_tensors(lambda t: t.update({NORM: torch.ones(2)})), rf"{NORM} has shape \[2\]"),
    "expert's shape": (edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].T})), f"{EXPERT} is .*, but .* is"),
    "integers": (edit_tensors(lambda t: t.update({NORM: t[NORM].int()})), f"{NORM} is int32"),
    "no scales": (
        edit_tensors(lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)})),
        "_scale_inv is missing",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named_in_one_line(tmp_path: Path, case: str) -> None:
    folders.make("qwen3_moe", tmp_path)
    damage, said = BAD[case]
    damage(tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        open_weights(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model.path={tmp_path}: ")


def test_square_matrices_that_may_lie_either_way_are_refused(tmp_path: Path) -> None:
    """Transposed or not is told by shape alone (transformers#47031)."""
    folders.make_qwen3_vl_moe(tmp_path, hidden=64)
    with pytest.raises(ConfigError, match=r"down_proj has square matrices \[64, 64\]"):
        open_weights(tmp_path)
