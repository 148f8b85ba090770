"""Multi-token prediction: modules that predict tokens after the next one, in training only.

DeepSeek-V3 (arXiv 2412.19437 section 2.2). Module k of depth D computes, for the token at i,

    h_i^k = block(W_k [norm(h_i^(k-1)); norm(embedding(t_(i+k)))])

where h^0 is the residual stream after the last block, and predicts t_(i+k+1) from it with the
decoder's own final norm and output matrix. Attention is causal over i, so h_i^k depends on tokens
up to i + k and on no later one. The decoder's output does not depend on the modules.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.attention import Packing
from nextpt.model.init import Init
from nextpt.model.layers import Block, Linear, RMSNorm
from nextpt.model.spec import ComputeOptions, ModelSpec


class MTPModule(nn.Module):
    """One depth of multi-token prediction: two norms, a projection of 2D to D, and a block.

    The block is of the kind of the decoder's last one.

    Args:
        spec: Shape of the model.
        init: Draws the initial matrices.
        name: Prefix of the parameters' names in `init`.
        options: Of the block.
    """

    def __init__(self, spec: ModelSpec, init: Init, name: str, options: ComputeOptions) -> None:
        super().__init__()
        self.hidden_norm = RMSNorm(spec.width, spec.norm_eps)
        self.embedding_norm = RMSNorm(spec.width, spec.norm_eps)
        self.projection = Linear(
            2 * spec.width, spec.width, bias=spec.bias, init=init, name=f"{name}.projection"
        )
        self.block = Block(spec, init, f"{name}.block", spec.depth - 1, options)

    def forward(
        self,
        hidden_BTD: Tensor,
        embedding_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        documents: Packing | None,
        first_values: Tensor | None,
        dropout_keys: Tensor | None = None,
    ) -> Tensor:
        """Compute h^k, [B, T, D].

        Args:
            hidden_BTD: h^(k-1).
            embedding_BTD: Embedding of the token k places after each.
            rope: (cos, sin) of each token's position, as for `Block`.
            documents: Which tokens may attend to each other; all of a row if None.
            first_values: Values of the decoder's first layer, where they are mixed with others.
            dropout_keys: Keys of the tokens in this module, as for `Block`.
        """
        normed = self.hidden_norm(hidden_BTD), self.embedding_norm(embedding_BTD)
        x_BTD, _ = self.block(
            self.projection(torch.cat(normed, -1)),
            rope,
            documents,
            None,
            first_values,
            dropout_keys,
        )
        output_BTD: Tensor = x_BTD
        return output_BTD


def shift(values_BT: Tensor, places: int, fill: int = 0) -> Tensor:
    """Value `places` tokens after each of a row, [B, T]; `fill` beyond its end."""
    return F.pad(values_BT[:, places:], (0, min(places, values_BT.shape[1])), value=fill)
