"""What a model is: parameters of presets as the estimate counts them, of published models as their owners do."""

import json
from pathlib import Path

import pytest

from moetrain import config
from moetrain.common.errors import ConfigError
from moetrain.observe.estimate import estimate
from moetrain.simulate.shape import PUBLISHED, from_config, from_hf

PRESETS = ["tiny", "small", "olmoe_1b7b", "qwen3_30b_a3b", "qwen3_235b_a22b", "deepseek_v3_like"]


@pytest.mark.parametrize("model", PRESETS)
def test_a_preset_has_the_parameters_of_the_estimate(model: str) -> None:
    settings = config.load([f"model={model}", "train.global_batch=8", "parallel.nproc=8", "model.vocab_size=4096"])
    shape = from_config(settings)
    found = estimate(config.resolve_early(settings, 8))
    bias = shape.num_moe * shape.experts if settings.balance.bias != "none" else 0
    assert shape.params == pytest.approx(found.total, abs=bias)
    assert shape.active_params == pytest.approx(found.active, abs=bias)
    assert shape.flops_per_token(settings.train.seq_len) == pytest.approx(found.flops_per_token, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "total", "active"),  # billions, as their owners tell
    [
        ("deepseek-v3", 671, 37),
        ("kimi-k2", 1026, 32.6),
        ("qwen3-30b-a3b", 30.53, 3.35),
        ("qwen3-235b-a22b", 235.1, 22.2),
        ("gpt-oss-20b", 20.91, 3.61),
        ("gpt-oss-120b", 116.83, 5.13),
    ],
)
def test_published_models_have_the_parameters_that_are_published(name: str, total: float, active: float) -> None:
    shape = from_hf(name)
    assert shape.params / 1e9 == pytest.approx(total, rel=0.005)
    without_embedding = shape.active_params - shape.vocab * shape.dim
    assert active in (
        pytest.approx(shape.active_params / 1e9, rel=0.03),
        pytest.approx(without_embedding / 1e9, rel=0.03),
    )


def test_a_config_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["gpt-oss-120b"]))
    read, named = from_hf(str(tmp_path)), from_hf("gpt-oss-120b")
    assert read.params == named.params
    assert len(read.attention.windows) == 18
    assert read.attention.pairs(4096, 36) == pytest.approx((128 - 2 + 2048) / 2)
    hybrid = {**PUBLISHED["qwen3-30b-a3b"], "layer_types": ["linear_attention", "full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps(hybrid))
    with pytest.raises(ConfigError, match="layers that the simulator does not know: linear_attention"):
        from_hf(str(tmp_path))
    with pytest.raises(ConfigError, match=r"must be a folder with a config.json, or one of deepseek-v3"):
        from_hf(str(tmp_path / "none"))


def test_what_the_simulator_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.chain=2: must be 1 for `moetrain simulate`"):
        from_config(config.load(["model=tiny", "model.chain=2"]))
