"""Folders of tiny models: as transformers saves them, and quantised or transposed as their makers publish them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moetrain.hf.quantized import FP4
from tests.hf import families


def make(name: str, path: Path, shard: str = "100KB", **more: Any) -> Any:
    """Save the tiny model of a family, all of whose numbers differ, and return it."""
    torch.manual_seed(0)
    return _save(families.make_class(name)(families.config_of(name, **more)), path, shard)


def make_qwen3_vl_moe(path: Path, hidden: int) -> Any:
    """Save a whole tiny Qwen3-VL-MoE, its vision tower included, with experts of width `hidden`, and return it."""
    import transformers

    text = families.config_of("qwen3_vl_moe", moe_intermediate_size=hidden).to_dict()
    text["rope_parameters"] = {**families.ROPE, "mrope_section": [3, 3, 2]}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    )
    torch.manual_seed(0)
    return _save(transformers.Qwen3VLMoeForConditionalGeneration(config), path, "100KB")


def make_qwen3_5_moe(path: Path, **more: Any) -> Any:
    """Save a whole tiny Qwen3.5-MoE, its vision tower included, and return it. `more`: fields of its text model."""
    import transformers

    text = families.config_of("qwen3_5_moe", **more).to_dict()
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 64}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config={**vision, "num_position_embeddings": 16})
    torch.manual_seed(0)
    return _save(transformers.Qwen3_5MoeForConditionalGeneration(config), path, "100KB")


def make_llama4(path: Path) -> Any:
    """Save a whole tiny Llama 4, its vision tower included, and return it."""
    import transformers

    text = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 32, "intermediate_size_mlp": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"num_local_experts": 8, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "pad_token_id": 0}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    vision |= {"image_size": 28, "patch_size": 14, "vision_output_dim": 64}
    vision |= {"projector_input_dim": 64, "projector_output_dim": 64}
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return _save(transformers.Llama4ForConditionalGeneration(config), path, "100KB")


def _save(model: Any, path: Path, shard: str) -> Any:
    for value in [*model.parameters(), *model.buffers()]:
        if value.is_floating_point():
            value.data.normal_()
    model.save_pretrained(path, max_shard_size=shard)
    return model


def edit_config(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def load(path: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}


def replace(path: Path, tensors: dict[str, Tensor]) -> None:
    """Have the folder hold these tensors alone, in one file."""
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file({key: value.contiguous() for key, value in tensors.items()}, path / "model.safetensors")


def quantise_mxfp4(path: Path) -> None:
    """Write the experts of a gpt-oss folder as OpenAI does, in blocks of 32 and exponents."""
    tensors = load(path)
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        groups = tensors.pop(key).transpose(1, 2).unflatten(-1, (-1, 32))
        exponents = groups.abs().amax(-1).log2().floor() - 2  # 4 is the largest power of two among the values
        scaled = groups / exponents.exp2()[..., None]
        codes = (scaled.abs()[..., None] - torch.tensor(FP4)).abs().argmin(-1) + 8 * (scaled < 0)
        tensors[f"{key}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        tensors[f"{key}_scales"] = (exponents + 127).to(torch.uint8)
    replace(path, tensors)
    edit_config(path, quantization_config={"quant_method": "mxfp4"})


def quantise_fp8(path: Path, block: tuple[int, int]) -> None:
    """Write the matrices of the layers as DeepSeek does, in e4m3 with an fp32 scale for each block."""
    tensors = load(path)
    for key in [key for key in tensors if "layers" in key and "_proj" in key and tensors[key].dim() == 2]:
        value = tensors[key]
        padded = torch.zeros([-(-size // part) * part for size, part in zip(value.shape, block, strict=True)])
        padded[: len(value), : value.shape[1]] = value
        blocks = padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
        scales = blocks.abs().amax((1, 3)) / 448  # the largest value of e4m3
        whole = (blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        tensors[key] = whole[: len(value), : value.shape[1]].to(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = scales
    replace(path, tensors)
    edit_config(path, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
