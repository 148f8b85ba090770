"""The objective adds a model's auxiliary losses with their coefficients."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nextpt.model import Decoder, DecoderOutput
from nextpt.objective import Loss, next_token_loss
from tests.support.dynamics_probe import batch_of, population
from tests.support.models import decoder


class Regularized(Decoder):
    def forward(self, *arguments: Any, **options: Any) -> DecoderOutput:
        hidden = super().forward(*arguments, **options).hidden
        return DecoderOutput(hidden, {"square": hidden.square().mean(), "mean": hidden.mean()})


def gradient_and_loss(model: Decoder, **options: Any) -> tuple[torch.Tensor, Loss]:
    model.zero_grad()
    loss = next_token_loss(model, batch_of(population()[:4]), 128.0, **options)
    loss.loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), loss


def test_coefficients_multiply_auxiliary_losses_and_their_gradients() -> None:
    _, plain = decoder()
    model = Regularized(plain.spec)
    model.load_state_dict(plain.state_dict())
    alone, loss = gradient_and_loss(plain)
    assert loss.auxiliary_losses == {}
    coefficients = {"square": 0.0, "mean": 0.0}
    none, zero = gradient_and_loss(model, auxiliary_coefficients=coefficients)
    assert torch.equal(none, alone) and torch.equal(zero.loss, loss.loss)
    default, _ = gradient_and_loss(model, auxiliary_coefficients={"mean": 0.0})  # 1 by default
    three, summed = gradient_and_loss(model, auxiliary_coefficients={"square": 3.0, "mean": 0.0})
    torch.testing.assert_close(three - alone, 3 * (default - alone), rtol=1e-3, atol=1e-6)
    assert float((default - alone).norm()) > 1e-3
    # 64 of the step's 128 targets are of this micro-batch
    with torch.no_grad():
        batch = batch_of(population()[:4])
        square = model(batch.tokens, batch.position_ids).auxiliary_losses["square"]
    assert float(summed.auxiliary_losses["square"]) == pytest.approx(3 * float(square) / 2)
    assert float((summed.loss - loss.loss).detach()) == pytest.approx(
        3 * float(square) / 2, rel=1e-4
    )
