"""The Triton kernels as training and evaluation launch them, for the compiler: `compile_report` examines them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from kernels.attention import launch
from kernels.attention.backward_triton import delta_kernel, keys_kernel, queries_kernel
from kernels.attention.forward_triton import forward_kernel
from kernels.cross_entropy.rows_triton import block_size, compiler_options, row_kernel
from kernels.cross_entropy.scale_triton import BLOCK, scale_kernel

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
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
) -> Variant:
    """One variant of the row kernel as the launcher would specialise it: pointers, width and strides are multiples of 16."""
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
    constants = {
        "TARGETS": targets,
        "HAS_BIAS": bias,
        "HAS_CAP": cap,
        "LINEAR": smooth,
        "SQUARE": True,
        "FLAT": smooth,
        "DESCRIBE": describe,
        "TOTAL": smooth,
        "GRADIENT": grad,
        "SLOTS": triton.next_power_of_2(targets),
        "BLOCK": block,
    }
    aligned = {"logits", "gradient", "bias", "width", "logits_stride", "gradient_stride"}
    return _source(row_kernel, kinds, constants, aligned), compiler_options(block)


def _source(
    kernel: Any, kinds: dict[str, str], constants: dict[str, Any], aligned: set[str]
) -> ASTSource:
    """Arguments that are in neither table are pointers to fp32."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*fp32") for n in names}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    return ASTSource(
        kernel,
        signature,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs=attributes,
    )


def loss_variants() -> dict[str, Variant]:
    bf16, fp32 = torch.bfloat16, torch.float32
    everything = {"bias": True, "cap": True, "smooth": True}
    found = {
        f"rows bf16, V={v}": row_variant(bf16, bf16, v) for v in (50, 1000, 4000, 8000, 128256)
    }
    found |= {
        "rows fp16": row_variant(torch.float16, torch.float16),
        "rows fp32": row_variant(fp32, fp32),
    }
    found |= {f"rows fp32 -> bf16, V={v}": row_variant(fp32, bf16, v) for v in (8000, 128256)}
    found |= {f"rows bf16, {k} targets": row_variant(bf16, bf16, targets=k) for k in (2, 4)}
    for name, logits in (("bf16", bf16), ("fp32 -> bf16", fp32)):
        found[f"rows {name}, soft cap"] = row_variant(logits, bf16, cap=True)
        found[f"rows {name}, bias, soft cap, smoothing"] = row_variant(logits, bf16, **everything)
        found[f"rows {name}, bias, soft cap, smoothing, 2 targets"] = row_variant(
            logits, bf16, targets=2, **everything
        )
        found[f"rows {name}, gradient only"] = row_variant(logits, bf16, describe=False)
    found["rows fp32, statistics only"] = row_variant(fp32, fp32, grad=False)
    found["rows fp32, statistics only, bias, soft cap"] = row_variant(
        fp32, fp32, grad=False, bias=True, cap=True
    )
    for name, values, always in (
        ("scale bf16", "*bf16", False),
        ("scale fp16 -> bf16", "*fp16", True),
    ):
        kinds = {"values": values, "out": "*bf16", "count": "i64"}
        constants = {"BLOCK": BLOCK, "ALWAYS": always}
        found[name] = (
            _source(scale_kernel, kinds, constants, {"values", "out", "count"}),
            {
                "num_warps": 4,
                "enable_fp_fusion": True,
            },
        )
    return found


def attention_variant(
    kernel: Any,
    table: dict[int, launch.Tile],
    width: int,
    value_width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    cap: bool = False,
    group: int = 4,
) -> Variant:
    """One kernel for heads of a width.

    Strides are multiples of 16 as in models; counts of tokens are not.
    """
    q = torch.empty(1, 1, 1, width, dtype=dtype, device="meta")
    v = torch.empty(1, 1, 1, value_width or width, dtype=dtype, device="meta")
    tile = launch.tile_for(table, q, v)
    options = launch.constants(q, v, 1.0 if cap else 0.0, tile)
    chosen = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    if kernel is delta_kernel:
        options = {"V": width, "HAS_LSE": True, "BLOCK_M": 64, "BLOCK_V": launch.padded(width)}
        chosen = {"num_warps": 4}
    else:
        options["GROUP"] = group
        if kernel is forward_kernel:
            options["HAS_SINKS"] = True
    tensors = {"q", "k", "v", "out", "d_out", "dq", "dk", "dv"}
    integers = {
        n for n in kernel.arg_names if n[-2:] in ("_b", "_s", "_h") or n.endswith("_stride")
    }
    kinds = dict.fromkeys(tensors, POINTERS[dtype]) | dict.fromkeys(
        ("first", "last", "query_start", "query_stop"), "*i32"
    )
    kinds |= (
        dict.fromkeys(integers, "i32")
        | dict.fromkeys(("queries", "keys", "heads"), "i32")
        | dict.fromkeys(("scale", "softcap"), "fp32")
    )
    kinds["sinks"] = "*fp32"
    aligned = {
        n for n in kernel.arg_names if n not in options and kinds.get(n, "*fp32").startswith("*")
    } | {n for n in integers if n[-2:] in ("_b", "_s", "_h")}
    return _source(kernel, kinds, options, aligned), chosen | {"enable_fp_fusion": True}


def attention_variants() -> dict[str, Variant]:
    found = {}
    passes = (
        ("forward", forward_kernel, launch.FORWARD),
        ("keys", keys_kernel, launch.KEYS),
        ("queries", queries_kernel, launch.QUERIES),
    )
    for name, kernel, table in passes:
        for width in (64, 128, 256):
            found[f"attention {name}, D={width}"] = attention_variant(kernel, table, width)
        found[f"attention {name}, D=96"] = attention_variant(kernel, table, 96)
        found[f"attention {name}, D=192, Dv=128"] = attention_variant(kernel, table, 192, 128)
        for width in (64, 128, 256):
            capped = launch.KEYS_CAPPED if kernel is keys_kernel else table
            found[f"attention {name}, D={width}, soft cap"] = attention_variant(
                kernel, capped, width, cap=True
            )
        found[f"attention {name}, D=128, fp32"] = attention_variant(
            kernel, table, 128, dtype=torch.float32
        )
    found["attention delta, D=128"] = attention_variant(delta_kernel, launch.FORWARD, 128)
    return found


def variants() -> dict[str, Variant]:
    """Everything that training and evaluation launch, by name."""
    return loss_variants() | attention_variants()
