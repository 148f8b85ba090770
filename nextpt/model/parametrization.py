"""Parametrization: initialisation, learning rates and multipliers by width and depth (muP).

With m = width / base width and L = depth / base depth, a parametrization says how every
hyperparameter of a parameter follows from that of the base shape, so that the best values of a
small model are those of a large one. At the base shape all factors are 1.

    standard    nothing follows: m = L = 1
    mup         by width (arXiv 2203.03466, table 8)
    completep   by width and depth (arXiv 2505.01618, table 1, alpha = 1)

Gradients of all parameters fall as 1/m, and those of the blocks as 1/(m L), so AdamW's epsilon
does too. Decay is multiplied by the learning rate of its parameter (torch's AdamW), and its factor
makes up for that of the learning rate: a step shrinks weights by the same share at every width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nextpt.config import ParametrizationKind, UpdateScale

# What a parameter is. Vectors are norms, biases and learned scalars of the blocks; gates are the
# rows of W_g that gate whole heads.
Role = Literal["embedding", "matrices", "gates", "output", "vectors", "final_norm"]


@dataclass(frozen=True)
class Factors:
    """Hyperparameters of a parameter / those of the base shape.

    Attributes:
        lr: Of the peak learning rate.
        weight_decay: Of the decoupled decay, which is multiplied by the learning rate.
        eps: Of AdamW's epsilon.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


@dataclass(frozen=True)
class Parametrization:
    """Rules of a parametrization for one shape.

    Attributes:
        kind: Its name.
        width_ratio: m = width / base width; 1 for "standard".
        depth_ratio: L = depth / base depth; 1 unless "completep".
        depth: Number of blocks.
        head_dim: Width of a head, E.
        base_head_dim: Width of a head at which attention logits are divided by sqrt(E); they are
            divided by E / sqrt(base_head_dim).
        heads: Number of attention heads; 0 where it is not known, and no matrix is a gate of heads.
    """

    kind: ParametrizationKind = "standard"
    width_ratio: float = 1.0
    depth_ratio: float = 1.0
    depth: int = 1
    head_dim: int = 1
    base_head_dim: int = 1
    heads: int = 0

    def role_of(self, name: str, shape: tuple[int, ...]) -> Role:
        """Role of a parameter with this name and full shape. A tied matrix is an embedding."""
        if len(shape) < 2:
            return "final_norm" if name.startswith("final_norm") else "vectors"
        if "embed_tokens" in name:
            return "embedding"
        if "lm_head" in name:
            return "output"
        # One row per head: `model.attention_gate: head`, not `element`
        return "gates" if "attention.gate_proj" in name and shape[0] == self.heads else "matrices"

    def init_std(self, std: float, role: Role, *, residual: bool = False) -> float:
        """Standard deviation of an initial matrix.

        Args:
            std: `model.init_std`.
            role: Role of the matrix.
            residual: Its output is added to the residual stream, and it gets 1 / sqrt(2 depth) of
                the others' (GPT-2, Radford et al. 2019, section 2.3), of the base depth where
                `residual_multiplier` follows the depth instead.
        """
        if role in ("matrices", "gates"):
            std /= math.sqrt(self.width_ratio)
        return std / math.sqrt(2 * self.depth / self.depth_ratio) if residual else std

    def adamw(self, role: Role) -> Factors:
        """Factors of a parameter that AdamW steps."""
        m, depth_ratio = self.width_ratio, self.depth_ratio
        if role in ("matrices", "gates"):
            return Factors(1 / m, m, 1 / (m * depth_ratio))
        return Factors(eps=1 / (m * depth_ratio) if role == "vectors" else 1 / m)

    def muon(self, scale: UpdateScale) -> Factors:
        """Factors of a matrix that Muon steps.

        A change of activations that is the same at any width needs an update of spectral norm
        sqrt(out/in) (arXiv 2310.17813). "spectral" and, for matrices whose sides grow alike,
        "original" give that; "match_rms_adamw" has a factor of sqrt(width) more.
        """
        if scale != "match_rms_adamw":
            return Factors()
        root = math.sqrt(self.width_ratio)
        return Factors(1 / root, root)

    @property
    def residual_multiplier(self) -> float:
        """Factor on what attention and feed-forward add to the residual stream, 1/L."""
        return 1 / self.depth_ratio

    @property
    def logits_scaling(self) -> float:
        """Divisor of the output logits, m."""
        return self.width_ratio

    @property
    def attention_multiplier(self) -> float:
        """Factor of attention logits beside the usual 1/sqrt(E)."""
        return math.sqrt(self.base_head_dim / self.head_dim)

    @property
    def attention_scale(self) -> float:
        """Factor of attention logits: 1/sqrt(E) at `base_head_dim`, and falling as 1/E."""
        return self.attention_multiplier / math.sqrt(self.head_dim)
