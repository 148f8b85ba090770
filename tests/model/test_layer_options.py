"""Options of layers: values against a plain reference, what a layer sees, cache and counts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.attention import PackedDocuments
from nextpt.base.errors import ConfigError
from nextpt.config import Config, parse_config
from nextpt.generate.decoding import DecodingBatch
from nextpt.model import Decoder, KVCache, ModelSpec, build_decoder, count
from nextpt.train import startup_checks
from tests.config.test_config import values
from tests.support.datasets import tiny
from tests.support.models import decoder, our_logits

PATTERN = {
    "depth": 3,
    "sliding_window": 5,
    "layer_pattern": ["local", "global"],
    "local_rope_base": 100.0,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "pattern": PATTERN,
    "relu2": {"ffn": "relu2", "bias": True},
    "gates of heads": {"attention_gate": "head", "qk_norm": True},
    "gates of elements": PATTERN | {"attention_gate": "element", "bias": True},
    "value residuals": PATTERN | {"value_residual": True},
    "multipliers": {"residual_multiplier": 0.3, "logits_scaling": 3.0},
    "sinks": {"attention_sinks": True},
    "sinks, pattern": PATTERN | {"attention_sinks": True},
    "pattern, qk_norm": PATTERN | {"qk_norm": True},
}


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x_THE: Tensor, base: float) -> Tensor:
    """Rotation of the pairs (i, i + E/2) as a product of complex numbers."""
    length, _, width = x_THE.shape
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(length).double().outer(frequencies).unsqueeze(1)
    pairs = torch.complex(*x_THE.double().chunk(2, -1)) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.cat((pairs.real, pairs.imag), -1).float()


def attended(
    spec: ModelSpec, attention: Any, x_TD: Tensor, kind: str, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of one row, head by head, with a mask by the definition; and its values."""
    length = len(x_TD)
    base, window = (
        (spec.local_rope_base, spec.sliding_window) if kind == "local" else (spec.rope_base, length)
    )
    q, k, v = (
        projection(x_TD).view(length, -1, spec.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if spec.value_residual and first is not None:
        v = (1 - attention.value_share) * v + attention.value_share * first
    if spec.qk_norm:
        q = rms(q, attention.q_norm.weight, spec.norm_eps)
        k = rms(k, attention.k_norm.weight, spec.norm_eps)
    q, k = rotated(q, base), rotated(k, base)
    outputs = []
    for head in range(spec.heads):
        group = head // (spec.heads // spec.kv_heads)
        scores = q[:, head] @ k[:, group].T / spec.head_dim**0.5
        for i in range(length):
            for j in range(length):
                if not 0 <= i - j < window:
                    scores[i, j] = -torch.inf
        weights = scores.exp()
        total = weights.sum(1, keepdim=True)
        if spec.attention_sinks:
            total += attention.sinks[head].exp()
        outputs.append(weights / total @ v[:, group])
    if spec.attention_gate != "none":
        gates = attention.gate_proj(x_TD).chunk(spec.heads, 1)  # [T, 1 or E] of each head
        outputs = [out / (1 + (-gate).exp()) for out, gate in zip(outputs, gates, strict=True)]
    return attention.o_proj(torch.cat(outputs, 1)), v


def fed_forward(spec: ModelSpec, ffn: Any, x_TD: Tensor) -> Tensor:
    up = ffn.up_proj(x_TD)
    if spec.ffn == "relu2":
        return ffn.down_proj(torch.where(up > 0, up * up, 0.0))
    gate = ffn.gate_proj(x_TD)
    return ffn.down_proj(gate / (1 + (-gate).exp()) * up)


def reference_logits(model: Decoder, tokens_T: Tensor) -> Tensor:
    """The model's computation in plain torch, written from the options' definitions."""
    spec = model.spec
    x = model.embed_tokens.weight[tokens_T]
    first = None
    for block, kind in zip(model.blocks, spec.layer_pattern, strict=True):
        normed = rms(x, block.attention_norm.weight, spec.norm_eps)
        out, v = attended(spec, block.attention, normed, kind, first)
        first = v if first is None else first
        x = x + spec.residual_multiplier * out
        normed = rms(x, block.ffn_norm.weight, spec.norm_eps)
        x = x + spec.residual_multiplier * fed_forward(spec, block.ffn, normed)
    logits = rms(x, model.final_norm.weight, spec.norm_eps) @ model.lm_head.weight.T
    return logits / spec.logits_scaling


def some_tokens(length: int) -> Tensor:
    return torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_are_those_of_a_plain_reference(option: str) -> None:
    _, model = decoder(**OPTIONS[option])
    tokens = some_tokens(14)
    with torch.no_grad():
        expected = reference_logits(model, tokens[0])
    torch.testing.assert_close(our_logits(model, tokens)[0], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_cached_left_padded_rows_give_the_logits_of_whole_texts(option: str) -> None:
    _, model = decoder(**OPTIONS[option])
    texts = [some_tokens(12)[0].tolist(), some_tokens(9)[0].tolist()]
    batch = DecodingBatch(model, [texts[0][:6], texts[1][:3]], 12)
    batch.take([1, 0])
    for step in range(6):
        batch.append(torch.tensor([texts[1][3 + step], texts[0][6 + step]]))
    expected = torch.stack([our_logits(model, torch.tensor([t]))[0, -1] for t in texts[::-1]])
    torch.testing.assert_close(batch.logits_BV, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_counts_and_cache_are_those_of_the_module(option: str) -> None:
    config, model = decoder(**OPTIONS[option])
    length = 12
    counts = count(ModelSpec.from_config(config), length)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    cache = KVCache.empty(model.spec, 1, length, dtype=torch.float32, device=torch.device("cpu"))
    model(some_tokens(length), torch.arange(length).unsqueeze(0), cache=cache)
    # A window of w keeps w - 1 tokens between calls
    kept = sum(2 * t.numel() for t in cache.keys)
    local = sum(window is not None for window in cache.windows)
    assert counts.cache_elements == kept + local * 2 * model.spec.kv_heads * model.spec.head_dim


@pytest.mark.parametrize("option", OPTIONS)
def test_recomputed_activations_give_the_same_gradients(option: str) -> None:
    gradients = []
    for recompute in (False, True):
        config, _ = decoder(**OPTIONS[option])
        train = config.train.model_copy(update={"activation_checkpointing": recompute})
        model = build_decoder(config.model_copy(update={"train": train}))
        model(some_tokens(12), torch.arange(12).unsqueeze(0)).hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items())


@pytest.mark.parametrize("pattern", [("local",), ("global", "local"), ("local", "local", "global")])
def test_each_layer_sees_its_window_of_its_document(pattern: Sequence[str]) -> None:
    """What an output depends on, by gradient, is the product of the layers' masks."""
    _, model = decoder(depth=len(pattern), sliding_window=3, layer_pattern=pattern)
    ids = torch.tensor([[0] * 9 + [1] * 5])
    positions = torch.cat((torch.arange(9), torch.arange(5))).unsqueeze(0)
    embedded = torch.randn(1, 14, 32, requires_grad=True)
    model.embed_tokens.forward = lambda tokens: embedded
    out = model(torch.zeros(1, 14, dtype=torch.long), positions, PackedDocuments(ids)).hidden
    distance = torch.arange(14).unsqueeze(1) - torch.arange(14)
    past = (distance >= 0) & (ids[0].unsqueeze(1) == ids[0])
    masks = [past & (distance < 3) if kind == "local" else past for kind in pattern]
    expected = reduce(torch.matmul, [mask.float() for mask in masks]) > 0
    for i in range(14):
        (gradient,) = torch.autograd.grad(out[0, i].sum(), embedded, retain_graph=True)
        assert torch.equal(gradient[0].ne(0).any(-1), expected[i]), i


@pytest.mark.parametrize(("window", "length"), [(5, 40), (40, 40), (64, 30)])
def test_flops_of_a_window_count_the_keys_that_are_seen(window: int, length: int) -> None:
    config, _ = decoder(depth=4, sliding_window=window, layer_pattern=["local", "global"])
    counts = count(ModelSpec.from_config(config), length)
    seen = [min(i + 1, window) for i in range(length)]
    keys = 2 * sum(seen) / length + 2 * (length + 1) / 2
    attention = counts.causal_flops_per_token - 6 * counts.matmul_parameters
    # Half a key per layer: the formulas take T / 2 where (T + 1) / 2 are seen
    assert attention == pytest.approx(12 * 4 * 8 * keys, abs=12 * 4 * 8 * 4 * 0.5)
    whole = counts.training_flops_per_token - 6 * counts.matmul_parameters
    assert whole == 12 * 4 * 8 * (2 * min(window, length) + 2 * length)


def test_a_pattern_repeats_from_the_last_layer() -> None:
    pattern = ["local", "local", "global"]
    options = {"sliding_window": 5, "layer_pattern": pattern, "local_rope_base": 50.0}
    kinds = decoder(depth=7, **options)[1].spec
    assert [kind[0] for kind in kinds.layer_pattern] == ["g", "l", "l", "g", "l", "l", "g"]
    assert kinds.windows == (None, 5, 5, None, 5, 5, None)
    assert kinds.to_json()["layer_pattern"] == pattern
    assert kinds.to_json()["local_rope_base"] == 50.0
    assert set(decoder(sliding_window=5)[1].spec.layer_pattern) == {"local"}
    assert set(decoder()[1].spec.layer_pattern) == {"global"}


def test_a_spec_without_options_has_the_json_of_earlier_versions() -> None:
    """Compressed files are identified by a hash of it."""
    names = (
        "vocab_size depth width heads kv_heads head_dim ffn ffn_width max_position rope_base"
        " rope_scaling qk_norm tied_embeddings bias norm_eps init_std logit_softcap sliding_window"
    )
    assert decoder(sliding_window=5)[1].spec.to_json().keys() == set(names.split())


REFUSED = {
    "long": (
        {"layer_pattern": ["local"] * 3, "sliding_window": 5},
        "model.layer_pattern has 3 layers, more than model.depth = 2; shorten it",
    ),
    "no window": ({"layer_pattern": ["local", "global"]}, "model.sliding_window is not set; set"),
    "no local layer": (
        {"layer_pattern": ["global"], "sliding_window": 5},
        "model.sliding_window = 5 has no effect, since model.layer_pattern has no local layer",
    ),
    "no local base": (
        {"local_rope_base": 5.0},
        "model.local_rope_base = 5.0 has no effect without local layers",
    ),
    "empty": ({"layer_pattern": []}, r"model.layer_pattern = \[\]: tuple should have at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_without_effect_are_refused(case: str) -> None:
    model, message = REFUSED[case]
    section = values()["model"] | {"depth": 2} | model
    with pytest.raises(ConfigError, match=message) as raised:
        parse_config(values(model=section), "test")
    assert "\n" not in str(raised.value)


def test_zero_initialisation_makes_blocks_the_identity() -> None:
    model, zero = (
        build_decoder(tiny(Path("none"), Path("none"), model={"residual_init": kind}))
        for kind in ("scaled", "zero")
    )
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            assert p.any() and not zero.get_parameter(name).any(), name
        else:
            assert torch.equal(p, zero.get_parameter(name)), name
    tokens = some_tokens(9)
    hidden = zero(tokens, torch.arange(9).unsqueeze(0)).hidden
    assert torch.equal(hidden, zero.final_norm(zero.embed_tokens(tokens)))


def test_sinks_of_zero_are_one_more_key_of_score_zero() -> None:
    """At the start; and the check at the start runs with them."""
    config = tiny(Path("none"), Path("none"), model={"attention_sinks": True})
    model = build_decoder(config)
    sinks = [p for name, p in model.named_parameters() if name.endswith("sinks")]
    assert len(sinks) == 2 and all(p.shape == (4,) and not p.any() for p in sinks)
    startup_checks.check_causality(config, torch.device("cpu"))
    refused = tiny(Path("none"), Path("none"), model={"attention_sinks": True, "attention": "sdpa"})
    with pytest.raises(ConfigError, match=r"model.attention = sdpa: .* it has no sinks"):
        startup_checks.check_causality(refused, torch.device("cpu"))


def test_every_window_is_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[int | None] = []
    monkeypatch.setattr(
        startup_checks, "check_attention", lambda *_, window, **__: windows.append(window)
    )
    config: Config = tiny(Path("none"), Path("none"), model=PATTERN)
    startup_checks.check_causality(config, torch.device("cpu"))
    assert windows == [None, 5]


def test_our_attention_is_compared_in_the_shapes_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = PATTERN | {"attention": "triton", "attention_sinks": True}
    config = tiny(Path("none"), Path("none"), model=model)
    asked = []

    def difference(run: object, device: object, dtype: object, **heads: object) -> str:
        asked.append(heads)
        return "it fails: OutOfResources: shared memory"

    monkeypatch.setattr(startup_checks, "difference", difference)
    with pytest.raises(ConfigError, match=r"= triton: triton does .* OutOfResources"):
        startup_checks.check_causality(config, torch.device("cpu"))
    spec = ModelSpec.from_config(config)
    group = spec.heads // spec.kv_heads
    head_dim = {"head_dim": spec.head_dim, "group": group}
    assert asked == [{"window": None, "sinks": True} | head_dim]
