"""Decoder: counts by formula, causality, initialisation, key-value cache, rotary positions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels.attention import PackedDocuments
from nextpt.config import RopeScaling
from nextpt.model import KVCache, ModelSpec, build_decoder, count
from nextpt.model.rope import frequencies, rotate, tables
from tests.support.datasets import tiny

SHAPES = {
    "plain": {},
    "grouped": {"kv_heads": 1},
    "all heads": {"kv_heads": None},
    "qk-norm off": {"qk_norm": False},
    "gelu": {"ffn": "gelu"},
    "gate": {"attention_gate": "element"},
    "relu2": {"ffn": "relu2"},
    "tied": {"tied_embeddings": True},
    "bias": {"bias": True},
    "bias, gelu": {"bias": True, "ffn": "gelu"},
    "head_dim": {"head_dim": 16, "ffn_width": 24},
    "window": {"sliding_window": 5},
    "pattern": {"sliding_window": 5, "layer_pattern": ["local", "global"], "local_rope_base": 50.0},
}


def build(**model: object) -> tuple:
    base = {"vocab_size": 96, "depth": 2, "width": 32, "heads": 4, "kv_heads": 2, "qk_norm": True}
    config = tiny(Path("none"), Path("none"), model=base | model)
    return config, build_decoder(config)


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_by_formula_are_those_of_the_module(shape: str) -> None:
    config, model = build(**SHAPES[shape])
    counts = count(
        ModelSpec.from_config(config),
        config.data.sequence_length,
    )
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    embeddings = 96 * 32 * (1 if SHAPES[shape].get("tied_embeddings") else 2)
    assert counts.non_embedding_parameters == counts.parameters - embeddings


@pytest.mark.parametrize("shape", ["plain", "gelu", "head_dim", "gate"])
def test_flops_by_formula_are_those_of_the_matrix_products(shape: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config, model = build(**SHAPES[shape], attention="reference", cross_entropy="reference")
    length = config.data.sequence_length
    tokens = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        hidden = model(tokens, torch.arange(length).unsqueeze(0)).hidden
        model.lm_head(hidden[0], tokens[0], torch.ones(length), float(length)).loss.backward()
    assert counter.get_total_flops() / length == pytest.approx(
        count(
            ModelSpec.from_config(config),
            config.data.sequence_length,
        ).training_flops_per_token,
        rel=0.03,
    )


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("shape", ["plain", "grouped", "window", "pattern", "tied"])
def test_output_does_not_depend_on_later_tokens_or_other_documents(
    shape: str, attention: str
) -> None:
    _, model = build(**SHAPES[shape], attention=attention)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 96, (1, 20), generator=generator)
    ids = torch.tensor([[0] * 8 + [1] * 12], dtype=torch.int32)
    positions = torch.cat([torch.arange(8), torch.arange(12)]).unsqueeze(0)

    def logits(t: torch.Tensor) -> torch.Tensor:
        return model.lm_head(model(t, positions, PackedDocuments(ids)).hidden)[0]

    before = logits(tokens)
    for position in range(20):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 96
        moved = (logits(changed) != before).any(-1)
        document = ids[0] == ids[0, position]
        assert not moved[:position].any(), f"token {position} reaches back"
        assert not moved[~document].any(), f"token {position} reaches another document"
        assert moved[position], (
            f"token {position} does not reach its own output: the test sees nothing"
        )


def test_gradient_of_an_output_stays_in_its_past() -> None:
    _, model = build()
    embedded = torch.randn(1, 12, 32, requires_grad=True)
    ids = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    positions = torch.arange(12).unsqueeze(0)
    model.embed_tokens.forward = lambda tokens: embedded
    out = model(torch.zeros(1, 12, dtype=torch.long), positions, PackedDocuments(ids)).hidden
    for i in range(12):
        (gradient,) = torch.autograd.grad(out[0, i].sum(), embedded, retain_graph=True)
        reached = gradient[0].ne(0).any(-1).tolist()
        assert reached == [j <= i and (j < 5) == (i < 5) for j in range(12)]


def test_initial_values_depend_on_seed_and_name_only() -> None:
    _, model = build()
    torch.randn(10)
    _, repeated = build()
    _, deeper = build(depth=3)
    for name, p in model.named_parameters():
        assert torch.equal(p, repeated.get_parameter(name)), name
        if "o_proj" not in name and "down_proj" not in name:
            assert torch.equal(p, deeper.get_parameter(name)), name
    assert not torch.equal(
        model.blocks[0].attention.q_proj.weight, model.blocks[1].attention.q_proj.weight
    )
    assert model.blocks[0].ffn.down_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.1)
    assert model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_capped_logits_are_those_of_the_loss() -> None:
    """Generation and the loss use the same cap, also with tied embeddings."""
    _, model = build(logit_softcap=2.0, tied_embeddings=True, init_std=0.5)
    hidden = model(torch.arange(12).unsqueeze(0), torch.arange(12).unsqueeze(0)).hidden[0]
    targets = torch.arange(12)
    logits = model.lm_head(hidden)
    assert 1.0 < logits.abs().max() < 2.0
    nats = model.lm_head(hidden, targets).nats
    torch.testing.assert_close(
        nats, torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    )


def test_cache_gives_the_same_logits_as_the_whole_text() -> None:
    _, model = build()
    model.eval()
    tokens = torch.randint(0, 96, (1, 15), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(15).unsqueeze(0)
    with torch.no_grad():
        whole = model(tokens, positions).hidden
        cache = KVCache.empty(model.spec, 1, 15, dtype=torch.float32, device=torch.device("cpu"))
        parts = [
            model(tokens[:, a:b], positions[:, a:b], cache=cache).hidden
            for a, b in ((0, 6), (6, 7), (7, 12), (12, 15))
        ]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_rotation_depends_on_the_distance_only() -> None:
    cos, sin = tables(40, 16, 10000.0, None)
    q, k = torch.randn(2, 1, 1, 1, 16)

    def score(i: int, j: int) -> float:
        return float(
            (
                rotate(q, cos[i].view(1, 1, 1, -1), sin[i].view(1, 1, 1, -1))
                * rotate(k, cos[j].view(1, 1, 1, -1), sin[j].view(1, 1, 1, -1))
            ).sum()
        )

    assert score(5, 2) == pytest.approx(score(30, 27), abs=1e-4)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_scaling_keeps_fast_and_stretches_slow_frequencies(kind: str) -> None:
    scaling = RopeScaling(kind=kind, factor=8.0, original_max_position=1024)
    plain, scaled = frequencies(64, 10000.0, None), frequencies(64, 10000.0, scaling)
    assert float(scaled[-1]) == pytest.approx(float(plain[-1]) / 8)
    assert float(scaled[0]) == pytest.approx(float(plain[0]) / (8 if kind == "linear" else 1))
    assert (scaled <= plain + 1e-12).all() and (scaled >= plain / 8 - 1e-12).all()
