"""Which attention a run on CUDA would take; nothing of it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import choice
from kernels.choice import choose_attention
from nextpt.config import load_config
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
