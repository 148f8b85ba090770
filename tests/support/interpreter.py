"""Triton's interpreter without its repeated work: the same bits in a fraction of the time.

Kernels of the tests are small, so that most of their time is what the interpreter does around each
operation: it looks through all of `triton.language` for what is to be patched at each call of a
function, adds integers a second time in 64 bits for an assertion that is off, and derives types and
shapes again for each value. `tests/kernels/test_interpreter.py` compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

VERSION = "3.9."  # of Triton, whose internals these are; another one is left as it is


def _patch_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Patch `triton.language` once per module of kernels, and undo nothing after a launch."""
    patched: set[str] = set()

    def patch_for(function: Any) -> Any:
        if function.__module__ not in patched:
            patch(function)
            patched.add(function.__module__)
        return interpreter._LangPatchScope()

    return patch_for


def _by_name(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return numpy's dtype for one of Triton's, which makes a table of them at each call."""
    known: dict[str, Any] = {}

    def get(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    return get


def _same_object_first(equal: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda self, other: self is other or equal(self, other)


def _type_once(init: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`: types of equal elements and shape are equal in all."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape))
        if key not in known:
            init(self, element_ty, shape)
            known[key] = vars(self).copy()
        vars(self).update(known[key])

    return init_type


def _shape_once(init: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`: shape and number of elements are those of the type."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape.values,) if type.is_block() else ()
        if key not in known:
            init(self, handle, type)
            known[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known[key]

    return init_tensor


def _promotion_once(promote: Callable[..., Any]) -> Callable[..., Any]:
    """`TritonSemantic.computation_type_impl`, a function of two dtypes."""
    known: dict[tuple[Any, ...], Any] = {}

    def promote_types(self: Any, a: Any, a_scalar: bool, b: Any, b_scalar: bool, div: bool) -> Any:
        key = a.name, a_scalar, b.name, b_scalar, div
        if key not in known:
            known[key] = promote(self, a, a_scalar, b, b_scalar, div)
        return known[key]

    return promote_types


def _equal_shapes_first(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """`TritonSemantic.broadcast_impl_value`: blocks of one shape stay as they are."""

    def broadcast_values(self: Any, a: Any, b: Any) -> Any:
        blocks = a.type.is_block() and b.type.is_block()
        if blocks and a.type.shape.values == b.type.shape.values:
            return a, b
        return broadcast(self, a, b)

    return broadcast_values


def _patches() -> list[Any]:
    changes = (
        (interpreter, "_patch_lang", _patch_once),
        (interpreter, "_get_np_dtype", _by_name),
        (tl.dtype, "__eq__", _same_object_first),
        (tl.block_type, "__init__", _type_once),
        (tl.tensor, "__init__", _shape_once),
        (TritonSemantic, "computation_type_impl", _promotion_once),
        (TritonSemantic, "broadcast_impl_value", _equal_shapes_first),
    )
    builder = interpreter.interpreter_builder
    assert not builder.options.debug  # which would compare the sums in 64 bits
    options = replace(builder.options, sanitize_overflow=False)
    return [
        mock.patch.object(builder, "options", options),
        *(mock.patch.object(o, name, change(getattr(o, name))) for o, name, change in changes),
    ]


_active = _patches() if triton.__version__.startswith(VERSION) else []


def start() -> None:
    """Omit the repeated work from now on."""
    for patch in _active:
        patch.start()


@contextmanager
def plain() -> Iterator[None]:
    """Interpret as Triton does, for a comparison."""
    for patch in reversed(_active):
        patch.stop()
    try:
        yield
    finally:
        start()
