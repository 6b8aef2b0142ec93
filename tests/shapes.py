"""Checks that arrays in `moetrain/moe` have the shapes that their names say, whenever a function there returns.

A name such as `x_TD` says two dimensions, T and D; the legend at the top of each file says what the letters mean. When
a function returns, all its suffixed variables have to agree: as many dimensions as letters, and one size a letter. A
digit is a dimension of that size (`links_C2`: [C, 2]) or a factor of the letter before it (`gate_up_MH2`: [M, 2H]). An
array without elements, which may stand for one that is not kept, needs the number of dimensions alone.

It costs nothing where it is not switched on: a profile function of the interpreter looks at the frames, no line of
the package knows of it.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

import moetrain

CHECKED = str(Path(moetrain.__file__).parent / "moe")
ARRAYS = (torch.Tensor, np.ndarray)
SUFFIX = re.compile(r"\w_((?:[A-Z]\d?)+)$")

_named: dict[int, tuple[CodeType, dict[str, tuple[str, ...]]]] = {}  # by id of a code, which stays alive here


@contextmanager
def check_shapes() -> Iterator[None]:
    """Check inside the context, in this thread. A name that does not fit raises `AssertionError` from its function."""
    before = sys.getprofile()
    sys.setprofile(_look_at_return)
    try:
        yield
    finally:
        sys.setprofile(before)


def are_checked() -> bool:
    """Return whether shapes are checked in this thread now."""
    return sys.getprofile() is _look_at_return


def find_disagreement(variables: dict[str, Any], named: dict[str, tuple[str, ...]]) -> str:
    """Return what is wrong with the shapes of a function's variables in one line; empty where nothing is.

    `named`: the dimensions of each name that has a suffix, in order.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, dims in named.items():
        value = variables.get(name)
        if not isinstance(value, ARRAYS):
            continue
        shape = tuple(value.shape)
        expected = _read_dims(dims, len(shape))
        if expected is None:
            return f"{name} has the shape {shape}"
        if 0 in shape:
            continue
        for (letter, factor), size in zip(expected, shape, strict=True):
            if size % factor or (not letter and size != factor):
                return f"{name} has the shape {shape}"
            known, other = sizes.setdefault(letter, (size // factor, name)) if letter else (1, "")
            if known != size // factor:
                return f"{letter} is {known} in {other} and {size // factor} in {name} {shape}"
    return ""


@cache
def _read_dims(dims: tuple[str, ...], ndim: int) -> list[tuple[str, int]] | None:
    """Return (letter, factor) of every dimension, literal ones without a letter; None where there are more or fewer."""
    if ndim == len(dims):
        return [(dim[0], int(dim[1:] or 1)) for dim in dims]
    literal = [part for dim in dims for part in ((dim[0], 1), *([("", int(dim[1:]))] if dim[1:] else []))]
    return literal if ndim == len(literal) else None


def find_named(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the dimensions of those names that have a suffix."""
    found = {name: match[1] for name in names if (match := SUFFIX.search(name))}
    return {name: tuple(re.findall(r"[A-Z]\d?", suffix)) for name, suffix in found.items()}


def _look_at_return(frame: FrameType, event: str, _: Any) -> None:
    if event != "return":
        return
    code = frame.f_code
    known = _named.get(id(code))
    if known is None:
        is_checked = code.co_filename.startswith(CHECKED)
        names = (*code.co_varnames, *code.co_cellvars, *code.co_freevars) if is_checked else ()
        known = _named[id(code)] = (code, find_named(names))
    if known[1] and (wrong := find_disagreement(frame.f_locals, known[1])):
        raise AssertionError(f"{Path(code.co_filename).name}:{code.co_name}: {wrong}")
