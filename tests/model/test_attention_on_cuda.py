"""Which attention a run on CUDA would take; nothing of it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention

from kernels import choice
from kernels.attention import PackedDocuments, interface
from kernels.choice import choose_attention
from nextpt.config import load_config
from nextpt.model.init import Init
from nextpt.model.layers import Block
from nextpt.model.spec import ComputeOptions, ModelSpec
from nextpt.train.engine import compiles_blocks
from nextpt.train.startup_checks import attention_features_of

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_shipped_config_writes_out_all_scores_or_their_mask(
    path: Path, precision: str, sinks: bool
) -> None:
    stage = max(load_config(path).train.zero_stage, 1)  # DeepSpeed's bf16 needs one
    overrides = [f"train.precision={precision}", f"train.zero_stage={stage}"]
    config = load_config(path, [*overrides, f"model.attention_sinks={str(sinks).lower()}"])
    assert config.model.attention == "auto"
    for features in attention_features_of(config, "cuda").values():
        chosen = choose_attention("auto", "cuda", features)
        assert "documents" in features and not features & chosen.slow_on_cuda
        assert chosen.name == ("varlen" if precision == "bf16" and not sinks else "flex")


@pytest.mark.parametrize(
    ("features", "names"),
    [
        ({"bf16"}, ["sdpa", "flash_attn", "varlen", "flex", "triton", "reference"]),
        ({"fp32"}, ["sdpa", "flex", "triton", "reference"]),
        ({"bf16", "documents", "window"}, ["flash_attn", "varlen", "flex", "triton", "reference"]),
        ({"fp32", "documents"}, ["flex", "triton", "reference"]),
        ({"bf16", "softcap", "documents"}, ["flash_attn", "flex", "triton", "reference"]),
        ({"bf16", "sinks", "documents"}, ["flex", "triton", "reference"]),
        ({"bf16", "lse", "offsets"}, ["flex", "triton", "reference"]),
        ({"fp64", "documents"}, ["reference"]),
        ({"fp64"}, ["reference"]),
    ],
)
def test_order_on_cuda_is_that_of_the_table(
    features: set[str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/kernels.md: with everything installed, and each in turn missing."""
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: object())
    table = dict(choice.ATTENTION)
    for name in names:
        chosen = choice.choose(table, choice.ATTENTION_ORDER, "auto", "cuda", features)
        assert chosen.name == name
        table[name] = choice.Implementation(name, frozenset())
    with pytest.raises(ValueError, match="no implementation on cuda"):
        choice.choose(table, choice.ATTENTION_ORDER, "auto", "cuda", features)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_blocks_are_compiled_on_cuda(path: Path) -> None:
    config = load_config(path)
    assert compiles_blocks(config, "cuda") == (config.train.zero_stage < 3)
    assert compiles_blocks(config, "cpu") == (path.stem == "shakespeare")
    for value in (True, False):
        assert compiles_blocks(load_config(path, [f"train.compile={value}"]), "cpu") == value


@pytest.mark.parametrize("name", ["sdpa", "varlen", "flex", "triton"])
def test_a_block_is_compiled_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of the 7B model, without a break of the graph.

    On the meta device, since torch without CUDA cannot trace tensors on CUDA.
    """
    implementation = replace(choice.ATTENTION[name], devices=frozenset({"meta"}))
    monkeypatch.setitem(choice.ATTENTION, name, implementation)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(interface, "autocast", lambda *tensors: tensors)  # meta has none
    config = load_config(Path("configs/7b.yaml"))
    spec, counter = ModelSpec.from_config(config), CompileCounter()
    options = ComputeOptions(attention=name)
    with torch.device("meta"):
        block = Block(spec, Init(0, 0.02, spec.rules), "blocks.0", 0, options).to(torch.bfloat16)
        x = torch.empty(1, 4096, spec.width, dtype=torch.bfloat16, requires_grad=True)
        angle = torch.empty(1, 4096, 1, spec.head_dim // 2)
        starts = torch.zeros(33, dtype=torch.int32)
        documents = PackedDocuments(torch.zeros(1, 4096, dtype=torch.int32), starts)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for _ in range(2):  # of two layers the second finds the mask
        out, _ = compiled(x, (angle, angle), documents)
        assert out.shape == x.shape and out.requires_grad
    assert 1 <= counter.frame_count <= 2
