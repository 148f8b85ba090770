"""Variants of the Triton kernels that training and evaluation launch, for `compile_report`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.attention import launch
from kernels.attention.backward_triton import delta_kernel, keys_kernel, queries_kernel
from kernels.attention.forward_triton import forward_kernel
from kernels.cross_entropy.rows_triton import Options, block_size, compiler_options, row_kernel
from kernels.cross_entropy.scale_triton import BLOCK, scale_kernel
from kernels.triton_jit import constants

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TENSORS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")
QUERY_HEADS = 4  # per key head
Variant = tuple[ASTSource, dict[str, Any]]


def row_variant(
    logits: torch.dtype,
    gradient: torch.dtype,
    vocabulary: int = 128256,
    targets: int = 1,
    bias: bool = False,
    cap: bool = False,
    smooth: bool = False,
    describe: bool = True,
    grad: bool = True,
    amd: bool = False,
) -> Variant:
    """Return one variant of the row kernel as it is launched.

    Pointers, width and strides are multiples of 16.
    """
    block = block_size(vocabulary, cap)
    kinds = {
        "logits": POINTERS[logits],
        "gradient": POINTERS[gradient],
        "bias": POINTERS[logits],
        "targets": "*i64",
        "hits": "*i1",
        "vocabulary": "i32",
        "width": "i32",
        "logits_stride": "i64",
        "gradient_stride": "i64",
        "softcap": "fp32",
    }
    options = Options(
        TARGETS=targets,
        HAS_BIAS=bias,
        HAS_CAP=cap,
        LINEAR=smooth,
        SQUARE=True,
        FLAT=smooth,
        DESCRIBE=describe,
        TOTAL=smooth,
        GRADIENT=grad,
        SLOTS=triton.next_power_of_2(targets),
        BLOCK=block,
    )
    aligned = {"logits", "gradient", "bias", "width", "logits_stride", "gradient_stride"}
    source = _source(row_kernel, kinds, {"OPTIONS": constants(options)}, aligned)
    return source, compiler_options(block, amd)


def _source(
    kernel: Any, kinds: dict[str, Any], constants: dict[str, Any], aligned: set[str]
) -> ASTSource:
    """Return the source of a compilation.

    Args:
        kernel: decorated by triton.jit.
        kinds: types of arguments, a tuple for a tuple; any other argument points to fp32.
        constants: compile-time arguments.
        aligned: arguments that are multiples of 16, tuples whole.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in names}
    paths: list[tuple[int, ...]] = []
    for name in aligned:
        position, kind = names.index(name), signature[name]
        inner = range(len(kind)) if isinstance(kind, tuple) else None
        paths += [(position,)] if inner is None else [(position, i) for i in inner]
    return ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in paths},
    )


def loss_variants(amd: bool) -> dict[str, Variant]:
    """Return the variants of the loss's kernels, by name; amd: for a device of AMD."""
    variant = partial(row_variant, amd=amd)
    bf16, fp32 = torch.bfloat16, torch.float32
    everything: dict[str, Any] = {"bias": True, "cap": True, "smooth": True}
    variants_by_name = {
        f"rows bf16, V={v}": variant(bf16, bf16, v) for v in (50, 1000, 4000, 8000, 128256)
    }
    variants_by_name |= {
        "rows fp16": variant(torch.float16, torch.float16),
        "rows fp32": variant(fp32, fp32),
    }
    variants_by_name |= {
        f"rows fp32 -> bf16, V={v}": variant(fp32, bf16, v) for v in (8000, 128256)
    }
    variants_by_name |= {f"rows bf16, {k} targets": variant(bf16, bf16, targets=k) for k in (2, 4)}
    for name, logits in (("bf16", bf16), ("fp32 -> bf16", fp32)):
        variants_by_name[f"rows {name}, soft cap"] = variant(logits, bf16, cap=True)
        variants_by_name[f"rows {name}, bias, soft cap, smoothing"] = variant(
            logits, bf16, **everything
        )
        variants_by_name[f"rows {name}, bias, soft cap, smoothing, 2 targets"] = variant(
            logits, bf16, targets=2, **everything
        )
        variants_by_name[f"rows {name}, gradient only"] = variant(logits, bf16, describe=False)
    variants_by_name["rows fp32, statistics only"] = variant(fp32, fp32, grad=False)
    variants_by_name["rows fp32, statistics only, bias, soft cap"] = variant(
        fp32, fp32, grad=False, bias=True, cap=True
    )
    for name, values, always in (
        ("scale bf16", "*bf16", False),
        ("scale fp16 -> bf16", "*fp16", True),
    ):
        kinds = {"values": values, "out": "*bf16", "count": "i64"}
        constants = {"BLOCK": BLOCK, "ALWAYS": always}
        variants_by_name[name] = (
            _source(scale_kernel, kinds, constants, {"values", "out", "count"}),
            {
                "num_warps": 4,
                "enable_fp_fusion": True,
            },
        )
    return variants_by_name


def attention_variant(
    kernel: Any,
    table: dict[int, launch.Tile],
    width: int,
    value_width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cap: bool = False,
    parts: int = 1,
) -> Variant:
    """Return one kernel for heads of a width, as it is launched for a model.

    Strides are multiples of 16 as in models; counts of tokens are not. `parts`: of a group, in the
    gradient of keys.
    """
    q = torch.empty(1, 1, QUERY_HEADS, width, dtype=dtype, device="meta")
    k = torch.empty(1, 1, 1, width, dtype=dtype, device="meta")
    v = torch.empty(1, 1, 1, value_width or width, dtype=dtype, device="meta")
    tile = launch.tile_for(table, q, v)
    constants: dict[str, Any]
    options: dict[str, Any] = launch.compiler_options(tile)
    if kernel is delta_kernel:
        block = launch.padded(width)
        constants = {
            "V": width, "HAS_LSE": True, "BLOCK_M": launch.DELTA_QUERIES, "BLOCK_V": block
        }  # fmt: skip
        options = {"num_warps": 4}
    else:
        constants = {"SHAPE": launch.shape_of(q, k, v, 1.0 if cap else 0.0, tile)}
        if kernel is forward_kernel:
            constants["HAS_SINKS"] = True
        if kernel is keys_kernel:
            constants["PARTS"] = parts
    kinds: dict[str, Any] = dict.fromkeys(TENSORS, POINTERS[dtype])
    kinds |= dict.fromkeys(("dk", "dv"), POINTERS[dtype if parts == 1 else torch.float32])
    kinds |= dict.fromkeys(("first", "last", "query_start", "query_stop"), "*i32")
    kinds |= dict.fromkeys(("queries", "keys", "heads"), "i32")
    kinds |= dict.fromkeys(("scale", "softcap"), "fp32")
    kinds |= {n: ("i32",) * 3 for n in kernel.arg_names if n.endswith("_strides")}
    kinds |= {n: "i32" for n in kernel.arg_names if n.endswith("_stride")}
    pointers = {
        n
        for n in kernel.arg_names
        if n not in constants and str(kinds.get(n, "*fp32")).startswith("*")
    }
    strides = {n for n in kernel.arg_names if n.endswith("_strides")}
    return _source(kernel, kinds, constants, pointers | strides), options | {
        "enable_fp_fusion": True
    }


def attention_variants(tiles: launch.Tiles) -> dict[str, Variant]:
    """Return the variants of attention's kernels with the tiles of a device, by name."""
    variants_by_name = {}
    passes = (
        ("forward", forward_kernel, tiles.forward),
        ("keys", keys_kernel, tiles.keys),
        ("queries", queries_kernel, tiles.queries),
    )
    for name, kernel, table in passes:
        for width in (64, 128, 256):
            variants_by_name[f"attention {name}, D={width}"] = attention_variant(
                kernel, table, width
            )
        variants_by_name[f"attention {name}, D=96"] = attention_variant(kernel, table, 96)
        variants_by_name[f"attention {name}, D=192, Dv=128"] = attention_variant(
            kernel, table, 192, 128
        )
        for width in (64, 128, 256):
            capped = tiles.of_keys(capped=True) if kernel is keys_kernel else table
            variants_by_name[f"attention {name}, D={width}, soft cap"] = attention_variant(
                kernel, capped, width, cap=True
            )
        variants_by_name[f"attention {name}, D=128, fp32"] = attention_variant(
            kernel, table, 128, dtype=torch.float32
        )
    for width in (64, 128, 256):
        variants_by_name[f"attention keys, D={width}, two parts"] = attention_variant(
            keys_kernel, tiles.keys, width, parts=2
        )
    variants_by_name["attention delta, D=128"] = attention_variant(delta_kernel, tiles.forward, 128)
    return variants_by_name


def variants(target: GPUTarget) -> dict[str, Variant]:
    """Return all that training and evaluation launch on a device, by name."""
    amd = target.backend == "hip"
    tiles = launch.AMD if amd else launch.tiles_by_capability(target.arch // 10)
    return loss_variants(amd) | attention_variants(tiles)
