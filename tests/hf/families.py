"""A tiny model of every family of transformers whose experts carry `@use_experts_implementation`.

`FAMILIES` names the class that is built and what its config needs beyond `COMMON`: each is a causal language model,
or the text model of one that sees or hears, under a head of its own (`TextModelWithHead`). All have two to four
layers, 8 experts, and a width of 64.
"""

import importlib
from dataclasses import dataclass, field, fields, is_dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "shared_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 16,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.0,
    "use_cache": False,
}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has a key for every head
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
SMALL_GEMMA = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16}
SMALL_INKLING = {
    "unpadded_vocab_size": 128,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "rel_extent": 64,
}


@dataclass(frozen=True)
class Family:
    """Where the model of a family is, and what its config needs."""

    name: str  # of the folder under transformers/models
    model: str  # the class
    overrides: dict[str, Any] = field(default_factory=dict)


def _families(**rows: tuple[str, dict[str, Any]]) -> dict[str, Family]:
    return {name: Family(name, model, overrides) for name, (model, overrides) in rows.items()}


FAMILIES = _families(
    afmoe=("AfmoeForCausalLM", {}),
    aria=("AriaTextForCausalLM", {}),
    axk1=("AXK1ForCausalLM", LATENT),
    axk2=("AXK2ForCausalLM", LATENT),
    bailing_hybrid=("BailingHybridForCausalLM", {**LATENT, **HYBRID}),
    beam=("BeamForCausalLM", {}),
    cohere2_moe=("Cohere2MoeForCausalLM", {}),
    deepseek_ocr2=("DeepseekOcr2TextModel", {}),
    deepseek_v2=("DeepseekV2ForCausalLM", LATENT),
    deepseek_v3=("DeepseekV3ForCausalLM", LATENT),
    deepseek_v32=("DeepseekV32ForCausalLM", LATENT),
    deepseek_v4=("DeepseekV4ForCausalLM", {"mlp_layer_types": ["hash_moe", "moe"]}),
    diffusion_gemma=("DiffusionGemmaEncoderTextModel", SMALL_GEMMA),
    dots1=("Dots1ForCausalLM", {}),
    dots3_note=("Dots3NoteForCausalLM", LATENT),
    ernie4_5_moe=("Ernie4_5_MoeForCausalLM", {}),
    ernie4_5_vl_moe=(
        "Ernie4_5_VLMoeTextModel",
        {"moe_intermediate_size": [32, 32], "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    ),
    exaone_moe=("ExaoneMoeForCausalLM", {}),
    flex_olmo=("FlexOlmoForCausalLM", {}),
    flint=("FlintForCausalLM", {"mlp_only_layers": []}),
    gemma4=("Gemma4ForCausalLM", {"enable_moe_block": True, **SMALL_GEMMA}),
    glm4_moe=("Glm4MoeForCausalLM", {}),
    glm4_moe_lite=("Glm4MoeLiteForCausalLM", LATENT),
    glm4v_moe=(
        "Glm4vMoeTextModel",
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}},
    ),
    glm5_next=("Glm5NextTextModel", {**LATENT, "qk_rope_head_dim": 0, "linear_head_dim": 16, "linear_num_heads": 4}),
    glm_moe_dsa=("GlmMoeDsaForCausalLM", LATENT),
    gpt_oss=("GptOssForCausalLM", {}),
    granitemoe=("GraniteMoeForCausalLM", {}),
    granitemoe_swa=("GraniteMoeSWAForCausalLM", {}),
    granitemoehybrid=("GraniteMoeHybridForCausalLM", HYBRID),
    granitemoeshared=("GraniteMoeSharedForCausalLM", {}),
    hunyuan_v1_moe=("HunYuanMoEV1ForCausalLM", {}),
    hy_v3=("HYV3ForCausalLM", {}),
    hy_v4=("HYV4ForCausalLM", {}),
    hy_v4_vl=("HYV4VLTextModel", {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}),
    inkling=("InklingForCausalLM", SMALL_INKLING),
    inkling2=("Inkling2ForCausalLM", SMALL_INKLING),
    inkling2_loop=("Inkling2LoopForCausalLM", SMALL_INKLING),
    jamba=("JambaForCausalLM", {}),
    kimi_linear=("KimiLinearForCausalLM", {**LATENT, **HYBRID, "linear_head_dim": 16, "linear_num_heads": 4}),
    kolibri1=("Kolibri1ForCausalLM", {}),
    laguna=("LagunaForCausalLM", {}),
    lara_mini=("LaraMiniForCausalLM", {}),
    lfm2_moe=("Lfm2MoeForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    mellum=("MellumForCausalLM", {}),
    mimo_v2_flash=("MiMoV2FlashForCausalLM", {}),
    minimax=("MiniMaxForCausalLM", {}),
    minimax_m2=("MiniMaxM2ForCausalLM", {}),
    minimax_m3_vl=("MiniMaxM3VLForCausalLM", {}),
    mistral4=("Mistral4ForCausalLM", LATENT),
    mistral_large4=("MistralLarge4TextModel", LATENT),
    mixtral=("MixtralForCausalLM", {}),
    muse_spark=("MuseSparkTextModel", {"moe_hidden_size": 64}),
    nemotron_h=(
        "NemotronHForCausalLM",
        {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8},
    ),
    olmoe=("OlmoeForCausalLM", {}),
    openai_privacy_filter=("OpenAIPrivacyFilterModel", {}),
    phimoe=("PhimoeForCausalLM", {}),
    qwen2_moe=("Qwen2MoeForCausalLM", {}),
    qwen3_5_moe=("Qwen3_5MoeForCausalLM", HYBRID),
    qwen3_moe=("Qwen3MoeForCausalLM", {}),
    qwen3_next=("Qwen3NextForCausalLM", HYBRID),
    qwen3_omni_moe=("Qwen3OmniMoeThinkerTextModel", {}),
    qwen3_vl_moe=("Qwen3VLMoeTextModel", {}),
    qwen4_exp=("Qwen4ExpForCausalLM", {**HYBRID, **INDEXER}),
    solar_open=("SolarOpenForCausalLM", {}),
    unlimited_ocr=("UnlimitedOcrTextModel", {}),
    zaya=("ZayaForCausalLM", {"num_experts_per_tok": 1}),
)


class TextModelWithHead(nn.Module):
    """The text model of a model that also sees: hidden states become logits, as in a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.lm_head = nn.Linear(64, 128, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        found = self.model(input_ids=input_ids, **options)
        found["logits"] = self.lm_head(found[0])
        return found


def config_of(name: str, **more: Any) -> Any:
    """The tiny config of a family. `more`: fields that differ from those of the table."""
    cls = make_class(name).config_class
    known = set(signature(cls.__init__).parameters) | set(cls.attribute_map)
    known |= {each.name for each in fields(cls)} if is_dataclass(cls) else set()
    values = {key: value for key, value in COMMON.items() if key in known}
    return cls(**{**values, **FAMILIES[name].overrides, **more})


def build(name: str, seed: int = 0, **more: Any) -> nn.Module:
    """The tiny model of a family, random, in fp32; a router's bias for the choice is not left at zero."""
    torch.manual_seed(seed)
    model = make_class(name)(config_of(name, **more))
    if not name_is_causal(name):
        model = TextModelWithHead(model)
    for key, value in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            value.data.normal_(std=0.02)
        if key.endswith("tid2eid"):  # the experts of each token, where they are looked up
            value.copy_(torch.stack([torch.randperm(8)[: value.shape[1]] for _ in value]))
    model.train()
    for module in model.modules():
        if type(module).__name__ == "PhimoeTopKRouter":  # which draws random numbers in training
            module.eval()
    return model


def name_is_causal(name: str) -> bool:
    return FAMILIES[name].model.endswith("ForCausalLM")


def make_class(name: str) -> Any:
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    return getattr(module, FAMILIES[name].model)
