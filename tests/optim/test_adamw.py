"""AdamW: equals torch's with clipping; a bad step changes nothing; never waits for the device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nextpt.config import OptimizerSection, to_yaml
from nextpt.model import build_decoder
from nextpt.optim.adamw import AdamW
from nextpt.optim.guarded import Shard
from nextpt.optim.registry import optimizer_spec
from tests.support.commands import run_script
from tests.support.datasets import tiny

SECTION = OptimizerSection(lr=0.01, weight_decay=0.1, grad_clip=1.0)


def test_it_is_adamw_with_clipping() -> None:
    ours, theirs = (torch.nn.Linear(8, 4) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    norm = [0.0]
    guarded = AdamW(SECTION).build(
        [{"params": list(ours.parameters()), "weight_decay": 0.1}],
        lambda: (torch.tensor(norm[0]), torch.tensor(False)),
    )
    plain = torch.optim.AdamW(
        theirs.parameters(), lr=0.01, betas=SECTION.betas, eps=SECTION.eps, weight_decay=0.1
    )
    for step in range(5):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) * (
            10 if step % 2 else 0.01
        )
        for model, optimizer in ((ours, guarded), (theirs, plain)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        norm[0] = float(torch.nn.utils.get_total_norm([p.grad for p in ours.parameters()]))
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        guarded.step()
        plain.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_groups_have_rates_decay_and_epsilon_of_the_parametrization() -> None:
    """As AdamW of torch with the options of each group; a bad step changes nothing."""
    base = {"parametrization": "completep", "base_width": 8, "base_depth": 1}
    section = {"lr": 0.01, "eps": 1e-2, "grad_clip": None, "decay_embeddings": True}
    config = tiny(Path("none"), Path("none"), model=base, optimizer=section)
    model, spec, bad = build_decoder(config), optimizer_spec(config), [False]
    named = dict(model.named_parameters())
    torch_model = build_decoder(config)
    theirs = dict(torch_model.named_parameters())
    groups = spec.torch_groups(named.items())
    guarded = spec.build(groups, lambda: (torch.tensor(1.0), torch.tensor(bad[0])))
    shards = {n: Shard(n, tuple(p.shape), p, 0, 0, p.numel()) for n, p in named.items()}
    guarded.attach(named.values(), shards.values())
    for group in guarded.param_groups:
        group["lr"] = 0.01 * group["lr_factor"]
    own = {
        "embed_tokens.weight": (0.01, 0.1, 1e-2 / 4),
        "lm_head.weight": (0.01, 0.1, 1e-2 / 4),
        "final_norm.weight": (0.01, 0.0, 1e-2 / 4),
    }
    block = {2: (0.01 / 4, 0.4, 1e-2 / 8), 1: (0.01, 0.0, 1e-2 / 8)}
    plain = torch.optim.AdamW(
        [
            {"params": [p], "lr": lr, "weight_decay": weight_decay, "eps": eps}
            for n, p in theirs.items()
            for lr, weight_decay, eps in [own.get(n, block[p.dim()])]
        ],
        betas=config.optimizer.betas,
    )
    chance = torch.Generator().manual_seed(0)
    for step in range(4):
        bad[0] = step == 1
        before = {n: p.detach().clone() for n, p in named.items()}
        for n, p in named.items():
            p.grad = torch.randn(p.shape, generator=chance) * 1e-2
            theirs[n].grad = p.grad.clone()
        guarded.step()
        if bad[0]:
            assert all(torch.equal(p, before[n]) for n, p in named.items())
            continue
        plain.step()
        updates = guarded.scalars()["optimizer_updates"]
        for n, p in named.items():
            torch.testing.assert_close(p, theirs[n], rtol=1e-5, atol=1e-6)
            moved = float((p.detach() - before[n]).norm())
            computed = guarded.last_update_squares(shards[n], 0.01, updates)[0]
            assert float(computed.sqrt()) == pytest.approx(moved, rel=3e-3), n


@pytest.mark.parametrize("norm", [float("nan"), float("inf"), -1.0, 50.0])
def test_a_bad_step_changes_nothing(norm: float) -> None:
    model = torch.nn.Linear(4, 4)
    current = [1.0]
    spec = AdamW(SECTION)
    optimizer = spec.build(
        spec.torch_groups(model.named_parameters()),
        lambda: (torch.tensor(current[0]), torch.tensor(current[0] != 1.0)),
    )

    def step(gradient: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.step()

    step(0.1)
    before = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in s.items()} for s in optimizer.state.values()]
    current[0] = norm
    step(norm)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(
        torch.equal(a[k], b[k])
        for a, b in zip(states, optimizer.state.values(), strict=True)
        for k in a
    )
    current[0] = 1.0
    step(0.1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_only_matrices_of_blocks_decay() -> None:
    config = tiny(Path("none"), Path("none"), model={"bias": True})
    model = build_decoder(config)
    names = {p: n for n, p in model.named_parameters()}
    decay, keep = AdamW(config.optimizer).torch_groups(model.named_parameters())
    assert decay["weight_decay"] == 0.1 and keep["weight_decay"] == 0.0
    assert all(
        names[p].endswith("proj.weight") or names[p] == "lm_head.weight" for p in decay["params"]
    )
    assert len(decay["params"]) == 2 * 7 + 1 and len(decay["params"]) + len(keep["params"]) == len(
        names
    )


def test_a_part_of_the_parameters_has_options_of_its_own() -> None:
    options = {"lr": 0.5, "betas": [0.8, 0.9]}
    config = tiny(
        Path("none"),
        Path("none"),
        optimizer={"lr": 0.1, "embedding": options, "vectors": {"lr": 0.2}},
    )
    spec, model = AdamW(config.optimizer), build_decoder(config)
    names = {p: n for n, p in model.named_parameters()}
    groups = {g["name"]: g for g in spec.torch_groups(model.named_parameters())}
    assert groups.keys() == {"decay", "embedding", "vectors"}
    assert [names[p] for p in groups["embedding"]["params"]] == ["embed_tokens.weight"]
    assert groups["embedding"]["lr_factor"] == pytest.approx(5)
    assert groups["embedding"]["betas"] == (0.8, 0.9) and groups["decay"]["betas"] == (0.9, 0.95)
    assert groups["embedding"]["weight_decay"] == groups["vectors"]["weight_decay"] == 0
    assert all(names[p].endswith("norm.weight") for p in groups["vectors"]["params"])
    assert spec.build(list(groups.values()), lambda: (torch.ones(()), torch.tensor(False)))


@pytest.mark.process
def test_a_step_reads_nothing_from_the_device(dataset: Path, tmp_path: Path) -> None:
    files = []
    muon = {"kind": "muon", "lr": 3e-3, "muon": {"normuon_beta": 0.9}}
    for stage, precision, optimizer in (
        (0, "fp32", {}),
        (1, "bf16", {}),
        (2, "bf16", {}),
        (3, "bf16", {}),
        (2, "fp32", {}),
        (0, "fp32", muon),
        (3, "bf16", muon),
    ):
        train = {
            "zero_stage": stage,
            "precision": precision,
            "steps": 4,
            "global_batch_size": 4,
            "micro_batch_size": 2,
        }
        config = tiny(dataset, tmp_path / "run", train=train, optimizer=optimizer)
        files.append(tmp_path / f"{config.optimizer.kind}-{precision}-{stage}.yaml")
        files[-1].write_text(to_yaml(config))
    completed = run_script("-m", "tests.support.sync_probe", *map(str, files))
    assert completed.returncode == 0, completed.stderr[-3000:]
    reads = json.loads(completed.stdout.splitlines()[-1])
    assert {Path(path).stem: lines for path, lines in reads.items() if lines} == {}
