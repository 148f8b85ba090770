"""Typed `triton.jit`, and the kinds of values that kernels take."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeAlias, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

Constants = TypeVar("Constants", bound=tuple[Any, ...])
Pointer: TypeAlias = Any  # to elements on the device; an integer may be added to it
Scalar: TypeAlias = Any  # a number that all threads of a program share
Block: TypeAlias = Any  # a tensor of a program, in its registers
Strides: TypeAlias = Any  # elements from one row, token and head to the next, as a tuple


def constants(values: Constants) -> Constants:
    """Return a named tuple of compile-time constants as kernels take it.

    Compilers of some versions (3.6) hand its fields on as Python's numbers and strings, which
    functions of kernels do not take for constants.
    """
    if triton.knobs.runtime.interpret:
        return values
    return type(values)(*(tl.constexpr(value) for value in values))


def device_guard(t: Tensor) -> AbstractContextManager[None]:
    """Return a context in which kernels are launched on the device of a tensor."""
    guard: AbstractContextManager[None] = torch.cuda.device_of(t)  # type: ignore[no-untyped-call]
    return guard


def jit(function: Callable[..., Any]) -> Any:
    """Return a kernel, or a function that kernels call; interpreted with TRITON_INTERPRET=1."""
    return triton.jit(function)
