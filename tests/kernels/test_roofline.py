"""Bounds from compiled code: what is counted in a loop, and what is made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kernels.bench.roofline import (
    MMA_SYNC,
    Cycles,
    backward,
    cycles_of,
    matrix_operations,
    operand_bytes,
    shared_bytes,
    tile_loops,
)

CODE = """
.L_x_1:
        /*0100*/                   MUFU.EX2 R5, R5 ;
        /*0110*/              @!P0 FFMA R6, R5, R4, R3 ;
.L_x_2:
        /*0120*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0130*/              @!PT LDS RZ, [RZ] ;
        /*0140*/                   MUFU.EX2 R5, R5 ;
        /*0150*/               @P0 BRA `(.L_x_2) ;
        /*0160*/              @!P1 BRA `(.L_x_1) ;
        /*0170*/               @P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0180*/                   MUFU.EX2 R5, R5 ;
        /*0190*/                   BRA `(.L_x_4);
.L_x_3:
        /*01a0*/                   EXIT ;
"""


def test_loops_are_innermost_with_products_and_exponentials() -> None:
    names = [[name for name, _ in loop] for loop in tile_loops(CODE)]
    assert names == [["HMMA.16816.F32.BF16", "LDS", "MUFU.EX2", "BRA"]]


def test_work_of_instructions() -> None:
    assert matrix_operations("HMMA.16816.F32.BF16") == 4096
    assert matrix_operations("HGMMA.64x128x16.F32.BF16") == 64 * 128 * 16 * 2 // 4
    assert matrix_operations("FFMA") == 0
    both, right = "R24, gdesc[UR20], R24", " R88, R152, gdesc[UR16].tnspB, R88"
    assert operand_bytes("HGMMA.64x128x16.F32.BF16", both) == 2 * 16 * (64 + 128) / 4
    assert operand_bytes("HGMMA.64x128x16.F32.BF16", right) == 2 * 16 * 128 / 4
    widths = {"LDS": 128, "LDS.128": 512, "STS.U16": 64, "LDSM.16.M88.4": 512, "LDSM.16.M88": 128}
    assert {name: shared_bytes(name) for name in widths} == widths
    assert shared_bytes("LDG.E.128") == 0


def test_cycles_of_a_loop() -> None:
    body = [("HMMA.16816", ""), ("FFMA", ""), ("FADD", ""), ("MUFU.EX2", ""), ("IADD3", "")]
    body += [("UIADD3", ""), ("LDS.128", ""), ("BAR.SYNC", "")]
    operations = 2 * 4096  # of which two warps compute all
    # Four warps: 128 threads, of which 128, 16 and 64 work in a cycle
    assert cycles_of(body, 4, "sm_86", operations) == Cycles(8.0, 16.0, 8.0, 2.0, 2.0, 16.0, 8.0)
    assert cycles_of(body, 4, "sm_80", operations)[1:4] == (8.0, 8.0, 4.0)
    assert cycles_of(body, 4, "sm_90", operations).matrix == pytest.approx(4 / MMA_SYNC)


def test_bounds() -> None:
    cycles = Cycles(400.0, 600.0, 100.0, 50.0, 200.0, 0.0, 150.0)
    assert (cycles.overlapped, cycles.serial) == (2 / 3, 0.5)
    assert Cycles(100.0, 100.0, 400.0, 0.0, 0.0, 0.0, 0.0).overlapped == 0.25
    assert backward(1.0, 1.0) == pytest.approx(5 / 7)


@pytest.mark.slow
def test_every_loop_multiplies_a_tile() -> None:
    """The command refuses code whose loop has fewer products than a tile has."""
    for target in ("sm_86", "sm_90", "sm_100"):
        completed = subprocess.run(
            [sys.executable, "-m", "kernels.bench.roofline", "--target", target, "--json"],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
            check=False,
        )
        assert completed.returncode == 0, completed.stderr[-3000:]
        table = json.loads(completed.stdout)
        assert len(table) == 12
        assert all(0 < row["serial"] < row["overlapped"] <= 1 for row in table.values()), table
