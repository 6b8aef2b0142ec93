"""Files of recorded choices: what is written is read, and what is none is refused in one line."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from moetrain.common.errors import ConfigError
from moetrain.moe.recorded import ChoiceFacts, RoutedExperts, read_facts, read_routed_experts
from moetrain.moe.rollouts import align_routed_experts

FACTS = ChoiceFacts("qwen3_moe", num_experts=8, num_layers=2, top_k=3, tokenizer="abc")


def samples() -> list[tuple[np.ndarray, np.ndarray]]:
    draw = np.random.default_rng(0)
    found = [(draw.integers(0, 99, size), draw.random((size, 2, 8)).argsort(-1)[..., :3]) for size in (5, 2, 7)]
    found[2][1][-1] = -1  # sampled last
    found[0][1][0] = -1  # before the first row that was returned
    return found


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_what_is_written_is_read(tmp_path: Path, suffix: str) -> None:
    made = RoutedExperts.collect(FACTS, samples())
    made.write(path := tmp_path / f"choices{suffix}")
    found = read_routed_experts(path)
    assert found.facts == read_facts(path, "x") == FACTS
    assert found.lengths.tolist() == [5, 2, 6]
    assert found.experts.dtype == np.int16
    assert np.array_equal(found.tokens, np.concatenate([t for t, _ in samples()])[:-1])
    assert np.array_equal(found.experts, np.concatenate([e for _, e in samples()])[:-1])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_many_experts_take_wider_numbers(tmp_path: Path) -> None:
    facts = ChoiceFacts("moetrain", num_experts=40_000, num_layers=1, top_k=1)
    RoutedExperts.collect(facts, [(np.arange(2), np.full((2, 1, 1), 39_999))]).write(path := tmp_path / "a.npz")
    assert read_routed_experts(path).experts.ravel().tolist() == [39_999] * 2


ARRAYS = {"tokens": np.zeros(2, np.int32), "lengths": np.full(1, 2), "experts": np.zeros((2, 2, 3), np.int16)}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({"lengths": np.full(1, 3)}, "lengths sum to 3, but there are 2 tokens"),
    "layers": ({"experts": np.zeros((2, 4, 3), np.int16)}, r"experts are \(2, 4, 3\), must be \(2, 2, 3\)"),
    "expert": ({"experts": np.full((2, 2, 3), 8)}, "an expert is 8, must be below num_experts=8"),
    "below": ({"experts": np.full((2, 2, 3), -2)}, "an expert is -2; -1 stands for what was not recorded"),
    "twice": ({"experts": np.array([[[0, 1, 2]] * 2, [[0, 1, 2], [3, 4, 3]]])}, "token 1 has an expert twice"),
    "partial": (
        {"experts": np.array([[[0, 1, 2]] * 2, [[0, 1, 2], [3, 4, -1]]])},
        "the choices of token 1 are not whole: other layers or tokens have more",
    ),
    "one layer": (
        {"experts": np.array([[[0, 1, 2], [-1, -1, -1]]] * 2)},
        "the choices of token 0 are not whole: other layers or tokens have more",
    ),
    "floats": ({"experts": np.zeros((2, 2, 3))}, "tokens, lengths and experts must be integers"),
    "weights": ({"weights": np.zeros((2, 2))}, r"weights must be \(2, 2, 3\), as experts are"),
    "empty": ({"lengths": np.array([2, 0])}, "every sample must have a token whose choice was recorded"),
}


@pytest.mark.parametrize("name", WRONG)
def test_files_that_cannot_be_are_refused(tmp_path: Path, name: str) -> None:
    change, message = WRONG[name]
    about = {"format": "moetrain.routed_experts", "version": "1", "model_type": "m"}
    about |= {"num_experts": "8", "num_layers": "2", "top_k": "3"}
    path = tmp_path / "a.safetensors"
    save_file(ARRAYS | change, path, about)
    with pytest.raises(ConfigError, match=f"^choices=.*a.safetensors: {message}$"):
        read_routed_experts(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    def refuse(name: str, content: bytes | None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_facts(tmp_path / name, "router.replay")
        assert "\n" not in str(caught.value)
        return str(caught.value).partition(f"{name}: ")[2]

    assert refuse("a.json", b"{}") == "must end in .npz or .safetensors"
    assert refuse("a.npz", None) == "must be an existing file"
    assert refuse("b.npz", b"not a zip").startswith("must be a file of recorded choices (")
    assert refuse("b.safetensors", b"x" * 20).startswith("must be a file of recorded choices (")
    plain = io.BytesIO()
    np.savez(plain, **ARRAYS)
    assert refuse("c.npz", plain.getvalue()).startswith("must be a file of recorded choices (")
    named = io.BytesIO()
    np.savez(named, **ARRAYS, metadata=np.array(json.dumps({"format": "other"})))
    said = "must be moetrain.routed_experts, version 1; its metadata says other, version null"
    assert refuse("d.npz", named.getvalue()) == said
    save_file(ARRAYS, tmp_path / "e.safetensors", {"format": "moetrain.routed_experts", "version": "1"})
    assert refuse("e.safetensors", None).startswith("its metadata must have num_experts, num_layers, top_k")


def test_another_model_is_told_by_its_numbers_and_name() -> None:
    def differ(**change: Any) -> str:
        return FACTS.find_difference(ChoiceFacts(**{**FACTS.__dict__, **change}))

    assert differ() == differ(tokenizer="") == differ(model_type="qwen3_moe_text") == ""
    assert differ(num_experts=16) == "recorded with num_experts=8, but the model has 16"
    assert differ(num_layers=3) == "recorded with num_layers=2, but the model has 3"
    assert differ(top_k=2) == "recorded with top_k=3, but the model has 2"
    assert differ(model_type="olmoe") == "recorded with model_type=qwen3_moe, but the model has olmoe"
    assert differ(tokenizer="abd") == "recorded with another tokenizer than that of the data"


def align(routed: Any, tokens: int = 6, **more: Any) -> np.ndarray:
    shape = {"num_layers": 4, "moe_layers": (1, 3), "top_k": 3, "num_experts": 8, **more}
    return align_routed_experts(range(tokens), routed, **shape)


def test_rollouts_are_read_as_the_servers_send_them() -> None:
    rows = np.random.default_rng(0).integers(0, 8, (5, 4, 3))  # of 6 tokens, of which the last one was sampled
    expected = align(rows)
    assert expected.shape == (6, 2, 3)
    assert np.array_equal(expected[:5], rows[:, [1, 3]])
    assert (expected[5] == -1).all()
    file = io.BytesIO()
    np.save(file, rows.astype(np.uint8))
    vllm = base64.b64encode(file.getvalue()).decode()
    sglang = base64.b64encode(rows.astype(np.int32).tobytes()).decode()
    for sent in (vllm, sglang, rows.tolist(), rows[:, [1, 3]]):
        assert np.array_equal(align(sent), expected)
    assert np.array_equal(align(rows, tokens=5), rows[:, [1, 3]])  # nothing was sampled after them
    later = align(rows[2:], start=2)
    assert np.array_equal(later[2:], expected[2:])
    assert (later[:2] == -1).all()


def test_rollouts_of_another_model_are_refused() -> None:
    rows = np.zeros((5, 4, 3), np.int32)
    bad: list[tuple[Any, dict[str, Any], str]] = [
        (rows, {"tokens": 8}, "has 5 rows from token 0 on, must have 8 or 7, of 8 tokens; the last one may have none"),
        (rows, {"start": 2}, "has 5 rows from token 2 on, must have 4 or 3, of 6 tokens; the last one may have none"),
        (rows[:, :3], {}, "has 3 layers, must have 4, or the 2 with experts"),
        (rows, {"top_k": 2}, "has 3 experts a token, must have 2"),
        (rows + 8, {}, "experts are 8 to 8, must be 0 to 7"),
        (rows[0], {}, "int32 of shape (4, 3), must be integers [tokens, layers, K]"),
    ]
    for routed, more, message in bad:
        with pytest.raises(ConfigError) as caught:
            align(routed, **more)
        assert str(caught.value) == f"routed_experts: {message}"
    with pytest.raises(ConfigError, match="must be base64 of int32"):
        align("no base64!")
