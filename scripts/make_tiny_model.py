"""Make a tiny Hugging Face folder with random weights: a model of a family, and a tokenizer of the text in docs/.

  python scripts/make_tiny_model.py qwen3_moe tiny-qwen3_moe

Nothing is downloaded. The folder has config.json, generation_config.json, model.safetensors and the tokenizer's files,
as `save_pretrained` writes them.
"""

import argparse
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import ByteLevelBPETokenizer, Tokenizer

ROOT = Path(__file__).parents[1]
VOCAB, END_OF_TEXT = 512, "<|endoftext|>"
COMMON = {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts_per_tok": 2, "eos_token_id": 0}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "v_head_dim": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}  # multi-head latent attention
FAMILIES = {
    "qwen3_moe": {"head_dim": 16, "num_experts": 8, "moe_intermediate_size": 32},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 8,
        "intermediate_size": 32,
        "max_position_embeddings": 131072,  # 32 times the length before YaRN
    },
    "deepseek_v3": {
        **LATENT,
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "intermediate_size": 128,  # of the first layer, which is dense
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
    },
}


def save_tiny_model(family: str, folder: Path) -> int:
    """Save the model and its tokenizer in `folder`, and return how many parameters it has."""
    tokens = ByteLevelBPETokenizer()
    texts = [str(path) for path in sorted((ROOT / "docs").glob("*.md"))]
    tokens.train(texts, vocab_size=VOCAB, special_tokens=[END_OF_TEXT], show_progress=False)
    end = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokens.to_str()), **end)

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return int(model.num_parameters())


def main() -> None:
    """Refuse a folder that is there; say what was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f"{options.folder}: is there already")
    count = save_tiny_model(options.family, options.folder)
    print(f"{options.folder}: {options.family}, {count:,} parameters, {VOCAB} tokens")


if __name__ == "__main__":
    main()
