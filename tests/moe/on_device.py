"""A device that is not there: tensors that say they are on a GPU and hold their values on the CPU.

Code under `Device()` takes its CUDA branches. Operations that mix devices are refused as a GPU would; launches, copies
from the host, waits for the device and timing events are counted. No speed, no memory, no races.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.device("cuda", 0)
SIZED_BY_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
UNLAUNCHED = {"aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}
found: Counter[str] = Counter()  # launches, copies, waits, events


class OnGpu(Tensor):
    """Its device is the GPU in Python; autograd, in C++, sees the CPU, whose thread it would otherwise not find."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        like = {"dtype": held.dtype, "strides": held.stride(), "storage_offset": held.storage_offset()}
        new = torch.Tensor._make_wrapper_subclass(cls, held.size(), **like)  # type: ignore[attr-defined]
        new.held = held
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        strangers = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]  # a number of the host may be anywhere
        assert not strangers, f"{func}: of the host, beside tensors of the GPU: {[x.shape for x in strangers]}"
        if (SIZED_BY_DATA & set(func.tags) and not _knows_size(func, args, kwargs)) or _writes_number(func, args):
            found["waits"] += 1
        name = func._schema.name
        if not func.is_view and name not in UNLAUNCHED and not name.startswith("c10d::"):
            found["launches"] += 1
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map_only(OnGpu, lambda x: x.held, args), **tree_map_only(OnGpu, lambda x: x.held, kwargs))
        out = tree_map_only(Tensor, OnGpu, out)
        return out if name.startswith("c10d::") else return_and_correct_aliasing(func, args, kwargs, out)


def _knows_size(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the host knows the size of a result that in other cases depends on values."""
    masks = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)]
    return kwargs.get("output_size") is not None or (func is torch.ops.aten.index.Tensor and not masks)


def _writes_number(func: Any, args: Any) -> bool:
    """Whether a number of the host is written by index: it is uploaded, and waited for (seen on an H100)."""
    return func._schema.name.startswith("aten::index_put") and not isinstance(args[2], OnGpu)


class _Host(TorchFunctionMode):
    """What crosses between host and device: it never gets to the dispatcher, for which all is on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], OnGpu) and func in (Tensor.tolist, Tensor.cpu):
            found["waits"] += 1
            return func(args[0].held)
        if func is Tensor.to:
            places = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, torch.device | str)]
            if places and torch.device(places[0]).type == "cuda" and not isinstance(args[0], OnGpu):
                found["copies"] += 1
                return OnGpu(args[0].detach().clone())
            assert not places or isinstance(args[0], OnGpu) == (torch.device(places[0]).type == "cuda"), "to the host"
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda" and not isinstance((args or [0])[0], OnGpu):
            found["copies" if func is torch.tensor else "launches"] += 1
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


class _Event:
    """A timing event."""

    def __init__(self, enable_timing: bool) -> None:
        found["events"] += 1

    def record(self, stream: object) -> None: ...


@contextmanager
def interpreting_triton() -> Iterator[None]:
    """Have the kernels in Triton take such tensors: what they are given lies on the CPU, where they are interpreted."""
    from moetrain.moe.kernels import triton_fused, triton_tables

    interpret = triton_fused.launch

    def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
        found["launches"] += programs > 0
        interpret(kernel, programs, *tree_map_only(OnGpu, lambda x: x.held, arguments), **options)

    with mock.patch.object(triton_fused, "launch", launch), mock.patch.object(triton_tables, "launch", launch):
        yield


@contextmanager
def device() -> Iterator[Counter[str]]:
    """Counts from zero, in what is yielded."""
    found.clear()
    with mock.patch("torch.cuda.Event", _Event), mock.patch("torch.cuda.current_stream", mock.Mock()), _Host():
        yield found


def backward(y: Tensor, upstream: Tensor) -> None:
    """`torch.autograd.backward` would leave what crosses between host and device out of sight."""
    options = {"allow_unreachable": True, "accumulate_grad": True}
    torch.autograd.graph._engine_run_backward((y,), (upstream,), False, False, (), **options)


def to_gpu(module: torch.nn.Module) -> None:
    """All parameters and buffers."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(OnGpu(parameter.detach()))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = OnGpu(buffer)
