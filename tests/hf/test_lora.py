"""LoRA on attention and experts: the steps of transformers, peft and torch alone, at every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moetrain import config
from moetrain.config.spec import resolve
from moetrain.models.initialise import draw_adapters
from moetrain.training.step import build
from tests.hf import families
from tests.hf.test_training import LR, NEAR, SEQUENCES, STEPS, VOCABULARY, RandomSamples, options, run_steps

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's

RANK, ALPHA = 3, 12
LINEARS, MATRICES = ["q_proj", "v_proj", "o_proj"], ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = f"lora.targets=[{','.join(LINEARS + MATRICES)}]"
LORA = [f"lora.rank={RANK}", f"lora.alpha={ALPHA}", TARGETS, "balance.coefficient=0", "balance.z_coefficient=0"]
LAYOUTS = [(1, 1, "none", 8), (2, 2, "full", 2), (4, 2, "full", 1)]  # ranks, of an expert group, recompute, micro-batch


def draw_first(overrides: list[str]) -> dict[str, Tensor]:
    """The adapters' first values by our names."""
    spec = resolve(config.load(overrides), 1, VOCABULARY, "fp32")
    model = build(spec)
    names = {parameter: name for name, parameter in model.named_parameters()}
    drawn = draw_adapters(model, spec.train.seed)
    return {names[p].removeprefix("hf."): read(slice(0, len(p))) for p, read in drawn}


class Peft:
    """The model under peft, with our first values."""

    def __init__(self, folder: Path, first: dict[str, Tensor]) -> None:
        import peft
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").train()
        about = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, target_parameters=MATRICES)
        self.model = peft.get_peft_model(base, about)
        for name, module in self.model.named_modules():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if isinstance(module, peft.tuners.lora.layer.ParamWrapper):
                a, b = (first.pop(f"{plain}.{module.parameter_name}_lora_{letter}") for letter in "AB")
                module.lora_A["default"].weight.data.copy_(a.flatten(0, 1))
                module.lora_B["default"].weight.data.copy_(b.permute(1, 2, 0).flatten(1))
            elif isinstance(module, peft.tuners.lora.Linear):
                module.lora_A["default"].weight.data.copy_(first.pop(f"{plain}.lora_A"))
                module.lora_B["default"].weight.data.copy_(first.pop(f"{plain}.lora_B"))
        assert not first


class Shared(nn.Module):
    """W + s B A with one pair for all experts."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + ALPHA / RANK * self.b @ self.a


class Parametrized:
    """The model with one pair for all experts of a layer, by torch's own parametrizations."""

    def __init__(self, folder: Path, first: dict[str, Tensor]) -> None:
        import transformers

        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        self.model.train().requires_grad_(False)
        for name in sorted(name for name in first if name.endswith("lora_A")):
            owner, _, last = name.rpartition(".")
            key = last.removesuffix("lora_A").removesuffix("_") or "weight"
            module = self.model.get_submodule(owner.removesuffix("_lora"))
            pair = Shared(first[name], first[f"{name[:-1]}B"])
            nn.utils.parametrize.register_parametrization(module, key, pair)
            module.parametrizations[key].original.requires_grad_(False)


def run_plain(model: nn.Module) -> list[tuple[float, float]]:
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=LR, betas=(0.9, 0.95), eps=0.01, weight_decay=0.1)
    found = []
    for number in range(STEPS):
        batch = RandomSamples().samples(number * SEQUENCES, (number + 1) * SEQUENCES)
        tokens = torch.from_numpy(batch.tokens)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(learning, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), float(norm)))
    return found


@pytest.mark.parametrize(("name", "shared"), [("qwen3_moe", False), ("gpt_oss", False), ("qwen3_moe", True)])
def test_steps_equal_those_of_transformers_and_peft(pool, name: str, shared: bool, tmp_path: Path) -> None:
    families.build(name, vocab_size=VOCABULARY, num_hidden_layers=2).save_pretrained(tmp_path)
    own = options(tmp_path, *LORA, f"lora.shared={shared}")
    expected = run_plain((Parametrized if shared else Peft)(tmp_path, draw_first(own)).model)
    for ranks, ep, recompute, micro_batch in LAYOUTS:
        layout = [f"train.recompute={recompute}", f"train.micro_batch={micro_batch}"]
        found, guests = pool.run(run_steps, ranks, [*own, *layout], ranks > 1, ep=ep)[0]
        assert np.array(found) == pytest.approx(np.array(expected), rel=NEAR), (ranks, ep)
        assert (guests > 0) == (ep > 1)
