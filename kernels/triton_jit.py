"""Typed `triton.jit`, and the kinds of values that kernels take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import triton

Pointer: TypeAlias = Any  # to elements on the device; an integer may be added to it
Scalar: TypeAlias = Any  # a number that all threads of a program share
Block: TypeAlias = Any  # a tensor of a program, in its registers
Strides: TypeAlias = Any  # elements from one row, token and head to the next, as a tuple


def jit(function: Callable[..., Any]) -> Any:
    """Return a kernel, or a function that kernels call; interpreted with TRITON_INTERPRET=1."""
    return triton.jit(function)
