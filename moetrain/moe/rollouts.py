"""The choices that vLLM and SGLang return with a rollout, brought to one row a token and one column a layer.

Both record [tokens, hidden layers, K]: layers without experts are there and mean nothing, and the token that was
sampled last is not, since no forward has seen it.

vLLM (`enable_return_routed_experts=True`): `CompletionOutput.routed_experts`, an array; its server sends the bytes of
an `.npy` file in base64. Of versions that return prompt and completion apart, put the one behind the other.
SGLang (`--enable-return-routed-experts`, `return_routed_experts=True`): `meta_info["routed_experts"]`, int32 in base64;
with `routed_experts_start_len` from that token on.

T tokens, L layers with experts, K experts a token.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.common.errors import ConfigError, short

NUMPY_BEGINS = b"\x93NUMPY"


def align_routed_experts(
    tokens: Sequence[int],
    routed_experts: Any,
    *,
    num_layers: int,
    moe_layers: Sequence[int],
    top_k: int,
    num_experts: int,
    start: int = 0,
) -> NDArray[np.int32]:
    """Return int32 [T, L, K] for the T `tokens` of prompt and completion; -1 where nothing was recorded.

    Arguments:
        tokens: prompt and completion, the last sampled token included.
        routed_experts: an array [tokens, layers, K], or the text in base64 that the servers send.
        num_layers: hidden layers of the model; `moe_layers`: the numbers of those that have experts.
        top_k, num_experts: of the model.
        start: the token that the first row is of (SGLang's `routed_experts_start_len`).

    The last token has no row, unless nothing was sampled after it. Raises `ConfigError` for any other number of rows,
    layers or experts.
    """
    rows = _decode(routed_experts, num_layers, top_k)
    if rows.ndim != 3 or rows.dtype.kind not in "iu":
        raise ConfigError(f"routed_experts: {rows.dtype} of shape {rows.shape}, must be integers [tokens, layers, K]")
    if rows.shape[2] != top_k:
        raise ConfigError(f"routed_experts: has {rows.shape[2]} experts a token, must have {top_k}")
    if rows.shape[1] == num_layers:
        rows = rows[:, list(moe_layers)]
    elif rows.shape[1] != len(moe_layers):
        raise ConfigError(
            f"routed_experts: has {rows.shape[1]} layers, must have {num_layers}, or the {len(moe_layers)} with experts"
        )
    total, end = len(tokens), start + len(rows)
    if start < 0 or end not in (total, total - 1):
        said = f"has {len(rows)} rows from token {start} on, must have {total - start} or {total - start - 1}"
        raise ConfigError(f"routed_experts: {said}, of {total} tokens; the last one may have none")
    if len(rows) and not 0 <= rows.min() <= rows.max() < num_experts:
        raise ConfigError(f"routed_experts: experts are {rows.min()} to {rows.max()}, must be 0 to {num_experts - 1}")
    found = np.full((total, len(moe_layers), top_k), -1, np.int32)
    found[start:end] = rows
    return found


def _decode(routed_experts: Any, num_layers: int, top_k: int) -> NDArray[Any]:
    """The array itself, or what a server has sent of it."""
    if not isinstance(routed_experts, str | bytes):
        return np.asarray(routed_experts)
    try:
        data = base64.b64decode(routed_experts, validate=True)
        if data.startswith(NUMPY_BEGINS):
            array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
            return array
        return np.frombuffer(data, np.int32).reshape(-1, num_layers, top_k)
    except (binascii.Error, ValueError, EOFError) as error:
        rule = f"must be base64 of int32 [tokens, {num_layers}, {top_k}] or of an .npy file"
        raise ConfigError(f"routed_experts: {rule} ({short(error)})") from None
