"""How a mistake in the configuration is put into one line: the field, the value, the rule."""

import difflib
import re

from moetrain.common.errors import ConfigError
from moetrain.config.fields import all_fields

FEW = 16  # fields of a section that a line may list
ELSEWHERE = {  # what transformers, Megatron-LM, DeepSpeed and torchtitan call a field of ours
    "model.dim": "hidden_size d_model n_embd",
    "model.num_layers": "num_hidden_layers n_layers n_layer",
    "model.num_heads": "num_attention_heads n_heads n_head",
    "model.num_kv_heads": "num_key_value_heads num_query_groups n_kv_heads",
    "model.head_dim": "kv_channels",
    "model.num_experts": "num_local_experts n_routed_experts",
    "model.expert_hidden": "moe_intermediate_size moe_ffn_hidden_size intermediate_size",
    "model.dense_hidden": "ffn_hidden_size",
    "model.num_shared_experts": "n_shared_experts",
    "model.rope_theta": "rotary_base",
    "model.norm_eps": "rms_norm_eps norm_epsilon layernorm_epsilon",
    "model.init_std": "initializer_range init_method_std",
    "model.tied_embeddings": "tie_word_embeddings",
    "router.top_k": "num_experts_per_tok moe_router_topk topk",
    "router.normalise": "norm_topk_prob",
    "router.scaling": "routed_scaling_factor moe_router_topk_scaling_factor",
    "router.scores": "scoring_func score_function moe_router_score_function",
    "router.capacity_factor": "moe_expert_capacity_factor",
    "balance.coefficient": "router_aux_loss_coef moe_aux_loss_coeff aux_loss_coef aux_loss_coeff",
    "balance.z_coefficient": "moe_z_loss_coeff router_z_loss_coef z_loss_coeff",
    "train.steps": "max_steps train_iters num_steps train_steps",
    "train.micro_batch": "micro_batch_size per_device_train_batch_size train_micro_batch_size_per_gpu local_batch_size",
    "train.global_batch": "global_batch_size train_batch_size",
    "train.seq_len": "seq_length max_seq_len max_length max_position_embeddings block_size",
    "train.dtype": "bf16 fp16 torch_dtype precision mixed_precision_param",
    "train.recompute": "gradient_checkpointing activation_checkpointing recompute_granularity",
    "train.log_every": "logging_steps log_interval log_freq",
    "optim.lr": "learning_rate",
    "optim.min_lr": "min_learning_rate",
    "optim.warmup": "warmup_steps lr_warmup_iters",
    "optim.schedule": "lr_scheduler_type lr_decay_style",
    "optim.eps": "adam_epsilon adam_eps",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.clip": "max_grad_norm clip_grad gradient_clipping max_norm grad_clip",
    "parallel.ep": "expert_model_parallel_size expert_parallel_degree expert_parallel_size ep_size",
    "parallel.dp_shard": "data_parallel_shard_degree",
    "parallel.dp_replicate": "data_parallel_replicate_degree",
    "parallel.nproc": "nproc_per_node num_gpus num_processes world_size",
    "checkpoint.every": "save_steps save_interval",
    "checkpoint.keep": "save_total_limit",
    "checkpoint.resume": "resume_from_checkpoint load",
    "eval.every": "eval_steps eval_interval",
    "run.dir": "output_dir save_dir",
    "engine.zero_stage": "zero_stage stage",
    "data.path": "data_path dataset dataset_path train_files",
    "data.tokenizer": "tokenizer_path tokenizer_model tokenizer_name",
    "data.vocab_size": "padded_vocab_size",
}


def plain(message: str) -> str:
    """pydantic's message as a rule that begins with "must"."""
    message = message.removeprefix("Input should be ").removeprefix("Value error, ")
    message = "must be given" if message == "Field required" else message
    message = re.sub(r"^a valid (\w+)(, .*)?$", r"must be a valid \1", message)
    return message if message.startswith("must") else f"must be {message}"


def nearest(field: str) -> str:
    """What may have been meant by a field that does not exist, as the end of a line; "" where nothing is near."""
    leaves = all_fields()
    if field in leaves:
        return f" in this {field.partition('.')[0]} preset"
    section, _, last = field.rpartition(".")
    if theirs := [name for name, words in ELSEWHERE.items() if last.lower() in words.split()]:
        return f"; did you mean {theirs[0]}?"
    own = [name.removeprefix(f"{section}.") for name in leaves if section and name.startswith(f"{section}.")]
    if close := difflib.get_close_matches(last, own, n=1, cutoff=0.7):
        return f"; did you mean {section}.{close[0]}?"
    elsewhere = [name for name in leaves if name.rpartition(".")[2] == last]
    if not own and not elsewhere:
        near = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in leaves], n=1, cutoff=0.75)
        elsewhere = [name for name in leaves if name.rpartition(".")[2] in near]
    if 0 < len(elsewhere) <= (1 if own else 3):
        return f"; did you mean {' or '.join(elsewhere)}?"
    return f"; {section} has {', '.join(own)}" if 0 < len(own) <= FEW else ""


def unknown_option(word: str, value: str) -> ConfigError:
    """For `--word value`, which is no option of the command line."""
    field = word.lstrip("-").replace("-", "_")
    hint = f"; did you mean {field}?" if field in all_fields() else nearest(field)
    hint = hint.replace(" or ", f"={value} or ").replace("?", f"={value}?")
    return ConfigError(f"{word}: no such option; fields are set as field=value{hint}")


def describe_override(override: str) -> str:
    """For what Hydra cannot read."""
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: an override reads field=value"
    if value.startswith("~/"):
        return f"{override}: nothing expands ~ here, {key}=$HOME{value[1:]} means the same"
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    rule = f"a value with = : ~ , brackets, quotes or letters beyond ASCII is quoted twice, \"{key}='{quoted}'\""
    return f"{override}: {rule}"


def describe_composition(error: Exception) -> str:
    """What Hydra or OmegaConf found wrong."""
    text, override = str(error), getattr(error, "override", None)
    if override is not None:
        return describe_override(str(override))
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"{found[1]}: no such field{nearest(found[1])}"
    if found := re.search(r"Key '[^']+' (?:is not in struct|not in)[\s\S]*?full_key: (\S+)", text):
        return f"{found[1]}: no such field{nearest(found[1])}"
    if found := re.search(
        r"Could not find '(\w+)/([^']+)'[\s\S]*?Available options in '[^']*':\n([\s\S]*?)\nConfig", text
    ):
        return f"{found[1]}={found[2]}: must be one of {', '.join(found[3].split())}"
    if found := re.search(r"Missing mandatory value: [\s\S]*?full_key: (\S+)", text):
        return f"{found[1]}: must be given"
    return " ".join(text.split())
