"""Measure the memory of reading weights: rank 0 of 4 reads its part of a folder, in each layout of files.

  python scripts/load_memory.py              the table of docs/bring-a-hugging-face-model.md; needs 1 GiB in /tmp
  python scripts/load_memory.py fp8          the rows of these layouts alone

The folders are random: four layers of 32 experts, of width 1,024. A process of its own reads, one tensor after the
other, the rows that the engine has rank 0 of an expert group of 4 read: its experts, and its quarter of every other
tensor. *Peak beyond the start* is its largest resident memory, less what it had when headers were read; the pages of
*mapped files* count in it, which the kernel takes back where memory is short. What was read is dropped, since the
engine copies it into the model.
"""

import argparse
import json
import math
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)
from moetrain.hf.build import build_transformer, unwrap  # noqa: E402
from moetrain.hf.initial import map_folder  # noqa: E402
from moetrain.hf.matching import list_default  # noqa: E402

RANKS, EXPERTS, WIDTH, MIB = 4, 32, 1024, 1 << 20
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 16, "vocab_size": 32768}
SIZES |= {"moe_intermediate_size": WIDTH, "intermediate_size": WIDTH, "first_k_dense_replace": 0}
SIZES |= {"num_experts": EXPERTS, "n_routed_experts": EXPERTS, "num_local_experts": EXPERTS}
LAYOUTS = {
    "bf16": ("qwen3_moe", "bf16, a key for each expert", None),
    "mxfp4": ("gpt_oss", "MXFP4", {"quant_method": "mxfp4"}),
    "fp8": ("deepseek_v3", "FP8 in blocks", {"quant_method": "fp8", "weight_block_size": [128, 128]}),
}


def write_folder(layout: str, folder: Path) -> None:
    """Write a random folder, in a file for each layer."""
    family, _, quantised = LAYOUTS[layout]
    known = transformers.AutoConfig.for_model(family)
    config = type(known)(**{key: value for key, value in SIZES.items() if hasattr(known, key)})
    config.save_pretrained(folder)
    model = unwrap(build_transformer(folder, device="meta"))
    about = json.loads((folder / "config.json").read_text())
    about |= {"quantization_config": quantised} if quantised else {}
    (folder / "config.json").write_text(json.dumps(about))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, lazy in list_default(model).items():
        found = re.search(r"layers\.(\d+)", key)
        files.setdefault(f"model-{found[1] if found else 'rest'}.safetensors", {})[key] = lazy.shape
    places = {}
    for file, shapes in files.items():
        tensors = {name: value for key, shape in shapes.items() for name, value in make_tensors(layout, key, shape)}
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def make_tensors(layout: str, key: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield what the files hold of a tensor: random values, and where they are quantised the scales."""
    if layout == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")):
        experts, width_in, width_out = shape
        groups = experts, width_out, width_in // 32
        yield f"{key}_blocks", torch.randint(256, (*groups, 16), dtype=torch.uint8)
        yield f"{key}_scales", torch.randint(120, 128, groups, dtype=torch.uint8)
    elif layout == "fp8" and "_proj" in key and "layers" in key and len(shape) == 2:
        yield key, torch.randn(shape).to(torch.float8_e4m3fn)
        yield f"{key}_scale_inv", torch.rand([math.ceil(size / 128) for size in shape])
    else:
        yield key, torch.randn(shape).to(torch.bfloat16)


def read_status(field: str) -> int:
    """Return the bytes of this process's memory: VmRSS, of it RssFile of mapped files, or VmHWM, the peak of VmRSS."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def read_part(folder: Path) -> tuple[int, int, int, int]:
    """Read as rank 0 does, and return bytes: read, of the largest tensor, of the peak beyond the start, and of mapped
    files at the end beyond those at the start.
    """
    torch.set_num_threads(1)
    sources = map_folder(folder, trust_remote_code=False).sources
    start, mapped, sizes = read_status("VmRSS"), read_status("RssFile"), []
    for source in sources.values():
        rows = -(-source.shape[0] // RANKS)
        value = source.read(list(range(rows)) if ".experts." in source.name else slice(0, rows))
        sizes.append(value.nbytes)
        del value
    return sum(sizes), max(sizes), read_status("VmHWM") - start, read_status("RssFile") - mapped


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)}; default: all")
    torch.manual_seed(0)
    print(
        "| files | folder | read | largest tensor | peak beyond the start | mapped files |\n|---|---|---|---|---|---|"
    )
    for layout in parser.parse_args().layouts or LAYOUTS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_folder(layout, folder)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                numbers = size, *pool.apply(read_part, (folder,))
        cells = [f"{number / MIB:,.0f} MiB" for number in numbers]
        print(f"| {LAYOUTS[layout][1]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
