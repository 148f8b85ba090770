"""Fused loss: every implementation against the definition in fp64, on the CPU and on a GPU."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cross_entropy import linear_cross_entropy, rows_triton
from tests.support.loss_cases import OPTIONS, Case, check_results, define, differentiate, make_case

# bf16 stores of Triton's interpreter truncate: in it fp16 represents the 16-bit types.
ON_CPU = [("torch", "cpu", t) for t in (torch.float32, torch.float16, torch.bfloat16)] + [
    ("triton", "cpu", t) for t in (torch.float32, torch.float16)
]
ON_GPU = [
    (name, "cuda", t)
    for name in ("torch", "triton")
    for t in (torch.float32, torch.float16, torch.bfloat16)
]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
# numpy warns where the interpreter computes both sides of a tl.where.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning:triton.*")
everywhere = pytest.mark.parametrize(
    ("implementation", "device", "dtype"),
    [*ON_CPU, *(pytest.param(*w, marks=gpu) for w in ON_GPU)],
    ids=name_of,
)


def check(
    case: Case, *, reduction: str = "sum", upstream: float = 1.0, dtype: torch.dtype, **options
) -> None:
    """Loss, statistics and all gradients against fp64, by QuACK's rule: see check_results."""
    options.setdefault("weight_sum", 1.0)
    output = linear_cross_entropy(
        case.hidden,
        case.weight,
        case.targets,
        token_weights=case.token_weights,
        bias=case.bias,
        reduction=reduction,
        **options,
    )
    assert output.loss.dtype == output.nats.dtype == output.lse.dtype == torch.float32
    assert output.hits.dtype == torch.bool
    actual = differentiate(case, output, reduction, upstream)
    assert all(actual[name].dtype == dtype for name in ("dX", "dW", "db") if name in actual)
    definition = {k: v for k, v in options.items() if k in OPTIONS}
    check_results(actual, case, dtype, reduction=reduction, upstream=upstream, **definition)


@pytest.mark.thorough
@everywhere
@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_loss_and_gradients(
    implementation: str, device: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    draw = data.draw
    n = draw(st.integers(0, 10), "tokens")
    case = make_case(
        n,
        draw(st.integers(1, 20), "width"),
        draw(st.integers(2, 200), "vocabulary"),
        targets=draw(st.sampled_from([None, 1, 3]), "targets"),
        bias=draw(st.booleans(), "bias"),
        peaked=draw(st.booleans(), "peaked"),
        scale=draw(st.sampled_from([0.01, 1.0, 5.0]), "scale"),
        dtype=dtype,
        device=device,
        seed=draw(st.integers(0, 999), "seed"),
    )
    options = {
        "z_loss_coefficient": draw(st.sampled_from([0.0, 1e-2]), "z_loss_coefficient"),
        "softcap": draw(st.sampled_from([None, 3.0]), "softcap"),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1]), "smoothing"),
        "weight_sum": draw(st.sampled_from([1.0, 3e4]), "weight_sum"),
        "reduction": draw(st.sampled_from(["sum", "none"]), "reduction"),
        "gradient": draw(st.sampled_from(["precise", "small"]), "mode"),
        "chunk_tokens": draw(st.integers(3, 11), "chunk"),
    }
    # Several blocks per row: at 16384 columns a block the interpreter would take minutes to see a
    # second one.
    with mock.patch.object(
        rows_triton, "MAX_BLOCK", draw(st.sampled_from([16, 64, 16384]), "block")
    ):
        check(
            case,
            implementation=implementation,
            upstream=draw(st.sampled_from([1.0, 0.7, 100.0]), "upstream"),
            dtype=dtype,
            **options,
        )


ONE_PEAKED = {"n": 1, "peaked": True, "scale": 5.0}
# Cases that once failed the rule, each for another reason
EDGE_CASES = {
    # fp64's own lse - z_t gave 0 for nats of 1.5e-17
    "nats below 2e-16": (
        {**ONE_PEAKED, "d": 18, "v": 20, "bias": True, "seed": 216},
        {"z_loss_coefficient": 0.01, "reduction": "none"},
    ),
    # The weight of p beside the target was a - b, with the error of a large b
    "gradient through lse beside a large one through nats": (
        {**ONE_PEAKED, "d": 14, "v": 159, "targets": 1, "bias": True, "seed": 78},
        {"reduction": "none"},
    ),
    # The cap's slope was made of c tanh / c, rounded twice
    "slope of a saturated cap": (
        {"n": 1, "d": 14, "v": 64, "targets": 1, "scale": 5.0, "seed": 664},
        {"softcap": 3.0, "label_smoothing": 0.1},
    ),
    # Torch's error happens to be a tenth of a rounding of the terms, which cancel
    "luck of torch": (
        {"n": 1, "d": 7, "v": 2, "targets": 3, "bias": True, "scale": 0.01, "seed": 67},
        {},
    ),
}


@everywhere
@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases(implementation: str, device: str, dtype: torch.dtype, name: str) -> None:
    shape, options = EDGE_CASES[name]
    with mock.patch.object(rows_triton, "MAX_BLOCK", 16):
        check(
            make_case(**shape, dtype=dtype, device=device),
            implementation=implementation,
            dtype=dtype,
            chunk_tokens=3,
            **options,
        )


@pytest.mark.thorough
@everywhere
@pytest.mark.parametrize("vocabulary", [2, 63, 64, 65, 1000, 16385])
def test_odd_vocabularies(
    implementation: str, device: str, dtype: torch.dtype, vocabulary: int
) -> None:
    # Chunks of 5: MKL sums products of fewer rows seven times less exactly, which is not
    # under test.
    check(
        make_case(10, 12, vocabulary, dtype=dtype, device=device),
        implementation=implementation,
        dtype=dtype,
        chunk_tokens=5,
    )


@everywhere
@pytest.mark.parametrize("scale", [40.0, 160.0])
def test_large_logits(implementation: str, device: str, dtype: torch.dtype, scale: float) -> None:
    """Logits up to several times `scale`: nothing cancels, since lse is kept as peak + log_sum."""
    check(
        make_case(12, 4, 99, scale=scale, dtype=dtype, device=device),
        implementation=implementation,
        dtype=dtype,
    )


@everywhere
def test_confident_targets_keep_their_gradient(
    implementation: str, device: str, dtype: torch.dtype
) -> None:
    """P of 1 - e^-7 to 1 - e^-14: p - 1 would have lost most digits.

    The numbers are exact in every dtype.
    """
    hidden = torch.tensor([[7.0], [10.0], [14.0]], dtype=dtype, device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]], dtype=dtype, device=device)
    out = linear_cross_entropy(
        hidden,
        weight,
        torch.zeros(3, dtype=torch.long, device=device),
        weight_sum=1.0,
        implementation=implementation,
    )
    (gradient,) = torch.autograd.grad(out.loss, hidden)
    exact = torch.log1p(torch.exp(-hidden.detach().double()))
    slope = torch.expm1(-exact)
    torch.testing.assert_close(out.nats.double(), exact.squeeze(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(
        gradient.double(),
        slope,
        rtol=max(2e-6, torch.finfo(dtype).eps),
        atol=1e-8 if dtype == torch.float16 else 0,
    )


@everywhere
@pytest.mark.parametrize("targets", [None, 2])
def test_all_ignored_is_zero_and_finite(
    implementation: str, device: str, dtype: torch.dtype, targets: int | None
) -> None:
    case = make_case(6, targets=targets, bias=True, dtype=dtype, device=device)
    out = linear_cross_entropy(
        case.hidden,
        case.weight,
        torch.full_like(case.targets, -100),
        bias=case.bias,
        z_loss_coefficient=1e-3,
        label_smoothing=0.1,
        implementation=implementation,
    )
    assert (
        out.loss == 0
        and out.z_loss == 0
        and out.nats.eq(0).all()
        and not out.hits.any()
        and out.lse.isfinite().all()
    )
    assert all(g.eq(0).all() for g in torch.autograd.grad(out.loss, case.leaves()))


@pytest.mark.thorough
@everywhere
def test_hits_and_the_shares_of_the_loss(
    implementation: str, device: str, dtype: torch.dtype
) -> None:
    case = make_case(30, targets=2, peaked=True, dtype=dtype, device=device)
    exact = define(case.wide(), z_loss_coefficient=0.5, weight_sum=4.0)
    out = linear_cross_entropy(
        case.hidden,
        case.weight,
        case.targets,
        token_weights=case.token_weights,
        z_loss_coefficient=0.5,
        weight_sum=torch.tensor(4.0, device=device),
        implementation=implementation,
        logits_dtype=torch.float32,
    )  # rounded logits may tie
    assert torch.equal(out.hits, exact.hits) and 0 < out.hits.sum() < out.hits.numel()
    plain = (case.token_weights * (case.targets != -100) * exact.nats).sum() / 4
    torch.testing.assert_close((out.loss - out.z_loss).double(), plain.detach(), rtol=5e-3, atol=0)
    assert out.z_loss > 0


@everywhere
def test_a_tie_is_no_hit(implementation: str, device: str, dtype: torch.dtype) -> None:
    """A tie with another entry or target; the same target twice is a hit."""
    hidden = torch.ones(2, 1, dtype=dtype, device=device)
    weight = torch.tensor([[2.0], [2.0], [1.0]], dtype=dtype, device=device)
    pairs = torch.tensor([[0, 1], [0, 0]], device=device)
    assert not linear_cross_entropy(hidden, weight, pairs, implementation=implementation).hits.any()
    output = linear_cross_entropy(
        hidden,
        weight * torch.tensor([[2.0], [1.0], [1.0]], dtype=dtype, device=device),
        pairs,
        implementation=implementation,
    )
    assert output.hits.tolist() == [[True, False], [True, True]]


@pytest.mark.thorough
@everywhere
def test_frozen_sides_and_no_grad_change_nothing(
    implementation: str, device: str, dtype: torch.dtype
) -> None:
    case = make_case(9, bias=True, dtype=dtype, device=device)
    # As without gradients
    options = {"implementation": implementation, "chunk_tokens": 4, "logits_dtype": torch.float32}
    whole = linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, **options)
    every = torch.autograd.grad(whole.loss, case.leaves())
    for side in range(3):
        sides = [t if i == side else t.detach() for i, t in enumerate(case.leaves())]
        out = linear_cross_entropy(*sides[:2], case.targets, bias=sides[2], **options)
        assert torch.equal(torch.autograd.grad(out.loss, sides[side])[0], every[side])
    with torch.no_grad():
        out = linear_cross_entropy(
            case.hidden, case.weight, case.targets, bias=case.bias, **options
        )
    assert (
        not out.loss.requires_grad
        and torch.equal(out.loss, whole.loss)
        and torch.equal(out.nats, whole.nats)
    )


@everywhere
def test_strided_inputs(implementation: str, device: str, dtype: torch.dtype) -> None:
    """Hidden states that are every second column, a weight that is a transposed matrix."""
    case = make_case(9, dtype=dtype, device=device)
    hidden = case.hidden.detach().repeat_interleave(2, 1)[:, ::2].requires_grad_()
    weight = case.weight.detach().T.contiguous().T.requires_grad_()
    assert not hidden.is_contiguous() and not weight.is_contiguous()
    check(
        Case(hidden, weight, None, case.targets, case.token_weights),
        implementation=implementation,
        dtype=dtype,
        chunk_tokens=4,
    )


@pytest.mark.thorough
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_many_targets_per_token_are_many_losses(device: str) -> None:
    """Multi-token prediction: K targets of one hidden state, also where some are equal."""
    case = make_case(20, 8, 6, targets=4, device=device)
    for implementation in ("torch", "triton"):
        together = linear_cross_entropy(
            case.hidden,
            case.weight,
            case.targets,
            token_weights=case.token_weights,
            weight_sum=2.0,
            implementation=implementation,
        )
        apart = [
            linear_cross_entropy(
                case.hidden,
                case.weight,
                t,
                token_weights=w,
                weight_sum=2.0,
                implementation=implementation,
            )
            for t, w in zip(
                case.targets.T.contiguous(), case.token_weights.T.contiguous(), strict=True
            )
        ]
        torch.testing.assert_close(together.loss, sum(o.loss for o in apart))
        torch.testing.assert_close(together.nats, torch.stack([o.nats for o in apart], 1))
        for a, b in zip(
            torch.autograd.grad(together.loss, case.leaves()),
            torch.autograd.grad(sum(o.loss for o in apart), case.leaves()),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
