"""The most memory that a computation holds at a time."""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain.distributed import shared_memory


def measure_peak(call: Callable[[], Iterable[Tensor]], device: torch.device) -> int:
    """Return the bytes of tensors that `call` holds at its peak, on top of what was there and without what it returns.

    CPU: the storages of all tensors that operators make, from birth to death, and those over memory shared with
    other ranks, with each rank that holds one; scratch space inside an operator and
    numpy arrays are not seen. CUDA: the allocator's peak; what is returned counts as there when the peak is.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        returned = sum(t.untyped_storage().nbytes() for t in call())
        return torch.cuda.max_memory_allocated() - before - returned
    with _Ledger() as ledger:
        shared_memory.observers.append(ledger.share)
        try:
            returned_tensors = list(call())
        finally:
            shared_memory.observers.remove(ledger.share)
        kept = {ledger.number(t.untyped_storage()) for t in returned_tensors}
    return ledger.peak(without=kept)


class _Ledger(TorchDispatchMode):
    """Births and deaths of storages, in order."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()  # the last holder may be a thread that sends, or the garbage collector
        self._numbers: dict[int, int] = {}  # address of the storage -> its number
        self._entries: list[tuple[int, int]] = []  # (number, bytes), negative at death
        self._count = 0
        self._shared: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), counted=False)  # seen first as an input: it was there
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage(), counted=True)
        return out

    def number(self, storage: UntypedStorage) -> int | None:
        """Return the number of a storage; None: it was not seen."""
        return self._numbers.get(storage._cdata)

    def peak(self, without: set[int | None]) -> int:
        """Return the most bytes held at a time, storages with the numbers of `without` left out."""
        held = most = 0
        for number, size in self._entries:
            if number not in without:
                held += size
                most = max(most, held)
        return most

    def share(self, number: int, size: int) -> None:
        """Note that a tensor over shared memory has so many bytes; 0: it is gone."""
        with self._lock:
            if size or number in self._shared:
                self._entries.append((-1 - number, size or -self._shared.pop(number)))
            if size:
                self._shared[number] = size

    def _note(self, storage: UntypedStorage, counted: bool) -> None:
        with self._lock:
            if storage._cdata in self._numbers:
                return
            self._count += 1
            number, size = self._count, storage.nbytes() if counted else 0
            self._numbers[storage._cdata] = number
            self._entries.append((number, size))
            weakref.finalize(storage, self._end, storage._cdata, number, size).atexit = False

    def _end(self, address: int, number: int, size: int) -> None:
        with self._lock:
            self._numbers.pop(address, None)
            self._entries.append((number, -size))
