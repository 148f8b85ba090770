"""Config section `objective`: weights of the next-token loss and the z-loss."""

from __future__ import annotations

import math

from pydantic import model_validator

from nextpt.config.section import Section, key


class ObjectiveSection(Section):
    """The weighted next-token loss."""

    domain_weights: dict[str, float] = key(
        default_factory=dict,
        description="domain -> weight of its tokens in the loss; 1 unless set",
    )
    token_weights: bool = key(
        False, description="multiply by the optional token_weights column of the shards"
    )
    z_loss_coefficient: float = key(
        0.0,
        ge=0,
        deprecated=("z_loss",),
        description="coefficient of log^2 Z (PaLM, arXiv 2204.02311 section 5)",
        aliases=("z_loss_weight", "z_loss_multiplier", "z_loss_coeff", "lm_head_z_loss"),
    )
    mtp_weight: float = key(
        0.3,
        ge=0,
        may_change=True,
        description=(
            "factor of the mean loss of the model.mtp_depth modules of multi-token prediction"
            " (DeepSeek-V3, arXiv 2412.19437: 0.3, and 0.1 for the last third of its tokens)"
        ),
        aliases=("mtp_loss_scaling_factor", "mtp_loss_weight", "mtp_loss_coeff", "mtp_lambda"),
    )

    @model_validator(mode="after")
    def _check_domain_weights(self) -> ObjectiveSection:
        for name, weight in self.domain_weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(
                    f"objective.domain_weights.{name} = {weight} must be finite and >= 0"
                )
        return self
