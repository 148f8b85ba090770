"""Initial weights: a function of (seed, parameter name), the same for any number of ranks.

Each matrix is drawn where its layer is built. Under ZeRO-3's partitioned construction a layer is
partitioned over the ranks as soon as it is complete, so no rank holds more than one whole layer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from nextpt.model.parametrization import Parametrization, Role


@dataclass(frozen=True)
class Init:
    """Initial values of matrices.

    Attributes:
        seed: Seed of the run.
        std: Standard deviation of the matrices, at the base shape.
        rules: What follows from it for this shape. Matrices whose output is added to the residual
            stream get less, so that its variance does not grow with depth.
        zero_residual: Those matrices are zero instead, so that a block begins as the identity
            (arXiv 1901.09321).
    """

    seed: int
    std: float
    rules: Parametrization
    zero_residual: bool = False

    def normal_(
        self, tensor: Tensor, name: str, *, role: Role = "matrices", residual: bool = False
    ) -> None:
        """Fill a tensor in place from a normal distribution of mean 0.

        Values are drawn in fp32 on the CPU, so that all devices get the same. A tensor on the meta
        device is left alone.

        Args:
            tensor: The parameter, of any shape, dtype and device.
            name: Name of the parameter, which with the seed decides the values.
            role: Role of the parameter.
            residual: Whether the matrix's output is added to the residual stream.
        """
        if tensor.is_meta:
            return
        if residual and self.zero_residual:
            torch.nn.init.zeros_(tensor)
            return
        std = self.rules.init_std(self.std, role, residual=residual)
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        with torch.no_grad():
            values = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
            tensor.copy_(values.normal_(0.0, std, generator=generator))
