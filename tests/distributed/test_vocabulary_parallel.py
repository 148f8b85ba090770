"""Vocabulary-parallel loss on two gloo ranks: against the whole vocabulary in fp64, and on one."""

from __future__ import annotations

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.cross_entropy.vocabulary_parallel import slice_of
from tests.support.loss_cases import check_results, define
from tests.support.ranks import start_new_ranks
from tests.support.vocabulary_ranks import CASES, UPSTREAM, WEIGHT_SUM, build

pytestmark = pytest.mark.process

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
    # New processes: a forked one has imported triton already, without its interpreter
    arguments = ["-m", "tests.support.vocabulary_ranks", str(folder)]
    processes = start_new_ranks(arguments, RANKS, folder, TRITON_INTERPRET="1")
    codes = [process.wait(1500) for process in processes]
    assert not any(codes), "\n".join(log.read_text()[-3000:] for log in folder.glob("*.log"))
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize(("name", "kernel"), RUNS)
def test_is_the_loss_of_the_whole_vocabulary(ranks: list[dict], name: str, kernel: str) -> None:
    case, options = build(name)
    parts = [rank["results"][f"{name}, {kernel}"] for rank in ranks]
    for key in SHARED:
        assert torch.equal(parts[0][key], parts[1][key]), f"{key} differs between ranks"
    output = parts[0] | {
        key: torch.cat([p[key] for p in parts]) for key in ("dW", "db") if key in parts[0]
    }
    dtype = case.hidden.dtype
    hits = define(case.wide(), **options).hits
    assert torch.equal(output["hits"], hits)
    assert (output["z_loss"] > 0) == ("z_loss_coefficient" in options)
    results = {
        key: output[key] for key in ("loss", "nats", "lse", "dX", "dW", "db") if key in output
    }
    assert all(results[key].dtype == dtype for key in ("dX", "dW", "db") if key in results)
    # The loss was saved before it met the gradient from above
    check_results(results, case, dtype, upstream=UPSTREAM, weight_sum=WEIGHT_SUM, **options)


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
    actual = ranks[0]["results"]["everything, torch"]
    torch.testing.assert_close(actual["loss"], out.loss.detach())
    torch.testing.assert_close(actual["z_loss"], out.z_loss)
    torch.testing.assert_close(actual["nats"], out.nats)


def test_user_errors_are_named(ranks: list[dict]) -> None:
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
