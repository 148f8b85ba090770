"""The loss over a vocabulary that is divided among two gloo ranks, against the whole one in fp64 and on one rank."""

from __future__ import annotations

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.vocabulary_parallel import slice_of
from tests.support.loss_cases import assert_as_exact, define
from tests.support.ranks import run_ranks
from tests.support.vocabulary_ranks import CASES, UPSTREAM, WEIGHT_SUM, build

RANKS = 2
SHARED = ("dX", "nats", "lse", "hits", "z_loss", "loss")
RUNS = [
    (name, kernel)
    for name in CASES
    for kernel in ("torch", "triton")
    if (name, kernel) != ("bf16", "triton")
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("vocabulary")
    run_ranks(
        ["-m", "tests.support.vocabulary_ranks", str(folder)], RANKS, folder, TRITON_INTERPRET="1"
    )
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "kernel"), RUNS)
def test_is_the_loss_of_the_whole_vocabulary(ranks: list[dict], name: str, kernel: str) -> None:
    case, options = build(name)
    parts = [rank["found"][f"{name}, {kernel}"] for rank in ranks]
    for key in SHARED:
        assert torch.equal(parts[0][key], parts[1][key]), f"{key} differs between ranks"
    found = parts[0] | {
        key: torch.cat([p[key] for p in parts]) for key in ("dW", "db") if key in parts[0]
    }
    wide = case.wide()
    exact = define(wide, weight_sum=WEIGHT_SUM, **options)
    plain = define(case, weight_sum=WEIGHT_SUM, **options)
    dtype = case.hidden.dtype
    assert torch.equal(found["hits"], exact.hits) and (found["z_loss"] > 0) == (
        "z_loss_coefficient" in options
    )
    for key, e, p in (
        ("nats", exact.nats, plain.nats),
        ("lse", exact.lse, plain.lse),
        ("loss", exact.losses.sum(), plain.losses.sum()),
    ):
        assert_as_exact(found[key], e.detach(), p, 3, dtype, key)
    expected = torch.autograd.grad(exact.losses.sum() * UPSTREAM, wide.leaves())
    rough = torch.autograd.grad(plain.losses.sum() * UPSTREAM, case.leaves())
    for key, e, p in zip(("dX", "dW", "db"), expected, rough, strict=False):
        assert found[key].dtype == dtype
        assert_as_exact(found[key], e, p, 2, dtype, key)


def test_agrees_with_one_rank(ranks: list[dict]) -> None:
    case, options = build("everything")
    out = linear_cross_entropy(
        case.hidden,
        case.weight,
        case.targets,
        bias=case.bias,
        token_weights=case.token_weights,
        weight_sum=WEIGHT_SUM,
        **options,
    )
    found = ranks[0]["found"]["everything, torch"]
    torch.testing.assert_close(found["loss"], out.loss.detach())
    torch.testing.assert_close(found["z_loss"], out.z_loss)
    torch.testing.assert_close(found["nats"], out.nats)


def test_mistakes_are_named(ranks: list[dict]) -> None:
    for messages, entries in zip(
        (r["refusals"] for r in ranks), ("0 to 10", "10 to 20"), strict=True
    ):
        assert entries in messages[0] and "target 100 is not in the vocabulary of 20" in messages[1]
        assert "not fp16" in messages[2] and "call it again" in messages[3]


def test_slices_cover_the_vocabulary() -> None:
    for vocabulary, count in ((53, 2), (2, 2), (7, 4), (128256, 8)):
        assert [i for r in range(count) for i in slice_of(vocabulary, r, count)] == list(
            range(vocabulary)
        )
