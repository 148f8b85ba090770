"""Launches of the attention kernels, and the tiles that they are launched with."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kernels.attention.backward_triton import delta_kernel, keys_kernel, queries_kernel
from kernels.attention.forward_triton import forward_kernel
from kernels.attention.intervals import Intervals
from kernels.attention.tiles_triton import Shape
from kernels.triton_jit import constants, device_guard
from kernels.triton_math import LOG2_E


class Tile(NamedTuple):
    """Queries, keys, warps and pipeline stages of one program."""

    m: int
    n: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of each pass for 16-bit types, by width of a head (up to).

    Attributes:
        forward: of the forward pass.
        keys: of the gradient of keys and values.
        queries: of the gradient of queries.
        keys_capped: of the gradient of keys and values with a soft cap, where they differ.
    """

    forward: dict[int, Tile]
    keys: dict[int, Tile]
    queries: dict[int, Tile]
    keys_capped: dict[int, Tile]

    def of_keys(self, capped: bool) -> dict[int, Tile]:
        """Return those of the gradient of keys and values, with a soft cap or without."""
        return self.keys | self.keys_capped if capped else self.keys


# No spills, no serialised wgmma: kernels.bench.compile_report.
SM_90 = Tiles(
    forward={64: Tile(128, 64, 4, 3), 128: Tile(128, 128, 8, 3), 256: Tile(128, 32, 8, 2)},
    keys={64: Tile(64, 128, 8, 2), 128: Tile(32, 128, 8, 2), 256: Tile(64, 32, 8, 1)},
    queries={64: Tile(128, 128, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 16, 8, 2)},
    keys_capped={128: Tile(32, 64, 8, 1)},
)
SM_100 = Tiles(
    forward={64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(128, 32, 8, 2)},
    keys={64: Tile(32, 128, 8, 2), 128: Tile(32, 64, 8, 2), 256: Tile(64, 32, 8, 1)},
    queries={64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(128, 16, 8, 2)},
    keys_capped={128: Tile(32, 64, 8, 1)},
)
# All others have no wgmma and as little as 99 KiB of shared memory (sm_86, sm_89, sm_120).
SM_80 = Tiles(
    forward={64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 3), 256: Tile(32, 32, 4, 2)},
    keys={64: Tile(32, 128, 8, 2), 128: Tile(64, 32, 4, 1), 256: Tile(16, 32, 4, 1)},
    queries={64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(32, 32, 4, 1)},
    keys_capped={},
)
# AMD's have 64 KiB of shared memory, and 64 threads to a warp; compiled for gfx942.
AMD = Tiles(
    forward={64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 4, 2), 256: Tile(64, 32, 4, 2)},
    keys={64: Tile(32, 128, 4, 2), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    queries={64: Tile(128, 64, 4, 2), 128: Tile(128, 32, 4, 2), 256: Tile(64, 32, 4, 1)},
    keys_capped={},
)
WIDE = Tile(16, 16, 8, 1)  # fp32, whose exact products do not use tensor cores
DELTA_QUERIES = 64  # of a program


class Inputs(NamedTuple):
    """What both passes read.

    Attributes:
        q: [B, Sq, Hq, D].
        k: [B, Sk, Hkv, D].
        v: [B, Sk, Hkv, Dv].
        sinks: [Hq] or None.
        intervals: keys that queries see.
        scale: of the scores.
        softcap: of the scores; 0 for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    intervals: Intervals
    scale: float
    softcap: float

    def readable(self) -> Inputs:
        """Return the inputs as kernels read them: what has no stride of its own lies dense."""
        return self._replace(
            q=rows_of(self.q),
            k=rows_of(self.k),
            v=rows_of(self.v),
            sinks=None if self.sinks is None else self.sinks.contiguous(),
            intervals=Intervals(*(rows_of(ends) for ends in self.intervals)),
        )


class Statistics(NamedTuple):
    """Of the scores that a query sees, fp32 [B, Hq, Sq]; -inf, -inf and 0 where it sees none.

    Attributes:
        lse: natural log-sum-exp.
        peak: largest score, in units of log2.
        log_sum: log2 of the sum of exp2 of all scores less the peak.
    """

    lse: Tensor
    peak: Tensor
    log_sum: Tensor


class OutputGradients(NamedTuple):
    """What the kernels of the backward pass read of the forward pass and from above.

    Attributes:
        d_out: gradient of out, [B, Sq, Hq, Dv].
        peak: see `Statistics`.
        log_sum: see `Statistics`.
        delta: rowsum(out d_out) - d_lse, fp32 [B, Hq, Sq].
    """

    d_out: Tensor
    peak: Tensor
    log_sum: Tensor
    delta: Tensor


def padded(width: int) -> int:
    """Return the width of tiles: a power of two, at least what tl.dot takes."""
    return max(16, int(triton.next_power_of_2(width)))


def tiles_of(device: torch.device) -> Tiles:
    """Return the tiles for a device; those of sm_90 where kernels are interpreted."""
    if device.type != "cuda":
        return SM_90
    if torch.version.hip:
        return AMD
    return tiles_by_capability(torch.cuda.get_device_capability(device)[0])


def tiles_by_capability(major: int) -> Tiles:
    """Return the tiles by the first number of the compute capability."""
    return {9: SM_90, 10: SM_100}.get(major, SM_80)


def tile_for(table: dict[int, Tile], q: Tensor, v: Tensor) -> Tile:
    """Return the tile for the types and widths of q and v."""
    if q.element_size() > 2:
        return WIDE
    width = max(q.shape[3], v.shape[3])
    return next(tile for limit, tile in sorted(table.items()) if width <= limit)


def forward(inputs: Inputs) -> tuple[Tensor, Statistics]:
    """Launch the forward pass; returns (out [B, Sq, Hq, Dv], the statistics)."""
    q, k, v, sinks, intervals, scale, softcap = inputs.readable()
    rows, queries, heads, _ = q.shape
    out = q.new_empty(rows, queries, heads, v.shape[3])
    statistics = Statistics(
        *(q.new_empty(rows, heads, queries, dtype=torch.float32) for _ in range(3))
    )
    if not statistics.lse.numel():
        return out, statistics
    tile = tile_for(tiles_of(q.device).forward, q, v)
    with device_guard(q):
        forward_kernel[(triton.cdiv(queries, tile.m) * heads * rows,)](
            *(q, k, v, out, *statistics, intervals.first, intervals.last),
            statistics.lse if sinks is None else sinks,
            *(strides(t) for t in (q, k, v, out)),
            *(_row_stride(intervals.first), queries, k.shape[1], heads, scale, softcap or 1.0),
            HAS_SINKS=sinks is not None,
            SHAPE=shape_of(q, k, v, softcap, tile),
            **compiler_options(tile),
        )
    return out, statistics


def backward(
    inputs: Inputs,
    out: Tensor,
    peak: Tensor,
    log_sum: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward pass.

    Args:
        inputs: of `forward`.
        out: result of `forward`.
        peak: see `Statistics`.
        log_sum: see `Statistics`.
        d_out: gradient of `out`.
        d_lse: gradient of `lse`, or None.

    Returns:
        Gradients of q, k, v and the sinks, the last empty without sinks.
    """
    inputs, out, d_out = inputs.readable(), rows_of(out), rows_of(d_out)
    peak, log_sum = peak.contiguous(), log_sum.contiguous()
    q, k, v, sinks = inputs[:4]
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    d_sinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
    if not peak.numel() or not k.shape[1]:
        return dq.zero_(), dk.zero_(), dv.zero_(), d_sinks
    with device_guard(q):
        delta = _delta(out, d_out, d_lse)
        gradients = OutputGradients(d_out, peak, log_sum, delta)
        _launch_keys(inputs, gradients, dk, dv)
        _launch_queries(inputs, gradients, dq)
    if sinks is not None:  # a sink is a key without value: ds = p (0 - delta)
        logits = sinks.float().view(1, -1, 1)
        p = torch.exp2((logits * LOG2_E.value - peak) - log_sum)
        p = torch.where(logits == -torch.inf, 0.0, p)  # -inf - -inf where nothing is seen
        d_sinks = -(p * delta).sum((0, 2)).to(sinks.dtype)
    return dq, dk, dv, d_sinks


def _delta(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """rowsum(out d_out) - d_lse, fp32 [B, Hq, Sq]."""
    rows, queries, heads, width = out.shape
    delta = out.new_empty(rows, heads, queries, dtype=torch.float32)
    delta_kernel[(triton.cdiv(queries, DELTA_QUERIES) * heads * rows,)](
        *(out, d_out, delta if d_lse is None else d_lse.contiguous(), delta),
        *(strides(out), strides(d_out), queries, heads),
        V=width,
        HAS_LSE=d_lse is not None,
        BLOCK_M=DELTA_QUERIES,
        BLOCK_V=padded(width),
    )
    return delta


def _launch_keys(inputs: Inputs, gradients: OutputGradients, dk: Tensor, dv: Tensor) -> None:
    q, k, v, _, intervals, scale, softcap = inputs
    rows, keys, kv_heads, _ = k.shape
    first, _, query_start, _ = intervals
    tile = tile_for(tiles_of(q.device).of_keys(softcap > 0), q, v)
    programs = triton.cdiv(keys, tile.n) * kv_heads * rows
    parts = parts_of_group(q.shape[2] // kv_heads, programs, multiprocessors_of(q.device))
    sums = [t if parts == 1 else _room_for_parts(t, parts) for t in (dk, dv)]
    keys_kernel[(programs * parts,)](
        *(q, k, v, *gradients, *intervals, *sums),
        *(strides(t) for t in (q, k, v, gradients.d_out, *sums)),
        *(_row_stride(first), _row_stride(query_start), q.shape[1], keys, q.shape[2]),
        *(scale, softcap or 1.0),
        SHAPE=shape_of(q, k, v, softcap, tile),
        PARTS=parts,
        **compiler_options(tile),
    )
    if parts > 1:
        for whole, part_sums in zip((dk, dv), sums, strict=True):
            whole.copy_(part_sums.view(rows, keys, kv_heads, parts, -1).sum(3))


def multiprocessors_of(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def parts_of_group(group: int, programs: int, multiprocessors: int) -> int:
    """Return into how many parts the query heads of a key head are divided for its gradient.

    The least that gives each multiprocessor two programs, since some see few queries and end early.

    Args:
        group: query heads per key head.
        programs: programs of the undivided gradient of keys.
        multiprocessors: of the device.
    """
    divisors = (parts for parts in range(1, group + 1) if group % parts == 0)
    return next((d for d in divisors if d * programs >= 2 * multiprocessors), group)


def _room_for_parts(gradient: Tensor, parts: int) -> Tensor:
    """Return fp32 [B, Sk, Hkv parts, D], for the sums of each part."""
    rows, keys, heads, width = gradient.shape
    return gradient.new_empty(rows, keys, heads * parts, width, dtype=torch.float32)


def _launch_queries(inputs: Inputs, gradients: OutputGradients, dq: Tensor) -> None:
    q, k, v, _, intervals, scale, softcap = inputs
    rows, queries, heads, _ = q.shape
    tile = tile_for(tiles_of(q.device).queries, q, v)
    queries_kernel[(triton.cdiv(queries, tile.m) * heads * rows,)](
        *(q, k, v, *gradients, intervals.first, intervals.last, dq),
        *(strides(t) for t in (q, k, v, gradients.d_out, dq)),
        *(_row_stride(intervals.first), queries, k.shape[1], heads, scale, softcap or 1.0),
        SHAPE=shape_of(q, k, v, softcap, tile),
        **compiler_options(tile),
    )


def rows_of(t: Tensor) -> Tensor:
    """Return t itself where its last elements lie side by side, as in views, else a copy."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def strides(t: Tensor) -> tuple[int, int, int]:
    """Return the strides of rows, tokens and heads of [B, S, H, D]."""
    return t.stride(0), t.stride(1), t.stride(2)


def _row_stride(index: Tensor) -> int:
    return 0 if index.shape[0] == 1 else index.stride(0)


def precision_of(q: Tensor) -> str:
    """Return the precision of fp32 products, by torch.set_float32_matmul_precision as in torch."""
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if tf32 else "ieee"


def shape_of(q: Tensor, k: Tensor, v: Tensor, softcap: float, tile: Tile) -> Shape:
    """Return the compile-time constants of a launch."""
    width, value_width = q.shape[3], v.shape[3]
    shape = Shape(
        D=width,
        V=value_width,
        BLOCK_D=padded(width),
        BLOCK_V=padded(value_width),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        GROUP=q.shape[2] // k.shape[2],
        HAS_CAP=softcap > 0,
        PRECISION=precision_of(q),
    )
    return constants(shape)


def compiler_options(tile: Tile) -> dict[str, int]:
    """Return what the compiler is told of a tile."""
    return {"num_warps": tile.warps, "num_stages": tile.stages}
