"""Fused loss in torch: operators, compilation, reductions, chunks, memory, errors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import LinearCrossEntropy, linear_cross_entropy
from kernels.cross_entropy.ops import scale_
from tests.support.loss_cases import define, make_case

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


pytestmark = pytest.mark.filterwarnings(
    "ignore:.*encountered in.*:RuntimeWarning:triton.*", "ignore::DeprecationWarning:torch.*"
)


def operands(kernel: str, needs: tuple[bool, bool, bool], bias: bool) -> tuple:
    """Arguments up to `scale` of both operators, and those behind softcap."""
    case = make_case(7, 5, 70, targets=2, bias=bias)
    sides = [
        t if t is None or need else t.detach() for t, need in zip(case[:3], needs, strict=True)
    ]
    targets = torch.where(case.targets == -100, -1, case.targets)
    return (
        (*sides, targets),
        case.token_weights * (targets >= 0),
        (3, "result", False, kernel, list(needs)),
    )


@pytest.mark.thorough
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, False)]
)
@pytest.mark.parametrize("kernel", ["torch", "triton"])
def test_opcheck(kernel: str, needs: tuple[bool, bool, bool]) -> None:
    bias = needs[2] or not any(needs)
    sides, scale, rest = operands(kernel, needs, bias)
    torch.library.opcheck(
        torch.ops.nextpt.linear_cross_entropy,
        (*sides, scale, 1e-2, 0.1, 4.0, *rest),
        test_utils=CHECKS,
    )
    torch.library.opcheck(
        torch.ops.nextpt.token_statistics, (*sides, 4.0, *rest), test_utils=CHECKS
    )


def test_opcheck_of_scaling() -> None:
    torch.library.opcheck(
        torch.ops.nextpt.scale_, (torch.randn(9), torch.tensor(0.5)), test_utils=CHECKS
    )


def both_losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, weight_sum: Tensor
) -> tuple[Tensor, Tensor]:
    scalar = linear_cross_entropy(
        hidden, weight, targets, weight_sum=weight_sum, z_loss_coefficient=1e-3, chunk_tokens=8
    )
    unreduced = linear_cross_entropy(hidden, weight, targets, reduction="none", softcap=5.0)
    return scalar.loss + scalar.nats.detach().mean(), unreduced.loss.square().sum()


@pytest.mark.thorough
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(both_losses, fullgraph=True, dynamic=dynamic, backend=backend)
    for n in (20, 33):
        case = make_case(n, 6, 90)
        weight_sum = torch.tensor(3.0)
        actual, expected = (
            f(case.hidden, case.weight, case.targets, weight_sum) for f in (compiled, both_losses)
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)
        gradients = [
            torch.autograd.grad(sum(losses), case.leaves()) for losses in (actual, expected)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_gradients_are_returned_without_a_copy() -> None:
    """A matrix gradient of a vocabulary is the largest tensor of many models."""
    case = make_case(6, 5, 40)
    out = linear_cross_entropy(case.hidden, case.weight, case.targets)
    gradients = (
        out.loss.grad_fn.saved_tensors[1:3] if hasattr(out.loss.grad_fn, "saved_tensors") else None
    )
    assert gradients is not None and [m.shape for m in gradients] == [
        case.hidden.shape,
        case.weight.shape,
    ]
    addresses = [m.data_ptr() for m in gradients]
    del gradients
    out.loss.backward()
    assert [case.hidden.grad.data_ptr(), case.weight.grad.data_ptr()] == addresses


@pytest.mark.parametrize("vocabulary", [512, 520, 543])
def test_what_memory_held_before_does_not_reach_the_gradients(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vocabularies that are no multiple of a CPU's bf16 tile, in memory full of NaN."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan"))
    )
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(rows, 32, generator=generator).bfloat16().requires_grad_()
        for rows in (128, vocabulary)
    )
    targets = torch.randint(vocabulary, (128,), generator=generator)
    loss = linear_cross_entropy(hidden, weight, targets, softcap=5.0, implementation="torch")
    gradients = torch.autograd.grad(loss.loss, (hidden, weight))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_second_backward_pass_is_refused() -> None:
    case = make_case(6)
    out = linear_cross_entropy(case.hidden, case.weight, case.targets)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_second_derivatives_are_refused() -> None:
    case = make_case(6)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(
            case.hidden, case.weight, case.targets, reduction=reduction
        ).loss.sum()

        def differentiate_twice(loss: torch.Tensor = loss) -> None:
            (g,) = torch.autograd.grad(loss, case.hidden, create_graph=True)
            g.sum().backward()

        message = r"has no second derivatives|no autograd formula|Trying to backward"
        with pytest.raises(RuntimeError, match=message):
            differentiate_twice()


def test_accumulates_into_what_is_there() -> None:
    case = make_case(10)
    once = torch.autograd.grad(
        linear_cross_entropy(case.hidden, case.weight, case.targets).loss, case.weight
    )[0]
    for _ in range(3):
        (linear_cross_entropy(case.hidden, case.weight, case.targets).loss * 0.5).backward()
    torch.testing.assert_close(case.weight.grad, 1.5 * once)


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_activation_checkpointing(reentrant: bool) -> None:
    case = make_case(10)
    module = LinearCrossEntropy(torch.nn.Parameter(case.weight.detach()), chunk_tokens=4)
    loss = checkpoint(
        module, case.hidden, case.targets, case.token_weights, 2.0, use_reentrant=reentrant
    )[0]
    actual = (
        torch.autograd.grad(loss, [case.hidden, module.weight])
        if not reentrant
        else _by_backward(loss, case.hidden, module.weight)
    )
    expected = torch.autograd.grad(define(case, weight_sum=2.0).losses.sum(), case.leaves())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def _by_backward(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_follows_autocast(implementation: str) -> None:
    case = make_case(10, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_cross_entropy(
            case.hidden.bfloat16(),
            case.weight,
            case.targets,
            bias=case.bias,
            implementation=implementation,
        )
    assert out.loss.dtype == torch.float32
    out.loss.backward()
    assert case.weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        out.loss,
        linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias).loss,
        rtol=1e-2,
        atol=0,
    )


def test_chunks_change_only_the_last_bits() -> None:
    case = make_case(50, 16, 300)
    whole = linear_cross_entropy(case.hidden, case.weight, case.targets)
    for chunk in (1, 7, 16, 49, 50, 1000):
        out = linear_cross_entropy(case.hidden, case.weight, case.targets, chunk_tokens=chunk)
        torch.testing.assert_close(out.nats, whole.nats, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            torch.autograd.grad(out.loss, case.weight)[0],
            torch.autograd.grad(
                linear_cross_entropy(case.hidden, case.weight, case.targets).loss, case.weight
            )[0],
            rtol=1e-5,
            atol=1e-7,
        )


def test_same_inputs_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        case = make_case(40, 16, 300, dtype=torch.bfloat16)
        out = linear_cross_entropy(case.hidden, case.weight, case.targets, chunk_tokens=16)
        results.append((out.loss.detach(), out.nats, *torch.autograd.grad(out.loss, case.leaves())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.thorough
def test_more_logits_than_32_bits_can_count() -> None:
    """8,200 tokens of 262,144 entries are 2^31 logits: the last are as exact as the first."""
    hidden = torch.linspace(-1, 1, 8200).unsqueeze(1)
    weight = torch.linspace(-2, 2, 262144).unsqueeze(1)
    targets = torch.arange(8200) * 31
    out = linear_cross_entropy(hidden, weight, targets)
    few = slice(8190, 8200)
    expected = torch.nn.functional.cross_entropy(
        (hidden[few] @ weight.T).double(), targets[few], reduction="none"
    )
    torch.testing.assert_close(out.nats[few].double(), expected, rtol=1e-6, atol=0)


PEAKS = """
import json, torch
from torch.nn import functional as F
from kernels.bench.machine import measure_peak
from kernels.cross_entropy import linear_cross_entropy
torch.set_num_threads(1)
x, w = torch.randn(4096, 64, requires_grad=True), torch.randn(20000, 64, requires_grad=True)
t = torch.randint(0, 20000, (4096,))
losses = {
    "ours": lambda: linear_cross_entropy(x, w, t, workspace_bytes=32 * 2**20).loss,
    "eager": lambda: F.cross_entropy(F.linear(x, w), t),
}
for name in losses:
    losses[name]().backward()
    x.grad = w.grad = None
peaks = {n: measure_peak("cpu", lambda: loss().backward()) for n, loss in losses.items()}
print(json.dumps(peaks))
"""


@pytest.mark.process
def test_peak_memory_is_bounded_by_the_budget() -> None:
    """Resident memory of a process of its own, where all logits are 313 MiB."""
    completed = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True
    )
    peaks = json.loads(completed.stdout)
    gradients = 4 * 64 * (4096 + 20000)
    assert peaks["eager"] > 600 * 2**20, "the measurement sees nothing"
    assert peaks["ours"] < 32 * 2**20 + gradients + 16 * 2**20, peaks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4, 7)}, "do not fit"),
        ({"weight": torch.zeros(9, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, "targets must be"),
        ({"targets": torch.zeros(4, 0, dtype=torch.long)}, "targets must be"),
        ({"targets": torch.zeros(4)}, "int64"),
        ({"token_weights": torch.zeros(4, 1)}, "token_weights must be"),
        ({"bias": torch.zeros(8)}, "bias must be"),
        ({"softcap": 0.0}, "softcap"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"reduction": "mean"}, "reduction"),
        ({"gradient": "exact"}, "gradient"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"workspace_bytes": 0}, "workspace_bytes"),
        ({"logits_dtype": torch.float16}, "logits_dtype"),
        ({"implementation": "cuda"}, "there are auto, reference, torch, triton"),
        ({"workspace_bytes": 100}, "give at least that"),
        ({"targets": torch.tensor([0, 9, 1, 1])}, "target 9 is not in the vocabulary of 9"),
        ({"targets": torch.tensor([0, -1, 1, 1])}, "target -1 is not in the vocabulary of 9"),
    ],
)
def test_errors_name_the_argument(change: dict, message: str) -> None:
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(9, 8),
        "targets": torch.zeros(4, dtype=torch.long),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_a_target_outside_the_vocabulary_is_nan_in_the_kernel() -> None:
    """On a GPU the host cannot check; the guard of the training loop sees the NaN."""
    from kernels.cross_entropy import rows_triton
    from kernels.cross_entropy.rows import Statistics

    targets = torch.tensor([[3], [9], [-2], [-1]])
    statistics = Statistics.empty(4, 1, torch.float32, torch.device("cpu"), False)
    rows_triton.work(torch.zeros(4, 64)[:, :9], None, None, targets, None, statistics, None, False)
    assert (
        statistics.nats[0].isfinite()
        and statistics.nats[1].isnan()
        and statistics.nats[2].isnan()
        and statistics.nats[3] == 0
    )


def test_scaling_kernel_changes_the_type_in_place() -> None:
    from kernels.cross_entropy.scale_triton import scale

    values = torch.tensor([1.0, -3.0, 0.5] * 2000, dtype=torch.float32)
    out = values.view(torch.int32)
    scale(values, torch.tensor(4.0), out)
    assert torch.equal(out, torch.tensor([4, -12, 2] * 2000, dtype=torch.int32))


def test_scaling_by_one_touches_nothing() -> None:
    values = torch.full((3,), float("nan"))
    scale_(values, torch.tensor(1.0))
    other = torch.ones(5, dtype=torch.bfloat16)
    scale_(other, torch.tensor(0.3))
    assert values.isnan().all() and torch.equal(other, torch.full((5,), 0.3, dtype=torch.bfloat16))
