"""Multi-token prediction: values, documents, causality, counts, and a decoder that ignores it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import PackedDocuments
from nextpt.base.errors import ConfigError
from nextpt.data.batch import IGNORE_INDEX, Batch
from nextpt.exchange import export_hf, load_hf
from nextpt.exchange.decoder import load_model
from nextpt.model import Decoder, ModelSpec, count
from nextpt.model.rope import rotate
from nextpt.objective import Loss, next_token_loss
from tests.exchange.test_export_hf import their_logits
from tests.support.datasets import tiny
from tests.support.models import checkpoint_of, decoder, our_logits, some_tokens
from tests.support.tokenizers import KINDS

DEPTH = 2
LENGTHS = ((5, 11), (1, 2, 10, 3))  # of the documents in two rows; the last one is padding


def batch() -> Batch:
    """Two packed rows, with weights of their own for every token."""
    sequences = some_tokens(96, 17)
    ids, positions, targets = [], [], sequences[:, 1:].clone()
    for row, lengths in enumerate(LENGTHS):
        ids.append([n for n, length in enumerate(lengths) for _ in range(length)])
        positions.append([i for length in lengths for i in range(length)])
        ends = torch.tensor(lengths).cumsum(0) - 1
        targets[row, ends] = IGNORE_INDEX
    ids[1][-3:] = [-1] * 3
    targets[1, -3:] = IGNORE_INDEX
    weights = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) + 0.5
    weights = weights * (targets != IGNORE_INDEX)
    nothing = torch.zeros(2, 16, dtype=torch.int32)
    starts = torch.tensor([length for lengths in LENGTHS for length in lengths]).cumsum(0)
    return Batch(
        tokens=sequences[:, :-1],
        targets=targets,
        position_ids=torch.tensor(positions),
        document_ids=torch.tensor(ids, dtype=torch.int32),
        token_weights=weights,
        target_bytes=nothing,
        is_text=weights > 0,
        domain_ids=torch.zeros(2, dtype=torch.long),
        sequence_numbers=torch.arange(2),
        cu_seqlens=F.pad(starts, (1, 0)).to(torch.int32),
    )


def trained(**options: Any) -> Decoder:
    return decoder(**{"mtp_depth": DEPTH} | options)[1].train()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def plain_block(model: Decoder, k: int, x_TD: Tensor) -> Tensor:
    """Block of depth k on a whole document, written out."""
    p = {name.removeprefix(f"mtp.{k}.block."): v for name, v in model.named_parameters()}
    length, rope = len(x_TD), model._rope[model.spec.rope_base]
    cos, sin = (t[:length].unsqueeze(1) for t in rope)
    normed = rms(x_TD, p["attention_norm.weight"])
    q, key, v = (
        (normed @ p[f"attention.{n}_proj.weight"].T).view(length, -1, model.spec.head_dim)
        for n in "qkv"
    )
    q, key = rotate(q, cos, sin), rotate(key, cos, sin)
    key, v = (t.repeat_interleave(model.spec.heads // model.spec.kv_heads, 1) for t in (key, v))
    scores = torch.einsum("ihe,jhe->hij", q, key) * model.spec.head_dim**-0.5
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("hij,jhe->ihe", weights, v).reshape(length, -1)
    x_TD = x_TD + out @ p["attention.o_proj.weight"].T
    normed = rms(x_TD, p["ffn_norm.weight"])
    gate, up = (normed @ p[f"ffn.{n}_proj.weight"].T for n in ("gate", "up"))
    return x_TD + (F.silu(gate) * up) @ p["ffn.down_proj.weight"].T


def expected_losses(model: Decoder, packed: Batch) -> list[Tensor]:
    """Weighted sums of nats at each depth: every document alone, target by target."""
    residual: list[Tensor] = []
    handle = model.blocks[-1].register_forward_hook(lambda *a: residual.append(a[2][0]))
    p = dict(model.named_parameters())
    sums = [torch.zeros(()) for _ in range(DEPTH)]
    for row in range(2):
        for document in range(len(LENGTHS[row])):
            at = (packed.document_ids[row] == document).nonzero().flatten()
            if not len(at):
                continue
            tokens = packed.tokens[row, at]
            model(tokens[None], torch.arange(len(at))[None])
            h_TD = residual[-1][0]
            for k in range(1, min(DEPTH, len(at) - 1) + 1):
                m = f"mtp.{k - 1}"
                parts = (
                    rms(h_TD[:-1], p[f"{m}.hidden_norm.weight"]),
                    rms(p["embed_tokens.weight"][tokens[k:]], p[f"{m}.embedding_norm.weight"]),
                )
                h_TD = plain_block(
                    model, k - 1, torch.cat(parts, 1) @ p[f"{m}.projection.weight"].T
                )
                logits = rms(h_TD, p["final_norm.weight"]) @ p["lm_head.weight"].T
                targets, weights = packed.targets[row, at[k:]], packed.token_weights[row, at[k:]]
                nats = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
                sums[k - 1] = sums[k - 1] + (nats * weights).sum()
    handle.remove()
    return sums


def gradients(model: Decoder, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradient_are_those_of_a_plain_reference(recompute: bool) -> None:
    model, packed = trained(), batch()
    model.options = type(model.options)(activation_checkpointing=recompute)
    total = 40.0  # weights of other micro-batches included
    loss = next_token_loss(model, packed, total, mtp_weight=0.3)
    sums = expected_losses(model, packed)
    for k, expected in enumerate(sums, 1):
        contribution = float(loss.auxiliary_losses[f"mtp_{k}"])
        assert contribution == pytest.approx(0.3 / DEPTH * float(expected.detach()) / total)
    actual = gradients(model, loss.loss)
    main = next_token_loss(model.eval(), packed, total, mtp_weight=0.3)
    assert main.auxiliary_losses == {} and torch.equal(main.nats, loss.nats)
    model.train()
    reference = gradients(model, main.loss + 0.3 / DEPTH * sum(sums) / total)
    assert actual.keys() == reference.keys() == dict(model.named_parameters()).keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-6, msg=name)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "logits_scaling": 2.0},
    "tied": {"tied_embeddings": True, "ffn": "gelu"},
    "value residual": {"value_residual": True, "attention_gate": "head"},
    "pattern": {"depth": 3, "sliding_window": 4, "layer_pattern": ["global", "local"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_depth_k_depends_on_k_more_tokens_of_its_document_and_on_no_later(
    options: dict[str, Any],
) -> None:
    model, packed = trained(**options), batch()
    documents = PackedDocuments(packed.document_ids, packed.cu_seqlens)

    def outputs(tokens: Tensor) -> list[Tensor]:
        with torch.no_grad():
            output = model(tokens, packed.position_ids, documents)
        return [output.hidden, *output.mtp_hidden]

    before = outputs(packed.tokens)
    ids = packed.document_ids[0]
    for position in range(16):
        tokens = packed.tokens.clone()
        tokens[0, position] = (tokens[0, position] + 1) % 96
        for k, (old, new) in enumerate(zip(before, outputs(tokens), strict=True)):
            moved = (old[0] != new[0]).any(-1)
            assert not moved[: max(position - k, 0)].any(), (position, k)
            assert torch.equal(old[1], new[1])
            # Places whose k-th next token is of another document have no loss at this depth
            counted = torch.tensor([i + k < 16 and ids[i + k] == ids[i] for i in range(16)])
            assert not moved[counted & (ids != ids[position])].any(), (position, k)
            if position >= k and ids[position - k] == ids[position]:
                assert moved[position - k], (position, k)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_parameters_and_flops_by_formula_are_those_of_the_modules(options: dict[str, Any]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = trained(**options, attention="reference", cross_entropy="reference")
    counts = count(model.spec, 16)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.mtp_parameters == sum(p.numel() for p in model.mtp.parameters())
    served = count(model.spec.inference, 16)
    assert served.parameters == counts.parameters - counts.mtp_parameters
    assert served.non_embedding_parameters == counts.non_embedding_parameters
    if "sliding_window" not in options:
        with FlopCounterMode(display=False) as counter:
            next_token_loss(model, batch(), 1.0, mtp_weight=0.3).loss.backward()
        flops = counter.get_total_flops() / 32
        assert flops == pytest.approx(counts.training_flops_per_token, rel=0.03)


def loss_of(model: Decoder, **options: Any) -> Loss:
    return next_token_loss(model, batch(), 20.0, **options)


def test_depths_change_no_other_parameter_and_no_bit_of_the_main_loss() -> None:
    _, plain = decoder()
    model = trained()
    model.load_state_dict(plain.state_dict(), strict=False)
    main, both = loss_of(plain.train()), loss_of(model, mtp_weight=0.3)
    assert torch.equal(main.nats, both.nats) and bool(both.loss > main.loss)
    # A weight of zero leaves the gradient of the next-token loss
    expected = gradients(plain, main.loss)
    actual = gradients(model, loss_of(model, mtp_weight=0.0).loss)
    assert all(torch.equal(actual[name], gradient) for name, gradient in expected.items())
    fresh = Decoder(model.spec), Decoder(model.spec.inference)
    assert all(torch.equal(p, fresh[0].get_parameter(n)) for n, p in fresh[1].named_parameters())


def test_evaluation_and_export_leave_the_modules_out(tmp_path: Path) -> None:
    config, model = decoder(mtp_depth=DEPTH, qk_norm=True)
    _, loaded = load_model(checkpoint_of(config, model, tmp_path / "checkpoints"))
    tokens = some_tokens(96, 12)
    assert loaded.spec.mtp_depth == 0 and not len(loaded.mtp)
    assert torch.equal(our_logits(loaded, tokens), our_logits(model, tokens))
    assert loaded.spec.to_json() == decoder(qk_norm=True)[1].spec.to_json()


def test_an_exported_model_has_the_logits_of_the_next_token(tmp_path: Path) -> None:
    KINDS["byte_level"](tmp_path / "tokenizer.json")
    config, model = decoder(mtp_depth=DEPTH, qk_norm=True)
    checkpoint = checkpoint_of(config, model, tmp_path / "checkpoints")
    name = export_hf(checkpoint, tmp_path / "tokenizer.json", tmp_path / "hf")
    assert name == "Qwen3ForCausalLM" and load_hf(tmp_path / "hf").spec == model.spec.inference
    tokens = some_tokens(96, 12)
    torch.testing.assert_close(
        their_logits(tmp_path / "hf", tokens), our_logits(model, tokens), atol=1e-4, rtol=0
    )


def test_a_depth_beyond_the_sequence_is_refused() -> None:
    data = {"sequence_length": 8}
    tiny(Path("none"), Path("none"), data=data, model={"mtp_depth": 6})
    with pytest.raises(ConfigError, match=r"model\.mtp_depth = 7 predicts further ahead"):
        tiny(Path("none"), Path("none"), data=data, model={"mtp_depth": 7})


def test_specs_without_modules_have_the_json_of_before() -> None:
    assert "mtp_depth" not in ModelSpec.from_config(decoder()[0]).to_json()
