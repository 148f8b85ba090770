"""Muon: equals torch's on one rank; options; a bad step changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import _muon

from nextpt.base.errors import ConfigError
from nextpt.config import Config, OptimizerSection, load_config
from nextpt.model import ModelSpec, build_decoder, count, parameter_shapes
from nextpt.optim.guarded import GuardedOptimizer, Shard
from nextpt.optim.muon import Muon
from nextpt.optim.newton_schulz import orthogonalize
from nextpt.optim.registry import optimizer_spec
from tests.support.datasets import tiny

ROOT = Path(__file__).resolve().parents[2]

SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32)}


def section(**muon: Any) -> OptimizerSection:
    return OptimizerSection(kind="muon", lr=0.02, grad_clip=None, muon=muon)


def model() -> nn.ParameterDict:
    chance = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    return nn.ParameterDict({**tensors, "norm": torch.ones(24)})


def build(own: nn.ParameterDict, section: OptimizerSection, bad: list[bool]) -> GuardedOptimizer:
    """The optimizer on one rank, as at ZeRO stage 0."""
    spec, named = Muon(section), dict(own.items())
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    optimizer = spec.build(
        spec.torch_groups(named.items()), lambda: (torch.tensor(1.0), torch.tensor(bad[0]))
    )
    shards = [Shard(name, shapes[name], p, 0, 0, p.numel()) for name, p in named.items()]
    optimizer.attach(named.values(), shards)
    optimizer.connect(shapes, [g["params"] for g in optimizer.param_groups], None)
    for group in optimizer.param_groups:
        group["lr"] = section.lr * group["lr_factor"]
    return optimizer


def give_gradients(own: nn.ParameterDict, step: int) -> None:
    chance = torch.Generator().manual_seed(step)
    for parameter in own.values():
        parameter.grad = torch.randn(parameter.shape, generator=chance) * 10.0 ** (step % 3)


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torchs_muon(scale: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the iteration itself, which torch computes in bf16 whatever the device."""
    options = section(lr=0.05, scale=scale, nesterov=nesterov, weight_decay=0.1)
    ours, theirs = model(), model()
    optimizer = build(ours, options, [False])
    monkeypatch.setattr(
        _muon,
        "_zeropower_via_newtonschulz",
        lambda u, *arguments: orthogonalize(u, optimizer.iteration),
    )
    oracle = torch.optim.Muon(
        [theirs[name] for name in SHAPES],
        lr=0.05,
        weight_decay=0.1,
        momentum=0.95,
        nesterov=nesterov,
        adjust_lr_fn=scale,
    )
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        oracle.step()
    for name in SHAPES:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
        buffer = oracle.state[theirs[name]]["momentum_buffer"]
        momentum = optimizer.state[ours[name]]["momentum"]
        torch.testing.assert_close(momentum, buffer, rtol=1e-5, atol=1e-6)


def test_its_iteration_is_torchs_in_bf16() -> None:
    five = build(model(), section(), [False]).iteration
    for shape in SHAPES.values():
        u = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        theirs = _muon._zeropower_via_newtonschulz(u, five.coefficients[0], 5, 1e-7)
        ours = orthogonalize(u.bfloat16(), five)
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_other_parameters_are_stepped_by_adamw() -> None:
    ours, norm = model(), nn.Parameter(torch.ones(24))
    options = section()
    optimizer = build(ours, options, [False])
    oracle = torch.optim.AdamW([norm], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        give_gradients(ours, step)
        norm.grad = ours["norm"].grad.clone()
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(ours["norm"], norm)


def test_cautious_weights_decay_only_where_the_update_shrinks_them() -> None:
    moved = {}
    for name, muon in (
        ("none", {"weight_decay": 0.0}),
        ("all", {"weight_decay": 0.5}),
        ("cautious", {"weight_decay": 0.5, "cautious_weight_decay": True}),
    ):
        own = model()
        optimizer = build(own, section(**muon), [False])
        give_gradients(own, 0)
        before = own["square"].detach().clone()
        optimizer.step()
        moved[name] = own["square"].detach() - before
    shrinks = moved["none"] * before < 0
    assert 0.2 < shrinks.float().mean() < 0.8
    expected = torch.where(shrinks, moved["all"], moved["none"])
    torch.testing.assert_close(moved["cautious"], expected)


def test_normuon_makes_rows_alike_and_keeps_the_norm() -> None:
    own, plain = model(), model()
    options = {"weight_decay": 0.0, "scale": "original", "lr": 1.0}
    optimizers = [
        build(own, section(**options, normuon_beta=0.9), [False]),
        build(plain, section(**options), [False]),
    ]
    before = own["tall"].detach().clone()
    for weights, optimizer in zip((own, plain), optimizers, strict=True):
        give_gradients(weights, 0)
        weights["tall"].grad[0] *= 1e-3
        optimizer.step()
    rows = (own["tall"].detach() - before).norm(dim=1)
    torch.testing.assert_close(rows, rows.mean().expand(40), rtol=1e-3, atol=0)
    unequal = (plain["tall"].detach() - before).norm(dim=1)
    assert unequal[0] < 0.1 * unequal.mean()
    torch.testing.assert_close(rows.norm(), unequal.norm(), rtol=1e-3, atol=0)
    square = optimizers[0].whole_state["tall"]["row_square"]
    assert square.shape == (40,) and square.max() > 2 * square[0] > 0


@pytest.mark.parametrize("gradient", [float("nan"), 1.0])
def test_a_bad_step_changes_nothing(gradient: float) -> None:
    own, bad = model(), [False]
    optimizer = build(own, section(normuon_beta=0.9), bad)
    give_gradients(own, 0)
    optimizer.step()

    def everything() -> list[torch.Tensor]:
        values = [p.detach() for p in own.values()]
        values += [v for state in optimizer.state.values() for v in state.values()]
        values += [v for state in optimizer.whole_state.values() for v in state.values()]
        for name, parameter in own.items():
            shard = optimizer.shards[parameter][0]
            assert shard.name == name
            values.append(optimizer.last_update_squares(shard, 0.02, 1.0))
        return [value.clone() for value in values]

    before = everything()
    bad[0] = True
    for parameter in own.values():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    bad[0] = False
    optimizer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_matrices_of_blocks_go_to_muon_and_the_rest_to_adamw() -> None:
    own = {"embedding": {"lr": 0.3, "betas": (0.8, 0.95)}, "output": {"weight_decay": 0.0}}
    muon = {"lr": 0.04, "weight_decay": 0.2}
    config = tiny(
        Path("none"),
        Path("none"),
        model={"bias": True},
        optimizer={"kind": "muon", "muon": muon} | own,
    )
    decoder = build_decoder(config)
    names = {p: n for n, p in decoder.named_parameters()}
    spec = Muon(config.optimizer)
    groups = {g["name"]: g for g in spec.torch_groups(decoder.named_parameters())}
    members = {name: {names[p] for p in group["params"]} for name, group in groups.items()}
    assert members["muon"] == {n for n in names.values() if n.endswith("proj.weight")}
    assert len(members["muon"]) == 2 * 7
    assert members["embedding"] == {"embed_tokens.weight"}
    assert members["output"] == {"lm_head.weight"}
    assert sum(map(len, members.values())) == len(names)
    lrs = {name: config.optimizer.lr * group["lr_factor"] for name, group in groups.items()}
    assert lrs == pytest.approx({"muon": 0.04, "embedding": 0.3, "output": 3e-3, "no_decay": 3e-3})
    assert groups["muon"]["weight_decay"] == 0.2 and groups["output"]["weight_decay"] == 0.0
    assert groups["embedding"]["betas"] == (0.8, 0.95) and groups["output"]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("base_width", [None, 8])
@pytest.mark.parametrize(("gate", "group"), [("head", "gates"), ("element", "muon")])
def test_gates_of_heads_go_to_adamw_and_gates_of_elements_to_muon(
    gate: str, group: str, base_width: int | None
) -> None:
    """Gates of heads have the options of the matrices that AdamW steps."""
    model: dict[str, Any] = {"attention_gate": gate}
    if base_width:
        model |= {"parametrization": "mup", "base_width": base_width}
    configs = [
        tiny(Path("none"), Path("none"), model=model, optimizer={"kind": kind})
        for kind in ("muon", "adamw")
    ]
    muon, adamw = map(optimizer_spec, configs)
    shapes = parameter_shapes(ModelSpec.from_config(configs[0]))
    gates = {n: s for n, s in shapes.items() if "attention.gate_proj" in n}
    assert len(gates) == 2
    for name, shape in gates.items():
        steps, plain = muon.group_of(name, shape), adamw.group_of(name, shape)
        if group == "muon":
            assert steps.name == "muon" and set(muon.state_shapes(name, shape)) == {"momentum"}
        else:
            assert steps.name == ("gates" if base_width else "decay")
            assert steps in muon.groups
            assert (steps.options, steps.lr_factor) == (plain.options, plain.lr_factor)
            assert set(muon.state_shapes(name, shape)) == {"exp_avg", "exp_avg_sq"}


def test_state_is_one_number_per_weight_of_a_matrix() -> None:
    shapes = {"blocks.0.attention.q_proj.weight": (8, 6), "norm.weight": (6,)}
    assert Muon(section()).state_bytes(shapes) == 4 * 48 + 8 * 6
    assert Muon(section(normuon_beta=0.9)).state_bytes(shapes) == 4 * 48 + 4 * 8 + 8 * 6


def test_orthogonalization_is_a_small_part_of_a_step() -> None:
    """Below 1 % of the arithmetic of GPT-2's shape with half a million tokens per step."""
    shape = {"vocab_size": 50304, "depth": 12, "width": 768, "heads": 12, "kv_heads": 12}
    train = {"global_batch_size": 512, "micro_batch_size": 8}
    config: Config = tiny(
        Path("none"),
        Path("none"),
        model=shape | {"ffn_width": 2048},
        data={"sequence_length": 1024},
        train=train,
        optimizer={"kind": "muon"},
    )
    spec, model_spec = Muon(config.optimizer), ModelSpec.from_config(config)
    shapes = parameter_shapes(model_spec)
    flops = sum(spec.flops(s) for n, s in shapes.items() if spec.is_matrix(n, s))
    d, f = 768, 2048
    assert flops == 12 * 5 * (4 * (6 * d**3) + 3 * (4 * d * d * f + 2 * d**3))
    training = count(model_spec, 1024).training_flops_per_token * config.batches.consumed_tokens(1)
    assert flops / training < 0.01


def test_the_kind_alone_makes_another_optimizer() -> None:
    path = ROOT / "configs" / "demo.yaml"
    assert load_config(path).optimizer.muon is not None
    assert load_config(path, ["optimizer.kind=adamw"]).optimizer.muon is None


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            {"muon": {"momentum": 0.9}},
            "optimizer.muon is for optimizer.kind = muon, and no kind is set",
        ),
        ({"kind": "muon", "muon": {"scale": "original"}}, "set optimizer.muon.lr"),
        (
            {"kind": "muon", "muon": {"coefficients": "polar_express", "newton_schulz_steps": 6}},
            "polar_express has coefficients for 5 iterations",
        ),
        (
            {"kind": "muon", "muon": {"ns_steps": 5}},
            "did you mean optimizer.muon.newton_schulz_steps",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(Path("none"), Path("none"), optimizer=optimizer)


def test_a_tied_matrix_has_the_options_of_the_embedding() -> None:
    with pytest.raises(ConfigError, match=r"set optimizer\.embedding"):
        tiny(
            Path("none"),
            Path("none"),
            model={"tied_embeddings": True},
            optimizer={"output": {"lr": 0.1}},
        )


def test_the_rms_of_an_update_is_adamws() -> None:
    own = model()
    before = own["wide"].detach().clone()
    optimizer = build(own, section(weight_decay=0.0), [False])
    give_gradients(own, 0)
    optimizer.step()
    moved = (own["wide"].detach() - before).square().mean().sqrt() / 0.02
    assert float(moved) == pytest.approx(0.2, rel=0.2) and math.isfinite(float(moved))
